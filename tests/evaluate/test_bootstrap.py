import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import QualityError
from halve.evaluate import bootstrap
from halve.evaluate.bootstrap import document_weights, intervals, ratio, upper_quantile

# Reference values of Student's t at 0.975 (any table).
STUDENT_T = {9: 2.262, 19: 2.093, 49: 2.010}


def synthetic(random, num_documents):
    """Token scores with a mean of 0.5 that share an effect within each document, and their document."""
    lengths = random.geometric(1 / 60, num_documents) + 10
    document = np.repeat(np.arange(num_documents), lengths)
    scores = 0.5 + random.normal(size=num_documents)[document] + random.normal(size=len(document))
    return scores, document


def mean_interval(scores, group, num_resamples=400, confidence=0.9, seed=0):
    statistic = ratio(np.bincount(group, scores), np.bincount(group))
    options = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    return intervals({"mean": statistic}, group.max() + 1, **options)["mean"]


def test_documents_drawn_hold_the_truth_as_often_as_stated_and_tokens_drawn_far_less():
    random = np.random.default_rng(7)
    by_document = by_token = 0
    num_trials = 300
    for seed in range(num_trials):
        scores, document = synthetic(random, 25)
        interval = mean_interval(scores, document, seed=seed)
        by_document += interval.low <= 0.5 <= interval.high
        spread = 1.645 * scores.std() / np.sqrt(len(scores))  # what a bootstrap of tokens tends to
        by_token += abs(scores.mean() - 0.5) <= spread
    # Three binomial standard errors about 0.90.
    error = 3 * np.sqrt(0.9 * 0.1 / num_trials)
    assert abs(by_document / num_trials - 0.9) < error
    assert by_token / num_trials < 0.6


def test_drawing_tokens_one_by_one_gives_a_far_narrower_interval():
    scores, document = synthetic(np.random.default_rng(3), 25)
    whole = mean_interval(scores, document)
    single = mean_interval(scores, np.arange(len(scores)))
    assert single.value == pytest.approx(whole.value)
    assert whole.high - whole.low > 3 * (single.high - single.low)


def test_intervals_shrink_as_one_over_the_root_of_the_number_of_documents():
    widths = []
    for num_documents in (25, 400):
        scores, document = synthetic(np.random.default_rng(5), num_documents)
        interval = mean_interval(scores, document, num_resamples=2000)
        widths.append(interval.high - interval.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)  # two spreads of 25 documents are 30 % apart


@pytest.mark.parametrize("num_documents", [10, 20, 50])
def test_few_documents_widen_the_interval_to_students_t(num_documents):
    values = np.random.default_rng(1).normal(size=num_documents)
    interval = mean_interval(values, np.arange(num_documents), num_resamples=40_000, confidence=0.95)
    width = 2 * STUDENT_T[num_documents - 1] * values.std(ddof=1) / np.sqrt(num_documents)
    assert interval.high - interval.low == pytest.approx(width, rel=0.04)


token_scores = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), min_size=2, max_size=80)


@settings(deadline=None)
@given(token_scores, st.sampled_from([1, 10, 50]), st.integers(0, 5), st.sampled_from([1, 600, 10**6]))
def test_the_weighted_quantile_is_that_of_the_documents_written_out(tokens, tail_percent, seed, batch_bytes):
    document, values = np.array([d for d, _ in tokens]), np.array([v / 7 for _, v in tokens])
    weights = next(document_weights(5, 6, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_BATCH_BYTES", batch_bytes)
        found = upper_quantile(values, document, tail_percent)(weights)
    for row, value in zip(weights, found, strict=True):
        written_out = np.sort(np.repeat(values, row[document]))
        if not len(written_out):
            continue  # only documents without tokens were drawn
        # The smallest that at most tail_percent of the tokens lie above.
        expected = next(v for v in written_out if 100 * (written_out > v).sum() <= tail_percent * len(written_out))
        assert value == expected


def test_the_quantile_at_equal_weights_is_numpys_inverted_cdf():
    values = np.random.default_rng(2).normal(size=1037)
    found = upper_quantile(values, np.zeros(1037, np.int64), 1)(np.ones((1, 1), np.int64))
    assert found[0] == np.quantile(values, 0.99, method="inverted_cdf")


def test_weights_draw_as_many_documents_as_there_are_in_batches_of_bounded_size(monkeypatch):
    whole = np.concatenate(list(document_weights(10, 500, 3)))
    assert whole.shape == (500, 10)
    assert (whole.sum(axis=1) == 10).all()
    assert abs(whole.mean(axis=0) - 1).max() < 4 * np.sqrt(0.9 / 500)
    monkeypatch.setattr(bootstrap, "_BATCH_BYTES", 8 * 10 * 64)
    batches = list(document_weights(10, 500, 3))
    assert max(len(batch) for batch in batches) == 64
    np.testing.assert_array_equal(np.concatenate(batches), whole)


def test_the_draws_of_a_seed_never_change():
    # Recorded once: another stream would make every certificate's intervals fail to reproduce.
    assert next(document_weights(6, 2, 0)).tolist() == [[1, 0, 0, 3, 1, 1], [1, 1, 1, 1, 1, 1]]


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=12), st.integers(0, 20))
def test_the_value_lies_in_its_interval(values, seed):
    interval = mean_interval(np.array(values), np.arange(len(values)), num_resamples=100, seed=seed)
    assert interval.low <= interval.value <= interval.high
    assert interval.n == len(values)


def test_what_gives_no_interval_is_refused():
    options = {"confidence": 0.95, "num_resamples": 400, "seed": 0}
    statistic = {"mean": ratio(np.ones(3), np.ones(3))}
    with pytest.raises(QualityError, match="1 documents with tokens to predict; an interval needs at least 2"):
        intervals(statistic, 1, **options)
    for confidence in (0, 1, 95, float("nan")):
        with pytest.raises(QualityError, match=r"is not between 0 and 1, such as 0\.95"):
            intervals(statistic, 3, **{**options, "confidence": confidence})
    with pytest.raises(QualityError, match=r"num_resamples: 400 leaves fewer than 5 .* take at least 1000"):
        intervals(statistic, 3, **{**options, "confidence": 0.99})
