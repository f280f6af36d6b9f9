import numpy as np
import pytest
import torch

from halve.core.errors import QualityError
from halve.engine import EngineConfig
from halve.evaluate import compare
from halve.evaluate.scorer import DecoderScorer, EngineScorer
from halve.kernels.reference import TorchOps
from halve.models import Decoder, read_config
from tests.models.test_against_transformers import decoder_of, random_model
from tests.tools import StateDictSource, ops_under_test


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


def test_a_scorer_that_let_go_answers_what_it_kept(decoder):
    texts = documents([30, 60])
    scorer = DecoderScorer(decoder, keep_bytes=1 << 20)
    before = [logits(scorer, text) for text in texts]
    scorer.let_go()
    for text, known in zip(texts, before, strict=True):
        np.testing.assert_array_equal(logits(scorer, text), known)
    assert decoder.layers
    assert not scorer.decoder.layers


def test_an_answer_that_is_not_read_to_its_end_leaves_torch_as_it_was(decoder):
    stream = DecoderScorer(decoder).logits(documents([10])[0])
    next(stream)
    assert not torch.is_inference_mode_enabled()


CONFIG = EngineConfig(max_num_seqs=3, max_tokens_per_step=24)


def test_the_engine_scores_as_the_model_without_a_cache_does(decoder):
    texts = documents([5, 130, 60, 2, 90, 44, 44])
    plain = compare(DecoderScorer(decoder), DecoderScorer(decoder), texts, window_tokens=64)
    served = EngineScorer(decoder, CONFIG)
    found = compare(DecoderScorer(decoder), served, texts, window_tokens=64)
    assert float(found.kl.max()) < 1e-6
    np.testing.assert_allclose(found.nll_smaller, plain.nll_smaller, atol=1e-4)
    np.testing.assert_array_equal(found.document, plain.document)
    assert served.num_tokens >= len(found.kl)
    assert 0.4 < served.num_decoded / served.num_tokens < 0.7


def test_windows_one_by_one_are_the_same_as_side_by_side(decoder):
    windows = documents([30, 7, 30, 50])
    scorer = EngineScorer(decoder, CONFIG)
    scorer.expect(windows)
    for window in [windows[0], windows[2], *documents([9]), windows[3], windows[1], windows[1]]:
        np.testing.assert_allclose(logits(scorer, window), logits(DecoderScorer(decoder), window), atol=2e-5)


def test_what_the_cache_rounds_shows_in_the_divergence():
    model = random_model()
    exact = decoder_of(model, TorchOps("cpu"))
    raw = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    for make in ops_under_test():
        kl = {}
        for kv in ("fp32", "int8"):
            rounding = Decoder(read_config(raw).with_kv_format(kv), make(), StateDictSource(model.state_dict()))
            found = compare(DecoderScorer(exact), EngineScorer(rounding, CONFIG), documents([60] * 8), window_tokens=64)
            kl[kv] = float(found.kl.mean())
        assert kl["fp32"] < 1e-8
        assert kl["int8"] > 100 * max(kl["fp32"], 1e-9)


def test_steps_that_leave_a_position_out_are_told(decoder):
    class Forgetful(EngineScorer):
        def steps(self, windows):
            yield from list(super().steps(windows))[:-3]

    with pytest.raises(QualityError, match="positions have no logits of the smaller model"):
        compare(DecoderScorer(decoder), Forgetful(decoder, CONFIG), documents([40]), window_tokens=64)


def test_logits_that_are_not_finite_are_told_from_steps_too(decoder):
    class Broken(EngineScorer):
        def steps(self, windows):
            for pieces in super().steps(windows):
                pieces[0].logits[0, 0] = np.nan
                yield pieces

    with pytest.raises(QualityError, match="document 1, smaller: logits hold NaN"):
        compare(DecoderScorer(decoder), Broken(decoder, CONFIG), documents([40]), window_tokens=64)
