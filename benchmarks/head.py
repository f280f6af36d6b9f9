"""What does it cost to choose tokens at the end of a step, with and without writing all logits?

The head reads its weights once for all rows: bytes over bandwidth is the floor. Full logits add rows * vocab * 4 bytes
that are written and read again by the sampler; where a row needs its k likeliest tokens only, the head keeps those. The
parts take turns, so that a drift of the machine hits all alike; medians over rounds, of the whole from hidden states to
tokens, as a fraction of the product that writes logits and chooses nothing. One thread, and its processor time, as what
is compared is small beside what other work on a machine adds; the inputs are few for the same reason.

    python benchmarks/head.py [--shape 128256x512] [--format int8] [--rows 1,32] [--rounds 30]

Prints a table, and one JSON line last.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median, quantiles

import numpy as np

from halve.formats import FORMATS
from halve.hardware import detect_cpu
from halve.kernels.native import NativeOps
from halve.kernels.native_cache import Step
from halve.kernels.native_checks import check_batch
from halve.kernels.native_rows import Linear
from halve.kernels.ops import AttentionSpec, TokenBatch
from halve.kernels.program import Program
from halve.kernels.sampling import SamplingBatch
from kernels import random_weight

K = 50


def parts(ops: NativeOps, linear: Linear, num_rows: int) -> dict[str, Callable[[], object]]:
    """From hidden states to logits or tokens, in every way."""
    spec, tokens = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2), np.zeros(num_rows, np.int32)
    each = np.arange(num_rows, dtype=np.int32)
    batch = TokenBatch(
        token_ids=tokens,
        positions=tokens,
        cu_seqlens=np.arange(num_rows + 1, dtype=np.int32),
        slot_mapping=each,
        block_tables=each[:, None],
    )
    step = Step(check_batch(batch, spec, ops.kv_cache(num_rows, 1, spec)))
    x = np.random.default_rng(0).standard_normal((num_rows, linear.layout.width), np.float32)
    full, few = Program(ops, num_rows, num_rows), Program(ops, num_rows, num_rows)
    logits = full.floats(linear.matrix.out_features, of_rows=True)
    full.product(full.prepare(x, linear.layout, of_rows=True), [linear], [logits], of_rows=True)
    values, ids = few.likeliest(few.prepare(x, linear.layout, of_rows=True), linear)
    sampling = SamplingBatch.of(num_rows, temperature=0.8, top_k=K, top_p=0.9, seed=each.astype(np.uint64))

    def all_logits() -> None:
        full.run(step, tokens, each)

    def sampled_from_all() -> object:
        all_logits()
        return ops.sample(logits, sampling)

    def greedy_from_all() -> object:
        all_logits()
        return ops.sample(logits, SamplingBatch.greedy(num_rows))

    def sampled_from_few() -> object:
        few.run(step, tokens, each, K)
        return ids[: num_rows * K][ops.sample(values[: num_rows * K].reshape(-1, K), sampling).token_ids + each * K]

    def greedy_from_few() -> object:
        few.run(step, tokens, each, 1)
        return ids[:num_rows]

    made = (all_logits, sampled_from_all, sampled_from_few, greedy_from_all, greedy_from_few)
    return {part.__name__: part for part in made}


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="128256x512", help="outputs x inputs")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    vocab, hidden = (int(n) for n in options.shape.split("x"))
    ops = NativeOps(activations="int8", num_threads=1)
    linear = ops.linear(random_weight(FORMATS[options.format], (vocab, hidden), np.random.default_rng(0)))
    results = []
    for num_rows in map(int, options.rows.split(",")):
        made = parts(ops, linear, num_rows)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(options.rounds + 1):
            for name, part in made.items():
                started = time.thread_time()
                part()
                seconds[name].append(time.thread_time() - started)
        bare = seconds["all_logits"][1:]  # the first round warms up
        result: dict[str, object] = {"rows": num_rows, "all_logits_ms": 1000 * median(bare)}
        for name, times in seconds.items():
            low, middle, high = quantiles([t / b for t, b in zip(times[1:], bare, strict=True)], n=4)
            result[name] = {"value": middle, "low": low, "high": high}
            print(
                f"{num_rows:3} rows {name:18} {1000 * median(times[1:]):8.3f} ms  {middle:.3f} [{low:.3f}, {high:.3f}]"
            )
        results.append(result)
    record = {
        "question": "head",
        "shape": options.shape,
        "format": options.format,
        "top_k": K,
        "kernel": ops.isa.name,
        "threads": ops.num_threads,
        "runs": options.rounds,
        "hardware": detect_cpu().model,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/head.py --shape {options.shape} --format {options.format} --rows {options.rows}",
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
