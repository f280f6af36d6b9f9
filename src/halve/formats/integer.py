"""Integer codes in a dense bit stream.

The layout is that of compressed-tensors `pack-quantized` since its 0.18 line: codes are shifted to unsigned
(code + 2^(bits-1)) and written along the inputs, first code in the lowest bits, codes straddling words, so that 32
codes fill exactly `bits` words of 32. A row starts on a word of its own.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def pack_codes(codes: Array, bits: int) -> Array:
    """Pack int8 codes [.., n] in [-2^(bits-1), 2^(bits-1) - 1] to uint32 [.., ceil(n * bits / 32)]."""
    unsigned = codes.view(np.uint8) + np.uint8(1 << (bits - 1))  # wraps, as two's complement does
    if bits in (2, 4, 8):
        return _pack_even(unsigned, bits)
    n = codes.shape[-1]
    padded = _pad_last(unsigned, 32).reshape(*codes.shape[:-1], -1, 32).astype(np.uint32)
    words = np.zeros((*padded.shape[:-1], bits), np.uint32)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        words[..., word] |= padded[..., i] << np.uint32(offset)
        if offset + bits > 32:
            words[..., word + 1] |= padded[..., i] >> np.uint32(32 - offset)
    return np.ascontiguousarray(words.reshape(*codes.shape[:-1], -1)[..., : math.ceil(n * bits / 32)])


def unpack_codes(words: Array, bits: int, n: int) -> Array:
    """Undo `pack_codes`: uint32 [.., ceil(n * bits / 32)] to int8 codes [.., n]."""
    if bits in (2, 4, 8):
        unsigned = _unpack_even(words, bits)[..., :n]
    else:
        groups = _pad_last(words, bits).reshape(*words.shape[:-1], -1, bits)
        unsigned = np.empty((*groups.shape[:-1], 32), np.uint8)
        mask = np.uint32((1 << bits) - 1)
        for i in range(32):
            word, offset = divmod(i * bits, 32)
            value = groups[..., word] >> np.uint32(offset)
            if offset + bits > 32:
                value = value | (groups[..., word + 1] << np.uint32(32 - offset))
            unsigned[..., i] = value & mask
        unsigned = unsigned.reshape(*words.shape[:-1], -1)[..., :n]
    return np.ascontiguousarray(unsigned - np.uint8(1 << (bits - 1))).view(np.int8)


def _pad_last(array: Array, multiple: int) -> Array:
    missing = -array.shape[-1] % multiple
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


def _pack_even(unsigned: Array, bits: int) -> Array:
    per_byte = 8 // bits
    padded = _pad_last(unsigned, 32 // bits)
    parts = padded.reshape(*padded.shape[:-1], -1, per_byte)
    packed = parts[..., 0].copy()
    for i in range(1, per_byte):
        packed |= parts[..., i] << np.uint8(i * bits)
    return np.ascontiguousarray(packed).view("<u4")


def _unpack_even(words: Array, bits: int) -> Array:
    packed = np.ascontiguousarray(words).view(np.uint8)
    per_byte = 8 // bits
    mask = np.uint8((1 << bits) - 1)
    parts = np.empty((*packed.shape, per_byte), np.uint8)
    for i in range(per_byte):
        np.bitwise_and(packed >> np.uint8(i * bits), mask, out=parts[..., i])
    return parts.reshape(*packed.shape[:-1], -1)
