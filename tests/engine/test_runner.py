from types import SimpleNamespace

import numpy as np
import pytest

from halve.core.errors import RequestError
from halve.engine import Engine, ModelRunner, block_bytes, blocks_for, blocks_within

from .toy import ToyRunner, alone, request


class ToyDecoder:
    """A toy with the face of a decoder; its cache is the toy's memory."""

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=50, context=64)

    def new_cache(self, num_blocks, block_size):
        return ToyRunner(num_blocks=num_blocks, block_size=block_size)

    def step(self, batch, cache, rows):
        return cache.run(batch, rows)


def test_a_decoder_runs_in_an_engine():
    runner = ModelRunner(ToyDecoder(), num_blocks=8, block_size=4)
    engine = Engine(runner)
    [done] = engine.complete([request("a", [1, 2, 3], max_tokens=9)])
    assert done.token_ids == alone([1, 2, 3], 9)
    assert (runner.vocab_size, runner.context, runner.num_blocks, runner.block_size) == (50, 64, 8, 4)
    engine.pool.check()


def test_the_cache_is_sized_by_memory_or_by_load():
    # Llama-3.2-1B in bf16: 16 layers x 8 heads x 64 x 2 bytes x keys and values = 32 KiB a token.
    size = block_bytes(num_layers=16, num_kv_heads=8, head_dim=64, kv_format="bf16", block_size=16)
    assert size == 16 * 32 * 1024
    # In int8 a byte an element, and two scales of two bytes a head.
    small = block_bytes(num_layers=16, num_kv_heads=8, head_dim=64, kv_format="int8", block_size=16)
    assert small == 16 * 16 * 8 * (2 * 64 + 2 * 2)
    assert blocks_within(2**30, size) == 2048
    assert blocks_for(max_num_seqs=3, context=100, block_size=16) == 21


def test_memory_for_less_than_a_block_is_refused():
    with pytest.raises(RequestError, match="10 bytes hold no block of 64 bytes; give the cache more memory"):
        blocks_within(10, 64)


def test_logits_leave_the_runner_as_float32():
    runner = ModelRunner(ToyDecoder(), num_blocks=8, block_size=4)
    runner._cache.run = lambda batch, rows: np.zeros((1, 50))
    assert runner.run(None, np.array([0], np.int32)).dtype == np.float32
