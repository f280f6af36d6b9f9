"""A router that learns: it finds what there is to find, and no more."""

import numpy as np
import pytest

from halve.evaluate.router import NUM_FEATURES, features_of, fit, gains_of_unseen

RNG = np.random.default_rng(0)
EASY, HARD = "Where is the capital of the country?", "Prove the theorem of the field and its extension."


def questions(n=400):
    """Hard ones only the dear model answers; of easy ones both know four in five."""
    hard = RNG.random(n) < 0.4
    prompts = [f"{HARD if h else EASY} {RNG.integers(1000)}" for h in hard]
    both = RNG.random(n) < 0.8
    return prompts, np.array([both & ~hard, both | hard]), hard


def test_rows_of_features():
    features = features_of(["a b", "", "c"])
    assert features.start.tolist() == [0, 5, 7, 10]
    assert features.index.max() == NUM_FEATURES - 1
    picked = features.rows(np.array([2, 0]))
    assert picked.start.tolist() == [0, 3, 8]
    assert picked.index.tolist() == [*features.index[7:10], *features.index[0:5]]
    assert np.sum(features.value[:3] ** 2) == pytest.approx(1)


def test_it_learns_which_questions_need_the_dear_model():
    prompts, right, hard = questions()
    gain = fit(features_of(prompts), right).gain(features_of(prompts))
    assert gain[hard].min() > gain[~hard].max()
    chances = fit(features_of(prompts), right).chances(features_of([EASY, HARD]))
    assert chances[0, 0] > 0.6 > chances[0, 1]


def test_gains_of_what_was_not_seen():
    prompts, right, hard = questions()
    features = features_of(prompts)
    gains = gains_of_unseen(features, right)
    assert gains[hard].mean() > gains[~hard].mean() + 0.3
    noise = RNG.random((2, len(prompts))) < 0.5
    assert abs(np.corrcoef(gains_of_unseen(features, noise), noise[1] * 1.0 - noise[0])[0, 1]) < 0.2


def test_the_same_questions_give_the_same_router():
    prompts, right, _ = questions(100)
    first, second = (fit(features_of(prompts), right).weights for _ in range(2))
    assert np.array_equal(first, second)
