"""Matrices in the layout that the C++ computes with (csrc/packing.h), made once from a file's rows.

One layout serves every instruction set, every number of rows and every kind of activation, so that a process holds
a weight once, and a cache of packed weights serves every machine.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from halve.core.errors import KernelError
from halve.formats import Weight
from halve.formats.base import BF16
from halve.kernels.native_library import library
from halve.kernels.ops import Array

LAYOUT_VERSION = 1  # bumped with csrc/packing.h: a cache of another version is made anew
ALIGNMENT = 64  # bytes, of a packed matrix
BLOCK = 64  # outputs
_KINDS = {"bf16": 1, "fp16": 2, "fp32": 3, "fp8": 4}  # `StoredKind`; 0 is integers
_SCALES: Mapping[np.dtype[Any], int] = {BF16: 1, np.dtype(np.float16): 2, np.dtype(np.float32): 3}

# Memory for a packed matrix: uint8 [bytes], aligned to ALIGNMENT.
Allocate = Callable[[int], Array]


class StoredRecord(ctypes.Structure):
    """`Stored` of csrc/packing.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
    )


class PackedRecord(ctypes.Structure):
    """`Packed` of csrc/packing.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("block_bytes", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("scale_bytes", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A matrix [out, in] ready to compute with. data: uint8, aligned; record: what it is, with data's address.

    Safe to share between threads and Ops; nothing writes to it.
    """

    record: PackedRecord
    data: Array

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return int(self.record.out_features)

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return int(self.record.in_features)

    @property
    def is_integer(self) -> bool:
        """Whether its weights are integer codes."""
        return int(self.record.kind) == 0

    @property
    def bits(self) -> int:
        """Bits of an integer code; 0 for floats."""
        return int(self.record.bits) if self.is_integer else 0

    @property
    def address(self) -> int:
        """Where C++ finds the record."""
        return ctypes.addressof(self.record)

    def header(self) -> dict[str, int]:
        """All of the record but the address of the data, for a cache."""
        return {name: int(getattr(self.record, name)) for name, _ in PackedRecord._fields_ if name != "data"}

    @classmethod
    def adopt(cls, header: Mapping[str, int], data: Array) -> "PackedMatrix":
        """A matrix whose packed bytes exist already. Raises KernelError when header and data do not fit."""
        names = {name for name, _ in PackedRecord._fields_} - {"data"}
        if header.keys() != names:
            raise KernelError(f"packed matrix: its header has the keys {sorted(header)}, expected {sorted(names)}")
        record = PackedRecord(**header)
        expected = int(record.block_bytes) * -(-int(record.out_features) // BLOCK)
        if data.dtype != np.uint8 or data.shape != (expected,) or data.ctypes.data % ALIGNMENT:
            raise KernelError(
                f"packed matrix: {data.dtype} {data.shape} at {data.ctypes.data:#x}; its header needs {expected} bytes "
                f"of uint8, aligned to {ALIGNMENT}"
            )
        record.data = data.ctypes.data
        return cls(record, data)


def pack(weight: Weight, allocate: Allocate | None = None, num_threads: int = 1) -> PackedMatrix:
    """Bring a stored matrix [out, in] into the kernels' layout; what its bits mean does not change.

    fp8 becomes bf16, which holds its values exactly. Scales stay in bf16, or become float32. allocate: gives the
    memory. Raises KernelError for anything but a matrix.
    """
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise KernelError(f"a product needs a matrix [out, in], got shape {weight.shape}; take one expert at a time")
    codes = np.require(weight.codes, requirements=["C", "A"])
    scale = None if weight.scale is None else np.require(weight.scale, requirements=["C", "A"])
    is_integer = weight.format.kind == "int"
    stored = StoredRecord(
        *weight.shape,
        weight.format.group_size or 0,
        codes.ctypes.data,
        None if scale is None else scale.ctypes.data,
        0 if is_integer else _KINDS[weight.format.name],
        weight.format.bits if is_integer else 0,
        0 if scale is None else _SCALES[scale.dtype],
    )
    record = PackedRecord()
    size = int(library().halve_plan_packing(ctypes.addressof(stored), ctypes.addressof(record)))
    data = (allocate or aligned_bytes)(size)
    library().halve_pack(ctypes.addressof(stored), ctypes.addressof(record), data.ctypes.data, num_threads)
    record.data = data.ctypes.data
    return PackedMatrix(record, data)


def aligned_bytes(size: int) -> Array:
    """`size` bytes of uint8 at an address that is a multiple of ALIGNMENT."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]
