"""The decoder's step on CUDA: fused operations, recorded as a graph where every sequence gets one token.

It says again what `decoder.py` says, in the operations that pay on a GPU: a norm rounds for the product behind it,
products that share their input are one, a product adds to the stream, keys and queries are rotated where they are
written. A test holds it to the decoder. Hooks look at single operations, so a decoder with hooks runs without it.

A step that only decodes is padded to a bucket, the next of 1, 2, 4, 8, 16, 32, 64, ... sequences; rows of padding write
nothing and read nothing. The first step of a bucket runs launch by launch, which compiles and loads what it needs, and
is then recorded while the device works at it; from the second on it is one launch. Lengths and block tables lie in the
device's memory, so one graph serves all of them. Prompts run launch by launch: they keep the device busy for longer
than the host takes.

Nothing waits for the device but `Flight.result`, once a step. A token in flight is taken on the device from what the
step before chose.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve.core.errors import KernelError
from halve.kernels.cuda import attention
from halve.kernels.cuda.cache import CudaCache
from halve.kernels.cuda.graphs import CudaGraphs, Graphs
from halve.kernels.cuda.ops import CudaOps, Product, kept
from halve.kernels.cuda.staging import Staging, section
from halve.kernels.ops import Array, AttentionSpec, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.models.config import ModelConfig, Rope
from halve.models.rope import RopeTable

log = logging.getLogger("halve.models")

MOST_SEQUENCES = 1024  # of a graph; steps with more run launch by launch
BUCKETS = (1, 2, 4, 8, 16, 32, *range(64, 256, 32), *range(256, MOST_SEQUENCES + 1, 64))
MOST_ROWS = 1 << 16  # tokens that one step may choose
PAD = 16  # steps with prompts are padded to so many tokens, so that kernels are compiled for few shapes

Attend = Callable[[AttentionSpec, Tensor, CudaCache, Tensor | None], Tensor]


class Flight:
    """A step that was launched. `result` waits for its tokens."""

    def __init__(self, finish: Callable[[], Sampled]) -> None:
        self._finish = finish

    def result(self) -> Sampled:
        """The tokens. Raises HalveError naming the row for logits that gave none."""
        return self._finish()


class _Layer:
    """One layer's products and memory. layer: a `halve.models.decoder.DecoderLayer`."""

    def __init__(self, layer: Any, ops: CudaOps, cache: CudaCache, table: Tensor | None) -> None:
        self.spec: AttentionSpec = kept(layer.attention_spec)
        self.cache, self.table, self.sinks, self.norms = cache, table, layer.sinks, layer.norms
        products = {kind: Product(p.linears, p.after) for kind, p in layer.projections.items()}
        self.qkv, self.o, self.gate_up, self.down = (products[kind] for kind in ("qkv", "o", "gate_up", "down"))


