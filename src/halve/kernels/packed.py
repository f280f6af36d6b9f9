"""Matrices in the layout that the C++ computes with (csrc/packing.h), made once from a file's rows.

One layout serves every instruction set, every number of rows and every kind of activation, so that a process holds
a weight once, and a cache of packed weights serves every machine.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from halve.core.errors import KernelError
from halve.formats import Format, Weight
from halve.formats.base import BF16
from halve.kernels.native_library import library
from halve.kernels.ops import Allocate, Array, Packed

LAYOUT_VERSION = 2  # raised by whatever changes a byte of what `pack` makes: a cache of another version is made anew
ALIGNMENT = 64  # bytes, of a packed matrix
BLOCK = 64  # outputs
_KINDS = {"bf16": 1, "fp16": 2, "fp32": 3, "fp8": 4}  # `StoredKind`; 0 is integers
_SCALES: Mapping[np.dtype[Any], int] = {BF16: 1, np.dtype(np.float16): 2, np.dtype(np.float32): 3}


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


def pack(weight: Weight, allocate: Allocate | None = None, num_threads: int = 1) -> Packed:
    """Bring a stored matrix [out, in] into the kernels' layout; what its bits mean does not change.

    fp8 becomes bf16, which holds its values exactly. Scales stay in bf16, or become float32. allocate: gives the
    memory. Raises KernelError for anything but a matrix.
    """
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise KernelError(f"a product needs a matrix [out, in], got shape {weight.shape}; take one expert at a time")
    shape = (weight.shape[0], weight.shape[1])
    codes = np.require(weight.codes, requirements=["C", "A"])
    scale = None if weight.scale is None else np.require(weight.scale, requirements=["C", "A"])
    stored = _stored(weight.format, shape, 0 if scale is None else _SCALES[scale.dtype])
    stored.codes, stored.scale = codes.ctypes.data, None if scale is None else scale.ctypes.data
    record, size = _plan(stored)
    blob = (allocate or aligned_bytes)(size)
    library().halve_pack(ctypes.addressof(stored), ctypes.addressof(record), blob.ctypes.data, num_threads)
    return Packed(format=weight.format, shape=shape, record=_numbers(record), blob=blob)


def adopt(packed: Packed) -> PackedMatrix:
    """What C++ takes, over the blob as it lies. Raises KernelError for what `pack` does not make."""
    if reason := packing_refusal(packed):
        raise KernelError(f"a packed {packed.format.name} matrix {packed.shape}: {reason}; pack the weight again")
    return PackedMatrix(PackedRecord(**packed.record, data=packed.blob.ctypes.data), packed.blob)


def packing_refusal(packed: Packed) -> str | None:
    """Why this is not what `pack` makes of a matrix of that format and shape, or None.

    Record and size are planned anew and compared, so that C++ never reads outside the blob, wherever it came from.
    """
    fmt, shape, blob = packed.format, packed.shape, packed.blob
    if len(shape) != 2 or min(shape) < 1 or fmt.refusal(shape[1]):
        return f"no matrix of format {fmt.name}"
    # No weight takes less than 2 bits: beyond this the plan's 64-bit numbers might not hold.
    if shape[0] * shape[1] > 4 * blob.size:
        return f"its blob of {blob.size} bytes is too small for a matrix {shape}"
    planned = [_plan(_stored(fmt, shape, kind)) for kind in (_SCALES.values() if fmt.scaled else [0])]
    size = next((size for record, size in planned if _numbers(record) == dict(packed.record)), None)
    if size is None:
        return f"its record is {dict(packed.record)}, expected {_numbers(planned[0][0])}"
    if blob.dtype != np.uint8 or blob.shape != (size,) or blob.ctypes.data % ALIGNMENT:
        return f"its blob is {blob.dtype} {blob.shape}, expected {size} bytes on a multiple of {ALIGNMENT}"
    return None


def packed_bytes(fmt: Format, shape: tuple[int, int]) -> int:
    """Bytes of what `pack` makes of a matrix [out, in] whose scales, if it has any, are bf16."""
    return _plan(_stored(fmt, shape, _SCALES[BF16] if fmt.scaled else 0))[1]


def _stored(fmt: Format, shape: tuple[int, int], scale_kind: int) -> StoredRecord:
    """A matrix [out, in] without its arrays, to plan by: of scales the plan asks only whether there is an address."""
    is_integer = fmt.kind == "int"
    return StoredRecord(
        out_features=shape[0],
        in_features=shape[1],
        group=fmt.group_size or 0,
        scale=ALIGNMENT if fmt.scaled else None,
        kind=0 if is_integer else _KINDS[fmt.name],
        bits=fmt.bits if is_integer else 0,
        scale_kind=scale_kind,
    )


def _plan(stored: StoredRecord) -> tuple[PackedRecord, int]:
    """The record of its packed form, without an address, and the bytes that it takes."""
    record = PackedRecord()
    return record, int(library().halve_plan_packing(ctypes.addressof(stored), ctypes.addressof(record)))


def _numbers(record: PackedRecord) -> dict[str, int]:
    """All of a record but the address."""
    return {name: int(getattr(record, name)) for name, _ in PackedRecord._fields_ if name != "data"}


def aligned_bytes(size: int) -> Array:
    """`size` bytes of uint8 at an address that is a multiple of ALIGNMENT."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]
