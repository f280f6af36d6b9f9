import pytest

from halve.core.errors import RequestError
from halve.engine.block_pool import BlockPool


def test_blocks_go_out_and_come_back():
    pool = BlockPool(6, 16)
    first, second = pool.allocate("a", 2), pool.allocate("b", 3)
    assert len(set(first + second)) == 5
    assert pool.num_free == 1
    pool.check()
    pool.free("a")
    assert pool.num_free == 3
    assert pool.allocate("c", 2) == first
    pool.check()


def test_more_blocks_than_are_free_are_refused():
    pool = BlockPool(4, 16)
    pool.allocate("a", 3)
    with pytest.raises(RequestError, match=r"'b': needs 2 blocks of 16 tokens, 1 of 4 are free; wait"):
        pool.allocate("b", 2)
    pool.check()


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 1), (16, 1), (17, 2)])
def test_a_begun_block_counts(num_tokens, blocks):
    assert BlockPool(4, 16).blocks_for(num_tokens) == blocks


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0)])
def test_a_pool_without_room_is_refused(sizes):
    with pytest.raises(RequestError, match="both must be 1 or more"):
        BlockPool(*sizes)


def test_check_finds_a_lost_and_a_doubled_block():
    pool = BlockPool(4, 16)
    pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check()
    pool._free.append(3)
    with pytest.raises(AssertionError):
        pool.check()
