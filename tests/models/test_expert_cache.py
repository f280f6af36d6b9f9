"""Experts through a cache: who stays, who goes, and what is read ahead; by a reader that tests hold by the hand."""

import threading

import numpy as np
import pytest

from halve.core.errors import CheckpointError, KernelError
from halve.models.expert_cache import LEAST_RIGHT, ExpertCache, _Space

SIZE = 128


class Reads:
    """Writes an expert's number where it is to be read to; waits while `go` is not set."""

    def __init__(self):
        self.order, self.broken = [], set()
        self.go = threading.Event()
        self.go.set()

    def __call__(self, key, memory):
        self.go.wait()
        self.order.append(key)
        if key in self.broken:
            raise CheckpointError(f"{key} is broken")
        memory[:] = key[0] * 16 + key[1]
        return memory


def cache_of(places, layers=3, experts=8, reads=None, sizes=None):
    sizes = sizes or dict.fromkeys(((layer, e) for layer in range(layers) for e in range(experts)), SIZE)
    return ExpertCache(sizes, places * SIZE, reads or Reads(), num_readers=1)


def run(cache, layer, experts, ahead=None):
    """Go through the portions, checking that each expert comes once and holds what it should; their sizes."""
    seen, portions = [], []
    for here in cache.portions(layer, experts, ahead):
        portions.append(len(here))
        for expert, memory in here.items():
            assert (memory == layer * 16 + expert).all()
            seen.append(expert)
    assert sorted(seen) == sorted(experts)
    return portions


def test_what_was_used_least_recently_makes_room():
    reads = Reads()
    cache = cache_of(4, reads=reads)
    run(cache, 0, [0, 1])
    run(cache, 0, [2, 3])
    run(cache, 0, [0])  # 1 is now the oldest
    run(cache, 0, [4])
    reads.order.clear()
    run(cache, 0, [0, 2, 3, 4])
    assert reads.order == []
    run(cache, 0, [1])
    assert reads.order == [(0, 1)]
    assert cache.use().hits == 1 + 4
    assert cache.use().misses == 2 + 2 + 1 + 1
    assert cache.use().hit_rate == 5 / 11
    assert cache.use().read_bytes == 6 * SIZE


def test_more_experts_than_fit_come_in_portions_and_those_that_are_there_first():
    reads = Reads()
    cache = cache_of(3, reads=reads)
    assert max(run(cache, 0, list(range(8)))) <= 3
    assert sorted(reads.order) == [(0, e) for e in range(8)]
    there = {key for key, entry in cache._entries.items() if entry.state == "ready"}
    reads.order.clear()
    run(cache, 0, list(range(8)))
    assert not there & set(reads.order)  # used before they make room
    assert len(reads.order) == 5


def test_those_that_are_there_are_computed_while_others_are_read():
    reads = Reads()
    cache = cache_of(4, reads=reads)
    run(cache, 0, [0, 1])
    reads.go.clear()
    portions = cache.portions(0, [0, 1, 2])
    assert sorted(next(portions)) == [0, 1]
    reads.go.set()
    assert sorted(next(portions)) == [2]
    assert next(portions, None) is None
    assert cache.use().wait_s >= 0


def test_a_right_guess_is_there_when_it_is_asked_for():
    reads = Reads()
    cache = cache_of(6, reads=reads)
    run(cache, 0, [0, 1], ahead=lambda: cache.expect(1, [5, 6]))
    with cache._queue.changed:
        cache._queue.changed.wait_for(lambda: all(e.state == "ready" for e in cache._entries.values()), timeout=10)
    assert reads.order == [(0, 0), (0, 1), (1, 5), (1, 6)]  # behind what was asked for
    run(cache, 1, [5, 7])
    use = cache.use()
    assert (use.hits, use.misses) == (1, 3)
    assert (use.num_ahead, use.num_ahead_right) == (2, 1)


