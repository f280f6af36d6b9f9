"""Angles of rotary positions, made once and looked up. Sources: see `halve.models.config.Rope`."""

import math

import numpy as np

from halve.kernels.ops import Array
from halve.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Array:
    """Radians a position for each of the D / 2 pairs, float32 as trained: theta^(-2i/D), then scaled by kind.

    linear: all divided by factor. llama3: waves longer than original_context / low_freq_factor are divided by
    factor, shorter than original_context / high_freq_factor stay, between them a blend (arXiv:2407.21783, 3.1.1 and
    Meta's reference code).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency: Array = np.float32(1.0) / np.power(np.float32(rope.theta), exponent, dtype=np.float32)
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        linear: Array = frequency / np.float32(rope.factor)
        return linear
    wave = np.float32(2 * math.pi) / frequency
    long_wave = rope.original_context / rope.low_freq_factor
    short_wave = rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = np.where(wave > long_wave, frequency / rope.factor, np.where(wave < short_wave, frequency, blend))
    result: Array = scaled.astype(np.float32)
    return result


class RopeTable:
    """cos and sin of every position so far, float32 [positions, D / 2], grown by doubling."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._tables: dict[Rope, tuple[Array, Array]] = {}

    def at(self, positions: Array, rope: Rope) -> tuple[Array, Array]:
        """cos, sin [T, D / 2] of positions [T]."""
        needed = int(positions.max()) + 1
        if rope not in self._tables or len(self._tables[rope][0]) < needed:
            length = 1 << (needed - 1).bit_length()
            angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(rope, self.head_dim)[None, :]
            self._tables[rope] = (np.cos(angles), np.sin(angles))
        cos, sin = self._tables[rope]
        return cos[positions], sin[positions]
