"""One decoder for every family, over `Ops`: what a layer computes is its `LayerSpec`, never a copy of this file.

Shapes: T tokens of a flat batch, H hidden. No padding, no past_key_values; keys and values live in a paged cache.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from halve.core.errors import KernelError
from halve.formats import Weight
from halve.kernels.native import NativeOps
from halve.kernels.ops import Array, AttentionSpec, Buffer, FusingOps, Ops, Packed, TokenBatch
from halve.kernels.program import MOST_CHOSEN
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.models.compiled import CompiledSteps
from halve.models.config import ModelConfig, Rope
from halve.models.expert_cache import ExpertCache, ExpertCacheUse
from halve.models.latent import LatentAttention
from halve.models.moe import ROUTED, ExpertCounts, ExpertProjection, Hook, Router, sparse_feed_forward
from halve.models.names import (
    EMBEDDING,
    FINAL_NORM,
    FusedGroup,
    Kind,
    head_group,
    layer_groups,
    layer_norms,
    qk_norm_sizes,
    qk_norms,
    sinks_name,
)
from halve.models.rope import RopeTable

if TYPE_CHECKING:  # torch and triton load only where they compute
    from halve.models.captured import CapturedSteps, Flight


class WeightSource(Protocol):
    """Where a decoder takes its weights from: a checkpoint, or a checkpoint with some weights changed."""

    def weight(self, module: str, shape: tuple[int, int]) -> Weight | Packed:
        """The matrix of a module: as stored, or packed already for the Ops of the decoder."""

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A norm gain, a bias or a router, float32."""

    def forget(self) -> None:
        """What was read will not be read again soon: free what holds it."""


@runtime_checkable
class ExpertSource(WeightSource, Protocol):
    """A source whose experts are not all in memory; `offload.OffloadSource`."""

    @property
    def experts(self) -> ExpertCache:
        """Where they are."""

    def projection(self, group: FusedGroup) -> ExpertProjection:
        """The products of all experts of a layer, of one kind."""


class Projection:
    """A fused group on the device. Every product of the model goes through here, and so does every hook.

    after: what becomes of each output before a hook sees it: a sum over the ranks that hold parts of the matrix.
    """

    def __init__(self, group: FusedGroup, ops: Ops, source: WeightSource) -> None:
        self.group = group
        self.ops = ops
        self.hook: Hook | None = None
        self.after: Callable[[Buffer], Buffer] | None = None
        linears = [
            ops.linear(
                source.weight(m.name, m.shape),
                source.vector(f"{m.name}.bias", (m.shape[0],)) if m.bias else None,
            )
            for m in group.members
        ]
        self.linears = ops.fuse(linears) if isinstance(ops, FusingOps) else linears

    def __call__(self, x: Buffer) -> list[Buffer]:
        """[T, in] -> one [T, out] for each member."""
        outputs = [self.ops.project(linear, x) for linear in self.linears]
        if self.after:
            outputs = [self.after(output) for output in outputs]
        return self.hook(self.group, x, outputs) if self.hook else outputs