def test_a_wrong_guess_that_nobody_read_yet_is_given_up_and_a_right_one_goes_first():
    reads = Reads()
    cache = cache_of(6, reads=reads)
    reads.go.clear()
    portions = cache.portions(0, [0], lambda: cache.expect(1, [3, 4, 5]))
    thread = threading.Thread(target=lambda: list(portions))
    thread.start()
    with cache._queue.changed:
        cache._queue.changed.wait_for(lambda: len(cache._queue.ahead) == 3, timeout=10)
    reads.go.set()
    thread.join()
    reads.go.clear()
    later = threading.Thread(target=run, args=(cache, 1, [5]))
    later.start()
    reads.go.set()
    later.join()
    assert cache.use().num_ahead_right == 1
    assert (1, 5) in reads.order
    assert len(cache._entries) == sum(key in cache._entries for key in reads.order)


def test_guesses_never_take_the_place_of_what_is_in_use_or_of_each_other():
    cache = cache_of(4)
    told = []

    def ahead():
        cache.expect(1, list(range(8)))
        told.append(sorted(cache._entries))

    run(cache, 0, [0, 1, 2], ahead)
    assert told == [[(0, 0), (0, 1), (0, 2), (1, 0)]]


def test_guesses_that_are_mostly_wrong_are_not_read_until_they_are_right_again():
    reads = Reads()
    cache = cache_of(4, reads=reads)
    for _ in range(60):
        run(cache, 0, [0, 1], lambda: cache.expect(1, [6, 7]))
        run(cache, 1, [0, 1])
    assert cache._right < LEAST_RIGHT
    before = cache.use().num_ahead
    run(cache, 0, [0, 1], lambda: cache.expect(1, [6]))
    run(cache, 1, [0, 1])
    assert cache.use().num_ahead == before
    for expert in [2, 3, 4, 5, 6, 7] * 6:  # judged all the same
        run(cache, 0, [0, 1], lambda expert=expert: cache.expect(1, [expert]))
        run(cache, 1, [expert])
    assert cache.use().num_ahead > before


def test_experts_of_several_sizes_share_the_memory():
    rng = np.random.default_rng(0)
    sizes = {(layer, e): 64 * int(rng.integers(1, 9)) for layer in range(3) for e in range(8)}
    cache = cache_of(8, sizes=sizes)
    for _ in range(200):
        run(cache, int(rng.integers(3)), rng.permutation(8)[: rng.integers(1, 9)].tolist())
    used = sum(entry.memory.size for entry in cache._entries.values())
    assert used + sum(size for _, size in cache._space._free) == cache.size_bytes


def test_an_expert_that_cannot_be_read_fails_its_step_and_no_other():
    reads = Reads()
    reads.broken.add((0, 1))
    cache = cache_of(4, reads=reads)
    with pytest.raises(CheckpointError, match="is broken"):
        run(cache, 0, [0, 1])
    run(cache, 0, [0, 2])
    reads.broken.clear()
    run(cache, 0, [0, 1, 2, 3, 4])


def test_a_consumer_that_breaks_off_leaves_nothing_pinned():
    cache = cache_of(2)
    for _ in range(3):
        portions = cache.portions(0, [0, 1])
        next(portions)
        portions.close()
        assert not any(entry.pinned for entry in cache._entries.values())
    run(cache, 1, [0, 1])


def test_threads_end_with_the_cache_and_a_closed_one_says_so():
    def readers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("halve-expert")]

    before = readers()
    cache = cache_of(2)
    mine = [thread for thread in readers() if thread not in before]
    assert len(mine) == 1
    cache.close()
    mine[0].join(10)
    assert not mine[0].is_alive()
    with pytest.raises(KernelError, match="closed"):
        run(cache, 0, [0])
    cache = cache_of(2)
    mine = [thread for thread in readers() if thread not in before]
    run(cache, 0, [0])
    del cache
    mine[-1].join(10)
    assert not mine[-1].is_alive()


def test_free_stretches_join():
    space = _Space(256)
    starts = [space.take(64) for _ in range(4)]
    assert starts == [0, 64, 128, 192]
    assert space.take(64) is None
    space.give(0, 64)
    space.give(128, 64)
    assert space.take(128) is None
    space.give(64, 64)
    assert space.take(192) == 0
