"""Routing priced: small sets by hand, and what must hold for any."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import ConfigError, DataError
from halve.economics.routing import Curve, Outcomes, Prices, certify, choose, interval, usd_per_million

D = Decimal
CHEAP = Prices(name="cheap", input_usd_per_mtok=D("0.60"), output_usd_per_mtok=D("2.00"), origin="test")


def outcomes(score, cheap, dear, costs=(1_000_000, 10_000_000)):
    n = len(score)
    return Outcomes(
        score=np.array(score, float),
        right=np.array([cheap, dear], float),
        pico_usd=np.array([[costs[0]] * n, [costs[1]] * n], np.int64),
    )


def drawn(n=2000, skill=1.0, seed=0):
    """Questions of which the dear model answers more, and a score that knows which, as far as skill goes."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n)
    cheap, dear = rng.random(n) > hard, rng.random(n) > hard / 3
    score = skill * hard + (1 - skill) * rng.random(n)
    return outcomes(score, cheap, dear)


FOUR = outcomes([4, 3, 2, 1], [0, 1, 0, 1], [1, 1, 0, 1])


def test_costs_by_hand():
    # 150 * 0.60 + 80 * 2.00 = 250 micro-dollars
    assert CHEAP.pico_usd(np.array([150]), np.array([80])).tolist() == [250_000_000]
    assert usd_per_million(250_000_000, 1) == 250
    assert usd_per_million(3, 2) == D("0.0000015")


