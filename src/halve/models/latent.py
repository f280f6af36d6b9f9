"""Attention from latents (MLA): narrow vectors of a token, from which each head makes its queries, keys and values.

Keys and values are made of the latent before they are cached, so that the cache and its kernels are those of every
model; values are widened to the keys' width with zeros. Source: arXiv:2405.04434, 2.1.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from halve.kernels.ops import Array, Buffer, Ops
from halve.models.config import Latent, ModelConfig
from halve.models.names import Kind, latent_norms

LATENT_EPS = 1e-6  # of the norms of latents, whatever config.json says of the others


class Vectors(Protocol):
    """Where norm gains come from; `decoder.WeightSource`."""

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A float tensor."""


class LatentAttention:
    """Queries, keys and values of one layer."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops, source: Vectors) -> None:
        assert config.latent is not None
        self.latent: Latent = config.latent
        self.ops, self.num_heads, self.head_dim = ops, config.num_heads, config.head_dim
        self.norms = {
            part: ops.vector(source.vector(name, (size,))) for part, (name, size) in latent_norms(config, layer).items()
        }

    def __call__(self, projections: Mapping[Kind, Any], x: Buffer) -> tuple[Buffer, Buffer, Buffer, Buffer, Buffer]:
        """x [T, H] -> of queries the plain part [T, heads, P] and that to be rotated [T, heads * R], of keys the plain
        part and the rotated one that all heads share [T, R], and values [T, heads, V].
        """
        latent, heads = self.latent, self.num_heads
        q, kv = projections["qkv"](x)
        if latent.query_rank is not None:
            (q,) = projections["q_b"](self.ops.rms_norm(q, self.norms["q"], LATENT_EPS))
        of_both = self.ops.rms_norm(columns(kv, 0, latent.kv_rank), self.norms["kv"], LATENT_EPS)
        (made,) = projections["kv_b"](of_both)
        q = q.reshape(len(x), heads, self.head_dim)
        made = made.reshape(len(x), heads, latent.plain_dim + latent.value_dim)
        turned = columns(q, latent.plain_dim, self.head_dim).reshape(len(x), heads * latent.rope_dim)
        return (
            columns(q, 0, latent.plain_dim),
            turned,
            columns(made, 0, latent.plain_dim),
            columns(kv, latent.kv_rank, latent.kv_rank + latent.rope_dim),
            columns(made, latent.plain_dim, latent.plain_dim + latent.value_dim),
        )

    def whole(
        self, parts: tuple[Buffer, Buffer, Buffer, Buffer, Buffer], q_rope: Buffer, k_rope: Buffer
    ) -> tuple[Buffer, Buffer, Buffer]:
        """Queries, keys and values [T, heads * D] of the parts and of what was rotated."""
        q_plain, _, k_plain, _, values = parts
        tokens, heads, latent = len(q_plain), self.num_heads, self.latent
        q = joined([q_plain, q_rope.reshape(tokens, heads, latent.rope_dim)])
        shared = joined([k_rope.reshape(tokens, 1, latent.rope_dim)] * heads, axis=1)
        k = joined([k_plain, shared])
        room = self.head_dim - latent.value_dim
        v = joined([values, 0 * columns(k, 0, room)]) if room else values
        return q.reshape(tokens, -1), k.reshape(tokens, -1), v.reshape(tokens, -1)

    def values_of(self, attended: Buffer) -> Buffer:
        """[T, heads * D] -> [T, heads * V]."""
        tokens = len(attended)
        wide = attended.reshape(tokens, self.num_heads, self.head_dim)
        return columns(wide, 0, self.latent.value_dim).reshape(tokens, -1)


def columns(x: Buffer, start: int, stop: int) -> Buffer:
    """x[..., start:stop], contiguous."""
    part = x[..., start:stop]
    return np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part.contiguous()


def joined(parts: list[Buffer], axis: int = -1) -> Buffer:
    """Buffers of one kind side by side."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=axis)
    import torch

    return torch.cat(parts, dim=axis)
