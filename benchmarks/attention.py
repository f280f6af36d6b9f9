"""Does attention run at the speed of memory in decode, and well above that of float products in prefill?

Shape of Llama-3.2-1B: 32 query heads, 8 key-value heads of 64; one layer at a time, 16 of them in the model.

Decode reads every key and value of the context once: at 8192 tokens, batch 8 and int8 that is 8 * 8192 * 8 heads * 132
bytes = 69 MB a layer (64 + 64 codes, 4 bytes of scales). Caches of several layers are taken in turn, more than 200 MB
together, so that no level of cache helps; the bound is a loop that only reads (libc's memchr over zeros in huge pages,
one slice a thread), timed before each step. Reported: the median of step bandwidth over read bandwidth, step by step.

Prefill of N tokens costs 2 * N * (N + 1) / 2 * 32 * 64 multiply-adds a layer. Linear layers cost 0.97e9 a token, at
some 250e9 a second; a whole model at 8k is 0.6 of its rate at 512 where attention takes at most 0.66 of that time, so
(0.269e9 a token and model at 8k) it must reach 105e9 multiply-adds a second. Float products peak at 2 * 8 * 2 threads
a cycle on AVX2, some 110e9; whole numbers of 16 bits at twice that.

int4 reads 72 bytes for what int8 reads 132 of: 0.545 of its time where memory is the bound. --against FORMAT decodes in
turns with another format and reports the median of seconds over seconds, turn by turn, which noise of the machine
disturbs less than two runs.

    python benchmarks/attention.py [--format int8] [--threads 2] [--context 8192] [--batch 8] [--seconds 10]
                                   [--against FORMAT]
"""

import argparse
import ctypes
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from halve.hardware import detect_cpu
from halve.hardware.detect import usable_cores
from halve.kernels.native import NativeOps
from halve.kernels.native_cache import KVCache, Step, zeros
from halve.kernels.ops import KV_FORMATS, Array, AttentionSpec, TokenBatch

ROTATED_BYTES = 220e6
BLOCK = 16
LINEAR_MACS_PER_TOKEN, LINEAR_MACS_PER_S, LAYERS = 0.97e9, 250e9, 16


class ReadLoop:
    """Bytes a second that this many threads can read."""

    def __init__(self, threads: int) -> None:
        self.memory = zeros(int(ROTATED_BYTES))
        self.memory[:] = 0  # every page is there
        self.pool, self.threads = ThreadPoolExecutor(threads), threads
        self.memchr = ctypes.CDLL(None).memchr
        self.memchr.argtypes, self.memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p

    def bytes_per_s(self) -> float:
        """Of one pass."""
        size = len(self.memory) // self.threads
        starts = [self.memory.ctypes.data + i * size for i in range(self.threads)]
        begin = time.perf_counter()
        list(self.pool.map(lambda start: self.memchr(start, 1, size), starts))
        return size * self.threads / (time.perf_counter() - begin)


