"""Does attention on a CUDA device read its cache at the speed of memory, and how fast is prefill?

Shape of Llama-3.1-8B: 32 query heads, 8 key-value heads of 128, blocks of 16 tokens in shuffled order, one layer.

Decode reads every key and value once. 32 sequences of 8192 tokens are 32 * 8192 * 8 heads * 2 * 128 elements = 0.54e9:
1.07 GB in bf16, far beyond the 50 MB of second level cache. The bound is a copy of 4 GiB in the same run, bytes read
and bytes written; the bar is 75 % of it. The long case is one sequence of 131072 tokens (0.54 GB in bf16).

Prefill of 8192 tokens multiplies 4 * 128 * 32 * 8192^2 / 2 times (causal). A dense bf16 H200 peaks at 989e12 a second.

A time is the median of 20 runs between two events, of a captured graph, of several launches where they are short.
Errors are the largest difference from float64 over what the cache holds, on samples of the same run's rows.

    python benchmarks/cuda_attention.py [--sweep]    # --sweep: other tilings and parts, in 80 s
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from halve.kernels import sampling as definition
from halve.kernels.cuda import attention
from halve.kernels.cuda.attention import Scratch, Tiling
from halve.kernels.cuda.cache import CudaCache
from halve.kernels.cuda.elementwise import argmax, rms_norm, silu_mul
from halve.kernels.cuda.sampling import draw, upload
from halve.kernels.ops import AttentionSpec
from halve.kernels.sampling import SamplingBatch

RUNS = 20
VOCAB = 128256
SWEEP_S = 80  # what a sweep may take, compiling included
COMPILERS = 14  # processes
DECODE_TILINGS = {
    "bf16": [
        Tiling(16, 64, 4, 3), Tiling(16, 64, 4, 4), Tiling(16, 64, 4, 6), Tiling(16, 128, 4, 2), Tiling(16, 128, 4, 3),
        Tiling(16, 64, 8, 4),
    ],
    "fp8": [
        Tiling(16, 128, 4, 2), Tiling(16, 128, 4, 3), Tiling(16, 128, 4, 4), Tiling(16, 128, 4, 6),
        Tiling(16, 64, 4, 4), Tiling(16, 64, 4, 3), Tiling(16, 64, 4, 6), Tiling(16, 256, 8, 3), Tiling(16, 128, 8, 4),
    ],
    "int8": [
        Tiling(16, 128, 4, 2), Tiling(16, 128, 4, 4), Tiling(16, 64, 4, 4), Tiling(16, 256, 4, 3),
        Tiling(16, 256, 8, 3), Tiling(16, 128, 8, 4),
    ],
}  # fmt: skip
DECODE_SPLITS = [1, 2, 3, 8, 16]  # with the built-in tiling
PREFILL_TILINGS = [
    Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 4), Tiling(128, 128, 8, 3), Tiling(64, 64, 4, 3),
]  # fmt: skip


def seconds(run: Callable[[], object], calls: int = 1) -> float:
    """Median time of one call, of a graph of `calls` of them."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return between_events(graph.replay) / calls


