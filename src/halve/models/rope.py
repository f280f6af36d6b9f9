"""Angles of rotary positions, made once and looked up. Sources: see `halve.models.config.Rope`."""

import math

import numpy as np

from halve.kernels.ops import Array
from halve.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Array:
    """Radians a position for each of the D / 2 pairs, float32 as trained: theta^(-2i/D), then scaled by kind.

    linear: all divided by factor. llama3: waves longer than original_context / low_freq_factor are divided by
    factor, shorter than original_context / high_freq_factor stay, between them a blend (arXiv:2407.21783, 3.1.1 and
    Meta's reference code). yarn: dimensions that turn less than beta_slow times over the original context are divided
    by factor, those that turn more than beta_fast times stay, between them a ramp (arXiv:2309.00071, 3.2).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency: Array = np.float32(1.0) / np.power(np.float32(rope.theta), exponent, dtype=np.float32)
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        linear: Array = frequency / np.float32(rope.factor)
        return linear
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, frequency)
    wave = np.float32(2 * math.pi) / frequency
    long_wave = rope.original_context / rope.low_freq_factor
    short_wave = rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = np.where(wave > long_wave, frequency / rope.factor, np.where(wave < short_wave, frequency, blend))
    result: Array = scaled.astype(np.float32)
    return result


def _yarn(rope: Rope, head_dim: int, frequency: Array) -> Array:
    def dimension(turns: float) -> float:
        """The pair that turns so many times over the original context."""
        wave = rope.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    scaled = frequency / np.float32(rope.factor) * ramp + frequency * (1 - ramp)
    result: Array = scaled.astype(np.float32)
    return result


class RopeTable:
    """cos and sin of every position so far, times the attention factor, float32 [positions, D / 2], grown."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._tables: dict[Rope, tuple[Array, Array]] = {}

    def at(self, positions: Array, rope: Rope) -> tuple[Array, Array]:
        """cos, sin [T, D / 2] of positions [T]."""
        needed = int(positions.max()) + 1
        if rope not in self._tables or len(self._tables[rope][0]) < needed:
            length = 1 << (needed - 1).bit_length()
            angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(rope, self.head_dim)[None, :]
            factor = np.float32(rope.attention_factor)
            self._tables[rope] = (np.cos(angles) * factor, np.sin(angles) * factor)
        cos, sin = self._tables[rope]
        return cos[positions], sin[positions]
