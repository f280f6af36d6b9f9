"""A whole step as one call into C++: instructions over memory that is laid out once (csrc/program.h).

Python's share of a step is then filling in a batch, and the interpreter's lock is free while the step runs. Memory
between instructions is shared by all layers; what a layer leaves behind is its keys, its values and the stream.
"""

import ctypes
from collections.abc import Collection, Sequence
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

OPERATIONS = ("embed", "angles", "prepare", "product", "reduce", "silu_mul", "kv_write", "attention")
_EMBED, _ANGLES, _PREPARE, _PRODUCT, _REDUCE, _SILU_MUL, _KV_WRITE, _ATTENTION = range(len(OPERATIONS))
BEST_BYTES = 8  # `Best` of csrc/products.h
MOST_CANDIDATES = 64  # as csrc/products.h has it


def _record(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_Instruction = _record("Instruction", operation=_I32, of_rows=_I32, record=_P)
_Embed = _record("Embed", table=_P, ids=_P, y=_P)
_Angles = _record("Angles", frequencies=_P, cos=_P, sin=_P, half=_I64)
_Reduce = _record("Reduce", likeliest=LikeliestRecord, rows=_I64, logits=_P, ids=_P)
_Gate = _record("Gate", gate=_P, up=_P, out=_P, width=_I64)
_StepInput = _record("StepInput", batch=_P, token_ids=_P, rows=_P, num_rows=_I64, num_candidates=_I64)

Rotation = tuple[Array, Array]  # cos, sin float32 [T, D / 2]


class Program:
    """Instructions for steps of up to max_tokens tokens, of which up to max_rows rows of logits are wanted.

    Arrays handed to it must stay where they are; it keeps them alive. Made once, run by one thread at a time.
    """

    def __init__(self, ops: NativeOps, max_tokens: int, max_rows: int) -> None:
        self.ops, self.max_tokens, self.max_rows = ops, max_tokens, max_rows
        self._instructions: list[tuple[int, bool, ctypes.Structure]] = []
        self._inputs: dict[tuple[InputLayout, bool], ActivationsRecord] = {}
        self._kept: list[Any] = []
        self._compiled: Any = None

    def floats(self, width: int, *, of_rows: bool = False) -> Array:
        """Float32 [max_tokens or max_rows, width] to work in."""
        rows = self.max_rows if of_rows else self.max_tokens
        array = aligned_bytes(4 * rows * width).view(np.float32).reshape(rows, width)
        self._kept.append(array)
        return array

    def embed(self, table: PackedMatrix, out: Array) -> None:
        """Rows of a table for the step's tokens."""
        self._add(_EMBED, _Embed(table=table.address, y=out.ctypes.data), keep=(table, out))

    def rotation(self, frequencies: Array) -> Rotation:
        """cos and sin of the step's positions times frequencies, float32 [D / 2] radians a position."""
        half = len(frequencies)
        cos, sin = self.floats(half), self.floats(half)
        addresses = (frequencies.ctypes.data, cos.ctypes.data, sin.ctypes.data)
        self._add(_ANGLES, _Angles(*addresses, half), keep=(frequencies, cos, sin))
        return cos, sin

    def prepare(
        self, x: Array, layout: InputLayout, *, gain: Array | None = None, eps: float = 0.0, of_rows: bool = False
    ) -> ActivationsRecord:
        """x as products of that layout take it, after RMSNorm where there is a gain; valid until the next of its kind.

        of_rows: only the rows whose logits are wanted, in their order.
        """
        if gain is None and layout.rounding == "fp32" and not of_rows:
            return layout.record({"values": x.ctypes.data})
        key = (layout, of_rows)
        if key not in self._inputs:
            self._inputs[key], arrays = layout.allocate(self.max_rows if of_rows else self.max_tokens)
            self._kept.append(arrays)
        record = PrepareRecord(
            x=x.ctypes.data,
            gain=None if gain is None else gain.ctypes.data,
            out=self._inputs[key],
            x_stride=x.shape[1],
            width=layout.width,
            eps=eps,
            rounding=ROUNDINGS[layout.rounding],
        )
        self._add(_PREPARE, record, of_rows=of_rows, keep=(x, gain))
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
        """Run every instruction for the tokens of a checked step. num_candidates: k of `likeliest`."""
        assert 1 <= num_candidates <= MOST_CANDIDATES
        if self._compiled is None:
            compiled = (_Instruction * len(self._instructions))()
            for i, (operation, of_rows, record) in enumerate(self._instructions):
                compiled[i] = _Instruction(operation, of_rows, ctypes.addressof(record))
            self._compiled = compiled
        inputs = _StepInput(step.address, token_ids.ctypes.data, rows.ctypes.data, len(rows), num_candidates)
        failed = library().halve_run(
            self.ops.isa.number,
            ctypes.addressof(self._compiled),
            len(self._instructions),
            ctypes.addressof(inputs),
            self.ops.num_threads,
        )
        if failed:
            reason = {1: f"this build has no rows for {self.ops.isa.name}", 2: "no memory for attention's sums"}
            raise KernelError(f"step: {reason[failed]}; reinstall halve on this machine, or give it more memory")

    def part(self, operations: Collection[str]) -> "Program":
        """Only the instructions of these `OPERATIONS`, over the same memory: what they cost, not what they compute."""
        part = Program(self.ops, self.max_tokens, self.max_rows)
        part._instructions = [i for i in self._instructions if OPERATIONS[i[0]] in operations]
        part._kept.append(self)
        return part

    def _add(self, operation: int, record: ctypes.Structure, *, of_rows: bool = False, keep: tuple[Any, ...]) -> None:
        self._instructions.append((operation, of_rows, record))
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