def between_events(run: Callable[[], object]) -> float:
    """Median time of a call between two events."""
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[RUNS // 2]


def copy_bandwidth() -> float:
    """Bytes a second, read and written: the better of the driver's copy of 4 GiB and of a kernel's that negates."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda")
    to = torch.empty_like(source)
    ways: list[Callable[[], object]] = [lambda: to.copy_(source), lambda: torch.neg(source, out=to)]
    for way in ways:
        way()
    return 2 * source.nbytes / min(between_events(way) for way in ways)


class Case:
    """Sequences of one length, random keys and values in all their blocks."""

    def __init__(self, spec: AttentionSpec, batch: int, context: int, block_size: int = 16) -> None:
        per = context // block_size
        torch.manual_seed(0)
        self.spec, self.batch, self.context = spec, batch, context
        self.cache = CudaCache(batch * per, block_size, spec, "cuda")
        order = torch.randperm(batch * per, device="cuda")
        self.tables = order.view(batch, per).to(torch.int32)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        G, D = spec.num_kv_heads, spec.head_dim
        step = 2**17
        for first in range(0, batch * context, step):
            n = min(step, batch * context - first)
            slots = torch.arange(first, first + n, dtype=torch.int32, device="cuda")
            qkv = torch.randn(n, (spec.num_heads + 2 * G) * D, dtype=torch.bfloat16, device="cuda")
            attention.rope_and_write(qkv, self.cache, slots, slots, None, spec)

    def kept(self, s: int, g: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence and head, float64 [context, D]."""
        blocks, cache = self.tables[s].long(), self.cache
        k = cache.keys.view(torch.uint8)[blocks, g].view(cache.keys.dtype).float().double().reshape(self.context, -1)
        v = cache.values.view(torch.uint8)[blocks, g].view(cache.values.dtype).float().double()
        v = (v if cache.kv_format == "bf16" else v.transpose(1, 2)).reshape(self.context, -1)
        if cache.key_scales is not None and cache.value_scales is not None:
            k = k * cache.key_scales[blocks, g].double().reshape(-1, 1)
            v = v * cache.value_scales[blocks, g].double().reshape(-1, 1)
        return k, v

    def error(self, q: torch.Tensor, out: torch.Tensor, rows: list[tuple[int, int, int]]) -> float:
        """Largest difference in rows (row of q, sequence, tokens that it sees), heads of the last key-value head."""
        spec, worst = self.spec, 0.0
        group, g = spec.num_heads // spec.num_kv_heads, spec.num_kv_heads - 1
        for row, s, seen in rows:
            k, v = self.kept(s, g)
            heads = q[row].double().view(-1, spec.head_dim)[g * group :]
            p = (heads @ k[:seen].T / math.sqrt(spec.head_dim)).softmax(-1)
            found = out[row].double().view(-1, spec.head_dim)[g * group :]
            worst = max(worst, float((p @ v[:seen] - found).abs().max()))
        return worst


def spec_of(kv_format: str, head_dim: int) -> AttentionSpec:
    """Heads of Llama-3.1-8B (128) or Llama-3.2-1B (64)."""
    return AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=head_dim, kv_format=kv_format)


