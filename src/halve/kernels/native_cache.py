"""The paged cache of one layer and the tokens of one step, as the C++ takes them (csrc/rows.h)."""

import ctypes
import mmap

import numpy as np

from halve.kernels.ops import Array, AttentionSpec, TokenBatch, kv_block_bytes

BLOCK_SIZE = 16  # of the cache that holds whole sequences for one call; the fast kernels take this one
FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
_ALIGN = 64
_HUGE_PAGE = 2 << 20


class _KvCacheRecord(ctypes.Structure):
    """`KvCache` of csrc/rows.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


class _StepBatchRecord(ctypes.Structure):
    """`StepBatch` of csrc/rows.h."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("widest", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("cu_seqlens", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
    )


class KvWriteRecord(ctypes.Structure):
    """`KvWrite` of csrc/rows.h."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("batch", ctypes.c_void_p),
    )


class AttentionRecord(ctypes.Structure):
    """`Attention` of csrc/rows.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("batch", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    )


def zeros(size_bytes: int) -> Array:
    """Zeroed bytes at an address that 64 divides, in huge pages where they are worth it and the system has them."""
    if size_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory, the default, gets no huge pages
        memory = mmap.mmap(-1, size_bytes + _HUGE_PAGE, flags=private)
        memory.madvise(mmap.MADV_HUGEPAGE)
        start = -np.frombuffer(memory, np.uint8).ctypes.data % _HUGE_PAGE
        return np.frombuffer(memory, np.uint8, size_bytes, start)
    owned = np.zeros(size_bytes + _ALIGN, np.uint8)
    start = -owned.ctypes.data % _ALIGN
    return owned[start : start + size_bytes]


class KVCache:
    """One layer's keys and values, zero: `data` uint8 [B, bytes of a block]; its layout is told in csrc/kv_layout.h."""

    def __init__(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.kv_format, self.num_kv_heads, self.head_dim = spec.kv_format, spec.num_kv_heads, spec.head_dim
        block_bytes = kv_block_bytes(spec, block_size)
        self.data = zeros(num_blocks * block_bytes).reshape(num_blocks, block_bytes)
        sizes = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.record = _KvCacheRecord(self.data.ctypes.data, *sizes, FORMATS[spec.kv_format])
        self.address = ctypes.addressof(self.record)

    @property
    def kind(self) -> tuple[str, int, int, int, int]:
        """All that a batch is checked against."""
        return self.kv_format, self.num_kv_heads, self.head_dim, self.num_blocks, self.block_size


class Step:
    """A checked batch over a cache, at an address; it keeps alive what its record points at."""

    def __init__(self, batch: TokenBatch) -> None:
        assert batch.slot_mapping is not None
        assert batch.block_tables is not None
        self.batch = batch
        arrays = (batch.positions, batch.cu_seqlens, batch.slot_mapping, batch.block_tables)
        sizes = (batch.num_tokens, batch.num_sequences, batch.block_tables.shape[1])
        self.record = _StepBatchRecord(*sizes, *(a.ctypes.data for a in arrays))
        self.address = ctypes.addressof(self.record)


def kv_write_record(cache: KVCache, step: Step, k: Array, v: Array) -> KvWriteRecord:
    """Write k and v [T, G * D] as they are."""
    sizes = {"k_stride": k.shape[1], "v_stride": v.shape[1]}
    return KvWriteRecord(k=k.ctypes.data, v=v.ctypes.data, cache=cache.address, batch=step.address, **sizes)


def attention_record(
    cache: KVCache, step: Step, q: Array, out: Array, spec: AttentionSpec, sinks: Array | None
) -> AttentionRecord:
    """Attention of q [T, H * D] as it is, without scratch."""
    return AttentionRecord(
        q=q.ctypes.data,
        q_stride=q.shape[1],
        cache=cache.address,
        batch=step.address,
        sinks=None if sinks is None else sinks.ctypes.data,
        out=out.ctypes.data,
        out_stride=out.shape[1],
        num_heads=spec.num_heads,
        window=spec.window or 0,
        chunk=spec.chunk or 0,
    )


def in_own_blocks(batch: TokenBatch) -> tuple[TokenBatch, int]:
    """A batch of whole sequences over blocks of their own, and how many blocks that takes."""
    lengths = np.diff(batch.cu_seqlens)
    blocks = -(-lengths // BLOCK_SIZE)
    first = np.cumsum(blocks) - blocks
    column = np.arange(blocks.max(initial=0))
    tables = np.where(column < blocks[:, None], first[:, None] + column, -1)
    slots = np.repeat(first, lengths) * BLOCK_SIZE + batch.positions
    over_blocks = TokenBatch(
        token_ids=batch.token_ids,
        positions=batch.positions,
        cu_seqlens=batch.cu_seqlens,
        slot_mapping=slots.astype(np.int32),
        block_tables=tables.astype(np.int32),
    )
    return over_blocks, int(blocks.sum())
