"""Two models on the same tokens: paired figures and what they say."""

import numpy as np
import pytest

from halve.core.errors import QualityError
from halve.evaluate import PairedScores
from halve.evaluate.side_by_side import against_reference, side_by_side

DOCUMENTS, TOKENS = 40, 30
RANDOM = np.random.default_rng(0)
HARD = np.repeat(RANDOM.normal(3, 1, DOCUMENTS), TOKENS)  # what both models find hard


def scores(worse=0.0, kl=0.01, flip=0.1, nll_original=HARD):
    count = DOCUMENTS * TOKENS
    return PairedScores(
        kl=(kl * RANDOM.uniform(0.5, 1.5, count)).astype(np.float32),
        flip=RANDOM.uniform(size=count) < flip,
        nll_original=nll_original.astype(np.float32),
        nll_smaller=(HARD + worse + RANDOM.normal(0, 0.05, count)).astype(np.float32),
        document=np.repeat(np.arange(DOCUMENTS), TOKENS).astype(np.int32),
    )


def test_a_small_difference_is_seen_since_what_is_hard_cancels():
    found = side_by_side(scores(worse=0.01), vocab_size=4096)
    assert found.better == "a"
    assert found.ppl_ratio.value == pytest.approx(np.exp(0.01), abs=0.005)
    assert found.ppl_ratio.high - found.ppl_ratio.low < 0.02  # each perplexity's own interval is ten times as wide
    assert found.perplexity_a.high / found.perplexity_a.low > 1.2
    assert found.between.kl_mean.value == pytest.approx(0.01, rel=0.1)
    assert (found.num_documents, found.num_tokens, found.a) == (DOCUMENTS, DOCUMENTS * TOKENS, None)


def test_what_is_alike_is_not_told_apart():
    assert side_by_side(scores(), vocab_size=4096).better == "not told apart"


def test_perplexity_on_foreign_text_decides_nothing():
    found = side_by_side(scores(worse=-0.5), vocab_size=15)
    assert found.foreign
    assert found.better == "not told apart"
    assert side_by_side(scores(worse=-0.5), vocab_size=4096).better == "b"


def test_against_a_reference_the_closer_one_is_better_whatever_its_perplexity():
    near, far = scores(worse=0.02, kl=0.01), scores(worse=-0.02, kl=0.03)
    found = against_reference(near, far, vocab_size=4096)
    assert found.better == "a"
    assert found.kl_difference.value == pytest.approx(0.02, rel=0.1)
    assert found.ppl_ratio.high < 1
    assert found.reference_perplexity.value == pytest.approx(float(np.exp(HARD.mean())))
    assert found.between is None


def test_scores_of_other_documents_are_refused():
    one = scores()
    other = PairedScores(**{name: getattr(one, name)[:-1] for name in PairedScores.__dataclass_fields__})
    with pytest.raises(QualityError, match="not of the same documents"):
        against_reference(one, other, vocab_size=4096)
