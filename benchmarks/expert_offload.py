"""What does it cost to keep a share of a sparse model's experts in memory and read the rest?

One answer of so many tokens, drawn by one seed, at batch 1: with all experts in memory, and with caches of the given
shares of them, in turns. Bounds: a token's missed bytes over the rate at which the file is read (measured here, whole
matrices in the order of a shuffle, by as many threads as the cache has), plus the step in memory. `--evict` drops the
file from the system's cache all the while, as if no memory were left for it; without it misses are copies from there.

Without MODEL: random weights in int4-g32, 8 layers of 64 experts of 2048 x 896, 8 for a token, 1.6 GB, written to a
temporary folder and removed. Its routers know no language: hits and guesses of trained models differ.

    python benchmarks/expert_offload.py [MODEL] [--shares 0.33,0.6] [--tokens 64] [--rounds 3] [--evict]

Prints progress on stderr and one JSON line last.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from halve.api.bundle import read_plan
from halve.checkpoint import TensorWriter, open_checkpoint
from halve.checkpoint.compressed_tensors import weight_specs, weight_tensors
from halve.checkpoint.packed import read_index
from halve.checkpoint.quantization_config import quantization_config
from halve.core.units import format_bytes
from halve.engine import Engine, ModelRunner, SamplingParams
from halve.formats import FORMATS, Weight
from halve.formats.base import BF16
from halve.formats.integer import pack_codes
from halve.hardware import detect_cpu
from halve.kernels.native import NativeOps
from halve.models import Decoder, OffloadSource, ReadySource, load_config, read_config
from halve.models.expert_cache import NUM_READERS
from halve.models.names import modules, vectors
from halve.models.ready import SUFFIX

RANDOM = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 896, "moe_intermediate_size": 896, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "vocab_size": 4096, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
FORMAT = FORMATS["int4-g32"]


def say(*words: object) -> None:
    """Progress."""
    print(*words, file=sys.stderr, flush=True)


def write_random(path: Path) -> None:
    """Codes drawn uniformly around zero, scales so that a product keeps the size of its input."""
    config, rng = read_config(RANDOM), np.random.default_rng(0)
    formats = {module.name: FORMAT.name for module in modules(config)}
    specs = {name: ("F32", shape) for name, shape in vectors(config)}
    for module in modules(config):
        specs |= weight_specs(module.name, FORMAT, module.shape, portable=False)
    with TensorWriter(path, specs) as writer:
        for module in modules(config):
            codes = pack_codes(rng.integers(-7, 8, module.shape, dtype=np.int8), 4)
            spread = np.sqrt(module.shape[1] * 56 / 3)  # of codes -7 to 7
            scale = np.full(FORMAT.scale_shape(module.shape), 1 / spread, np.float32).astype(BF16)
            weight = Weight(format=FORMAT, shape=module.shape, codes=codes, scale=scale)
            for name, tensor in weight_tensors(module.name, weight, portable=False).items():
                writer.write(name, tensor)
        for name, shape in vectors(config):
            ones = np.ones(shape, np.float32)
            writer.write(name, ones if len(shape) == 1 else rng.standard_normal(shape, np.float32) * 0.05)
    record = {**RANDOM, "quantization_config": quantization_config(formats, portable=False)}
    (path / "config.json").write_text(json.dumps(record))


@contextmanager
def evicting(path: Path, wanted: bool) -> Iterator[None]:
    """Have the system forget a file's pages, again and again."""
    done = threading.Event()

    def forget() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        while not done.is_set():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            done.wait(0.002)
        os.close(descriptor)

    thread = threading.Thread(target=forget)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if wanted:
            thread.join()


def read_rate(path: Path, evict: bool) -> float:
    """GB/s at which experts' matrices are read, in any order."""
    blobs = [blob for name, blob in read_index(path).blobs.items() if ".experts." in name]
    random.Random(0).shuffle(blobs)
    memory = [np.empty(max(blob.size for blob in blobs), np.uint8) for _ in range(NUM_READERS)]

    def read(which: int) -> int:
        descriptor, total = os.open(path, os.O_RDONLY), 0
        for blob in blobs[which :: 2 * NUM_READERS]:
            total += os.preadv(descriptor, [memory[which][: blob.size].data], blob.start)
        os.close(descriptor)
        return total

    with evicting(path, evict), ThreadPoolExecutor(NUM_READERS) as pool:
        time.sleep(0.05)
        started = time.perf_counter()
        total = sum(pool.map(read, range(NUM_READERS)))
        return total / (time.perf_counter() - started) / 1e9


