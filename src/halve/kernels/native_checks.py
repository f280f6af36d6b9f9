"""What must hold before an array's address goes to C++: types, shapes, and every index inside its buffer."""

from typing import Any

import numpy as np

from halve.core.errors import KernelError
from halve.kernels.native_cache import KVCache
from halve.kernels.ops import KV_FORMATS, Array, AttentionSpec, TokenBatch

MAX_HEAD_DIM = 1024


def check_attention(spec: AttentionSpec) -> None:
    """Refuse, with KernelError, attention that the rows do not compute."""
    if spec.num_kv_heads < 1 or spec.num_heads < 1 or spec.num_heads % spec.num_kv_heads:
        raise KernelError(f"attention: num_kv_heads {spec.num_kv_heads} must divide num_heads {spec.num_heads}")
    if not 1 <= spec.head_dim <= MAX_HEAD_DIM:
        raise KernelError(f"attention: head_dim {spec.head_dim} is not between 1 and {MAX_HEAD_DIM}")
    if spec.window is not None and spec.window < 1:
        raise KernelError(f"attention: window {spec.window} must be 1 or more, or None to see everything before")
    if spec.chunk is not None and spec.chunk < 1:
        raise KernelError(f"attention: chunk {spec.chunk} must be 1 or more, or None for no chunks")
    if spec.kv_format not in KV_FORMATS:
        raise KernelError(
            f"attention: kv_format {spec.kv_format!r} is not one of {list(KV_FORMATS)}, which our C++ keeps"
        )


def check_batch(batch: TokenBatch, spec: AttentionSpec, cache: KVCache | None) -> TokenBatch:
    """A copy of the batch as C++ reads it.

    Raises KernelError for what would read or write outside the buffers or the cache.
    """
    tokens, sequences = batch.num_tokens, batch.num_sequences
    positions = int32("positions", batch.positions, (tokens,)).copy()
    ends = int32("cu_seqlens", batch.cu_seqlens, (None,)).copy()
    lengths = np.diff(ends)
    if sequences < 1 or ends[0] != 0 or ends[-1] != tokens or lengths.min() < 0:
        raise KernelError(f"cu_seqlens {ends.tolist()} must rise from 0 to the {tokens} tokens of the batch")
    owned = lengths > 0
    first, last = positions[ends[:-1][owned]], positions[ends[1:][owned] - 1]
    counted = np.arange(tokens) + np.repeat(first - ends[:-1][owned], lengths[owned])
    if (positions != counted).any() or positions.min(initial=0) < 0:
        raise KernelError("positions of each sequence must count up by one from 0 or more; order its tokens so")
    if cache is None:
        if first.any():
            raise KernelError(f"without a cache sequences start at position 0, got {first.tolist()}; give a cache")
        return TokenBatch(token_ids=batch.token_ids, positions=positions, cu_seqlens=ends)
    num_blocks, block_size = cache.num_blocks, cache.block_size
    if (cache.kv_format, cache.num_kv_heads, cache.head_dim) != (spec.kv_format, spec.num_kv_heads, spec.head_dim):
        held = f"{cache.num_kv_heads} heads of {cache.head_dim} in {cache.kv_format}"
        raise KernelError(f"the cache holds {held}; make one with kv_cache for {spec}")
    if batch.slot_mapping is None or batch.block_tables is None:
        raise KernelError("a batch over a cache needs slot_mapping and block_tables; allocate blocks for it first")
    slots = int32("slot_mapping", batch.slot_mapping, (tokens,)).copy()
    tables = int32("block_tables", batch.block_tables, (sequences, None)).copy()
    within("slot", slots, num_blocks * block_size, "allocate a block for every token before the step")
    oldest = np.zeros_like(first) if spec.window is None else np.maximum(first - spec.window + 1, 0)
    within(
        "block", _blocks_read(tables[owned], oldest, last, block_size), num_blocks, "name a block for every position"
    )
    return TokenBatch(
        token_ids=batch.token_ids, positions=positions, cu_seqlens=ends, slot_mapping=slots, block_tables=tables
    )


def _blocks_read(tables: Array, oldest: Array, last: Array, block_size: int) -> Array:
    """Blocks that hold positions oldest..last of each sequence, -1 for those beyond the width of the tables."""
    needed = int(last.max(initial=-1)) // block_size + 1
    wide = np.pad(tables, ((0, 0), (0, max(0, needed - tables.shape[1]))), constant_values=-1)
    column = np.arange(wide.shape[1])
    read = (column >= (oldest // block_size)[:, None]) & (column <= (last // block_size)[:, None])
    return wide[read]


def check_copies(pairs: Array, num_blocks: int) -> Array:
    """A copy of [N, 2] blocks, from and to. Raises KernelError for one outside, written twice, or written and read."""
    pairs = int32("pairs", pairs, (None, 2)).copy()
    within("block", pairs, num_blocks, "copy blocks that were allocated")
    written = pairs[:, 1]
    if len(np.unique(written)) < len(written) or np.isin(written, pairs[:, 0]).any():
        raise KernelError(f"blocks {written.tolist()} are written twice, or read too; copy them one step after another")
    return pairs


def within(what: str, values: Array, end: int, way_out: str) -> None:
    """Refuse indices outside 0 .. end - 1 with KernelError."""
    if values.size and (values.min() < 0 or values.max() >= end):
        wrong = values[(values < 0) | (values >= end)]
        raise KernelError(f"{what} {wrong[0]} ({wrong.size} of {values.size}) is not in 0..{end - 1}; {way_out}")


def floats(name: str, values: Array, shape: tuple[int | None, ...]) -> Array:
    """A float32 array of this shape (None: any length), contiguous; else KernelError."""
    return _array(name, values, np.dtype(np.float32), shape)


def int32(name: str, values: Array, shape: tuple[int | None, ...]) -> Array:
    """An int32 array of this shape (None: any length), contiguous; else KernelError."""
    return _array(name, values, np.dtype(np.int32), shape)


def _array(name: str, values: Array, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> Array:
    """The array itself when C++ may read it at its address, else KernelError; None in `shape` is any length."""
    if not isinstance(values, np.ndarray) or values.dtype != dtype:
        kind = getattr(values, "dtype", type(values).__name__)
        raise KernelError(f"{name}: expected a numpy array of {dtype}, got {kind}; convert it with from_host or astype")
    if values.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, values.shape, strict=True)):
        raise KernelError(f"{name}: expected shape {['any' if n is None else n for n in shape]}, got {values.shape}")
    if not (values.flags.c_contiguous and values.flags.aligned):
        raise KernelError(f"{name}: expected C-contiguous aligned memory; pass np.ascontiguousarray({name})")
    return values