def batch_over_blocks(batch: int, first: int, count: int, seed: int) -> tuple[TokenBatch, int]:
    """Each of `batch` sequences runs tokens first .. first + count - 1, over blocks in a shuffled order."""
    per = -(-(first + count) // BLOCK)
    tables = np.random.default_rng(seed).permutation(batch * per).reshape(batch, per).astype(np.int32)
    positions = np.tile(np.arange(first, first + count, dtype=np.int32), batch)
    owner = np.repeat(np.arange(batch), count)
    made = TokenBatch(
        token_ids=np.zeros(batch * count, np.int32),
        positions=positions,
        cu_seqlens=np.arange(0, batch * count + 1, count, dtype=np.int32),
        slot_mapping=tables[owner, positions // BLOCK] * BLOCK + positions % BLOCK,
        block_tables=tables,
    )
    return made, batch * per


def random_inputs(tokens: int, spec: AttentionSpec) -> list[Array]:
    """q, k and v."""
    rng = np.random.default_rng(1)
    widths = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return [rng.standard_normal((tokens, n * spec.head_dim), np.float32) for n in widths]


def filled(ops: NativeOps, spec: AttentionSpec, batch: int, context: int) -> KVCache:
    """A cache whose every slot was written."""
    whole, num_blocks = batch_over_blocks(batch, 0, context, 0)
    cache = ops.kv_cache(num_blocks, BLOCK, spec)
    _, k, v = random_inputs(batch * context, spec)
    ops._run["kv_write"](cache, Step(whole), k, v)
    return cache


def rotated(ops: NativeOps, spec: AttentionSpec, batch: int, context: int) -> list[KVCache]:
    """Caches of more than ROTATED_BYTES together."""
    caches = [filled(ops, spec, batch, context)]
    while sum(c.data.nbytes for c in caches) < ROTATED_BYTES:
        caches.append(ops.kv_cache(caches[0].num_blocks, BLOCK, spec))
        caches[-1].data[:] = caches[0].data
    return caches


def in_turns(
    ops: NativeOps, specs: list[AttentionSpec], batch: int, context: int, seconds: float
) -> dict[str, float | list[float]]:
    """Seconds of a step with the first spec over those with the second, as median and quartiles of turns."""
    caches = [rotated(ops, spec, batch, context) for spec in specs]
    made, _ = batch_over_blocks(batch, context - 1, 1, 0)
    step, (q, _, _) = Step(made), random_inputs(batch, specs[0])
    ratios, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        spent = []
        for spec, some in zip(specs, caches, strict=True):
            begin = time.perf_counter()
            for cache in some:
                ops._run["attention"](cache, step, q, spec=spec, sinks=None)
            spent.append((time.perf_counter() - begin) / len(some))
        ratios.append(spent[0] / spent[1])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return {
        "decode_of_other": round(float(middle), 3),
        "decode_of_other_quartiles": [round(float(low), 3), round(float(high), 3)],
    }


def decode(ops: NativeOps, spec: AttentionSpec, batch: int, context: int, seconds: float) -> dict[str, float]:
    """Steps of one token a sequence, each beside a pass of the read loop."""
    caches = rotated(ops, spec, batch, context)
    made, _ = batch_over_blocks(batch, context - 1, 1, 0)
    step, (q, _, _) = Step(made), random_inputs(batch, spec)
    loop, ratios, speeds, reads = ReadLoop(ops.num_threads), [], [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = loop.bytes_per_s()
        for cache in caches:
            begin = time.perf_counter()
            ops._run["attention"](cache, step, q, spec=spec, sinks=None)
            speeds.append(cache.data.nbytes / (time.perf_counter() - begin))
            ratios.append(speeds[-1] / before)
        reads.append(before)
    return {
        "decode_gb_per_s": round(float(np.median(speeds)) / 1e9, 2),
        "read_gb_per_s": round(float(np.median(reads)) / 1e9, 2),
        "decode_of_read": round(float(np.median(ratios)), 3),
    }


def prefill(ops: NativeOps, spec: AttentionSpec, tokens: int, chunk: int) -> dict[str, float]:
    """One sequence in chunks."""
    cache = filled(ops, spec, 1, tokens)
    q, _, _ = random_inputs(chunk, spec)
    spent = 0.0
    for first in range(0, tokens, chunk):
        made, _ = batch_over_blocks(1, first, chunk, 0)
        per = -(-tokens // BLOCK)
        tables = np.random.default_rng(0).permutation(per).reshape(1, per).astype(np.int32)
        made = TokenBatch(
            token_ids=made.token_ids,
            positions=made.positions,
            cu_seqlens=made.cu_seqlens,
            slot_mapping=tables[0, made.positions // BLOCK] * BLOCK + made.positions % BLOCK,
            block_tables=tables,
        )
        step = Step(made)
        begin = time.perf_counter()
        ops._run["attention"](cache, step, q, spec=spec, sinks=None)
        spent += time.perf_counter() - begin
    macs = tokens * (tokens + 1) * spec.num_heads * spec.head_dim
    linear = tokens * LINEAR_MACS_PER_TOKEN / LINEAR_MACS_PER_S
    return {
        "seconds": round(spent, 4),
        "gmac_per_s": round(macs / spent / 1e9, 1),
        "of_linear_time": round(spent * LAYERS / linear, 3),
    }


def main() -> None:
    """Measure decode and prefill; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int8", choices=list(KV_FORMATS))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--against", choices=list(KV_FORMATS))
    args = parser.parse_args()
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=64, kv_format=args.format)
    ops = NativeOps(num_threads=args.threads)
    device = detect_cpu()
    record = {
        "question": "attention",
        "hardware": f"{device.model}, {args.threads} threads",
        "kernel": ops.kernels["attention"],
        "format": args.format,
        "context": args.context,
        "batch": args.batch,
        **decode(ops, spec, args.batch, args.context, args.seconds),
    }
    if args.against:
        record["other"] = args.against
        specs = [spec, replace(spec, kv_format=args.against)]
        record |= in_turns(ops, specs, args.batch, args.context, args.seconds)
    print({k: v for k, v in record.items() if k.startswith(("decode", "read"))}, file=sys.stderr)
    for tokens in sorted({512, args.context}):
        record[f"prefill_{tokens}"] = prefill(ops, spec, tokens, min(args.chunk, tokens))
    short, long = (record[f"prefill_{n}"]["of_linear_time"] for n in (512, args.context))
    record["prefill_rate_of_512"] = round((1 + short) / (1 + long), 3)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
