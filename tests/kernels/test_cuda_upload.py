import numpy as np
import pytest
import torch

from halve.formats import FORMATS, pack_codes
from halve.formats.base import BF16, FP8
from halve.kernels.cuda.upload import Stage, unpacked, upload

CPU = torch.device("cpu")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("width", [32, 96, 40])
def test_codes_are_unpacked_from_words_as_the_format_says(bits, width):
    most = 1 << (bits - 1)
    codes = np.random.default_rng(bits).integers(-most, most, (5, width)).astype(np.int8)
    words = upload(pack_codes(codes, bits), CPU)
    np.testing.assert_array_equal(unpacked(words, bits, width).numpy(), codes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, FP8, np.int8])
def test_what_arrives_has_the_bits_that_were_sent_however_it_was_cut(dtype):
    values = np.random.default_rng(0).standard_normal((7, 13)).astype(dtype)
    for found in (
        upload(values, CPU),
        upload(values, CPU, Stage(16, pinned=False)),
        upload(values.T, CPU, Stage(64, pinned=False)).T,
    ):
        raw = found.contiguous().view(torch.uint8).numpy().tobytes()
        assert raw == values.tobytes()
    assert {fmt.dtype for fmt in FORMATS.values()} >= {np.dtype(dtype)}