class DecoderLayer:
    """Attention and feed-forward, each behind a norm and added to the stream. Source: arXiv:2302.13971."""

    def __init__(self, config: ModelConfig, index: int, ops: Ops, source: WeightSource, rope: "RopeTable") -> None:
        spec = config.layers[index]
        self.config, self.spec, self.ops, self.rope = config, spec, ops, rope
        self.attention_spec = AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=spec.window,
            chunk=spec.chunk,
            kv_format=spec.kv_format,
        )
        self.norms = [ops.vector(source.vector(name, (config.hidden_size,))) for name in layer_norms(index)]
        self.sinks = ops.vector(source.vector(sinks_name(index), (config.num_heads,))) if spec.sinks else None
        self.qk_norms = None
        if spec.qk_norm == "after":
            self.qk_norms = [ops.vector(np.ones(config.head_dim, np.float32))] * 2
        elif spec.qk_norm is not None:
            sizes = zip(qk_norms(index), qk_norm_sizes(config, index), strict=True)
            self.qk_norms = [ops.vector(source.vector(name, (size,))) for name, size in sizes]
        self.projections: dict[Kind, Any] = {}
        for kind, group in layer_groups(config, index).items():
            if kind not in ROUTED or spec.experts is None:
                self.projections[kind] = Projection(group, ops, source)
            elif isinstance(source, ExpertSource):
                self.projections[kind] = source.projection(group)
            else:
                self.projections[kind] = ExpertProjection(group, ops, source)
        self.latent = LatentAttention(config, index, ops, source) if config.latent else None
        self.router = Router(config, index, ops, source) if spec.experts else None
        self.forced_rows = 0  # of calibration, see `sparse_feed_forward`
        self.following: DecoderLayer | None = None  # the next sparse layer, where experts are read ahead

    def __call__(self, x: Buffer, batch: TokenBatch, cache: Any | None = None) -> Buffer:
        """[T, H] -> [T, H]."""
        x = self.attend(x, batch, cache)
        return self.ops.add(x, self.feed_forward(x))

    @property
    def fused(self) -> bool:
        """Whether its experts, if it has any, run as one grouped product that a program can hold."""
        if self.router is None:
            return True
        routed = [self.projections[kind] for kind in ROUTED]
        grouped = all(isinstance(one, ExpertProjection) and one.grouped is not None for one in routed)
        return grouped and self.router.experts.top_k <= MOST_CHOSEN

    def attend(self, x: Buffer, batch: TokenBatch, cache: Any | None = None) -> Buffer:
        """The stream after attention, before the feed-forward: [T, H] -> [T, H]."""
        normed = self.ops.rms_norm(x, self.norms[0], self.config.rms_norm_eps)
        return self.ops.add(x, self._attention(normed, batch, cache))

    def normed(self, x: Buffer) -> Buffer:
        """The stream after attention as the feed-forward takes it."""
        return self.ops.rms_norm(x, self.norms[1], self.config.rms_norm_eps)

    def feed_forward(self, x: Buffer) -> Buffer:
        """What the feed-forward adds to the stream after attention."""
        return self._feed_forward(self.normed(x), None if self.following is None else partial(self._look_ahead, x))

    def _attention(self, x: Buffer, batch: TokenBatch, cache: Any | None) -> Buffer:
        q, k, v = self._qkv(x, batch.positions) if self.latent is None else self._of_latents(x, batch.positions)
        if (scale := self._query_scale(batch.positions)) is not None:
            q = q * _column(scale, q)
        attended = self.ops.attention(q, k, v, batch, self.attention_spec, cache, self.sinks)
        (out,) = self.projections["o"](attended if self.latent is None else self.latent.values_of(attended))
        return out

    def _qkv(self, x: Buffer, positions: Array) -> tuple[Buffer, Buffer, Buffer]:
        q, k, v = self.projections["qkv"](x)
        if self.qk_norms is not None and self.spec.qk_norm != "after":
            q, k = (self._head_normed(one, gain) for one, gain in zip((q, k), self.qk_norms, strict=True))
        if self.spec.rope is not None:
            q, k = (self._rotated(one, positions, self.spec.rope) for one in (q, k))
        if self.qk_norms is not None and self.spec.qk_norm == "after":
            q, k = (self._head_normed(one, gain) for one, gain in zip((q, k), self.qk_norms, strict=True))
        return q, k, v

    def _of_latents(self, x: Buffer, positions: Array) -> tuple[Buffer, Buffer, Buffer]:
        assert self.latent is not None
        parts = self.latent(self.projections, x)
        q_rope, k_rope = parts[1], parts[3]
        if self.spec.rope is not None:
            q_rope, k_rope = (self._rotated(one, positions, self.spec.rope) for one in (q_rope, k_rope))
        return self.latent.whole(parts, q_rope, k_rope)

    def _rotated(self, x: Buffer, positions: Array, rope: Rope) -> Buffer:
        """Heads [T, heads * R] turned by their positions; neighbours of a pair come to lie half a head apart first."""
        dim = self.config.rotary_dim
        if rope.interleaved:
            x = x.reshape(len(x), -1, dim // 2, 2).swapaxes(-1, -2).reshape(x.shape)
        cos, sin = self.rope.at(positions, rope)
        return self.ops.rope(x, cos, sin, dim)

    def _query_scale(self, positions: Array) -> Array | None:
        """What queries are multiplied by, float32 [T]; None for nothing."""
        if self.spec.temperature is None:
            return None if self.spec.query_scale == 1 else np.full(len(positions), self.spec.query_scale, np.float32)
        floor, scale = self.spec.temperature
        steps = np.floor((positions.astype(np.float32) + 1) / np.float32(floor))
        found: Array = (np.log1p(steps) * np.float32(scale) + 1) * np.float32(self.spec.query_scale)
        return found

    def _head_normed(self, x: Buffer, gain: Buffer) -> Buffer:
        """Queries or keys [T, heads * D] normed, each head by itself or all of a token's together."""
        rows = x if self.spec.qk_norm == "row" else x.reshape(-1, self.config.head_dim)
        return self.ops.rms_norm(rows, gain, self.config.rms_norm_eps).reshape(x.shape)

    def _look_ahead(self, x: Buffer) -> None:
        """Tell the next sparse layer what it would ask for if nothing were added to the stream until there."""
        following = self.following
        assert following is not None
        assert following.router is not None
        following.projections["gate_up"].held.expect(following.router.likely(following.normed(x)))

    def _feed_forward(self, x: Buffer, ahead: Callable[[], None] | None = None) -> Buffer:
        if self.router is not None:
            return sparse_feed_forward(self.ops, self.router, self.projections, x, self.forced_rows, ahead)
        gate, up = self.projections["gate_up"](x)
        (out,) = self.projections["down"](self.ops.silu_mul(gate, up))
        return out


class Decoder:
    """A whole model on one device."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        source: WeightSource,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config, self.ops = config, ops
        self.embedding = ops.table(source.weight(EMBEDDING, (config.vocab_size, config.hidden_size)))
        rope = RopeTable(config.rotary_dim)
        self.layers: list[DecoderLayer] = []
        for index in range(config.num_layers):
            self.layers.append(DecoderLayer(config, index, ops, source, rope))
            source.forget()  # else a model is there twice for a while: as it is held here, and as mapped files
            if progress:
                progress(index + 1, config.num_layers)
        self.final_norm = ops.vector(source.vector(FINAL_NORM, (config.hidden_size,)))
        self.head = Projection(head_group(config), ops, source)
        source.forget()
        self._experts = source.experts if isinstance(source, ExpertSource) else None
        if self._experts is not None:
            for layer, following in pairwise(layer for layer in self.layers if layer.router is not None):
                layer.following = following
        self._fused = config.fused and self._experts is None and all(layer.fused for layer in self.layers)
        self._compiled: CompiledSteps | None = None
        self._captured: CapturedSteps | None = None

    def copied(self) -> "Decoder":
        """The same model over the same weights, whose layers may be changed; its steps are not compiled."""
        made = copy.copy(self)
        made.layers = [copy.copy(layer) for layer in self.layers]
        made._fused, made._compiled, made._captured = False, None, None
        return made

    def projections(self) -> Iterator[Projection | ExpertProjection]:
        """Every projection, in the order they run."""
        for layer in self.layers:
            yield from layer.projections.values()
        yield self.head

    def expert_counts(self) -> list[ExpertCounts]:
        """How often the experts of each sparse layer were asked since the model was made."""
        return [layer.router.counts for layer in self.layers if layer.router is not None]

    def expert_cache(self) -> ExpertCacheUse | None:
        """What the cache of experts has done since the model was made; None where all are in memory."""
        return None if self._experts is None else self._experts.use()

    def close(self) -> None:
        """End the threads that read experts, where there are any; they end with the decoder too."""
        if self._experts is not None:
            self._experts.close()

    def new_cache(self, num_blocks: int, block_size: int) -> list[Any]:
        """An empty paged cache, one entry a layer."""
        return [self.ops.kv_cache(num_blocks, block_size, layer.attention_spec) for layer in self.layers]

    def hidden(self, batch: TokenBatch, cache: Sequence[Any] | None = None) -> Buffer:
        """Final hidden states after the last norm, [T, H]."""
        x = self.ops.embed(self.embedding, batch.token_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, batch, None if cache is None else cache[i])
        return self.ops.rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: Buffer) -> Buffer:
        """[R, H] -> [R, vocab]."""
        (out,) = self.head(hidden)
        return out

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's result is the same to the bit whatever else is in the batch."""
        return self.ops.batch_invariant

    @property
    def runs_ahead(self) -> bool:
        """Whether a step can be submitted before the tokens of the one before are known."""
        return self.ops.name == "cuda" and self.config.plain

    def step(self, batch: TokenBatch, cache: Sequence[Any], rows: Array) -> Array:
        """Run one step over the cache and return float32 logits of the given rows of the batch, [R, vocab]."""
        if steps := self._compiled_for(cache):
            return steps.logits(batch, rows).copy()
        if captured := self._captured_for(cache):
            return captured.logits(batch, rows).copy()
        hidden = self.ops.take_rows(self.hidden(batch, cache), np.asarray(rows))
        return self.ops.to_host(self.logits(hidden))

    def sample(self, batch: TokenBatch, cache: Sequence[Any], rows: Array, sampling: SamplingBatch) -> Sampled:
        """Run one step over the cache and choose a token for each of the given rows int32 [R] of the batch."""
        if steps := self._compiled_for(cache):
            return steps.sample(batch, rows, sampling)
        if captured := self._captured_for(cache):
            return captured.sample(batch, rows, sampling)
        hidden = self.ops.take_rows(self.hidden(batch, cache), np.asarray(rows))
        return self.ops.sample(self.logits(hidden), sampling)

    def submit(self, batch: TokenBatch, cache: Sequence[Any], rows: Array, sampling: SamplingBatch) -> "Flight":
        """Begin what `sample` does; the result tells its tokens. A token id of -1 - r is the token that the step
        before chose for its row r.

        Raises KernelError for Ops that compute on the host, and with hooks, which look at one operation at a time.
        """
        captured = self._captured_for(cache)
        if captured is None:
            raise KernelError(f"{self.ops.name} kernels with or without hooks don't run ahead here; take `sample`")
        return captured.submit(batch, rows, sampling)

    def _captured_for(self, cache: Sequence[Any]) -> "CapturedSteps | None":
        """The step over this cache in fused operations on CUDA, where no hook wants to look in."""
        if not self.runs_ahead or any(p.hook for p in self.projections()):
            return None
        if self._captured is None or self._captured.cache is not cache:
            from halve.models.captured import CapturedSteps

            self._captured = CapturedSteps(self, self.ops, cache)  # type: ignore[arg-type]  # CudaOps, by their name
        return self._captured

    def _compiled_for(self, cache: Sequence[Any]) -> "CompiledSteps | None":
        """The step over this cache as one program, where the Ops run programs and no hook wants to look in."""
        if not isinstance(self.ops, NativeOps) or not self._fused or any(p.hook for p in self.projections()):
            return None
        if self._compiled is None or self._compiled.cache is not cache:
            self._compiled = CompiledSteps(self, self.ops, cache)
        return self._compiled

    def copy_blocks(self, cache: Sequence[Any], pairs: Array) -> None:
        """Copy blocks of the cache in every layer: pairs int32 [n, 2], (from, to)."""
        for layer in cache:
            self.ops.copy_blocks(layer, pairs)


def _column(values: Array, like: Buffer) -> Any:
    """float32 [T] as a column beside a buffer of [T, ..], of its kind."""
    if isinstance(like, np.ndarray):
        return values[:, None]
    import torch

    return torch.from_numpy(values).to(like.device, like.dtype)[:, None]
