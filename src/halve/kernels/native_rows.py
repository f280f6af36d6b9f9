"""The rows of our C++ on the CPU, for each instruction set, operation and format: which runs where, and how exact.

Weights lie packed (packed.py), once, for every row below. Two kinds of rows multiply them:

**float**: activations are floats (`fp32`, or rounded to `bf16`), a weight is widened to what `Weight.dequantize` means,
and sums are float32: stretches of 64 inputs one after the other, then the stretches. With n = in_features and
eps = 2^-24 that is at most n's share of a stretch and all stretches, and every product rounds once at most, so

    |y - y_exact| <= float_error_steps(n) * eps * (|bias| + sum |x| |w|) + (n + 1) * 2^-149 (subnormals)

with y_exact the product of the activations as rounded.

**dot**: activations are rounded to int8 (csrc/prepare.h) and meet the weights' integer codes exactly; sums of a run
of inputs (a group, or less on avx2) become floats, are scaled and added, one rounding a run, so that

    |y - y_exact| <= dot_error_steps(n, run) * eps * (|bias| + sum |x8| |w|) + (n + 1) * 2^-149

with x8 the activations as rounded and y_exact the product with them.

Where the processor has dot products of bf16 (avx512bf16, amx, neon_i8mm), bf16 activations meet bf16 (and fp8) weights
in them, within the float bound, subnormals aside: there (n + 1) * 2^-149 is (n + 1) * 2^-126. Of ARM's, each of the
n / 2 + 1 roundings on the path is to odd, by up to 2 eps; AMX sums 256 inputs in 25 roundings (csrc/amx_tiles.h).

The order of a sum depends on n, the format and the instruction set alone: a token's result is the same for any number
of threads and whatever tokens are beside it.
"""

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from halve.core.errors import KernelError
from halve.formats import FORMATS, Format
from halve.formats.activations import activations_for
from halve.formats.base import widen
from halve.hardware import Device
from halve.kernels.dispatch import Kernel, Spec
from halve.kernels.native_cache import KVCache, Step, attention_record, kv_write_record
from halve.kernels.native_library import LIBRARY, available, library
from halve.kernels.native_sampling import SamplingWork
from halve.kernels.ops import Array, AttentionSpec
from halve.kernels.packed import PackedMatrix, PackedRecord
from halve.kernels.products import ROUNDINGS, Codes, InputLayout, PrepareRecord, product_record, rows_of
from halve.kernels.sampling import Sampled, SamplingBatch

ACTIVATIONS = tuple(ROUNDINGS)
BF16_WEIGHTS = ("bf16", "fp8")  # what lies as bf16 when it is packed


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set that the rows are compiled for. number: its place in the C++ table."""

    name: str
    number: int
    features: tuple[str, ...]
    tiles: bool = True  # int8 activations meet integer codes as integers
    multiplies_bf16: bool = False  # it has a dot product of bf16 numbers

    def float_error_steps(self, in_features: int) -> int:
        """Roundings on the longest path of a float product's sum, bias and scale included: see the top of this file."""
        return min(in_features, 64) + math.ceil(in_features / 64) + 3

    def dot_error_steps(self, in_features: int, fmt: Format) -> int:
        """The same for int8 activations."""
        if not self.tiles:
            return self.float_error_steps(in_features) + 2
        return math.ceil(in_features / (self.run_inputs(fmt) or in_features)) + 5

    @property
    def pairs(self) -> bool:
        """Whether products of bytes are added in pairs, in 16 bits."""
        return self.name == "avx2"

    def run_inputs(self, fmt: Format) -> int | None:
        """Inputs that are summed as integers before they are scaled; None for all."""
        group = fmt.group_size
        if group is None or not self.pairs or fmt.bits == 8:
            return group
        return {6: 16, 5: 32}.get(fmt.bits, min(group, 64))


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
_AVX512BF16 = (*_AVX512, "avx512_bf16")
_DOTPROD = ("neon", "dotprod")
ISAS = (  # best first
    Isa("amx", 5, (*_AVX512BF16, "amx_tile", "amx_int8", "amx_bf16"), multiplies_bf16=True),
    Isa("avx512bf16", 3, _AVX512BF16, multiplies_bf16=True),
    Isa("avx512", 2, _AVX512),
    Isa("avxvnni", 4, (*_AVX2, "avx_vnni")),
    Isa("avx2", 1, _AVX2),
    Isa("neon_i8mm", 7, (*_DOTPROD, "i8mm", "bf16"), multiplies_bf16=True),
    Isa("neon_dotprod", 6, _DOTPROD),
    Isa("baseline", 0, (), tiles=False),
)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A matrix prepared for products by one kernel. activations: how its input is rounded before it."""

    kernel: Kernel
    isa: Isa
    format: Format
    matrix: PackedMatrix
    bias: Array | None
    activations: str

    def over(self, data: Array, bias: Array | None) -> "Linear":
        """The same product with another matrix, packed alike. data: its blob, as large; the caller knows it is one."""
        assert data.size == self.matrix.data.size
        record = PackedRecord.from_buffer_copy(self.matrix.record)
        record.data = data.ctypes.data
        return replace(self, matrix=PackedMatrix(record, data), bias=bias)

    @property
    def layout(self) -> InputLayout:
        """What the product's input takes."""
        codes = None
        if self.activations == "int8" and self.isa.tiles:
            codes = Codes(bits=self.matrix.bits, run=self.isa.run_inputs(self.format), pairs=self.isa.pairs)
        bf16 = self.isa.multiplies_bf16 and self.activations == "bf16" and self.format.name in BF16_WEIGHTS
        return InputLayout(width=self.matrix.in_features, rounding=self.activations, codes=codes, bf16=bf16)


