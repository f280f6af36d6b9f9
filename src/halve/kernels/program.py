"""A whole step as one call into C++: instructions over memory that is laid out once (csrc/program.h).

Python's share of a step is then filling in a batch, and the interpreter's lock is free while the step runs. Memory
between instructions is shared by all layers; what a layer leaves behind is its keys, its values and the stream.
"""

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halve.core.errors import KernelError
from halve.kernels.native import NativeOps
from halve.kernels.native_cache import AttentionRecord, KVCache, KvWriteRecord, Step
from halve.kernels.native_checks import check_batch, int32, within
from halve.kernels.native_library import library
from halve.kernels.native_rows import Linear
from halve.kernels.ops import Array, AttentionSpec, TokenBatch
from halve.kernels.packed import PackedMatrix, aligned_bytes
from halve.kernels.products import (
    MAX_MEMBERS,
    ROUNDINGS,
    ActivationsRecord,
    InputLayout,
    LikeliestRecord,
    PrepareRecord,
    ProductRecord,
    product_record,
    rows_of,
)

OPERATIONS = (
    *("embed", "angles", "prepare", "product", "reduce", "silu_mul", "kv_write", "attention"),
    *("norm", "route", "experts", "combine"),
)
_EMBED, _ANGLES, _PREPARE, _PRODUCT, _REDUCE, _SILU_MUL, _KV_WRITE, _ATTENTION = range(8)
_NORM, _ROUTE, _EXPERTS, _COMBINE = range(8, 12)
NAN_LOGITS = 3  # what a run returns then
MOST_CHOSEN = 64  # experts of a token, as csrc/experts.h has it
BEST_BYTES = 8  # `Best` of csrc/products.h
MOST_CANDIDATES = 64  # as csrc/products.h has it


