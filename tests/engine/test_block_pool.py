import random
from array import array

import pytest

from halve.core.errors import RequestError
from halve.engine.block_pool import BlockPool, block_hash


def names(*tokens):
    """Hashes of a chain of blocks of one token each."""
    chain = []
    for token in tokens:
        chain.append(block_hash(chain[-1] if chain else None, array("i", [token])))
    return chain


def hold(pool, *tokens):
    """A sequence's full blocks, published."""
    blocks = [pool.allocate() for _ in tokens]
    for block, name in zip(blocks, names(*tokens), strict=True):
        pool.publish(block, name)
    return blocks


def test_blocks_go_out_and_come_back():
    pool = BlockPool(6, 16)
    first, second = [pool.allocate() for _ in range(2)], [pool.allocate() for _ in range(3)]
    assert len(set(first + second)) == 5
    assert (pool.num_free, pool.num_used, pool.num_available) == (1, 5, 1)
    pool.check()
    pool.release(first)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 0, 3)
    pool.check()


def test_a_full_block_stays_in_the_cache_for_the_next_prompt_with_its_prefix():
    pool = BlockPool(6, 1)
    blocks = hold(pool, 1, 2, 3)
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (3, 3, 0)
    found = pool.find(names(1, 2, 9))
    assert found == blocks[:2]
    assert pool.num_unused(found) == 2
    for block in found:
        pool.share(block)
    assert (pool.num_cached, pool.num_used) == (1, 2)
    pool.check()


def test_the_same_tokens_after_another_prefix_are_another_block():
    assert names(1, 5)[1] != names(2, 5)[1]
    assert names(1, 5)[1] != names(5)[0]
    pool = BlockPool(4, 1)
    hold(pool, 1, 5)
    assert pool.find(names(5)) == []


def test_shared_blocks_are_free_when_the_last_holder_lets_go():
    pool = BlockPool(2, 1)
    [block] = hold(pool, 1)
    pool.share(block)
    assert pool.num_references(block) == 2
    pool.release([block])
    assert pool.num_references(block) == 1
    assert pool.num_used == 1
    pool.release([block])
    assert pool.num_cached == 1
    pool.check()


def test_the_block_that_lay_longest_is_emptied_first_and_of_a_prefix_its_end():
    pool = BlockPool(4, 1)
    old, new = hold(pool, 1, 2), hold(pool, 7, 8)
    pool.release(old)
    pool.release(new)
    assert pool.allocate() == old[1]
    assert pool.find(names(1, 2)) == old[:1]
    assert pool.allocate() == old[0]
    assert pool.allocate() == new[1]
    assert pool.find(names(7, 8)) == new[:1]
    pool.check()


def test_reading_a_cached_block_makes_it_the_last_to_be_emptied():
    pool = BlockPool(3, 1)
    for token in (1, 2, 3):
        pool.release(hold(pool, token))
    [block] = pool.find(names(1))
    pool.share(block)
    pool.release([block])
    pool.allocate(), pool.allocate()
    assert pool.find(names(1)) == [block]
    pool.check()


def test_of_two_blocks_with_the_same_content_the_first_stays_the_source():
    pool = BlockPool(4, 1)
    [first], [second] = hold(pool, 1), hold(pool, 1)
    assert pool.find(names(1)) == [first]
    pool.release([second])
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.release([first])
    assert (pool.num_free, pool.num_cached) == (3, 1)
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


def test_check_finds_a_hash_that_points_at_another_block():
    pool = BlockPool(4, 1)
    hold(pool, 1, 2)
    pool._by_hash[names(1)[0]] = 1
    with pytest.raises(AssertionError):
        pool.check()


def test_whatever_is_done_every_block_is_in_one_state():
    rng = random.Random(0)
    pool, held = BlockPool(12, 1), []
    for _ in range(3000):
        if held and rng.random() < 0.45:
            pool.release(held.pop(rng.randrange(len(held))))
        else:
            tokens = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            found = pool.find(names(*tokens))
            if len(tokens) - len(found) > pool.num_available - pool.num_unused(found):
                continue
            for block in found:
                pool.share(block)
            blocks = [*found, *(pool.allocate() for _ in tokens[len(found) :])]
            for block, name in zip(blocks, names(*tokens), strict=True):
                pool.publish(block, name)
            held.append(blocks)
        pool.check()
    for blocks in held:
        pool.release(blocks)
    pool.check()
    assert pool.num_used == 0