def test_four_questions_by_hand():
    curve = Curve(FOUR)
    cheap, dear = curve.always("cheap"), curve.always("dear")
    assert (cheap.accuracy.value, dear.accuracy.value) == (0.5, 0.75)
    assert (cheap.usd_per_million, dear.usd_per_million) == (1, 10)
    one = curve.at(4.0)
    assert (one.dear_share, one.accuracy.value, one.loss.value) == (0.25, 0.75, 0)
    assert one.usd_per_million == D("3.25")
    assert curve.at(float("inf")).usd_per_million == 1
    assert curve.at(float("-inf")).dear_share == 1
    assert curve.cost_at(4.0) == 13_000_000
    assert [point.dear_share for point in curve.points(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_frames_by_hand():
    curve = Curve(FOUR)
    coin = curve.coin(0.5)
    assert (coin.accuracy.value, coin.usd_per_million) == (0.625, D("5.5"))
    assert curve.coin_as_good(0.625).dear_share == 0.5
    assert curve.coin_as_good(0.9) is None
    oracle = curve.oracle()
    assert (oracle.dear_share, oracle.accuracy.value, oracle.usd_per_million) == (0.25, 0.75, D("3.25"))
    assert curve.oracle(accuracy=0.5).dear_share == 0
    assert curve.oracle(accuracy=0.6).dear_share == 0.25


def test_what_is_recovered_by_hand():
    curve = Curve(FOUR)
    assert curve.recovered("calls").value == pytest.approx(0.8)
    assert curve.calls_for(0.5) == 0.25
    # 25 of 101 budgets pay for no call: 0 .. 0.24
    assert curve.recovered("dollars").value == pytest.approx(76 / 101)


def test_a_dear_model_that_is_no_better():
    curve = Curve(outcomes([1, 2, 3, 4], [1, 1, 0, 1], [0, 1, 1, 1]))
    assert curve.recovered("calls") is curve.recovered("dollars") is None
    assert curve.calls_for(0.5) is None
    assert curve.coin_as_good(0.7).dear_share == 0
    assert choose(Curve(outcomes(range(50), [1] * 50, [1] * 50)), 0.01) == float("inf")


def test_an_oracle_takes_what_gains_most_for_a_dollar_first():
    two = Outcomes(
        score=np.array([1.0, 2.0]),
        right=np.array([[0.0, 0.0], [1.0, 1.0]]),
        pico_usd=np.array([[0, 0], [10_000_000, 1_000_000]]),
    )
    assert Curve(two).oracle(accuracy=0.5).usd_per_million == D("0.5")


def test_two_scores_of_the_same_questions():
    good, blind = drawn(skill=1.0), drawn(skill=0.0)
    blind = Outcomes(score=blind.score, right=good.right, pico_usd=good.pico_usd)
    first, second = Curve(good), Curve(blind)
    more = first.recovers_more(second)
    assert more.low > 0
    assert second.recovers_more(first).high < 0
    assert first.recovers_more(first).value == 0
    assert more.value == pytest.approx(first.recovered("dollars").value - second.recovered("dollars").value)
    target = first.at(first.thresholds()[60]).accuracy.value
    assert first.as_good(target, "x").usd_per_million < second.as_good(target, "x").usd_per_million
    assert first.as_good(2.0, "x") is None
    assert Curve(FOUR).as_good(0.5, "x").dear_share == 0
    assert Curve(FOUR).as_good(0.75, "x").dear_share == 0.25


def test_ties_go_together():
    curve = Curve(outcomes([1, 1, 1, 2], [0] * 4, [1] * 4))
    assert curve.at(1.0).dear_share == 1
    assert curve.at(1.5).dear_share == 0.25


def test_a_good_score_is_better_than_a_coin_and_a_blind_one_is_not():
    good, blind = (Curve(drawn(skill=skill)).recovered("calls") for skill in (1.0, 0.0))
    assert good.low > 0.5
    assert blind.low < 0.5 < blind.high


def test_a_threshold_is_chosen_with_room_and_certified_elsewhere():
    chosen, unseen = Curve(drawn(4000, seed=1)), Curve(drawn(4000, seed=2))
    verdict = certify(chosen, unseen, 0.05)
    assert verdict.answer == "holds"
    assert verdict.strategy.loss.high <= 0.05
    assert 0 < verdict.strategy.dear_share < 1
    assert verdict.strategy.usd_per_million < unseen.always("dear").usd_per_million
    assert (verdict.chosen_on, verdict.certified_on) == (4000, 4000)


def test_nine_thresholds_in_ten_are_certified():
    """Of 40 pairs of halves 36 are expected; 30 or fewer would be one in 100."""
    answers = []
    for seed in range(40):
        chosen, unseen = (Curve(drawn(600, seed=2 * seed + i), resamples=100) for i in (0, 1))
        answers.append(certify(chosen, unseen, 0.1).answer)
    assert answers.count("holds") > 30
    assert "broken" not in answers


def test_limits_that_are_broken_or_not_shown():
    few = Curve(drawn(60, seed=3))
    assert certify(few, few, 0.0).strategy.dear_share == 1
    assert certify(few, few, 0.02, threshold=0.5).answer in ("not_shown", "broken")
    many = Curve(drawn(4000))
    assert certify(many, many, 0.01, threshold=float("inf")).answer == "broken"
    with pytest.raises(ConfigError, match=r"quality limit: 1 must be from 0 to below 1"):
        choose(many, 1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 100 sets from one source, about 95 intervals hold its accuracy; 86 or fewer would be one in 2,000."""
    truth = 0.5
    held = 0
    for seed in range(100):
        right = np.random.default_rng(seed).random(300) < truth
        one = Curve(outcomes(np.arange(300), right, right), resamples=200, seed=seed).always("cheap").accuracy
        held += one.low <= truth <= one.high
    assert held > 86


def test_percentiles():
    one = interval(5.0, np.arange(1001.0))
    assert (one.value, one.low, one.high) == pytest.approx((5.0, 25.0, 975.0))


def test_what_cannot_be_routed():
    with pytest.raises(DataError, match=r"routing: 1 questions; at least 2 are needed"):
        outcomes([1], [1], [1])
    with pytest.raises(DataError, match="no finite number"):
        outcomes([1, float("nan")], [1, 1], [1, 1])


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=50, deadline=None)
def test_what_holds_for_any_questions(rows):
    score, cheap, dear = zip(*rows, strict=True)
    curve = Curve(outcomes(score, cheap, dear), resamples=100)
    points = curve.points()
    costs = [point.usd_per_million for point in points]
    assert costs == sorted(costs)  # more calls to the dear model never cost less
    oracle = curve.oracle()
    for point in points:
        assert point.accuracy.value <= oracle.accuracy.value + 1e-12
        assert point.accuracy.value + point.loss.value == pytest.approx(curve.always("dear").accuracy.value)
        assert point.accuracy.low - 1e-9 <= point.accuracy.high
    assert points[0].usd_per_million == curve.always("cheap").usd_per_million
    assert points[-1].usd_per_million == curve.always("dear").usd_per_million
    assert curve.coin(1.0).usd_per_million == points[-1].usd_per_million