def as_vector(values: Array) -> Array:
    """A float32 copy of float values of any type."""
    return np.array(widen(np.asarray(values)), np.float32, order="C")


def call(name: str, isa: Isa, *arguments: Any) -> None:
    """Call the C++ function; arrays go as their addresses, None as a null pointer."""
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    if getattr(library(), f"halve_{name}")(isa.number, *values):
        raise KernelError(
            f"{name}: this build of {LIBRARY} has no rows for {isa.name}; reinstall halve on this machine"
        )


def _project(isa: Isa, linear: Linear, x: Array, threads: int) -> Array:
    layout = linear.layout
    record, arrays = layout.allocate(max(len(x), 1))
    prepare = PrepareRecord(
        x=x.ctypes.data, out=record, x_stride=layout.width, width=layout.width, rounding=ROUNDINGS[layout.rounding]
    )
    call("prepare", isa, ctypes.addressof(prepare), len(x), threads)
    y = np.empty((len(x), linear.matrix.out_features), np.float32)
    product = product_record(
        record, [linear.matrix], [linear.bias], [rows_of(y)], rounding=layout.rounding, rows=len(x)
    )
    call("product", isa, ctypes.addressof(product), threads)
    del arrays  # lived until here
    return y


def _embed(isa: Isa, matrix: PackedMatrix, ids: Array, threads: int) -> Array:
    y = np.empty((len(ids), matrix.in_features), np.float32)
    call("embed", isa, matrix.address, ids, y, len(ids), threads)
    return y


def _rms_norm(isa: Isa, x: Array, gain: Array, eps: float, *, threads: int) -> Array:
    y = np.empty_like(x)
    call("rms_norm", isa, x, gain, y, *x.shape, eps, threads)
    return y


