"""How long from `halve generate` to the first token, and how much memory does it take?

A model of Llama-3.2-1B's shape in int4-g32 with a tokenizer of 128,256 tokens, both random, started in new processes:
first with nothing kept (every matrix is packed, the file of packed weights is written), then from that file, in the
page cache. Time is from the start of Python to the first byte of the answer; memory is the highest resident size.
Bars: the second start under 1.5 s; memory at most 1.15 times the weights' bytes, plus the cache of keys and values,
plus 300 MB.

    python benchmarks/start_time.py [--format int4-g32] [--starts 5] [--keep DIR]
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compress_time import LLAMA_32_1B, random_checkpoint

from halve.checkpoint import open_checkpoint
from halve.core.units import format_bytes
from halve.hardware import detect_cpu

PROMPT = "Once upon"
SECONDS, MEMORY_FACTOR, MEMORY_BYTES = 1.5, 1.15, 300_000_000
NUM_TOKENS, NUM_SPECIAL = 128_000, 256

# The command as a user runs it, then the highest resident size on stderr (Linux).
COMMAND = """
import sys
from halve.cli.main import main
try:
    main()
finally:
    print(next(l for l in open("/proc/self/status") if l.startswith("VmHWM:")).split()[1], file=sys.stderr)
"""
MAKE = """
import sys
from pathlib import Path
from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan
from halve.formats import format_named
from halve.models import load_config, stored_formats
from halve.search import plan_for
source, out, fmt = sys.argv[1:]
Path(out).mkdir()
with open_checkpoint(source) as checkpoint:
    config = load_config(checkpoint)
    formats = stored_formats(checkpoint, config)
    plan = plan_for(config, format_named(fmt), "rtn", portable=False, source=formats)
    apply_plan(checkpoint, config, plan, Path(out))
"""


def random_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE tokenizer of Llama 3's size: every way to merge two tokens into a third is listed."""
    from tokenizers import pre_tokenizers

    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*(c for c in alphabet if "a" <= c <= "z"), "Ġ"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokens = list(alphabet)
    while len(tokens) < NUM_TOKENS:
        left = rng.choice(tokens[-40_000:] if rng.random() < 0.5 else letters)
        both = left + rng.choice(letters if rng.random() < 0.7 else tokens)
        if len(both) <= 10 and both not in vocabulary:
            vocabulary[both] = len(tokens)
            tokens.append(both)
    splits = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    merges = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": NUM_TOKENS + i, "content": f"<|special_{i}|>", **flags} for i in range(NUM_SPECIAL)]
    record: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }
    (directory / "tokenizer.json").write_text(json.dumps(record), encoding="utf-8")


def make_bundle(directory: Path, fmt: str) -> Path:
    """A bundle in `directory`, made unless it is there."""
    bundle = directory / f"llama-3.2-1b-{fmt}"
    if not (bundle / "tokenizer.json").exists():
        source = directory / "model"
        if not (source / "config.json").exists():
            source.mkdir(parents=True, exist_ok=True)
            random_checkpoint(source)
        shutil.rmtree(bundle, ignore_errors=True)
        subprocess.run([sys.executable, "-c", MAKE, source, bundle, fmt], check=True)
        random_tokenizer(bundle)
    return bundle


def start(bundle: Path) -> dict[str, float]:
    """Run the command once: seconds to the first byte of the answer, seconds in all, highest resident bytes."""
    argv = [sys.executable, "-c", COMMAND, "generate", str(bundle), PROMPT, "--max-tokens", "2"]
    started = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - started
        _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors.decode())
    peak = int(errors.split()[-1]) * 1024
    return {"first_token_s": first, "whole_s": time.perf_counter() - started, "peak_bytes": peak}


def cache_bytes(num_tokens: int) -> int:
    """Keys and values of so many tokens in bf16."""
    heads, dim, layers = (LLAMA_32_1B[k] for k in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
    return num_tokens * 2 * 2 * int(heads) * int(dim) * int(layers)


def main() -> None:
    """Start the model once with nothing kept and several times after; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="make or reuse the random bundle in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = make_bundle(args.keep or Path(temporary), args.format)
        shutil.rmtree(bundle / ".halve", ignore_errors=True)
        with open_checkpoint(bundle) as checkpoint:
            weight_bytes = checkpoint.weight_bytes
        first = start(bundle)
        later = [start(bundle) for _ in range(args.starts)]
    second_s = statistics.median(run["first_token_s"] for run in later)
    allowed = round(MEMORY_FACTOR * weight_bytes) + cache_bytes(512) + MEMORY_BYTES
    peak = max(run["peak_bytes"] for run in [first, *later])
    print(f"first start {first['first_token_s']:.2f} s to the first token", file=sys.stderr)
    print(f"second start {second_s:.2f} s, bar {SECONDS} s", file=sys.stderr)
    print(f"peak {format_bytes(peak)}, bar {format_bytes(allowed)}", file=sys.stderr)
    device = detect_cpu()
    record = {
        "question": "start_time",
        "model": "llama-3.2-1b-shape",
        "format": args.format,
        "hardware": f"{device.model}, {device.num_cores} cores",
        "weight_bytes": weight_bytes,
        "first": first,
        "second": later,
        "second_median_s": second_s,
        "peak_bytes": peak,
        "bars": {"second_s": SECONDS, "peak_bytes": allowed},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
