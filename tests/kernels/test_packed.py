"""The kernels' layout, against bytes worked out by hand; packed matrices are taken over, and nothing else is."""

import ctypes
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from halve.core.errors import KernelError
from halve.formats import FORMATS, Weight, pack_codes
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


# Bytes


def integers(name, codes, scale):
    fmt, codes = FORMATS[name], np.asarray(codes, np.int8)
    return Weight(
        format=fmt,
        shape=codes.shape,
        codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits),
        scale=np.asarray(scale, np.float32).astype(BF16),
    )


def test_int4_is_scales_then_nibbles_four_inputs_of_16_outputs_a_step():
    codes = np.zeros((2, 32), np.int8)
    codes[1] = np.arange(32) % 16 - 8
    packed = pack(integers("int4-g32", codes, [[1.0], [2.0]]))
    assert packed.blob.size == 64 * 2 + 4 * 256
    assert packed.blob[:6].view(np.uint16).tolist() == [0x3F80, 0x4000, 0]  # bf16 1, 2, and no third output
    first = packed.blob[128:192]  # 16 outputs
    assert first[4:8].tolist() == [0x40, 0x51, 0x62, 0x73]  # inputs 0..3 low, 4..7 high, code + 8
    assert first[0:4].tolist() == [0x88] * 4  # code 0
    assert first[8:12].tolist() == [0x88] * 4  # an output that is not there: code 0, scale 0
    assert packed.blob[192 + 4 : 192 + 8].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]  # inputs 8..15


def test_int3_is_a_plane_of_two_bits_and_a_plane_of_one():
    codes = np.arange(32).reshape(1, 32) % 8 - 4
    packed = pack(integers("int3-g32", codes, [[1.0]]))
    planes = packed.blob[128:].reshape(4, 3, 16, 4)[0, :, 0]  # 16 outputs, step, output, input
    unsigned = (np.arange(32) % 8).reshape(8, 4)  # quad, input
    twos = [[sum((unsigned[4 * s + i, j] & 3) << (2 * i) for i in range(4)) for j in range(4)] for s in range(2)]
    ones = [sum((unsigned[q, j] >> 2) << q for q in range(8)) for j in range(4)]
    assert planes.tolist() == [*twos, ones]


def test_int8_has_its_scales_at_the_head_of_the_block_and_ends_in_zeros():
    packed = pack(integers("int8", [[1, -2, 3]], [[0.5]]))
    steps = packed.blob[128:].reshape(4, 8, 16, 4)[0]
    assert steps[0, 0].tolist() == [129, 126, 131, 128]
    assert (steps[1:] == 128).all()


def test_bf16_lies_in_pairs_of_inputs_and_fp8_becomes_bf16():
    values = np.array([[1.0, 2.0, -3.0]], np.float32)
    plain = pack(Weight(format=FORMATS["bf16"], shape=(1, 3), codes=values.astype(BF16)))
    assert plain.blob.view(np.uint16).reshape(2, 64, 2)[:, 0].tolist() == [[0x3F80, 0x4000], [0xC040, 0]]
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(1, 256)
    fp8 = pack(Weight(format=FORMATS["fp8"], shape=(1, 256), codes=every, scale=np.ones((1, 1), BF16)))
    stored = fp8.blob[128:].view(BF16).reshape(128, 64, 2)[:, 0].reshape(-1).astype(np.float32)
    np.testing.assert_array_equal(stored, every.astype(np.float32)[0])


# Values, and taking over


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