def _record(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_Instruction = _record("Instruction", operation=_I32, of_rows=_I32, per_token=_I64, record=_P)
_Embed = _record("Embed", table=_P, ids=_P, y=_P)
_Angles = _record("Angles", frequencies=_P, cos=_P, sin=_P, half=_I64, factor=_F32)
_Reduce = _record("Reduce", likeliest=LikeliestRecord, rows=_I64, logits=_P, ids=_P)
_Gate = _record("Gate", gate=_P, up=_P, out=_P, width=_I64)
_Norm = _record("Norm", x=_P, gain=_P, y=_P, x_stride=_I64, y_stride=_I64, parts=_I64, width=_I64, eps=_F32)
_Route = _record(
    "Route",
    **{"logits": _P, "experts": _I64, "top_k": _I64, "renormalize": _I32, "scale": _F32},
    **dict.fromkeys(("chosen", "weights", "places", "tokens", "offsets", "counted", "totals", "broken"), _P),
)
_Experts = _record(
    "Experts",
    **{"route": _P, "each": _P, "tokens": ActivationsRecord, "places": ActivationsRecord, "row_bytes": _I64 * 5},
)
_Combine = _record("Combine", route=_P, y=_P, shared=_P, shares=_P, x=_P, width=_I64)
_StepInput = _record("StepInput", batch=_P, token_ids=_P, rows=_P, num_rows=_I64, num_candidates=_I64)

Rotation = tuple[Array, Array]  # cos, sin float32 [T, D / 2]


class BrokenRouteError(Exception):
    """A `Program.route` met NaN in its logits. index: which, from 0."""

    def __init__(self, index: int) -> None:
        super().__init__(f"route {index} met NaN")
        self.index = index


@dataclass(frozen=True, slots=True)
class Places:
    """Where a program's tokens go, sorted by expert. broken: int32 [1], 1 where the last step's logits held NaN."""

    record: ctypes.Structure
    broken: Array

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return int(self.record.top_k)


class Program:
    """Instructions for steps of up to max_tokens tokens, of which up to max_rows rows of logits are wanted.

    Arrays handed to it must stay where they are; it keeps them alive. Made once, run by one thread at a time.
    """

    def __init__(self, ops: NativeOps, max_tokens: int, max_rows: int) -> None:
        self.ops, self.max_tokens, self.max_rows = ops, max_tokens, max_rows
        self._instructions: list[tuple[int, bool, int, ctypes.Structure]] = []
        self._inputs: dict[tuple[InputLayout, bool, int, bool], ActivationsRecord] = {}
        self._routes: list[Places] = []
        self._kept: list[Any] = []
        self._compiled: Any = None

    def floats(self, width: int, *, of_rows: bool = False, per_token: int = 1) -> Array:
        """Float32 [max_tokens * per_token or max_rows, width] to work in."""
        rows = self.max_rows if of_rows else self.max_tokens * per_token
        array = aligned_bytes(4 * rows * width).view(np.float32).reshape(rows, width)
        self._kept.append(array)
        return array

    def embed(self, table: PackedMatrix, out: Array) -> None:
        """Rows of a table for the step's tokens."""
        self._add(_EMBED, _Embed(table=table.address, y=out.ctypes.data), keep=(table, out))

    def rotation(self, frequencies: Array, factor: float = 1.0) -> Rotation:
        """cos and sin of the step's positions times frequencies, float32 [D / 2] radians a position, times factor."""
        half = len(frequencies)
        cos, sin = self.floats(half), self.floats(half)
        addresses = (frequencies.ctypes.data, cos.ctypes.data, sin.ctypes.data)
        self._add(_ANGLES, _Angles(*addresses, half, factor), keep=(frequencies, cos, sin))
        return cos, sin

    def prepare(
        self,
        x: Array,
        layout: InputLayout,
        *,
        gain: Array | None = None,
        eps: float = 0.0,
        of_rows: bool = False,
        per_token: int = 1,
    ) -> ActivationsRecord:
        """x as products of that layout take it, after RMSNorm where there is a gain; valid until the next of its kind.

        of_rows: only the rows whose logits are wanted, in their order. per_token: rows of x for each token.
        """
        if gain is None and layout.rounding == "fp32" and not of_rows:
            return layout.record({"values": x.ctypes.data})
        record_of = self._input(layout, of_rows=of_rows, per_token=per_token)
        record = PrepareRecord(
            x=x.ctypes.data,
            gain=None if gain is None else gain.ctypes.data,
            out=record_of,
            x_stride=x.shape[1],
            width=layout.width,
            eps=eps,
            rounding=ROUNDINGS[layout.rounding],
        )
        self._add(_PREPARE, record, of_rows=of_rows, per_token=per_token, keep=(x, gain))
        return record_of

    def _input(
        self, layout: InputLayout, *, of_rows: bool = False, per_token: int = 1, brought: bool = False
    ) -> ActivationsRecord:
        """Memory for prepared rows. brought: that were prepared elsewhere."""
        key = (layout, of_rows, per_token, brought)
        if key not in self._inputs:
            rows = self.max_rows if of_rows else self.max_tokens * per_token
            self._inputs[key], arrays = layout.allocate(rows)
            self._kept.append(arrays)
        return self._inputs[key]

    def product(
        self,
        x: ActivationsRecord,
        linears: Sequence[Linear],
        outputs: Sequence[Array],
        *,
        add: bool = False,
        gated: bool = False,
        of_rows: bool = False,
    ) -> None:
        """x times matrices that share its layout, into outputs (added to them where `add`).

        gated: two matrices, one output: silu(x W0) * (x W1).
        """
        assert len({linear.layout for linear in linears}) == 1
        assert len(linears) <= MAX_MEMBERS
        record = product_record(
            x,
            [linear.matrix for linear in linears],
            [linear.bias for linear in linears],
            [rows_of(output) for output in outputs],
            rounding=linears[0].activations,
            add=add,
            gated=gated,
        )
        self._add(_PRODUCT, record, of_rows=of_rows, keep=(*linears, *outputs))

    def likeliest(self, x: ActivationsRecord, linear: Linear) -> tuple[Array, Array]:
        """The k largest outputs of each wanted row, equals to the lowest, in place of all of them.

        k is told to `run`. Returns the outputs, float32, and which they are, int32, both [max_rows * MOST_CANDIDATES]
        of which a run fills [rows, k]: in their order; -infinity where there are fewer, infinity in a row with NaN.
        """
        places, size = self.ops.num_threads, self.max_rows * MOST_CANDIDATES
        parts = {
            "lists": aligned_bytes(BEST_BYTES * places * size),
            "held": np.zeros(places * self.max_rows, np.int32),
            "floors": np.full(self.max_rows, np.finfo(np.float32).min, np.float32),
            "taken": np.zeros(places, np.int32),
        }
        likeliest = LikeliestRecord(places=places, **{name: part.ctypes.data for name, part in parts.items()})
        values, ids = np.zeros(size, np.float32), np.zeros(size, np.int32)
        record: ProductRecord = product_record(x, [linear.matrix], [linear.bias], [], rounding=linear.activations)
        record.likeliest = likeliest
        self._add(_PRODUCT, record, of_rows=True, keep=(linear, parts))
        reduce = _Reduce(likeliest, logits=values.ctypes.data, ids=ids.ctypes.data)
        self._add(_REDUCE, reduce, of_rows=True, keep=(values, ids))
        return values, ids

    def silu_mul(self, gate: Array, up: Array, out: Array) -> None:
        """silu(gate) * up."""
        addresses = (gate.ctypes.data, up.ctypes.data, out.ctypes.data)
        self._add(_SILU_MUL, _Gate(*addresses, gate.shape[1]), keep=(gate, up, out))

    def norm(self, x: Array, gain: Array, eps: float) -> None:
        """RMSNorm in place of each len(gain) values that lie side by side in a row of x, columns of a wider array."""
        (at, stride), width = rows_of(x), len(gain)
        parts = x.shape[1] // width
        record = _Norm(at, gain.ctypes.data, at, stride, stride, parts, width, eps)
        self._add(_NORM, record, keep=(x, gain))

    def route(
        self, logits: Array, top_k: int, *, renormalize: bool, scale: float, counted: Array, totals: Array
    ) -> Places:
        """Send tokens to the experts of their largest logits [T, experts] (`Route` of csrc/experts.h).

        counted: int64 [experts], to which each step adds its tokens; totals: int64 [2], to which it adds itself and the
        experts that were asked.
        """
        experts, size = logits.shape[1], self.max_tokens * top_k
        assert 0 < top_k <= min(experts, MOST_CHOSEN)
        chosen, at, tokens = (np.zeros(size, np.int32) for _ in range(3))
        weights, offsets, broken = np.zeros(size, np.float32), np.zeros(experts + 1, np.int32), np.zeros(1, np.int32)
        arrays = (chosen, weights, at, tokens, offsets, counted, totals, broken)
        record = _Route(logits.ctypes.data, experts, top_k, renormalize, scale, *(one.ctypes.data for one in arrays))
        places = Places(record, broken)
        self._routes.append(places)
        self._add(_ROUTE, record, keep=(logits, arrays))
        return places

    def experts(
        self,
        x: ActivationsRecord,
        places: Places,
        layout: InputLayout,
        each: Sequence[Sequence[Linear]],
        output: Array,
        *,
        brought: bool,
        clamp: tuple[float, float] | None = None,
    ) -> None:
        """Products of rows that lie by expert, each with its own expert's matrices, into output [T * top_k, N].

        x: prepared rows of the places, of that layout; or of the tokens, which are then brought to their places. each:
        one matrix of every expert, or two that gate: silu(x W0) * (x W1), or as `clamp` says; none of an expert whose
        rows of the output are left as they are.
        """
        records = (ProductRecord * len(each))()
        for e, linears in enumerate(each):
            if not linears:
                continue
            records[e] = product_record(
                ActivationsRecord(),
                [linear.matrix for linear in linears],
                [linear.bias for linear in linears],
                [rows_of(output)],
                rounding=layout.rounding,
                gated=len(linears) == 2,
                clamp=clamp,
            )
        sizes = layout.parts()
        if layout.codes or layout.bf16:
            sizes.pop("values")  # which norms left there
        row_bytes = (_I64 * 5)(*(sizes.get(part, 0) for part in ("values", "codes", "wide", "scale", "starts")))
        tokens, there = ActivationsRecord(), x
        if brought:
            tokens, there = x, self._input(layout, per_token=places.top_k, brought=True)
        record = _Experts(ctypes.addressof(places.record), ctypes.addressof(records), tokens, there, row_bytes)
        self._add(_EXPERTS, record, keep=(places, records, each, output))

    def combine(
        self, y: Array, places: Places, x: Array, *, shared: Array | None = None, shares: Array | None = None
    ) -> None:
        """x += the weighted sum over each token's experts of y [T * top_k, H], and one for all, `shared` [T, H].

        shares: logits [T, 1] whose sigmoid `shared` is multiplied by.
        """
        beside = (None if one is None else one.ctypes.data for one in (shared, shares))
        record = _Combine(ctypes.addressof(places.record), y.ctypes.data, *beside, x.ctypes.data, x.shape[1])
        self._add(_COMBINE, record, keep=(y, places, x, shared, shares))

    def write(self, k: Array, v: Array, cache: KVCache, rotation: Rotation | None) -> None:
        """Keys, rotated, and values into their slots of the cache; k and v may be columns of a wider array."""
        (k_at, k_stride), (v_at, v_stride) = rows_of(k), rows_of(v)
        angles = _addresses(rotation)
        record = KvWriteRecord(k=k_at, v=v_at, k_stride=k_stride, v_stride=v_stride, cache=cache.address, **angles)
        self._add(_KV_WRITE, record, keep=(k, v, cache, rotation))

    def attend(
        self,
        q: Array,
        out: Array,
        cache: KVCache,
        spec: AttentionSpec,
        *,
        rotation: Rotation | None,
        sinks: Array | None,
    ) -> None:
        """Causal attention of q, rotated, over the cache."""
        (q_at, q_stride), (out_at, out_stride) = rows_of(q), rows_of(out)
        record = AttentionRecord(
            q=q_at,
            q_stride=q_stride,
            cache=cache.address,
            sinks=None if sinks is None else sinks.ctypes.data,
            out=out_at,
            out_stride=out_stride,
            num_heads=spec.num_heads,
            window=spec.window or 0,
            chunk=spec.chunk or 0,
            **_addresses(rotation),
        )
        self._add(_ATTENTION, record, keep=(q, out, cache, rotation, sinks))

    def run(self, step: Step, token_ids: Array, rows: Array, num_candidates: int = 1) -> None:
        """Run every instruction for the tokens of a checked step. num_candidates: k of `likeliest`.

        Raises BrokenRouteError for tokens that could go anywhere.
        """
        assert 1 <= num_candidates <= MOST_CANDIDATES
        if self._compiled is None:
            compiled = (_Instruction * len(self._instructions))()
            for i, (operation, of_rows, per_token, record) in enumerate(self._instructions):
                compiled[i] = _Instruction(operation, of_rows, per_token, ctypes.addressof(record))
            self._compiled = compiled
        inputs = _StepInput(step.address, token_ids.ctypes.data, rows.ctypes.data, len(rows), num_candidates)
        failed = library().halve_run(
            self.ops.isa.number,
            ctypes.addressof(self._compiled),
            len(self._instructions),
            ctypes.addressof(inputs),
            self.ops.num_threads,
        )
        if failed == NAN_LOGITS:
            raise BrokenRouteError(next(i for i, places in enumerate(self._routes) if places.broken[0]))
        if failed:
            reason = {1: f"this build has no rows for {self.ops.isa.name}", 2: "no memory for attention's sums"}
            raise KernelError(f"step: {reason[failed]}; reinstall halve on this machine, or give it more memory")

    def part(self, operations: Collection[str]) -> "Program":
        """Only the instructions of these `OPERATIONS`, over the same memory: what they cost, not what they compute."""
        part = Program(self.ops, self.max_tokens, self.max_rows)
        part._instructions = [i for i in self._instructions if OPERATIONS[i[0]] in operations]
        part._kept.append(self)
        return part

    def _add(
        self,
        operation: int,
        record: ctypes.Structure,
        *,
        of_rows: bool = False,
        per_token: int = 1,
        keep: tuple[Any, ...],
    ) -> None:
        self._instructions.append((operation, of_rows, per_token, record))
        self._kept.append(keep)


def _addresses(rotation: Rotation | None) -> dict[str, int | None]:
    cos, sin = rotation or (None, None)
    return {"cos": None if cos is None else cos.ctypes.data, "sin": None if sin is None else sin.ctypes.data}


def checked_step(batch: TokenBatch, specs: Sequence[AttentionSpec], cache: Sequence[KVCache], vocab_size: int) -> Step:
    """A batch whose every index was looked at, for each different layer once. Raises KernelError."""
    within(
        "token id",
        int32("token_ids", batch.token_ids, (None,)),
        vocab_size,
        "the tokenizer and the model do not belong together",
    )
    checked = None
    for spec, layer in {(s, c.kind): (s, c) for s, c in zip(specs, cache, strict=True)}.values():
        checked = check_batch(batch, spec, layer)
    assert checked is not None
    return Step(checked)