class CapturedSteps:
    """A decoder's steps over one cache. decoder: a `halve.models.Decoder` on `CudaOps`.

    graphs: what records steps; None where there is no CUDA device, and every step runs launch by launch.
    """

    def __init__(self, decoder: Any, ops: CudaOps, cache: Sequence[CudaCache], graphs: Graphs | None = None) -> None:
        self.decoder, self.ops, self.cache = weakref.proxy(decoder), ops, cache  # as in `compiled.py`
        config: ModelConfig = decoder.config
        device = ops.torch_device
        self._graphs: Graphs | None = CudaGraphs(device) if graphs is None and device.type == "cuda" else graphs
        self._recorded: dict[int, Callable[[], None]] = {}
        self._eager: set[int] = set()  # buckets that can't be recorded
        first = cache[0]
        self._width = min(first.num_blocks, -(-config.context // first.block_size))
        self._buckets = [b for b in BUCKETS if b <= first.num_blocks] or [1]
        capacity = min(config.context, self._width * first.block_size)
        ropes = {layer.spec.rope for layer in decoder.layers if layer.spec.rope is not None}
        tables = {rope: _rope_table(rope, config.head_dim, capacity, device) for rope in ropes}
        self._layers = [
            _Layer(layer, ops, layer_cache, tables.get(layer.spec.rope))
            for layer, layer_cache in zip(decoder.layers, cache, strict=True)
        ]
        self._head = Product(decoder.head.linears, decoder.head.after)
        most = self._buckets[-1]
        self._staging = Staging(device, 4 * section(most) + most * self._width)
        self._loose = Staging(device, 4096, grows=True)
        self._tables = torch.full((most, self._width), -1, dtype=torch.int32, device=device)
        self._last = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)  # tokens of the step before, by row
        self._logits: dict[int, Tensor] = {}  # float32 [bucket, vocab]; graphs write to the one they know
        self._scratch: dict[int, attention.Scratch] = {}

    @property
    def recorded(self) -> list[int]:
        """The buckets that run as graphs."""
        return sorted(self._recorded)

    def replay(self, bucket: int) -> None:
        """Launch a recorded step once more, over what is staged (for measurements)."""
        self._recorded[bucket]()

    def logits(self, batch: TokenBatch, rows: Array) -> Array:
        """Run one step; float32 logits [R, vocab] of the given rows."""
        with torch.inference_mode(), self.ops.on_device():
            return self.ops.to_host(self._run(batch, np.asarray(rows, np.int32)))

    def sample(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """Run one step and choose a token for each of the given rows."""
        return self.submit(batch, rows, sampling).result()

    def submit(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Flight:
        """Launch one step; a token id of -1 - r is the token that the step before chose for its row r."""
        if len(rows) > MOST_ROWS:
            raise KernelError(f"rows: {len(rows)} tokens of one step, at most {MOST_ROWS}; lower max_num_seqs")
        with torch.inference_mode(), self.ops.on_device():
            logits = self._run(batch, np.asarray(rows, np.int32))
            ids, finish = self.ops.choose(logits, sampling)
            self._last[: len(rows)].copy_(ids)
            return Flight(finish)

    def _run(self, batch: TokenBatch, rows: Array) -> Tensor:
        """Logits float32 [R, vocab] on the device, valid until the next step."""
        size = batch.num_sequences
        one_each = batch.num_tokens == size and np.array_equal(rows, np.arange(size))
        bucket = next((b for b in self._buckets if b >= size), None) if one_each else None
        return self._run_mixed(batch, rows) if bucket is None else self._run_decode(batch, bucket)[:size]

    def _run_decode(self, batch: TokenBatch, bucket: int) -> Tensor:
        size = batch.num_sequences
        assert batch.slot_mapping is not None
        assert batch.block_tables is not None
        ids, positions, lengths = (np.zeros(bucket, np.int32) for _ in range(3))
        slots = np.full(bucket, -1, np.int32)
        ids[:size], positions[:size], slots[:size] = batch.token_ids, batch.positions, batch.slot_mapping
        lengths[:size] = batch.positions + 1
        tables = batch.block_tables
        *_, staged = self._staging.put([ids, positions, slots, lengths, np.ascontiguousarray(tables)])
        self._tables[:size, : tables.shape[1]].copy_(staged.view(tables.shape))
        if bucket not in self._logits:
            self._logits[bucket] = self._new_logits(bucket)
        if bucket in self._recorded:
            self._recorded[bucket]()
        else:
            self._decode(bucket)
            self._record(bucket)
        return self._logits[bucket]

    def _record(self, bucket: int) -> None:
        """Record what has just run once; the device is still at it."""
        if self._graphs is None or bucket in self._eager:
            return
        try:
            self._recorded[bucket] = self._graphs.capture(lambda: self._decode(bucket))
        except RuntimeError as error:  # a driver or library that records less than ours does: slower, never wrong
            log.warning("steps of %d sequences can't be recorded as a graph and run without: %s", bucket, error)
            self._eager.add(bucket)

    def _decode(self, bucket: int) -> None:
        """Launch a step of one token for each of `bucket` sequences, from what is staged to its `_logits`."""
        starts = [i * section(bucket) for i in range(4)]
        ids, positions, slots, lengths = (self._staging.ints[start : start + bucket] for start in starts)
        scratch = self._scratch_for(bucket)

        def attend(spec: AttentionSpec, q: Tensor, cache: CudaCache, sinks: Tensor | None) -> Tensor:
            return attention.decode(q, cache, self._tables[:bucket], lengths, spec, sinks=sinks, scratch=scratch)

        x = self._layers_over(ids, positions, slots, attend)
        self._head_over(x, self._logits[bucket])

    def _run_mixed(self, batch: TokenBatch, rows: Array) -> Tensor:
        """Prompts and decodes side by side: sequences with one token come first, as the scheduler has them."""
        assert batch.slot_mapping is not None
        assert batch.block_tables is not None
        num_tokens, num_rows = batch.num_tokens, len(rows)
        counts = np.diff(batch.cu_seqlens)
        several = np.flatnonzero(counts != 1)
        decodes = int(several[0]) if len(several) else len(counts)
        padded = -(-num_tokens // PAD) * PAD
        ids, positions = np.zeros(padded, np.int32), np.zeros(padded, np.int32)
        slots = np.full(padded, -1, np.int32)
        ids[:num_tokens], positions[:num_tokens] = batch.token_ids, batch.positions
        slots[:num_tokens] = batch.slot_mapping
        ends = batch.cu_seqlens[1:]
        lengths = batch.positions[ends - 1] + 1
        width = batch.block_tables.shape[1]
        tables = np.zeros((len(counts), -(-width // PAD) * PAD), np.int32)
        tables[:, :width] = batch.block_tables
        taken = np.zeros(-(-num_rows // PAD) * PAD, np.int32)
        taken[:num_rows] = rows
        parts = [ids, positions, slots, lengths[:decodes], tables[:decodes], lengths[decodes:], tables[decodes:]]
        parts += [batch.cu_seqlens[decodes:] - batch.cu_seqlens[decodes], taken]
        ids_, positions_, slots_, short, short_tables, long, long_tables, cu, taken_ = self._loose.put(parts)
        short_tables, long_tables = short_tables.view(-1, tables.shape[1]), long_tables.view(-1, tables.shape[1])
        scratch = self._scratch_for(next((b for b in BUCKETS if b >= decodes), decodes)) if decodes else None

        def attend(spec: AttentionSpec, q: Tensor, cache: CudaCache, sinks: Tensor | None) -> Tensor:
            out = torch.empty_like(q)
            out[num_tokens:].zero_()  # padding
            if decodes:
                attention.decode(
                    q[:decodes], cache, short_tables, short, spec, sinks=sinks, out=out[:decodes], scratch=scratch
                )
            if decodes < len(counts):
                attention.prefill(q[decodes:], cache, long_tables, cu, long, spec, sinks=sinks, out=out[decodes:])
            return out

        x = self._layers_over(ids_, positions_, slots_, attend)
        logits = self._new_logits(len(taken))
        if num_rows:
            self._head_over(x.index_select(0, taken_), logits)
        return logits[:num_rows]

    def _layers_over(self, ids: Tensor, positions: Tensor, slots: Tensor, attend: Attend) -> Tensor:
        """The stream bf16 [T, H] after the last layer; the tokens' keys and values are in the cache."""
        ops, eps = self.ops, self.decoder.config.rms_norm_eps
        flown = self._last.index_select(0, (-1 - ids).clamp_(min=0))
        known = torch.where(ids < 0, flown, ids).clamp_(min=0)  # a row that gave no token fails when it is asked for
        x = ops.embed_on_device(self.decoder.embedding, known)
        for layer in self._layers:
            qkv = layer.qkv.of_norm(x, layer.norms[0], eps)
            q = attention.rope_and_write(qkv, layer.cache, positions, slots, layer.table, layer.spec)
            layer.o.add_to(x, attend(layer.spec, q, layer.cache, layer.sinks))
            gate_up = layer.gate_up.of_norm(x, layer.norms[1], eps)
            layer.down.add_gated_to(x, gate_up)
        return x

    def _head_over(self, x: Tensor, logits: Tensor) -> None:
        self._head.of_norm(x, self.decoder.final_norm, self.decoder.config.rms_norm_eps, out=logits)

    def _new_logits(self, rows: int) -> Tensor:
        return torch.empty(rows, self.decoder.config.vocab_size, dtype=torch.float32, device=self.ops.torch_device)

    def _scratch_for(self, bucket: int) -> attention.Scratch:
        if bucket not in self._scratch:
            self._scratch[bucket] = attention.decode_scratch(bucket, self._layers[0].spec, self.ops.torch_device)
        return self._scratch[bucket]


def _rope_table(rope: Rope, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """float32 [positions, D]: cosines of the pairs, then sines."""
    cos, sin = RopeTable(head_dim).at(np.arange(positions, dtype=np.int32), rope)
    return torch.from_numpy(np.concatenate((cos, sin), axis=1)).to(device)
