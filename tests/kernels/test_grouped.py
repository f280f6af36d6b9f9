"""Rows sorted by expert: one call gives what a product for each expert gives."""

import numpy as np
import pytest

from halve.core.errors import KernelError
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.base import BF16
from halve.kernels import native_library
from halve.kernels.grouped import project_groups
from halve.kernels.native import NativeOps

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")
RNG = np.random.default_rng(3)
OFFSETS = np.array([0, 1, 1, 9, 309], np.int32)  # one row, none, a few, more than are taken together


def expert(name="int4-g32", shape=(96, 64)):
    fmt = FORMATS[name]
    codes = RNG.integers(-(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1), shape).astype(np.int8)
    scale = RNG.uniform(0.01, 0.03, fmt.scale_shape(shape)).astype(BF16)
    return Weight(format=fmt, shape=shape, codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits), scale=scale)


@pytest.mark.parametrize("name", ["int4-g32", "int8", "int6-g32"])
@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_each_expert_multiplies_its_own_rows_to_the_same_bits(name, activations):
    ops = NativeOps(activations=activations)
    experts = [ops.linear(expert(name), RNG.standard_normal(96).astype(np.float32)) for _ in range(4)]
    x = RNG.standard_normal((309, 64)).astype(np.float32)
    y = project_groups(ops, experts, x, OFFSETS)
    for e, linear in enumerate(experts):
        mine = slice(OFFSETS[e], OFFSETS[e + 1])
        np.testing.assert_array_equal(y[mine], ops.project(linear, x[mine]))


def test_no_rows_at_all_give_none():
    ops = NativeOps()
    assert project_groups(ops, [ops.linear(expert())], np.zeros((0, 64), np.float32), np.zeros(2, np.int32)).size == 0


@pytest.mark.parametrize("offsets", [[0, 1, 2, 3], [1, 1, 9, 9], [0, 5, 4, 9], [0, -1, 4, 9]])
def test_offsets_that_do_not_cover_the_rows_are_refused(offsets):
    ops = NativeOps()
    with pytest.raises(KernelError, match="must rise from 0 to the 9 rows of x"):
        project_groups(ops, [ops.linear(expert())] * 3, np.zeros((9, 64), np.float32), np.array(offsets, np.int32))


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
def test_experts_may_be_stored_in_different_formats(activations):
    ops = NativeOps(activations=activations)
    experts = [ops.linear(expert(name)) for name in ("int8", "int3-g32", "int4-g64", "int6-g32")]
    x = RNG.standard_normal((309, 64)).astype(np.float32)
    y = project_groups(ops, experts, x, OFFSETS)
    for e, linear in enumerate(experts):
        mine = slice(OFFSETS[e], OFFSETS[e + 1])
        np.testing.assert_array_equal(y[mine], ops.project(linear, x[mine]))


def test_experts_of_different_shapes_are_refused():
    ops = NativeOps()
    experts = [ops.linear(expert()), ops.linear(expert(shape=(32, 64)))]
    with pytest.raises(KernelError, match="share their shape"):
        project_groups(ops, experts, np.zeros((2, 64), np.float32), np.array([0, 1, 2], np.int32))
