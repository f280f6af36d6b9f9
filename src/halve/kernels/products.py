"""The records of products that C++ reads (csrc/products.h), and the memory of their inputs."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halve.kernels.ops import Array
from halve.kernels.packed import PackedMatrix, aligned_bytes

CHUNK = 32  # inputs
MAX_MEMBERS = 4
ROUNDINGS = {"fp32": 0, "bf16": 1, "int8": 2}


class ActivationsRecord(ctypes.Structure):
    """`Activations` of csrc/products.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("wide", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("value_stride", ctypes.c_int64),
        ("code_stride", ctypes.c_int64),
        ("start_stride", ctypes.c_int64),
        ("run", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("split", ctypes.c_int32),
    )


class PrepareRecord(ctypes.Structure):
    """`Prepare` of csrc/products.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("out", ActivationsRecord),
        ("x_stride", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("rounding", ctypes.c_int32),
    )


class LikeliestRecord(ctypes.Structure):
    """`Likeliest` of csrc/products.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lists", "held", "floors", "taken")),
        ("places", ctypes.c_int64),
        ("k", ctypes.c_int64),
    )


class ProductRecord(ctypes.Structure):
    """`Product` of csrc/products.h."""

    _fields_ = (
        ("x", ActivationsRecord),
        ("weight", ctypes.c_void_p * MAX_MEMBERS),
        ("bias", ctypes.c_void_p * MAX_MEMBERS),
        ("y", ctypes.c_void_p * MAX_MEMBERS),
        ("y_stride", ctypes.c_int64 * MAX_MEMBERS),
        ("likeliest", LikeliestRecord),
        ("rows", ctypes.c_int64),
        ("members", ctypes.c_int32),
        ("add", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Codes:
    """How integer tiles take activations: in runs of `run` inputs (None: one for all), against weights of `bits`.

    pairs: the tiles multiply pairs of bytes into 16 bits (avx2).
    """

    bits: int
    run: int | None
    pairs: bool


@dataclass(frozen=True, slots=True)
class InputLayout:
    """What a product's input takes a row. codes: None for floats, which `rounding` may have rounded."""

    width: int
    rounding: str
    codes: Codes | None = None
    bf16: bool = False  # as bits of bf16, for bf16 weights where the processor multiplies those

    @property
    def padded(self) -> int:
        """Inputs, up to a whole chunk."""
        return -(-self.width // CHUNK) * CHUNK

    @property
    def wide(self) -> bool:
        """Whether codes lie as 16 bits."""
        return self.codes is not None and self.codes.pairs and self.codes.bits == 8

    @property
    def strides(self) -> dict[str, int]:
        """Elements from one row to the next; rows of codes lie on different cache lines of a set."""
        starts = self.padded // self.codes.run if self.codes and self.codes.run else 1
        return {"value_stride": self.width, "code_stride": self.padded + 2 * CHUNK, "start_stride": starts}

    def parts(self) -> dict[str, int]:
        """Bytes a row of each array."""
        strides = self.strides
        parts = {"values": 4 * strides["value_stride"]}
        if self.codes:
            codes = {"wide": 2 * strides["code_stride"]} if self.wide else {"codes": strides["code_stride"]}
            parts |= {**codes, "scale": 4, "starts": 4 * strides["start_stride"]}
        if self.bf16:
            parts |= {"wide": 2 * strides["code_stride"]}
        return parts

    def record(self, addresses: Mapping[str, int]) -> ActivationsRecord:
        """The record of arrays at these addresses, by the names of `parts`."""
        settings = {}
        if self.codes:
            split = self.codes.pairs and self.codes.bits < 8
            settings = {"run": self.codes.run or 0, "bits": self.codes.bits, "split": int(split)}
        return ActivationsRecord(**addresses, **self.strides, **settings)

    def allocate(self, rows: int) -> tuple[ActivationsRecord, list[Array]]:
        """Memory for `rows` rows, and its record; the record is valid while the arrays live."""
        arrays = {name: aligned_bytes(size * rows) for name, size in self.parts().items()}
        return self.record({name: array.ctypes.data for name, array in arrays.items()}), list(arrays.values())


def product_record(
    x: ActivationsRecord,
    matrices: Sequence[PackedMatrix],
    biases: Sequence[Array | None],
    outputs: Sequence[tuple[int, int]],
    *,
    rounding: str,
    rows: int = 0,
    add: bool = False,
    gated: bool = False,
    clamp: tuple[float, float] | None = None,
) -> ProductRecord:
    """A product of x with up to MAX_MEMBERS matrices; outputs are (address, floats from one row to the next).

    clamp: alpha and limit of a gate that is not silu (`Product` of csrc/products.h).
    """
    assert len(matrices) <= MAX_MEMBERS
    record = ProductRecord(x=x, rows=rows, members=len(matrices), add=add, gated=gated, rounding=ROUNDINGS[rounding])
    record.alpha, record.limit = clamp or (0.0, 0.0)
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        record.weight[i] = matrix.address
        record.bias[i] = None if bias is None else bias.ctypes.data
    for i, (address, stride) in enumerate(outputs):
        record.y[i], record.y_stride[i] = address, stride
    return record


def rows_of(array: Array) -> tuple[int, int]:
    """Address and stride of float rows, for `product_record`."""
    assert array.dtype == np.float32
    return array.ctypes.data, array.strides[0] // 4