def _rope(isa: Isa, x: Array, cos: Array, sin: Array, *, head_dim: int, threads: int) -> Array:
    y = np.empty_like(x)
    call("rope", isa, x, cos, sin, y, len(x), x.shape[1] // head_dim, head_dim, threads)
    return y


def _pairwise(name: str, isa: Isa, x: Array, y: Array, *, threads: int) -> Array:
    out = np.empty_like(x)
    call(name, isa, x, y, out, x.size, threads)
    return out


def _round_bf16(isa: Isa, x: Array, *, threads: int) -> Array:
    out = np.empty_like(x)
    call("round_bf16", isa, x, out, x.size, threads)
    return out


def _kv_write(isa: Isa, cache: KVCache, step: Step, k: Array, v: Array, *, threads: int) -> None:
    record = kv_write_record(cache, step, k, v)
    call("kv_write", isa, ctypes.addressof(record), threads)


def _copy_blocks(isa: Isa, cache: KVCache, pairs: Array, *, threads: int) -> None:
    call("copy_blocks", isa, cache.address, pairs, len(pairs), threads)


def _attention(
    isa: Isa, cache: KVCache, step: Step, q: Array, *, spec: AttentionSpec, sinks: Array | None, threads: int
) -> Array:
    out = np.empty_like(q)
    record = attention_record(cache, step, q, out, spec, sinks)
    scratch = np.empty(library().halve_attention_scratch(ctypes.addressof(record)), np.uint8)
    record.scratch = scratch.ctypes.data
    call("attention", isa, ctypes.addressof(record), threads)
    return out


def _sample(isa: Isa, logits: Array, batch: SamplingBatch, *, threads: int) -> Sampled:
    work = SamplingWork(logits, batch, threads)
    call("sample", isa, work.address, threads)
    return work.result()


PLAIN: Mapping[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "kv_write": _kv_write,
    "copy_blocks": _copy_blocks,
    "attention": _attention,
    "add": partial(_pairwise, "add"),
    "silu_mul": partial(_pairwise, "silu_mul"),
    "round_bf16": _round_bf16,
}


def _refusal(isa: Isa, accepted: Format | None, activations: tuple[str, ...], device: Device, spec: Spec) -> str | None:
    if spec.format != accepted:
        return f"takes {accepted and accepted.name}, not {spec.format and spec.format.name}"
    if spec.activations not in activations:
        return f"takes {' or '.join(activations)} activations, not {spec.activations}"
    if device.kind != "cpu":
        return f"needs a cpu; {device.name} is {device.kind}"
    missing = [feature for feature in isa.features if feature not in device.features]
    return f"needs {', '.join(missing)}" if missing else None


def plain_rows(op: str) -> list[Kernel]:
    """The rows of an operation without a format, best instruction set first."""
    return [
        Kernel(
            name=f"native_{isa.name}",
            op=op,
            refusal=partial(_refusal, isa, None, ACTIVATIONS),
            run=partial(_sample if op == "sample" else PLAIN[op], isa),
        )
        for isa in ISAS
    ]


def format_rows(op: str, accepted: Format) -> list[Kernel]:
    """The rows of products or tables of one format, best instruction set first."""
    suffix = accepted.name.replace("-", "_")
    kinds = [("float", ACTIVATIONS[:2])] if op == "linear" else [("rows", ACTIVATIONS)]
    if op == "linear" and accepted.kind == "int":
        kinds.append(("dot", ("int8",)))
    bf16 = op == "linear" and accepted.name in BF16_WEIGHTS
    return [
        Kernel(
            name=f"native_{isa.name}_dot_{suffix}",
            op=op,
            refusal=partial(_refusal, isa, accepted, ("bf16",)),
            run=partial(_project, isa),
        )
        for isa in ISAS
        if bf16 and isa.multiplies_bf16
    ] + [
        Kernel(
            name=f"native_{isa.name}_{kind}_{suffix}",
            op=op,
            refusal=partial(_refusal, isa, accepted, activations),
            run=partial(_project if op == "linear" else _embed, isa),
        )
        for kind, activations in kinds
        for isa in ISAS
    ]


TABLE: list[Kernel] = [
    *(row for op in ("linear", "embed") for accepted in FORMATS.values() for row in format_rows(op, accepted)),
    *(row for op in (*PLAIN, "sample") for row in plain_rows(op)),
]


def format_report(device: Device) -> list[dict[str, Any]]:
    """For every format, the row that runs its products on `device` and why others don't (for `halve doctor`)."""
    absent = available()
    report = []
    for accepted in FORMATS.values():
        chosen, refused = None, []
        spec = Spec(op="linear", format=accepted, activations=activations_for(accepted, "int8"))
        for row in format_rows("linear", accepted):
            reason = absent or row.refusal(device, spec)
            if reason is None:
                chosen = row.name
                break
            refused.append({"kernel": row.name, "reason": reason})
        report.append({"op": "linear", "format": accepted.name, "kernel": chosen, "refused": refused})
    return report
