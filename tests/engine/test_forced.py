"""Texts through the engine's steps, over the toy model that notices whatever lies in a wrong slot."""

from types import SimpleNamespace

import numpy as np
import pytest

from halve.core.errors import RequestError
from halve.engine import EngineConfig
from halve.engine.forced import forced, step_tokens_of
from tests.engine.toy import ToyRunner

CONFIG = EngineConfig(max_num_seqs=4, max_tokens_per_step=16, max_prefill_beside_decode=8)


class ToyDecoder(ToyRunner):
    """The toy as a decoder: its cache is its memory, made anew."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=self.vocab_size)

    def new_cache(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.memory = np.full(num_blocks * block_size, -1, np.int64)
        return self.memory

    def step(self, batch, cache, rows):
        assert cache is self.memory
        return self.logits(batch, rows)

    def copy_blocks(self, cache, pairs):
        raise AssertionError("no prefix is shared, so nothing is copied")


def texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, n).astype(np.int32) for n in lengths]


def collected(decoder, given, config=CONFIG, **options):
    found = [np.full((len(text), 50), np.nan, np.float32) for text in given]
    for pieces in forced(decoder, given, config, block_size=4, **options):
        for piece in pieces:
            found[piece.index][piece.start : piece.start + len(piece.logits)] = piece.logits
    return found


@pytest.mark.parametrize("prompt_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_blocks", [None, 14])
def test_every_position_sees_its_own_text_up_to_it(prompt_share, num_blocks):
    given = texts([1, 2, 30, 17, 5, 40, 3, 26])
    decoder = ToyDecoder()
    found = collected(decoder, given, prompt_share=prompt_share, num_blocks=num_blocks)
    for text, logits in zip(given, found, strict=True):
        expected = [decoder.next(text[: i + 1].astype(np.int64)) for i in range(len(text))]
        np.testing.assert_allclose(logits, np.array(expected, np.float32))


def test_equal_texts_are_computed_each():
    decoder = ToyDecoder()
    (text,) = texts([20])
    one, other = collected(decoder, [text, text])
    np.testing.assert_array_equal(one, other)
    assert sum(batch.num_tokens for batch in decoder.batches) == 40


def test_prompts_and_answers_share_steps_within_what_the_engine_allows():
    decoder = ToyDecoder()
    collected(decoder, texts([20] * 10))
    sizes = [(batch.num_sequences, batch.num_tokens) for batch in decoder.batches]
    assert max(sequences for sequences, _ in sizes) == CONFIG.max_num_seqs
    assert max(tokens for _, tokens in sizes) <= CONFIG.max_tokens_per_step
    assert any(sequences == tokens == 4 for sequences, tokens in sizes)  # four answers, one token each
    assert any(1 < sequences < tokens for sequences, tokens in sizes)  # a prompt beside answers


def test_a_text_that_the_cache_can_never_hold_is_refused():
    with pytest.raises(RequestError, match="need 40 tokens of cache, there are 12"):
        collected(ToyDecoder(), texts([40]), num_blocks=3)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(RequestError, match="text 1: holds no token"):
        collected(ToyDecoder(), texts([0]))


def test_no_texts_run_nothing():
    assert collected(ToyDecoder(), []) == []


def test_a_large_vocabulary_makes_steps_shorter_but_never_less_than_a_token_a_sequence():
    assert step_tokens_of(EngineConfig(), 32_000) == 512
    assert step_tokens_of(EngineConfig(), 128_256) == 261
    assert step_tokens_of(EngineConfig(), 10_000_000) == 32
