"""Attention over the paged cache in Triton: rotate and store, decode, prefill. Definition: `reference.TorchOps`.

decode: flash-decoding (arXiv:2311.01282). Reading keys and values once is the bound, so the query heads of a key-value
head share a tile of tensor cores and a sequence is cut in parts, enough to fill the device; the last part to come joins
them, and a sequence of one part has nothing to join.
prefill: FlashAttention-2 (arXiv:2307.08691). A tile holds some queries times the query heads of one key-value head, so
that a chunk of 8192 tokens and a sequence's one new token run by the same kernel, side by side.

No function waits for the device or allocates where `out` and `scratch` are given, and grids depend on shapes alone: a
captured graph serves every length that its tables have room for. Integer tensors are int32. Where kernels begin ahead
(`ahead.py`), positions, slots, lengths and block tables are read before the kernel just before has ended: they come
from an earlier one, or from the host.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from halve.core.errors import KernelError
from halve.kernels.cuda.ahead import launched
from halve.kernels.cuda.attention_kernels import decode_kernel, prefill_kernel, write_kernel
from halve.kernels.cuda.cache import CudaCache

if TYPE_CHECKING:
    from halve.kernels.ops import AttentionSpec

LOG2E = math.log2(math.e)
MOST_SPLITS = 128
FEW_TOKENS = 64  # up to which each head of a token is rotated by an instance of its own
TILES_A_SPLIT = 4  # fewer in a part of a sequence than this cost more to join than they save
INSTANCES_PER_SM = 2  # of decode: what runs at once; measured, more parts read no faster


class Scratch(NamedTuple):
    """Memory for the parts of a decode step: float32 [S, H, parts, D] and [S, H, parts, 2] (maximum, sum).

    counters: int32 [S, G], parts that came; zero between steps.
    """

    values: torch.Tensor
    sums: torch.Tensor
    counters: torch.Tensor


class Tiling(NamedTuple):
    """How a kernel is compiled: rows of queries and tokens of the cache at a time, warps, stages of its pipeline."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def rope_and_write(
    qkv: torch.Tensor,
    cache: CudaCache,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rope_table: torch.Tensor | None,
    spec: "AttentionSpec",
    out_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to their slots, return queries bf16 [T, H * D].

    qkv: bf16 or float32 [T, (H + 2 G) * D], rows at any stride. positions, slots: [T]; slot -1 writes nothing.
    rope_table: float32 [positions, D], cosines of the D / 2 pairs and then sines; None turns nothing.
    """
    num_tokens = qkv.shape[0]
    heads = spec.num_heads + 2 * spec.num_kv_heads
    if qkv.shape[1] != heads * spec.head_dim or qkv.stride(1) != 1:
        raise KernelError(f"qkv: {tuple(qkv.shape)} is not [T, {heads} heads * {spec.head_dim}]; pass q, k, v fused")
    q = torch.empty(num_tokens, spec.num_heads * spec.head_dim, dtype=torch.bfloat16, device=qkv.device)
    q = q if out_q is None else out_q
    if num_tokens:
        tile = 8 if num_tokens >= FEW_TOKENS else 1
        write_kernel[(num_tokens, triton.cdiv(heads, tile))](
            qkv, q, *_memory(cache), positions, slots, rope_table,
            qkv.stride(0), q.stride(0), 0,
            H=spec.num_heads, G=spec.num_kv_heads, D=spec.head_dim, HALF=triton.next_power_of_2(spec.head_dim // 2),
            P=cache.block_size, KV=cache.kv_format, HEADS=tile, ROPE=rope_table is not None,
            num_warps=1, enable_fp_fusion=False, **launched(qkv.device),
        )  # fmt: skip
    return q


def decode_scratch(
    num_sequences: int, spec: "AttentionSpec", device: torch.device | str, splits: int | None = None
) -> Scratch:
    """Memory that `decode` of this many sequences needs; the same may serve every layer, one after another.

    splits: parts that a sequence is cut into at most; `num_splits` where none are given.
    """
    splits = num_splits(num_sequences, spec, torch.device(device)) if splits is None else splits
    parts = (num_sequences, spec.num_heads, splits)
    return Scratch(
        torch.empty(*parts, spec.head_dim, dtype=torch.float32, device=device),
        torch.empty(*parts, 2, dtype=torch.float32, device=device),
        torch.zeros(num_sequences, spec.num_kv_heads, dtype=torch.int32, device=device),
    )


def num_splits(num_sequences: int, spec: "AttentionSpec", device: torch.device) -> int:
    """Parts that a sequence is cut into, at most: what the device runs at once, and no more."""
    room = INSTANCES_PER_SM * _num_sms(device)
    return max(1, min(MOST_SPLITS, room // max(1, num_sequences * spec.num_kv_heads)))


def decode_tiling(cache: CudaCache, head_dim: int) -> Tiling:
    """What reads fastest: 8 or 16 KiB of keys at a time, and as much again of values; the next two under way."""
    return Tiling(16, 64 if head_dim > 64 else 128, 2 if cache.kv_format == "fp8" else 4, 3)


def decode(
    q: torch.Tensor,
    cache: CudaCache,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    spec: "AttentionSpec",
    *,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Attention of one token a sequence: q bf16 [S, H * D] -> bf16 [S, H * D].

    block_tables: [S, W]. seq_lens: [S], tokens in the cache, this one among them; 0 gives zeros and reads nothing.
    sinks: float32 [H], one more logit a head. scratch: from `decode_scratch`.
    """
    num_sequences = q.shape[0]
    _check(q, cache, spec)
    out = torch.empty_like(q) if out is None else out
    scratch = scratch or decode_scratch(num_sequences, spec, q.device)
    splits = scratch.values.shape[2]
    if not num_sequences:
        return out
    tile = tiling or decode_tiling(cache, spec.head_dim)
    group = spec.num_heads // spec.num_kv_heads
    decode_kernel[(spec.num_kv_heads, num_sequences, splits)](
        q, *_memory(cache), block_tables, seq_lens, sinks, out, *scratch,
        q.stride(0), out.stride(0), block_tables.stride(0), LOG2E / math.sqrt(spec.head_dim),
        G=spec.num_kv_heads, D=spec.head_dim, DIM=triton.next_power_of_2(spec.head_dim), GROUP=group,
        HEADS=_columns(group, cache), P=cache.block_size, WINDOW=spec.window or 0, KV=cache.kv_format, N=tile.tokens,
        SPLITS=splits, PARTS=triton.next_power_of_2(splits), LEAST=TILES_A_SPLIT, SINKS=sinks is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launched(q.device),
    )  # fmt: skip
    return out


