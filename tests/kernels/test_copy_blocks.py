"""Copying blocks of a paged cache, as copy-on-write needs it, on every Ops."""

import numpy as np
import pytest

from halve.core.errors import KernelError
from halve.kernels.native import NativeOps
from halve.kernels.native_library import available
from halve.kernels.ops import AttentionSpec, TokenBatch
from halve.kernels.reference import TorchOps

SPECS = [AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, kv_format=name) for name in ("fp32", "bf16")]
needs_native = pytest.mark.skipif(available() is not None, reason="the C++ library is not built")
every_ops = pytest.mark.parametrize("make", [TorchOps, pytest.param(NativeOps, marks=needs_native)])


def one_token(position, blocks, size=4):
    """A token at a position of a sequence over these blocks."""
    return TokenBatch(
        token_ids=np.zeros(1, np.int32),
        positions=np.array([position], np.int32),
        cu_seqlens=np.array([0, 1], np.int32),
        slot_mapping=np.array([blocks[position // size] * size + position % size], np.int32),
        block_tables=np.array([blocks], np.int32),
    )


@every_ops
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kv_format)
def test_a_sequence_over_copied_blocks_goes_on_with_the_same_bits(make, spec):
    ops = make()
    cache = ops.kv_cache(6, 4, spec)

    def attend(position, blocks):
        rng = np.random.default_rng(position)
        q, k, v = (ops.from_host(rng.standard_normal((1, n * 8), np.float32)) for n in (4, 2, 2))
        return ops.to_host(ops.attention(q, k, v, one_token(position, blocks), spec, cache))

    for position in range(6):
        attend(position, [0, 1])
    ops.copy_blocks(cache, np.array([[1, 4], [0, 3]], np.int32))
    apart = [attend(position, [3, 4]) for position in (6, 7)]
    together = [attend(position, [0, 1]) for position in (6, 7)]
    np.testing.assert_array_equal(apart, together)


@needs_native
@pytest.mark.parametrize("pairs", [[[0, 3]], [[-1, 0]]])
def test_a_block_that_does_not_exist_is_refused(pairs):
    ops = NativeOps(num_threads=1)
    with pytest.raises(KernelError, match=r"block -?\d \(1 of 2\) is not in 0..2"):
        ops.copy_blocks(ops.kv_cache(3, 4, SPECS[0]), np.array(pairs, np.int32))
