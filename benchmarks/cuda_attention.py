"""Does attention on a CUDA device read its cache at the speed of memory, and how fast is prefill?

Shape of Llama-3.1-8B: 32 query heads, 8 key-value heads of 128, blocks of 16 tokens in shuffled order, one layer.

Decode reads every key and value once. 32 sequences of 8192 tokens are 32 * 8192 * 8 heads * 2 * 128 elements = 0.54e9:
1.07 GB in bf16, far beyond the 50 MB of second level cache. The bound is a copy of 1 GiB in the same run, bytes read
and bytes written; the bar is 75 % of it. The long case is one sequence of 131072 tokens (0.54 GB in bf16).

Prefill of 8192 tokens multiplies 4 * 128 * 32 * 8192^2 / 2 times (causal). A dense bf16 H200 peaks at 989e12 a second.

A time is the median of 20 runs between two events, of a captured graph of several launches where the case is short.
Errors are the largest difference from float64 over what the cache holds, on samples of the same run's rows.

    python benchmarks/cuda_attention.py [--sweep]    # --sweep: tilings beside the one that is built in
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from halve.kernels.cuda import attention
from halve.kernels.cuda.attention import Tiling
from halve.kernels.cuda.cache import CudaCache
from halve.kernels.cuda.elementwise import argmax, rms_norm, silu_mul
from halve.kernels.cuda.sampling import draw, upload
from halve.kernels.ops import AttentionSpec
from halve.kernels.sampling import SamplingBatch

RUNS = 20
VOCAB = 128256
DECODE_TILINGS = [
    Tiling(16, 32, 4, 4), Tiling(16, 64, 4, 2), Tiling(16, 64, 4, 4), Tiling(16, 64, 8, 3), Tiling(16, 128, 4, 2),
    Tiling(16, 128, 8, 3),
]  # fmt: skip
PREFILL_TILINGS = [
    Tiling(128, 64, 8, 3), Tiling(128, 128, 8, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(128, 64, 4, 2),
    Tiling(128, 32, 4, 3),
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
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return sorted(times)[RUNS // 2]


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: to.copy_(source))


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


def decode(case: Case, bandwidth: float, tilings: list[Tiling]) -> list[dict[str, Any]]:
    """One record a tiling, the built-in one first."""
    spec, batch = case.spec, case.batch
    q = torch.randn(batch, spec.num_heads * spec.head_dim, dtype=torch.bfloat16, device="cuda")
    out, scratch = torch.empty_like(q), attention.decode_scratch(batch, spec, "cuda")
    records = []
    for tiling in (None, *tilings):

        def step(tiling: Tiling | None = tiling) -> torch.Tensor:
            return attention.decode(
                q, case.cache, case.tables, case.lengths, spec, out=out, scratch=scratch, tiling=tiling
            )

        taken = seconds(step)
        records.append(
            {
                "tiling": list(tiling or attention.decode_tiling(case.cache, spec.head_dim)),
                "us": round(taken * 1e6, 1),
                "of_copy": round(case.cache.nbytes / taken / bandwidth, 3),
                "error": case.error(q, out, [(0, 0, case.context), (batch - 1, batch - 1, case.context)]),
            }
        )
    return records


def prefill(case: Case, tilings: list[Tiling]) -> list[dict[str, Any]]:
    """One record a tiling, of a sequence in one chunk."""
    spec, tokens = case.spec, case.context
    q = torch.randn(tokens, spec.num_heads * spec.head_dim, dtype=torch.bfloat16, device="cuda")
    out, offsets = torch.empty_like(q), torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    records = []
    for tiling in (None, *tilings):

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


def small_kernels() -> dict[str, float]:
    """Microseconds of the kernels between products, 32 tokens of Llama-3.1-8B, in a graph of 20 calls."""
    x = torch.randn(32, 4096, dtype=torch.bfloat16, device="cuda")
    stream, gain = torch.randn(32, 4096, device="cuda"), torch.ones(4096, device="cuda")
    gate_up = torch.randn(32, 2 * 14336, dtype=torch.bfloat16, device="cuda")
    logits = torch.randn(32, VOCAB, device="cuda") * 4
    parameters = {
        "temperature": upload(SamplingBatch.of(32, temperature=1.0), "cuda"),
        "top_k_top_p": upload(SamplingBatch.of(32, temperature=1.0, top_k=50, top_p=0.9), "cuda"),
    }
    spec = spec_of("int8", 128)
    cache = CudaCache(32, 16, spec, "cuda")
    qkv = torch.randn(32, 6144, dtype=torch.bfloat16, device="cuda")
    table, slots = torch.randn(64, 128, device="cuda"), torch.arange(32, dtype=torch.int32, device="cuda")
    runs: dict[str, Callable[[], object]] = {
        "norm_int8": lambda: rms_norm(x, gain, 1e-5, residual=stream, activations="int8"),
        "silu_int8": lambda: silu_mul(gate_up, activations="int8"),
        "rope_and_write_int8": lambda: attention.rope_and_write(qkv, cache, slots, slots, table, spec),
        "argmax": lambda: argmax(logits),
        **{f"draw_{k}": lambda p=p: draw(logits, p) for k, p in parameters.items()},  # type: ignore[misc]
    }
    return {name: round(seconds(run, 20) * 1e6, 2) for name, run in runs.items()}


def main() -> None:
    """Measure; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time other tilings too")
    args = parser.parse_args()
    sweep_decode = DECODE_TILINGS if args.sweep else []
    sweep_prefill = PREFILL_TILINGS if args.sweep else []
    bandwidth = copy_bandwidth()
    record: dict[str, Any] = {
        "question": "cuda_attention",
        "hardware": torch.cuda.get_device_name(),
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "decode": {},
        "prefill": {},
    }

    def note(kind: str, name: str, found: list[dict[str, Any]]) -> None:
        record[kind][name] = found if args.sweep else found[0]
        print(name, json.dumps(found), file=sys.stderr, flush=True)

    for head_dim in (128, 64):
        for kv_format in ("bf16", "fp8", "int8"):
            case = Case(spec_of(kv_format, head_dim), 32, 8192)
            note("decode", f"32x8192 d{head_dim} {kv_format}", decode(case, bandwidth, sweep_decode))
            del case
            if head_dim == 128 or kv_format == "bf16":
                case = Case(spec_of(kv_format, head_dim), 1, 8192)
                note("prefill", f"8192 d{head_dim} {kv_format}", prefill(case, sweep_prefill))
                del case
    note("decode", "1x131072 d128 bf16", decode(Case(spec_of("bf16", 128), 1, 131072), bandwidth, []))
    note("decode", "32x8192 d128 bf16 blocks of 64", decode(Case(spec_of("bf16", 128), 32, 8192, 64), bandwidth, []))
    record["small_us"] = small_kernels()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
