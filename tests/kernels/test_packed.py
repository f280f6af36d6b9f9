"""The kernels' layout, against bytes worked out by hand, and what is refused."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from halve.core.errors import KernelError
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.base import BF16
from halve.kernels import native_library
from halve.kernels.packed import ALIGNMENT, adopt, pack, packing_refusal

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")


def integers(name, codes, scale):
    fmt, codes = FORMATS[name], np.asarray(codes, np.int8)
    return Weight(
        format=fmt,
        shape=codes.shape,
        codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits),
        scale=np.asarray(scale, np.float32).astype(BF16),
    )


def test_int4_is_scales_then_nibbles_four_inputs_of_64_outputs_a_step():
    codes = np.zeros((2, 32), np.int8)
    codes[1] = np.arange(32) % 16 - 8
    packed = pack(integers("int4-g32", codes, [[1.0], [2.0]]))
    assert packed.blob.size == 64 * 2 + 4 * 256
    assert packed.blob[:6].view(np.uint16).tolist() == [0x3F80, 0x4000, 0]  # bf16 1, 2, and no third output
    first = packed.blob[128:384]
    assert first[4:8].tolist() == [0x40, 0x51, 0x62, 0x73]  # inputs 0..3 low, 4..7 high, code + 8
    assert first[0:4].tolist() == [0x88] * 4  # code 0
    assert first[8:12].tolist() == [0x88] * 4  # an output that is not there: code 0, scale 0
    assert packed.blob[384 + 4 : 384 + 8].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]  # inputs 8..15


def test_int3_is_a_plane_of_two_bits_and_a_plane_of_one():
    codes = np.arange(32).reshape(1, 32) % 8 - 4
    packed = pack(integers("int3-g32", codes, [[1.0]]))
    planes = packed.blob[128:].reshape(3, 64, 4)[:, 0]
    unsigned = (np.arange(32) % 8).reshape(8, 4)  # quad, input
    twos = [[sum((unsigned[4 * s + i, j] & 3) << (2 * i) for i in range(4)) for j in range(4)] for s in range(2)]
    ones = [sum((unsigned[q, j] >> 2) << q for q in range(8)) for j in range(4)]
    assert planes.tolist() == [*twos, ones]


def test_int8_has_its_scales_at_the_head_of_the_block_and_ends_in_zeros():
    packed = pack(integers("int8", [[1, -2, 3]], [[0.5]]))
    steps = packed.blob[128:].reshape(8, 64, 4)
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


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_packed_is_adopted_and_nothing_else(name):
    fmt, shape = FORMATS[name], (70, 128)
    codes = np.zeros(fmt.codes_shape(shape), fmt.dtype)
    scale = np.ones(fmt.scale_shape(shape), BF16) if fmt.scaled else None
    packed = pack(Weight(format=fmt, shape=shape, codes=codes, scale=scale))
    assert packing_refusal(packed) is None
    assert adopt(packed).out_features == 70
    assert packed.blob.ctypes.data % ALIGNMENT == 0
    for wrong in (
        replace(packed, record={**packed.record, "block_bytes": packed.record["block_bytes"] + 64}),
        replace(packed, record={**packed.record, "out_features": 71}),
        replace(packed, shape=(70, 160)),
        replace(packed, blob=packed.blob[:-1]),
        replace(packed, blob=np.zeros(packed.blob.size + 1, np.uint8)[1:]),
    ):
        with pytest.raises(KernelError, match="pack the weight again"):
            adopt(wrong)
