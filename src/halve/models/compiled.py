"""The decoder's step as one program of fused operations, for Ops that run programs.

It says again what `decoder.py` and `moe.py` say, in the operations that pay on a CPU: a norm rounds for the product
behind it, a product adds to the stream or gates, keys and queries are rotated where they are written and read, a row
of a token is rounded once for all its experts. Tests hold it to the decoder. Hooks look at single operations, so a
decoder with hooks runs without it.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from halve.kernels.native import NativeOps
from halve.kernels.native_cache import KVCache, Step
from halve.kernels.native_checks import within
from halve.kernels.native_rows import Linear
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.program import MOST_CANDIDATES, BrokenRouteError, Program, Rotation, checked_step
from halve.kernels.sampling import Sampled, SamplingBatch, unsampled
from halve.models.config import Experts, ModelConfig, Rope
from halve.models.rope import inverse_frequencies

# A program's memory is laid out for so many at least, and for twice as many when it is outgrown.
LEAST_TOKENS = 32
LEAST_ROWS = 4

Outputs = tuple[Array, ...]  # all logits, or the values and the ids of `Program.likeliest`


class CompiledSteps:
    """A decoder's steps over one cache. decoder: a `halve.models.Decoder` on `NativeOps`, which must live as long."""

    def __init__(self, decoder: Any, ops: NativeOps, cache: Sequence[KVCache]) -> None:
        # The decoder keeps its steps: without a weak reference its weights would wait for the garbage collector.
        self.decoder, self.ops, self.cache = weakref.proxy(decoder), ops, cache
        self._specs = [layer.attention_spec for layer in decoder.layers]
        self._programs: dict[bool, tuple[Program, Outputs]] = {}

    def logits(self, batch: TokenBatch, rows: Array) -> Array:
        """Run one step; float32 logits [R, vocab] of the given rows, valid until the next step."""
        (logits,) = self._run(batch, rows)
        return logits[: len(rows)]

    def sample(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """Run one step and choose a token for each of the given rows; full logits are made only where they matter."""
        k = sampling.num_candidates
        if k is None or k > MOST_CANDIDATES:
            return self.ops.sample(self.logits(batch, rows), sampling)
        values, ids = (part[: len(rows) * k].reshape(-1, k) for part in self._run(batch, rows, k))
        if sampling.plain_greedy and np.isfinite(values).all():
            sampled = unsampled(sampling, k)
            sampled.token_ids[:] = ids[:, 0]
            return sampled
        sampled = self.ops.sample(values, sampling)  # which also says which row is broken
        sampled.token_ids[:] = np.take_along_axis(ids, sampled.token_ids[:, None], axis=1)[:, 0]
        return sampled

    def program(self, batch: TokenBatch, rows: Array, *, full: bool) -> tuple[Program, Step]:
        """What runs for a batch, and the batch as it takes it: for measurements of its parts."""
        step = checked_step(batch, self._specs, self.cache, self.decoder.config.vocab_size)
        return self._program(full, batch.num_tokens, len(rows))[0], step

    def _run(self, batch: TokenBatch, rows: Array, num_candidates: int | None = None) -> Outputs:
        """Memory with the logits of the rows, or with the values and ids of their likeliest tokens."""
        step = checked_step(batch, self._specs, self.cache, self.decoder.config.vocab_size)
        rows = np.ascontiguousarray(rows, np.int32)
        within("row", rows, batch.num_tokens, "take rows of the batch")
        program, out = self._program(num_candidates is None, batch.num_tokens, len(rows))
        try:
            program.run(step, batch.token_ids, rows, num_candidates or 1)
        except BrokenRouteError as error:
            routers = [layer.router for layer in self.decoder.layers if layer.router is not None]
            raise routers[error.index].broken() from None
        return out

    def _program(self, full: bool, tokens: int, rows: int) -> tuple[Program, Outputs]:
        there = self._programs.get(full)
        if there is None:
            there = self._write(full, max(LEAST_TOKENS, tokens), max(LEAST_ROWS, rows))
        elif there[0].max_tokens < tokens or there[0].max_rows < rows:
            outgrown = there[0]
            most_tokens = max(2 * outgrown.max_tokens if tokens > outgrown.max_tokens else outgrown.max_tokens, tokens)
            most_rows = max(2 * outgrown.max_rows if rows > outgrown.max_rows else outgrown.max_rows, rows)
            there = self._write(full, most_tokens, most_rows)
        return there

    def _write(self, full: bool, max_tokens: int, max_rows: int) -> tuple[Program, Outputs]:
        program = Program(self.ops, max_tokens, max_rows)
        self._programs[full] = program, _write_step(program, self.decoder, self.cache, full=full)
        return self._programs[full]


def _write_step(program: Program, decoder: Any, cache: Sequence[KVCache], *, full: bool) -> Outputs:
    """Instructions of a whole step, and what its results come in."""
    config: ModelConfig = decoder.config
    x = program.floats(config.hidden_size)
    program.embed(decoder.embedding[1], x)
    ropes = {layer.spec.rope for layer in decoder.layers if layer.spec.rope is not None}
    rotations = {
        rope: program.rotation(inverse_frequencies(rope, config.head_dim), rope.attention_factor) for rope in ropes
    }
    work = _Work(program, config, rotations)
    for layer, layer_cache in zip(decoder.layers, cache, strict=True):
        work.attention(layer, layer_cache, x)
        if layer.router is None:
            work.feed_forward(layer, x)
        else:
            work.sparse_feed_forward(layer, x)
    (head,) = decoder.head.linears
    last = program.prepare(x, head.layout, gain=decoder.final_norm, eps=config.rms_norm_eps, of_rows=True)
    if not full:
        return program.likeliest(last, head)
    logits = program.floats(config.vocab_size, of_rows=True)
    program.product(last, [head], [logits], of_rows=True)
    return (logits,)


class _Work:
    """The memory that layers share, and what one layer adds to the program."""

    def __init__(self, program: Program, config: ModelConfig, rotations: dict[Rope, Rotation]) -> None:
        self.program, self.config, self.rotations = program, config, rotations
        self.queries, self.keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = program.floats(self.queries + 2 * self.keys)
        self.attended = program.floats(self.queries)
        self._buffers: dict[tuple[str, int, int], Array] = {}

    def _floats(self, what: str, width: int, per_token: int = 1) -> Array:
        """Memory that all layers use for one purpose."""
        key = (what, width, per_token)
        if key not in self._buffers:
            self._buffers[key] = self.program.floats(width, per_token=per_token)
        return self._buffers[key]

    def attention(self, layer: Any, cache: KVCache, x: Array) -> None:
        """x += o(attention(qkv(norm(x))))."""
        q, k, v = np.split(self.qkv, [self.queries, self.queries + self.keys], axis=1)
        self._products(x, layer.projections["qkv"].linears, [q, k, v], gain=layer.norms[0])
        for part, gain_of in zip((q, k), layer.qk_norms or (), strict=False):
            self.program.norm(part, gain_of, self.config.rms_norm_eps)
        rotation = self.rotations.get(layer.spec.rope)
        self.program.write(k, v, cache, rotation)
        self.program.attend(q, self.attended, cache, layer.attention_spec, rotation=rotation, sinks=layer.sinks)
        self._products(self.attended, layer.projections["o"].linears, [x], add=True)

    def feed_forward(self, layer: Any, x: Array) -> None:
        """x += down(silu(gate(norm(x))) * up(norm(x)))."""
        inner = self._gated(layer.projections["gate_up"].linears, x, layer.norms[1])
        self._products(inner, layer.projections["down"].linears, [x], add=True)

    def _gated(self, linears: list[Linear], x: Array, gain: Array) -> Array:
        """silu(gate(norm(x))) * up(norm(x))."""
        gate, up = linears
        width = gate.matrix.out_features
        inner = self._floats("inner", width)
        if gate.layout == up.layout:
            self.program.product(self._prepare(x, gate, gain), [gate, up], [inner], gated=True)
        else:
            beside = self._floats("beside", width)
            self._products(x, [gate, up], [inner, beside], gain=gain)
            self.program.silu_mul(inner, beside, inner)
        return inner

    def sparse_feed_forward(self, layer: Any, x: Array) -> None:
        """x += the weighted sum of what a token's experts make of norm(x), and an expert that all tokens go through."""
        router, program, gain = layer.router, self.program, layer.norms[1]
        experts: Experts = router.experts
        logits = self._floats("logits", experts.num_experts)
        self._products(x, [router.linear], [logits], gain=gain)
        places = program.route(
            logits,
            experts.top_k,
            renormalize=experts.renormalize,
            scale=experts.scale,
            counted=router.counts.tokens,
            totals=router.counts.totals,
        )
        inner = self._floats("inner", experts.intermediate_size, experts.top_k)
        outputs = self._floats("outputs", self.config.hidden_size, experts.top_k)
        for layout, each in layer.projections["gate_up"].grouped.by_layout.items():
            ready = program.prepare(x, layout, gain=gain, eps=self.config.rms_norm_eps)
            program.experts(ready, places, layout, each, inner, brought=True, clamp=experts.clamp)
        for layout, each in layer.projections["down"].grouped.by_layout.items():
            ready = program.prepare(inner, layout, per_token=experts.top_k)
            program.experts(ready, places, layout, each, outputs, brought=False)
        shared = shares = None
        if experts.shared_size:
            shared = self._floats("shared", self.config.hidden_size)
            within = self._gated(layer.projections["shared_gate_up"].linears, x, gain)
            self._products(within, layer.projections["shared_down"].linears, [shared])
            if router.shared_gate is not None:
                shares = self._floats("shares", 1)
                self._products(x, [router.shared_gate], [shares], gain=gain)
        program.combine(outputs, places, x, shared=shared, shares=shares)

    def _prepare(self, x: Array, linear: Linear, gain: Array | None) -> Any:
        return self.program.prepare(x, linear.layout, gain=gain, eps=self.config.rms_norm_eps)

    def _products(
        self, x: Array, linears: list[Linear], outputs: list[Array], *, gain: Array | None = None, add: bool = False
    ) -> None:
        """Products of one input, those that take it alike together."""
        for layout in dict.fromkeys(linear.layout for linear in linears):
            members = [i for i, linear in enumerate(linears) if linear.layout == layout]
            ready = self._prepare(x, linears[members[0]], gain)
            self.program.product(ready, [linears[i] for i in members], [outputs[i] for i in members], add=add)
