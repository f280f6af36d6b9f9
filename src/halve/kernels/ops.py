"""`Ops`: every operation of a decoder over opaque buffers, so that the model is written once.

Two implementations: `reference.TorchOps` (any torch device, differentiable, the definition of each operation) and
`native.NativeOps` (our C++ on CPU, numpy outside, no torch). A buffer belongs to the Ops that made it: a torch
tensor for one, a numpy array for the other. Float buffers are float32 [rows, features], C-contiguous.

Shapes: T tokens of a step, S sequences, H query heads, G key-value heads, D head size, B blocks, P tokens a block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from halve.formats import Format, Weight
from halve.kernels.sampling import Sampled, SamplingBatch

Buffer = Any
Array = np.ndarray[Any, np.dtype[Any]]
# Memory for a packed matrix: uint8 [bytes], on a multiple of 64 bytes.
Allocate = Callable[[int], Array]

# Formats of our C++'s cache -> bits of an element.
KV_FORMATS: Mapping[str, int] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
KV_GROUP = 32  # dims of a head that share a scale in int4


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """The tokens of one step, flat: prefill chunks and single decode tokens side by side, no padding.

    token_ids, positions: int32 [T]. cu_seqlens: int32 [S + 1], sequence s owns tokens cu_seqlens[s]:cu_seqlens[s+1],
    in order of position and contiguous. slot_mapping: int32 [T], where each token's key and value go in the paged
    cache (block * P + offset). block_tables: int32 [S, widest], blocks of each sequence in order, -1 beyond its last.
    A batch without a cache (slot_mapping and block_tables None) holds whole sequences, each starting at position 0.
    """

    token_ids: Array
    positions: Array
    cu_seqlens: Array
    slot_mapping: Array | None = None
    block_tables: Array | None = None

    @classmethod
    def whole(cls, sequences: Sequence[Sequence[int] | Array]) -> "TokenBatch":
        """Whole sequences from position 0, without a cache."""
        lengths = np.array([len(s) for s in sequences], np.int32)
        return cls(
            token_ids=np.concatenate([np.asarray(s, np.int32) for s in sequences]),
            positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        )

    @property
    def num_tokens(self) -> int:
        """T, the tokens of this step."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """S, the sequences of this step."""
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """What one layer's attention computes. Source: arXiv:1706.03762; grouped queries arXiv:2305.13245.

    window: a token sees itself and the `window - 1` before it; None sees all before it. chunk: positions fall into
    chunks of that many from 0 on, and a token sees those of its own chunk only; None for no chunks.
    kv_format: keys and values are rounded to it before they are read, cached or not (`reference.ROUND_KEYS`,
    `reference.ROUND_KV`). int8 has a scale for each token and head, int4 one for each KV_GROUP dims of them.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None
    kv_format: str = "bf16"


