"""The decoder's step as one program of fused operations, for Ops that run programs.

It says again what `decoder.py` says, in the operations that pay on a CPU: a norm rounds for the product behind it,
a product adds to the stream or gates, keys and queries are rotated where they are written and read. A test holds it
to the decoder. Hooks look at single operations, so a decoder with hooks runs without it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from halve.kernels.native import NativeOps
from halve.kernels.native_cache import KVCache, Step
from halve.kernels.native_checks import within
from halve.kernels.native_rows import Linear
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.program import Program, Rotation, checked_step
from halve.kernels.sampling import Sampled, SamplingBatch, broken, unsampled
from halve.models.config import ModelConfig, Rope
from halve.models.rope import inverse_frequencies

# A program's memory is laid out for so many at least, and for twice as many when it is outgrown.
LEAST_TOKENS = 32
LEAST_ROWS = 4


class CompiledSteps:
    """A decoder's steps over one cache. decoder: a `halve.models.Decoder` on `NativeOps`."""

    def __init__(self, decoder: Any, ops: NativeOps, cache: Sequence[KVCache]) -> None:
        self.decoder, self.ops, self.cache = decoder, ops, cache
        self._specs = [layer.attention_spec for layer in decoder.layers]
        self._programs: dict[bool, tuple[Program, Array]] = {}

    def logits(self, batch: TokenBatch, rows: Array) -> Array:
        """Run one step; float32 logits [R, vocab] of the given rows, valid until the next step."""
        return self._run(batch, rows, greedy=False)

    def sample(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """Run one step and choose a token for each of the given rows; full logits are made only where they matter."""
        if not sampling.plain_greedy:
            return self.ops.sample(self._run(batch, rows, greedy=False), sampling)
        ids = self._run(batch, rows, greedy=True)
        if (ids < 0).any():
            raise broken(int(np.flatnonzero(ids < 0)[0]), 1)
        sampled = unsampled(sampling, self.decoder.config.vocab_size)
        sampled.token_ids[:] = ids
        return sampled

    def program(self, batch: TokenBatch, rows: Array, *, greedy: bool) -> tuple[Program, Step]:
        """What runs for a batch, and the batch as it takes it: for measurements of its parts."""
        step = checked_step(batch, self._specs, self.cache, self.decoder.config.vocab_size)
        return self._program(greedy, batch.num_tokens, len(rows))[0], step

    def _run(self, batch: TokenBatch, rows: Array, *, greedy: bool) -> Array:
        step = checked_step(batch, self._specs, self.cache, self.decoder.config.vocab_size)
        rows = np.ascontiguousarray(rows, np.int32)
        within("row", rows, batch.num_tokens, "take rows of the batch")
        program, out = self._program(greedy, batch.num_tokens, len(rows))
        program.run(step, batch.token_ids, rows)
        return out[: len(rows)]

    def _program(self, greedy: bool, tokens: int, rows: int) -> tuple[Program, Array]:
        there = self._programs.get(greedy)
        if there is None:
            there = self._write(greedy, max(LEAST_TOKENS, tokens), max(LEAST_ROWS, rows))
        elif there[0].max_tokens < tokens or there[0].max_rows < rows:
            outgrown = there[0]
            most_tokens = max(2 * outgrown.max_tokens if tokens > outgrown.max_tokens else outgrown.max_tokens, tokens)
            most_rows = max(2 * outgrown.max_rows if rows > outgrown.max_rows else outgrown.max_rows, rows)
            there = self._write(greedy, most_tokens, most_rows)
        return there

    def _write(self, greedy: bool, max_tokens: int, max_rows: int) -> tuple[Program, Array]:
        program = Program(self.ops, max_tokens, max_rows)
        self._programs[greedy] = program, _write_step(program, self.decoder, self.cache, greedy=greedy)
        return self._programs[greedy]


def _write_step(program: Program, decoder: Any, cache: Sequence[KVCache], *, greedy: bool) -> Array:
    """Instructions of a whole step; the array that its logits, or its best tokens, come in."""
    config: ModelConfig = decoder.config
    x = program.floats(config.hidden_size)
    program.embed(decoder.embedding[1], x)
    ropes = {layer.spec.rope for layer in decoder.layers if layer.spec.rope is not None}
    rotations = {rope: program.rotation(inverse_frequencies(rope, config.head_dim)) for rope in ropes}
    work = _Work(program, config, rotations)
    for layer, layer_cache in zip(decoder.layers, cache, strict=True):
        work.attention(layer, layer_cache, x)
        work.feed_forward(layer, x)
    (head,) = decoder.head.linears
    last = program.prepare(x, head.layout, gain=decoder.final_norm, eps=config.rms_norm_eps, of_rows=True)
    if greedy:
        return program.best(last, head)
    logits = program.floats(config.vocab_size, of_rows=True)
    program.product(last, [head], [logits], of_rows=True)
    return logits


class _Work:
    """The memory that layers share, and what one layer adds to the program."""

    def __init__(self, program: Program, config: ModelConfig, rotations: dict[Rope, Rotation]) -> None:
        self.program, self.config, self.rotations = program, config, rotations
        self.queries, self.keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = program.floats(self.queries + 2 * self.keys)
        self.attended = program.floats(self.queries)
        self.inner = program.floats(config.intermediate_size)

    def attention(self, layer: Any, cache: KVCache, x: Array) -> None:
        """x += o(attention(qkv(norm(x))))."""
        q, k, v = np.split(self.qkv, [self.queries, self.queries + self.keys], axis=1)
        self._products(x, layer.projections["qkv"].linears, [q, k, v], gain=layer.norms[0])
        rotation = self.rotations.get(layer.spec.rope)
        self.program.write(k, v, cache, rotation)
        self.program.attend(q, self.attended, cache, layer.attention_spec, rotation=rotation, sinks=layer.sinks)
        self._products(self.attended, layer.projections["o"].linears, [x], add=True)

    def feed_forward(self, layer: Any, x: Array) -> None:
        """x += down(silu(gate(norm(x))) * up(norm(x)))."""
        gate, up = layer.projections["gate_up"].linears
        if gate.layout == up.layout:
            ready = self._prepare(x, gate, layer.norms[1])
            self.program.product(ready, [gate, up], [self.inner], gated=True)
        else:
            beside = self.program.floats(self.config.intermediate_size)
            self._products(x, [gate, up], [self.inner, beside], gain=layer.norms[1])
            self.program.silu_mul(self.inner, beside, self.inner)
        self._products(self.inner, layer.projections["down"].linears, [x], add=True)

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