def prefill_tiling(cache: CudaCache, head_dim: int) -> Tiling:
    """What keeps sums in registers, and loads of two tiles under way."""
    if head_dim > 64:
        return Tiling(128, 128 if cache.kv_format == "bf16" else 64, 8, 3)
    return Tiling(128, 64, 8 if cache.kv_format == "int8" else 4, 3)


def prefill(
    q: torch.Tensor,
    cache: CudaCache,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seq_lens: torch.Tensor,
    spec: "AttentionSpec",
    *,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Causal attention of chunks, their own keys in the cache already: q bf16 [T, H * D] -> bf16 [T, H * D].

    Sequence s asks with rows cu_seqlens[s]:cu_seqlens[s + 1], none to all of its seq_lens[s] tokens in the cache, the
    last ones of it. Rows beyond cu_seqlens[S] are left as they are.
    """
    num_tokens, num_sequences = q.shape[0], len(seq_lens)
    _check(q, cache, spec)
    out = torch.empty_like(q) if out is None else out
    if not num_tokens or not num_sequences:
        return out
    tile = tiling or prefill_tiling(cache, spec.head_dim)
    group = spec.num_heads // spec.num_kv_heads
    rows = max(tile.rows, triton.next_power_of_2(group))
    queries = rows // group
    prefill_kernel[(spec.num_kv_heads, num_tokens // queries + num_sequences)](
        q, *_memory(cache), block_tables, cu_seqlens, seq_lens, sinks, out,
        q.stride(0), out.stride(0), block_tables.stride(0), num_sequences, LOG2E / math.sqrt(spec.head_dim),
        G=spec.num_kv_heads, D=spec.head_dim, DIM=triton.next_power_of_2(spec.head_dim), GROUP=group, QUERIES=queries,
        ROWS=rows, P=cache.block_size, WINDOW=spec.window or 0, KV=cache.kv_format, N=tile.tokens,
        SINKS=sinks is not None, ASM=_compiled(), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _columns(group: int, cache: CudaCache) -> int:
    """Query heads that an instance of decode has room for: 16 columns of tensor cores, two a head over int8."""
    return max(8 if cache.kv_format == "int8" else 16, int(triton.next_power_of_2(group)))


def _check(q: torch.Tensor, cache: CudaCache, spec: "AttentionSpec") -> None:
    if q.shape[1] != spec.num_heads * spec.head_dim or q.stride(1) != 1 or q.dtype != torch.bfloat16:
        wanted = f"bf16 [T, {spec.num_heads} heads * {spec.head_dim}]"
        raise KernelError(f"q: {q.dtype} {tuple(q.shape)} is not {wanted}; take it from rope_and_write")
    if cache.kv_format != spec.kv_format:
        raise KernelError(f"cache: holds {cache.kv_format}, the layer wants {spec.kv_format}; make it from this spec")


def _memory(cache: CudaCache) -> tuple[torch.Tensor | None, ...]:
    return cache.keys, cache.values, cache.key_scales, cache.value_scales


def _compiled() -> bool:
    """Whether kernels run on a device; Triton's interpreter knows no assembly."""
    return not triton.knobs.runtime.interpret


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
