import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.formats.integer import pack_codes, unpack_codes


def bits_by_hand(codes: np.ndarray, bits: int) -> np.ndarray:
    """The definition, one bit at a time: code + 2^(b-1), first code lowest, rows on words of their own."""
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]):
        stream = sum((int(code) + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(row))
        num_words = -(-len(row) * bits // 32)
        rows.append([(stream >> (32 * i)) & 0xFFFFFFFF for i in range(num_words)])
    return np.array(rows, np.uint32).reshape(*codes.shape[:-1], -1)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (8, [-128, -1, 0, 127], [0xFF807F00]),
        (4, [-8, -7, -6, -5, -4, -3, -2, -1], [0x76543210]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0xFEDCBA98]),
        (2, [-2, -1, 0, 1] * 4, [0xE4E4E4E4]),
        (3, [-4] * 32, [0, 0, 0]),
        (3, [3] * 32, [0xFFFFFFFF] * 3),
        (3, [-4] * 10 + [3] + [-4] * 21, [0xC0000000, 0x00000001, 0]),  # the eleventh code straddles two words
        (6, [-32] * 5 + [31] + [-32] * 26, [0xC0000000, 0x0000000F, 0, 0, 0, 0]),
        (4, [7, 7, 7], [0x00000FFF]),  # what a row does not fill is zero
    ],
)
def test_codes_become_the_words_written_by_hand(bits, codes, words):
    packed = pack_codes(np.array([codes], np.int8), bits)
    assert packed.dtype == np.uint32
    assert packed.tolist() == [words]
    assert unpack_codes(packed, bits, len(codes)).tolist() == [codes]


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    width=st.integers(1, 80),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_is_the_bit_stream_and_unpacking_undoes_it(bits, width, rows, seed):
    half = 1 << (bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, (rows, width)).astype(np.int8)
    packed = pack_codes(codes, bits)
    np.testing.assert_array_equal(packed, bits_by_hand(codes, bits))
    unpacked = unpack_codes(packed, bits, width)
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_leading_axes_are_kept(bits):
    codes = np.random.default_rng(0).integers(-4, 4, (2, 5, 64)).astype(np.int8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (2, 5, 2 * bits)
    np.testing.assert_array_equal(unpack_codes(packed, bits, 64), codes)
