"""Packed matrices: what is packed is taken over as it lies, and nothing else is, wherever it came from."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from halve.core.errors import KernelError
from halve.formats import FORMATS, Weight
from halve.formats.base import BF16
from halve.kernels import native, native_library
from halve.kernels.arena import Arena
from halve.kernels.ops import Packed
from halve.kernels.packed import ALIGNMENT, PackedRecord, adopt, aligned_bytes, pack, packing_refusal

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")

SHAPE = (70, 128)  # a whole block of outputs and a part of one
SCALES = (np.dtype(np.float16), np.dtype(np.float32), BF16)


def make_weight(name, shape=SHAPE, scale_dtype=BF16):
    """Random codes and scales; whole numbers for plain floats."""
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    if not fmt.scaled:
        return Weight(format=fmt, shape=shape, codes=rng.integers(-9, 9, shape).astype(fmt.dtype))
    if fmt.kind == "float":
        codes = rng.normal(size=shape).astype(fmt.dtype)
    else:
        raw = rng.integers(0, 256, (*fmt.codes_shape(shape), fmt.dtype.itemsize), dtype=np.uint8)
        codes = raw.view(fmt.dtype)[..., 0]
    scale = rng.uniform(0.5, 2, fmt.scale_shape(shape)).astype(scale_dtype)
    return Weight(format=fmt, shape=shape, codes=codes, scale=scale)


@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.scaled])
def test_scales_of_every_type_mean_what_dequantize_says(name, scale_dtype):
    """One-hot inputs read a matrix back, exactly."""
    weight, ops = make_weight(name, scale_dtype=scale_dtype), native.NativeOps(num_threads=1)
    eye = np.eye(SHAPE[1], dtype=np.float32)
    np.testing.assert_array_equal(ops.project(ops.linear(weight), eye).T, weight.dequantize())
    rows = np.arange(SHAPE[0], dtype=np.int32)
    np.testing.assert_array_equal(ops.embed(ops.table(weight), rows), weight.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_matrix_runs_from_where_it_lies_and_computes_the_same(name):
    weight, ops, arena = make_weight(name), native.NativeOps(num_threads=1), Arena()
    packed = ops.pack(weight, arena.take)
    assert ops.refusal(packed) is None
    assert packed.blob.size == arena.used_bytes
    linear, (_, table) = ops.linear(packed), ops.table(packed)
    assert linear.matrix.data is table.data is packed.blob
    x = np.random.default_rng(1).normal(size=(3, SHAPE[1])).astype(np.float32)
    np.testing.assert_array_equal(ops.project(linear, x), ops.project(ops.linear(weight), x))


@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
def test_half_scales_stay_halves_only_where_they_are_bf16(scale_dtype):
    packed = pack(make_weight("int4-g32", scale_dtype=scale_dtype))
    assert packed.record["scale_bytes"] == (2 if scale_dtype == BF16 else 4)
    assert packing_refusal(packed) is None


FIELDS = [name for name, _ in PackedRecord._fields_ if name != "data"]


@pytest.mark.parametrize("change", [-1, 1, 64, 2**40, 2**64])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", ["int4-g32", "int8", "fp8", "bf16"])
def test_a_record_that_differs_anywhere_is_refused(name, field, change):
    packed = pack(make_weight(name))
    wrong = replace(packed, record={**packed.record, field: packed.record[field] + change})
    assert "its record is" in packing_refusal(wrong)
    with pytest.raises(KernelError, match=r"its record is .*; pack the weight again"):
        adopt(wrong)


def test_a_record_that_lacks_a_field_or_has_another_is_refused():
    packed = pack(make_weight("int8"))
    assert "its record is" in packing_refusal(replace(packed, record={}))
    assert "its record is" in packing_refusal(replace(packed, record={**packed.record, "data": 4096}))


def test_wider_scales_need_a_larger_blob():
    wide, narrow = (pack(make_weight("int4-g32", scale_dtype=each)) for each in (np.float32, BF16))
    assert "its blob is" in packing_refusal(replace(narrow, record=wide.record))


def test_a_blob_of_another_size_type_or_place_is_refused():
    packed = pack(make_weight("int4-g32"))
    shifted = aligned_bytes(packed.blob.size + 1)[1:]
    assert shifted.ctypes.data % ALIGNMENT
    for blob in (packed.blob[:-64], packed.blob.view(np.int8), packed.blob.reshape(2, -1), shifted):
        assert "its blob is" in packing_refusal(replace(packed, blob=blob))


@pytest.mark.parametrize("shape", [(71, 128), (70, 96), (134, 128), (0, 128), (70, 0), (-70, 128), (70, 128, 1), (70,)])
def test_a_matrix_under_another_shape_is_refused(shape):
    assert packing_refusal(replace(pack(make_weight("int4-g32")), shape=shape))


@pytest.mark.parametrize("shape", [(2**62, 128), (2**31, 2**31), (64, 2**58), (2**64 + 70, 128)])
def test_a_shape_whose_bytes_no_number_holds_is_refused(shape):
    assert "too small for a matrix" in packing_refusal(replace(pack(make_weight("int4-g32")), shape=shape))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("int4-g64", "bf16")])
def test_a_matrix_under_another_format_is_refused(name):
    packed = pack(make_weight("int4-g64"))
    assert packing_refusal(replace(packed, format=FORMATS[name]))


def test_only_matrices_are_packed():
    for shape in ((2, 4, 32), (0, 32)):
        with pytest.raises(KernelError, match="a product needs a matrix"):
            pack(make_weight("fp32", shape))


def test_the_record_that_cpp_sees_has_the_address_of_the_blob():
    packed = pack(make_weight("int8"))
    matrix = adopt(packed)
    assert ctypes.cast(matrix.address, ctypes.POINTER(PackedRecord))[0].data == packed.blob.ctypes.data
    assert isinstance(packed, Packed)
