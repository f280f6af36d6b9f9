"""The paged cache of one layer on a CUDA device: how keys and values of B blocks of P tokens lie there.

A block holds all heads, one after the other, and a head's P tokens lie together, so that what one kernel instance
reads of a block is one run of bytes:

    keys    [B, G, P, D]
    values  [B, G, P, D] in bf16; [B, G, D, P] in formats of one byte
    key_scales, value_scales  bf16 [B, G, P], int8 alone

The product of probabilities and values sums over tokens. Tensor cores take 16-bit values in pairs of tokens straight
from token-major memory (ldmatrix.trans), but there is no such load for bytes: token-minor memory gives each thread the
four tokens that it multiplies as one word.

Formats: bf16; fp8, e4m3 without a scale, saturating at 448 (arXiv:2209.05433); int8 with a bf16 scale for each token
and head, `halve.kernels.reference.round_kv_int8`.
"""

from typing import TYPE_CHECKING

import torch

from halve.core.errors import KernelError

if TYPE_CHECKING:
    from halve.kernels.ops import AttentionSpec

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
SMALLEST_BLOCK = 16  # tokens; the narrowest tile of a tensor core over values of one byte


class CudaCache:
    """Keys and values of one layer, zero at first; the top of this file says how they lie."""

    def __init__(self, num_blocks: int, block_size: int, spec: "AttentionSpec", device: torch.device | str) -> None:
        """Reserve memory for B blocks of P tokens. Raises KernelError for a format or block size without kernels."""
        if spec.kv_format not in DTYPES:
            raise KernelError(f"kv_format: {spec.kv_format!r} has no CUDA kernels; choose one of {list(DTYPES)}")
        if block_size < SMALLEST_BLOCK or block_size & (block_size - 1):
            raise KernelError(f"block_size: {block_size} must be a power of two, {SMALLEST_BLOCK} or more, on CUDA")
        self.num_blocks, self.block_size, self.kv_format = num_blocks, block_size, spec.kv_format
        head = (num_blocks, spec.num_kv_heads)
        token_major, token_minor = (*head, block_size, spec.head_dim), (*head, spec.head_dim, block_size)
        dtype = DTYPES[spec.kv_format]
        # Bytes first: not every torch fills fp8.
        self.keys = _zeros(token_major, dtype, device)
        self.values = _zeros(token_major if spec.kv_format == "bf16" else token_minor, dtype, device)
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if spec.kv_format == "int8":
            self.key_scales = _zeros((*head, block_size), torch.bfloat16, device)
            self.value_scales = _zeros((*head, block_size), torch.bfloat16, device)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that the cache holds, blocks first."""
        return [t for t in (self.keys, self.values, self.key_scales, self.value_scales) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def copy_blocks(self, pairs: torch.Tensor) -> None:
        """Copy whole blocks: pairs int64 [N, 2] on the device, from and to; no block is both."""
        for tensor in self.tensors:
            held = tensor.view(torch.uint8)  # not every torch indexes fp8
            held[pairs[:, 1]] = held[pairs[:, 0]]


def cache_block_bytes(spec: "AttentionSpec", block_size: int) -> int:
    """Bytes of one block of one layer: keys and values of block_size tokens, and their scales."""
    scale = 2 if spec.kv_format == "int8" else 0
    return 2 * spec.num_kv_heads * block_size * (spec.head_dim * DTYPES[spec.kv_format].itemsize + scale)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    bytes_last = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.zeros(bytes_last, dtype=torch.uint8, device=device).view(dtype)