def answer(decoder: Decoder, prompts: list[list[int]], tokens: int) -> tuple[float, list[tuple[int, ...]]]:
    """Tokens a second of answers one after the other, prompts left aside, and the answers."""
    engine = Engine(ModelRunner(decoder, num_blocks=128))
    found, seconds = [], 0.0
    for prompt in prompts:
        times, ids = [], []
        for output in engine.stream(
            prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=1)
        ):
            times.append(time.perf_counter())
            ids.append(output.token_id)
        seconds += times[-1] - times[0]
        found.append(tuple(ids))
    engine.close()
    return len(prompts) * (tokens - 1) / seconds, found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--shares", default="0.33,0.6")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--evict", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the random model and packed weights go")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="expert-offload-"))
    try:
        record = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(record))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cases in turns."""
    os.environ["HALVE_CACHE"] = str(folder / "cache")
    model = options.model or folder / "model"
    if options.model is None:
        model.mkdir()
        write_random(model)
    checkpoint = open_checkpoint(model)
    plan = read_plan(checkpoint)
    config = load_config(checkpoint, plan)
    ops = NativeOps(activations=plan.activations.format if options.model else "int8")
    sources, decoders = {}, {}
    for share in map(float, options.shares.split(",")):
        largest = open_source(checkpoint, config, ops, 1 << 60) if not sources else None
        size = int(share * (largest or next(iter(sources.values()))).experts.use().expert_bytes)
        sources[share] = open_source(checkpoint, config, ops, size)
        decoders[share] = Decoder(config, ops, sources[share])
        del largest
    (path,) = (folder / "cache").rglob(f"*{SUFFIX}")
    with ReadySource(checkpoint, ops, version="benchmark") as whole:
        decoders[1.0] = Decoder(config, ops, whole)
    say(f"packed: {format_bytes(path.stat().st_size)}")
    rng = np.random.default_rng(5)
    speeds: dict[float, list[float]] = {share: [] for share in decoders}
    rates, uses = [], {share: decoders[share].expert_cache() for share in sources}
    for turn in range(options.rounds + 1):
        prompts = [rng.integers(3, config.vocab_size, options.prompt).tolist()]
        expected = None
        for share in sorted(decoders, reverse=True):
            with evicting(path, options.evict and share < 1):
                speed, found = answer(decoders[share], prompts, options.tokens)
            assert expected in (None, found), "an answer differs from the one with all experts in memory"
            expected = found
            speeds[share].append(speed)
            if turn == 0 and share < 1:
                uses[share] = decoders[share].expert_cache()  # what follows is warm
        rates.append(read_rate(path, options.evict))
        say(turn, {share: round(values[-1], 2) for share, values in speeds.items()}, f"{rates[-1]:.2f} GB/s")
    results = []
    for share in sorted(decoders):
        values = speeds[share][1:]
        row: dict[str, Any] = {"share": share, "decode_tok_s": [min(values), median(values), max(values)]}
        if share < 1:
            first, last = uses[share], decoders[share].expert_cache()
            assert first is not None
            assert last is not None
            asked = last.hits + last.misses - first.hits - first.misses
            ahead = last.num_ahead - first.num_ahead
            tokens = options.rounds * options.tokens
            row |= {
                "cache_bytes": last.size_bytes,
                "hit_rate": (last.hits - first.hits) / asked,
                "ahead_right": (last.num_ahead_right - first.num_ahead_right) / ahead if ahead else None,
                "ahead_share": ahead / asked,
                "read_bytes_per_token": (last.read_bytes - first.read_bytes) / tokens,
                "wait_ms_per_token": 1e3 * (last.wait_s - first.wait_s) / tokens,
            }
            bound = 1 / median(speeds[1.0][1:]) + row["read_bytes_per_token"] / median(rates) / 1e9
            row["bound_tok_s"] = 1 / bound
        results.append(row)
        say(json.dumps(row))
    device = detect_cpu()
    return {
        "question": "expert_offload", "hardware": device.model, "threads": ops.num_threads, "model": str(model.name),
        "expert_bytes": next(iter(sources.values())).experts.use().expert_bytes, "read_gb_s": median(rates),
        "evict": options.evict, "results": results, "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def open_source(checkpoint: Any, config: Any, ops: NativeOps, size: int) -> OffloadSource:
    """Experts behind a cache of a size."""
    return OffloadSource(checkpoint, config, ops, cache_bytes=size, version="benchmark")


if __name__ == "__main__":
    main()
