"""How long does it take to compress a 1B model, and how much memory?

Bounds: reading 2.5 GB of bf16 and writing 0.7 GB; for R0 some ten passes over 1.24e9 weights; for R1 one forward pass
of the calibration tokens (0.97e9 multiply-adds each) and some 160 passes over the weights in cache. Each method runs
in a process of its own, so that its peak memory is its own. Certification is not part of it.

    python benchmarks/compress_time.py [--tokens 32768] [--format int4-g32] [--keep DIR]
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from halve.checkpoint import TensorWriter, open_checkpoint
from halve.compress import apply_plan, calibrate
from halve.core.units import format_bytes, format_duration
from halve.formats import format_named
from halve.formats.base import BF16
from halve.hardware import detect_cpu
from halve.models import CheckpointSource, load_config, stored_formats
from halve.models.config import read_config
from halve.models.names import modules, num_parameters, vectors
from halve.search import plan_for

LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
}


def random_checkpoint(directory: Path) -> None:
    """Write a Llama-3.2-1B shape with Gaussian weights of the usual spread, in bf16."""
    config = read_config(LLAMA_32_1B)
    rng = np.random.default_rng(0)
    specs = {f"{m.name}.weight": ("BF16", m.shape) for m in modules(config)}
    specs |= {name: ("BF16", shape) for name, shape in vectors(config)}
    with TensorWriter(directory, specs) as writer:
        for name, (_, shape) in specs.items():
            values = np.ones(shape, np.float32)
            if len(shape) == 2:
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            writer.write(name, values.astype(BF16))
    (directory / "config.json").write_text(json.dumps(LLAMA_32_1B))


def compress(source: Path, out: Path, method: str, fmt: str, num_tokens: int, results: "multiprocessing.Queue") -> None:
    """Compress once; put seconds of each part and the peak memory on the queue."""
    started = time.perf_counter()
    with open_checkpoint(source) as checkpoint:
        config = load_config(checkpoint)
        energies = None
        if method == "clip":
            tokens = np.random.default_rng(1).integers(0, config.vocab_size, num_tokens).astype(np.int32)
            documents = list(tokens.reshape(-1, 1024))
            energies = calibrate(config, CheckpointSource(checkpoint), documents, window_tokens=1024)
        calibrated = time.perf_counter()
        plan = plan_for(config, format_named(fmt), method, portable=False, source=stored_formats(checkpoint, config))
        apply_plan(checkpoint, config, plan, out, energies=energies)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put({"calibrate_s": calibrated - started, "write_s": ended - calibrated, "peak_bytes": peak})


def main() -> None:
    """Run both methods; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--keep", type=Path, help="make or reuse the random checkpoint in this folder")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    record = {"question": "compress_time", "model": "llama-3.2-1b-shape", "format": args.format, "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as temporary:
        source = args.keep or Path(temporary) / "model"
        if not (source / "config.json").exists():
            source.mkdir(parents=True, exist_ok=True)
            random_checkpoint(source)
        for method in ("rtn", "clip"):
            out = Path(temporary) / method
            out.mkdir()
            queue = context.Queue()
            process = context.Process(target=compress, args=(source, out, method, args.format, args.tokens, queue))
            process.start()
            result = queue.get()
            process.join()
            record[method] = result
            total = result["calibrate_s"] + result["write_s"]
            print(f"{method}: {format_duration(total)}, peak {format_bytes(result['peak_bytes'])}", file=sys.stderr)
    device = detect_cpu()
    record |= {
        "hardware": f"{device.model}, {device.num_cores} cores",
        "parameters": num_parameters(read_config(LLAMA_32_1B)),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