def kv_token_bytes(kv_format: str, head_dim: int) -> int:
    """Bytes of one token's key or value of one head, with its scales, as the format defines it: without padding."""
    if kv_format == "int4":
        return -(-head_dim // 2) + 2 * -(-head_dim // KV_GROUP)
    return {"fp32": 4 * head_dim, "bf16": 2 * head_dim, "int8": head_dim + 2, "fp8": head_dim}[kv_format]


def kv_block_bytes(spec: AttentionSpec, block_size: int) -> int:
    """Bytes of one block of one layer's paged cache: keys and values of block_size tokens, and their scales.

    The C++ rounds each head up to 64 bytes (csrc/kv_layout.h).
    """
    if spec.kv_format == "int4":
        groups = -(-spec.head_dim // KV_GROUP)
        keys, values = -(-spec.head_dim // 8) * 4 * block_size, -(-block_size // 2) * groups * KV_GROUP
        head = keys + values + 2 * 2 * groups * block_size
    else:
        element, pair = KV_FORMATS[spec.kv_format] // 8, 1 if spec.kv_format == "fp32" else 2
        keys = -(-spec.head_dim // pair) * pair * block_size
        values = -(-block_size // pair) * pair * spec.head_dim
        head = (keys + values) * element + (2 * 2 * block_size if spec.kv_format == "int8" else 0)
    return spec.num_kv_heads * -(-head // 64) * 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packed:
    """A matrix [out, in] in the layout of the kernels that packed it, ready to run from where it lies.

    record: whole numbers by which the kernels know the layout. blob: uint8, on a multiple of 64 bytes.
    Safe to share between threads and Ops; nothing writes to it.
    """

    format: Format
    shape: tuple[int, int]
    record: Mapping[str, int]
    blob: Array


class Ops(Protocol):
    """Operations on one device. Every function returns a new buffer; only `attention` writes (into the cache)."""

    name: str
    batch_invariant: bool  # a token's result is the same to the bit whatever else is in the batch

    @property
    def kernels(self) -> Mapping[str, str]:
        """Operation and format -> the kernel that was chosen, for logs and reports."""

    def linear(self, weight: Weight | Packed, bias: Array | None = None) -> Any:
        """Prepare a matrix [out, in] for `project`; the kernel is chosen here, once.

        A `Packed` of these Ops is run from where it lies; KernelError for one that they did not pack.
        """

    def table(self, weight: Weight | Packed) -> Any:
        """Prepare an embedding table [vocab, hidden] for `embed`; a `Packed` as for `linear`."""

    def vector(self, values: Array) -> Buffer:
        """Bring a float vector (norm gain, bias, sinks) to the device as float32."""

    def from_host(self, values: Array) -> Buffer:
        """Bring float32 [rows, features] to the device."""

    def to_host(self, buffer: Buffer) -> Array:
        """Bring a float buffer to a float32 numpy array."""

    def embed(self, table: Any, token_ids: Array) -> Buffer:
        """Rows of the table: [T] -> [T, hidden]."""

    def rms_norm(self, x: Buffer, gain: Buffer, eps: float) -> Buffer:
        """x / sqrt(mean(x^2) + eps) * gain over each row. Source: arXiv:1910.07467."""

    def project(self, linear: Any, x: Buffer) -> Buffer:
        """Round x [T, in] to the plan's activation format and return x @ weight.T + bias, [T, out]."""

    def rope(self, x: Buffer, cos: Array, sin: Array, head_dim: int) -> Buffer:
        """Rotate each head of x [T, heads * D] by half-split pairs; cos, sin float32 [T, D / 2]. arXiv:2104.09864."""

    def attention(
        self,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        batch: TokenBatch,
        spec: AttentionSpec,
        cache: Any | None,
        sinks: Buffer | None = None,
    ) -> Buffer:
        """Causal softmax attention: q [T, H * D], k and v [T, G * D] -> [T, H * D], scaled by 1 / sqrt(D).

        With a cache (one layer's, from `kv_cache`) k and v are written to their slots first, then each token reads
        its sequence's positions 0..own through the block table. Without one, sequences are whole in the batch.
        sinks [H]: one more logit a head in the softmax's denominator.
        """

    def silu_mul(self, gate: Buffer, up: Buffer) -> Buffer:
        """silu(gate) * up, elementwise. Source: arXiv:2002.05202."""

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        """x + y."""

    def take_rows(self, x: Buffer, rows: Array) -> Buffer:
        """x[rows]."""

    def sample(self, logits: Buffer, batch: SamplingBatch) -> Sampled:
        """Choose a token for every row of logits [R, vocab]. Defined by `halve.kernels.sampling`; raises as it does."""

    def kv_cache(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> Any:
        """An empty paged cache of one layer: keys and values of B blocks of P tokens in the spec's format."""

    def copy_blocks(self, cache: Any, pairs: Array) -> None:
        """Copy whole blocks of one layer's cache: pairs int32 [N, 2], from and to; no block is both."""


@runtime_checkable
class FusingOps(Ops, Protocol):
    """Ops that keep matrices which share their input as one in memory."""

    def fuse(self, linears: Sequence[Any]) -> list[Any]:
        """What `linear` prepared for the members of one group, in order, to be used in their place."""


@runtime_checkable
class OwnMemoryOps(Ops, Protocol):
    """Ops of a device with memory of its own."""

    def spare_bytes(self) -> int:
        """Memory that is free now, less what steps take beside weights and cache."""


class PackingOps(Ops, Protocol):
    """Ops that put matrices into a layout of their own before they run, so that it is worth keeping on disk."""

    @property
    def layout(self) -> str:
        """The layout's name and version; fit for the name of a file. Where it differs, nothing can be taken over."""

    def pack(self, weight: Weight, allocate: Allocate | None = None) -> Packed:
        """Pack a matrix [out, in]. allocate: gives the memory, instead of some of its own."""

    def refusal(self, packed: Packed) -> str | None:
        """Why this is no matrix that these Ops packed, or None: record and blob are what `pack` makes, in size."""
