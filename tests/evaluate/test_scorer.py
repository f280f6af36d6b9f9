import numpy as np
import pytest
import torch

from halve.evaluate import compare
from halve.evaluate.scorer import DecoderScorer
from tests.models.test_against_transformers import decoder_of, random_model
from tests.tools import ops_under_test


@pytest.fixture(scope="module", params=ops_under_test(), ids=lambda make: make.__name__, name="decoder")
def _decoder(request):
    return decoder_of(random_model(), request.param())


def logits(scorer, tokens):
    return np.concatenate([chunk.copy() for chunk in scorer.logits(tokens)])


def documents(lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 128, n).astype(np.int32) for n in lengths]


def test_announced_windows_give_the_same_logits_as_each_alone(decoder):
    windows = documents([5, 200, 3, 90, 5, 250])
    windows.append(windows[0])  # the same text twice
    announced = DecoderScorer(decoder)
    announced.expect(windows)
    for window in windows:
        np.testing.assert_allclose(logits(announced, window), logits(DecoderScorer(decoder), window), atol=2e-5)


def test_windows_that_were_not_announced_or_come_in_another_order_are_answered_too(decoder):
    windows = documents([20, 30, 40])
    scorer = DecoderScorer(decoder)
    scorer.expect(windows)
    for window in [windows[2], *documents([7]), windows[0], windows[1]]:
        np.testing.assert_allclose(logits(scorer, window), logits(DecoderScorer(decoder), window), atol=2e-5)


def test_remembered_states_change_no_score_and_stay_within_their_bytes(decoder):
    texts = documents([30, 60, 90])
    plain = compare(DecoderScorer(decoder), DecoderScorer(decoder), texts, window_tokens=32)
    keeping = DecoderScorer(decoder, keep_bytes=100 * 4 * 64)
    for _ in range(2):
        again = compare(keeping, DecoderScorer(decoder), texts, window_tokens=32)
        np.testing.assert_allclose(again.nll_original, plain.nll_original, atol=1e-4)
    assert sum(len(hidden) for hidden in keeping._kept.values()) <= 100


def test_an_answer_that_is_not_read_to_its_end_leaves_torch_as_it_was(decoder):
    stream = DecoderScorer(decoder).logits(documents([10])[0])
    next(stream)
    assert not torch.is_inference_mode_enabled()