def decode(
    case: Case, bandwidth: float, others: list[tuple[Tiling | None, int]], until: float = math.inf
) -> list[dict[str, Any]]:
    """One record a tiling and number of parts, the built-in ones first; others while there is time."""
    spec, batch = case.spec, case.batch
    q = torch.randn(batch, spec.num_heads * spec.head_dim, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    records = []
    default = attention.num_splits(batch, spec, torch.device("cuda"))
    for tiling, splits in [(None, 0), *others]:
        if time.monotonic() > until:
            break
        scratch = attention.decode_scratch(batch, spec, "cuda", splits or default)

        def step(tiling: Tiling | None = tiling, scratch: Scratch = scratch) -> torch.Tensor:
            return attention.decode(
                q, case.cache, case.tables, case.lengths, spec, out=out, scratch=scratch, tiling=tiling
            )

        taken = seconds(step, 5)
        records.append(
            {
                "tiling": list(tiling or attention.decode_tiling(case.cache, spec.head_dim)),
                "splits": splits or default,
                "us": round(taken * 1e6, 1),
                "of_copy": round(case.cache.nbytes / taken / bandwidth, 3),
                "error": case.error(q, out, [(0, 0, case.context), (batch - 1, batch - 1, case.context)]),
            }
        )
    return records


def prefill(case: Case, others: list[Tiling], until: float = math.inf) -> list[dict[str, Any]]:
    """One record a tiling, of a sequence in one chunk, the built-in one first; others while there is time."""
    spec, tokens = case.spec, case.context
    q = torch.randn(tokens, spec.num_heads * spec.head_dim, dtype=torch.bfloat16, device="cuda")
    out, offsets = torch.empty_like(q), torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    records = []
    for tiling in (None, *others):
        if time.monotonic() > until:
            break

        def chunk(tiling: Tiling | None = tiling) -> torch.Tensor:
            return attention.prefill(q, case.cache, case.tables, offsets, case.lengths, spec, out=out, tiling=tiling)

        taken = seconds(chunk)
        flops = 4 * spec.head_dim * spec.num_heads * tokens * (tokens + 1) / 2
        rows = [(row, 0, row + 1) for row in (0, 1, 777, tokens // 2, tokens - 1)]
        records.append(
            {
                "tiling": list(tiling or attention.prefill_tiling(case.cache, spec.head_dim)),
                "ms": round(taken * 1e3, 3),
                "tflop_s": round(flops / taken / 1e12, 1),
                "error": case.error(q, out, rows),
            }
        )
    return records


DRAWS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k_top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_p_flat": {"temperature": 4.0, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
}


def draws() -> dict[str, Any]:
    """Microseconds of a draw of 32 rows, in a graph of 20, and how many tokens are other than the definition's."""
    torch.manual_seed(1)
    logits = torch.randn(32, VOCAB, device="cuda") * 4
    found = {}
    for name, settings in DRAWS.items():
        batch = SamplingBatch.of(32, seed=list(range(32)), **settings)
        parameters = upload(batch, "cuda")
        chosen, _ = draw(logits, parameters)
        expected = definition.sample(logits.cpu().numpy(), batch).token_ids
        found[name] = {
            "us": round(seconds(lambda p=parameters: draw(logits, p), 20) * 1e6, 1),  # type: ignore[misc]
            "other_tokens": int((chosen.cpu().numpy() != expected).sum()),
        }
    return found


def small_kernels() -> dict[str, float]:
    """Microseconds of the kernels between products, 32 tokens of Llama-3.1-8B, in a graph of 20 calls."""
    x = torch.randn(32, 4096, dtype=torch.bfloat16, device="cuda")
    stream, gain = torch.randn(32, 4096, device="cuda"), torch.ones(4096, device="cuda")
    gate_up = torch.randn(32, 2 * 14336, dtype=torch.bfloat16, device="cuda")
    logits = torch.randn(32, VOCAB, device="cuda") * 4
    spec = spec_of("int8", 128)
    cache = CudaCache(32, 16, spec, "cuda")
    qkv = torch.randn(32, 6144, dtype=torch.bfloat16, device="cuda")
    table, slots = torch.randn(64, 128, device="cuda"), torch.arange(32, dtype=torch.int32, device="cuda")
    runs: dict[str, Callable[[], object]] = {
        "norm_int8": lambda: rms_norm(x, gain, 1e-5, residual=stream, activations="int8"),
        "silu_int8": lambda: silu_mul(gate_up, activations="int8"),
        "rope_and_write_int8": lambda: attention.rope_and_write(qkv, cache, slots, slots, table, spec),
        "argmax": lambda: argmax(logits),
    }
    return {name: round(seconds(run, 20) * 1e6, 2) for name, run in runs.items()}


def compile_ahead(job: tuple[str, str, Tiling | None, int]) -> None:
    """Leave what a case launches in Triton's cache on disk; the device runs it on next to nothing."""
    kind, kv_format, tiling, splits = job
    if kind == "draw":
        draw(torch.randn(1, VOCAB, device="cuda"), upload(SamplingBatch.of(1, temperature=1.0, top_k=5), "cuda"))
        return
    spec = spec_of(kv_format, 128)
    case = Case(spec, 1, 32)
    q = torch.randn(1, spec.num_heads * spec.head_dim, dtype=torch.bfloat16, device="cuda")
    if kind == "decode":
        scratch = attention.decode_scratch(1, spec, "cuda", splits)
        attention.decode(q, case.cache, case.tables, case.lengths, spec, scratch=scratch, tiling=tiling)
    else:
        offsets = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        attention.prefill(q, case.cache, case.tables, offsets, case.lengths, spec, tiling=tiling)
    torch.cuda.synchronize()


def sweep(note: Callable[[str, str, Any], None], bandwidth: float, until: float) -> None:
    """Tilings and parts beside the built-in ones, on the shape of Llama-3.1-8B, until time is up."""
    default = attention.num_splits(32, spec_of("bf16", 128), torch.device("cuda"))
    cuts: dict[str, list[tuple[Tiling | None, int]]] = {
        kv_format: [*((t, default) for t in tilings), *((None, n) for n in DECODE_SPLITS)]
        for kv_format, tilings in DECODE_TILINGS.items()
    }
    formats = ("fp8", "bf16", "int8")
    jobs: list[tuple[str, str, Tiling | None, int]] = [("draw", "", None, 0)]
    jobs += [("decode", f, t, n) for f in formats for t, n in [(None, default), *cuts[f]]]
    jobs += [("prefill", f, t, 0) for f in formats for t in (None, *PREFILL_TILINGS)]
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        waiting = [pool.apply_async(compile_ahead, (job,)) for job in jobs]
        for job, result in zip(jobs, waiting, strict=True):
            try:
                result.get(max(0.1, until - 30 - time.monotonic()))
            except Exception as error:
                print("not compiled", job, repr(error)[:200], file=sys.stderr, flush=True)
    print(f"compiled {len(jobs)} in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    note("draw", "32x128256", draws())
    for kv_format in formats:
        case = Case(spec_of(kv_format, 128), 32, 8192)
        note("decode", f"32x8192 d128 {kv_format}", decode(case, bandwidth, cuts[kv_format], until))
        del case
        case = Case(spec_of(kv_format, 128), 1, 8192)
        note("prefill", f"8192 d128 {kv_format}", prefill(case, PREFILL_TILINGS, until))
        del case


def main() -> None:
    """Measure; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help=f"time other cuts instead, for {SWEEP_S} s at most")
    args = parser.parse_args()
    until = time.monotonic() + SWEEP_S - 5
    bandwidth = copy_bandwidth()
    record: dict[str, Any] = {
        "question": "cuda_attention",
        "hardware": torch.cuda.get_device_name(),
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "decode": {},
        "prefill": {},
    }

    def note(kind: str, name: str, found: Any) -> None:
        record.setdefault(kind, {})[name] = found
        lines = found if isinstance(found, list) else [found]
        for line in lines:
            print(kind, name, json.dumps(line), file=sys.stderr, flush=True)

    print(f"copy {bandwidth / 1e9:.0f} GB/s", file=sys.stderr, flush=True)
    if args.sweep:
        sweep(note, bandwidth, until)
        print(json.dumps(record))
        return
    for head_dim in (128, 64):
        for kv_format in ("bf16", "fp8", "int8"):
            case = Case(spec_of(kv_format, head_dim), 32, 8192)
            note("decode", f"32x8192 d{head_dim} {kv_format}", decode(case, bandwidth, [])[0])
            del case
            if head_dim == 128 or kv_format == "bf16":
                case = Case(spec_of(kv_format, head_dim), 1, 8192)
                note("prefill", f"8192 d{head_dim} {kv_format}", prefill(case, [])[0])
                del case
    for kv_format in ("bf16", "fp8"):
        long = Case(spec_of(kv_format, 128), 1, 131072)
        note("decode", f"1x131072 d128 {kv_format}", decode(long, bandwidth, [])[0])
        del long
    blocks = Case(spec_of("bf16", 128), 32, 8192, 64)
    note("decode", "32x8192 d128 bf16 blocks of 64", decode(blocks, bandwidth, [])[0])
    note("draw", "32x128256", draws())
    record["small_us"] = small_kernels()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
