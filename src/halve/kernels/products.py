"""The records of products that C++ reads (csrc/products.h), and the memory of their inputs."""

import ctypes
from collections.abc import Sequence
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
        ("sums", ctypes.c_void_p),
        ("halves", ctypes.c_void_p),
        ("value_stride", ctypes.c_int64),
        ("code_stride", ctypes.c_int64),
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


class ProductRecord(ctypes.Structure):
    """`Product` of csrc/products.h."""

    _fields_ = (
        ("x", ActivationsRecord),
        ("weight", ctypes.c_void_p * MAX_MEMBERS),
        ("bias", ctypes.c_void_p * MAX_MEMBERS),
        ("y", ctypes.c_void_p * MAX_MEMBERS),
        ("y_stride", ctypes.c_int64 * MAX_MEMBERS),
        ("rows", ctypes.c_int64),
        ("members", ctypes.c_int32),
        ("add", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class InputLayout:
    """What a product's input takes a row. tiles: int8 codes go in as codes (else as floats that were rounded)."""

    width: int
    rounding: str
    tiles: bool = False
    wide: bool = False  # 8-bit weights on avx2
    halves: bool = False  # narrower weights on avx2

    @property
    def code_stride(self) -> int:
        """Codes of a row; rows lie on different cache lines of one set."""
        return -(-self.width // CHUNK) * CHUNK + 2 * CHUNK

    def parts(self) -> dict[str, int]:
        """Bytes a row of each array."""
        parts = {"values": 4 * self.width}
        if self.tiles:
            parts |= {"codes": self.code_stride, "scale": 4, "sums": self.code_stride // CHUNK * 4}
            parts |= {"wide": 2 * self.code_stride} if self.wide else {}
            parts |= {"halves": self.code_stride // 16 * 4} if self.halves else {}
        return parts

    def allocate(self, rows: int) -> tuple[ActivationsRecord, list[Array]]:
        """Memory for `rows` rows, and its record; the record is valid while the arrays live."""
        arrays = {name: aligned_bytes(size * rows) for name, size in self.parts().items()}
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        record = ActivationsRecord(**addresses, value_stride=self.width, code_stride=self.code_stride)
        return record, list(arrays.values())


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
) -> ProductRecord:
    """A product of x with up to MAX_MEMBERS matrices; outputs are (address, floats from one row to the next)."""
    assert len(matrices) <= MAX_MEMBERS
    record = ProductRecord(
        x=x, rows=rows, members=len(matrices), add=add, gated=gated, rounding=ROUNDINGS[rounding]
    )
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
