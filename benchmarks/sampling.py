"""How long does it take to choose a token from a row of logits?

Bounds: greedy reads vocab * 4 bytes once (0.51 MB of a 128,256-token row), so it cannot beat those bytes over the
bandwidth of where they lie, which is the last-level cache right after the product that wrote them: the ceiling is the
time of a bare sum over the same row in the same run. A cut by top_k reads the row once too, and then little. Without
top_k every token that can be drawn costs one exp in double, some 2 ns, and top_p a histogram more.

One thread, one row, C++ alone and with the call from Python around it; medians over rounds that take turns.

    python benchmarks/sampling.py [--vocab 128256] [--rounds 300]
"""

import argparse
import json
import statistics
import sys
import time

import numpy as np

from halve.hardware import detect_cpu
from halve.kernels.native import ISAS, NativeOps
from halve.kernels.native_library import library
from halve.kernels.native_sampling import SamplingWork
from halve.kernels.sampling import Ragged, SamplingBatch


def batches(vocab: int) -> dict[str, SamplingBatch]:
    """What is asked for, by name."""
    history = Ragged.of([np.arange(min(1000, vocab))])
    return {
        "greedy": SamplingBatch.greedy(1),
        "temperature_top_k_top_p": SamplingBatch.of(1, temperature=0.8, top_k=50, top_p=0.9),
        "temperature": SamplingBatch.of(1, temperature=0.8),
        "temperature_top_p": SamplingBatch.of(1, temperature=0.8, top_p=0.9),
        "temperature_min_p": SamplingBatch.of(1, temperature=0.8, min_p=0.05),
        "temperature_typical_p": SamplingBatch.of(1, temperature=0.8, typical_p=0.9),
        "greedy_logprobs_5": SamplingBatch.of(1, num_logprobs=5),
        "greedy_penalties_1000": SamplingBatch.of(
            1, repetition_penalty=1.1, prompt_tokens=history, output_tokens=history
        ),
    }


def main() -> None:
    """Time every setting; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=300)
    args = parser.parse_args()
    ops, device = NativeOps(num_threads=1), detect_cpu()
    isa = next(isa.number for isa in ISAS if ops.kernels["sample"] == f"native_{isa.name}")
    logits = (np.random.default_rng(0).standard_normal((1, args.vocab)) * 2).astype(np.float32)
    times: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        started = time.perf_counter()
        logits.sum()
        times.setdefault("read", []).append(time.perf_counter() - started)
        for name, batch in batches(args.vocab).items():
            work = SamplingWork(logits, batch, 1)
            started = time.perf_counter()
            library().halve_sample(isa, work.address, 1)
            between = time.perf_counter()
            ops.sample(logits, batch)
            times.setdefault(name, []).append(between - started)
            times.setdefault(f"{name}_from_python", []).append(time.perf_counter() - between)
    record = {"question": "sampling_us", "vocab": args.vocab, "rounds": args.rounds, "logits": "normal, spread 2"}
    for name, seconds in times.items():
        low, median, high = (q * 1e6 for q in statistics.quantiles(seconds, n=4))
        record[name] = {"value": round(median, 1), "low": round(low, 1), "high": round(high, 1)}
        print(f"{name}: {median:.0f} us ({low:.0f} to {high:.0f})", file=sys.stderr)
    record |= {"hardware": f"{device.model}, {device.num_cores} cores", "kernel": ops.kernels["sample"]}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
