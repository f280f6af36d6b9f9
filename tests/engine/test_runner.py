from types import SimpleNamespace

import numpy as np
import pytest

from halve.core.errors import RequestError
from halve.engine import EngineCore, ModelRunner, blocks_for, blocks_within

from .toy import ToyRunner, alone, finish, request


class ToyDecoder:
    """A toy with the face of a decoder; its cache is the toy's memory."""

    batch_invariant = True

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=50, context=64)

    def new_cache(self, num_blocks, block_size):
        return ToyRunner(num_blocks=num_blocks, block_size=block_size)

    def sample(self, batch, cache, rows, sampling):
        return cache.run(batch, rows, sampling)

    def copy_blocks(self, cache, pairs):
        cache.copy_blocks(pairs)


def test_a_decoder_runs_in_an_engine():
    runner = ModelRunner(ToyDecoder(), num_blocks=8, block_size=4)
    core = EngineCore(runner)
    done = finish(core, [request("a", [1, 2, 3], n=2, max_tokens=9)])
    assert [c.token_ids for c in done] == [alone([1, 2, 3], 9)] * 2
    assert (runner.vocab_size, runner.context, runner.num_blocks, runner.block_size) == (50, 64, 8, 4)
    assert runner.batch_invariant


def test_copied_blocks_reach_the_cache():
    runner = ModelRunner(ToyDecoder(), num_blocks=8, block_size=4)
    runner._cache.memory[4:8] = 7
    runner.copy_blocks(np.array([[1, 3]], np.int32))
    assert runner._cache.memory[12:16].tolist() == [7] * 4


def test_the_cache_is_sized_by_memory_or_by_load():
    assert blocks_within(2**30, 16 * 32 * 1024) == 2048
    assert blocks_for(max_num_seqs=3, context=100, block_size=16) == 21


def test_memory_for_less_than_a_block_is_refused():
    with pytest.raises(RequestError, match="10 bytes hold no block of 64 bytes; give the cache more memory"):
        blocks_within(10, 64)
