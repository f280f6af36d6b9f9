"""Against hand-worked numbers and against scipy's tests and a direct maximum of the likelihood."""

import math

import pytest
from scipy import optimize, stats

from halve.core.errors import QualityError
from halve.evaluate.paired import (
    Pairs,
    above_chance_p,
    interval,
    items_needed,
    least_items,
    lower_bound,
    mcnemar_p,
    tango_z,
    wilson,
)


def pairs(harmed, fixed, n=100, both=None):
    both = n - harmed - fixed if both is None else both
    return Pairs(both=both, harmed=harmed, fixed=fixed, neither=n - harmed - fixed - both)


def test_answers_are_counted():
    counted = Pairs.of([True, True, False, False, True], [True, False, True, False, True])
    assert counted == Pairs(both=2, harmed=1, fixed=1, neither=1)
    assert counted.n == 5
    assert counted.difference == 0


@pytest.mark.parametrize(("one", "other"), [([True], []), ([], [])])
def test_lists_that_do_not_pair_are_refused(one, other):
    with pytest.raises(QualityError, match="one of each for every question"):
        Pairs.of(one, other)


def test_mcnemar_by_hand():
    # 2 * (C(6,0) + C(6,1)) / 2^6 = 14 / 64
    assert mcnemar_p(pairs(5, 1)) == pytest.approx(14 / 64)
    assert mcnemar_p(pairs(0, 0)) == 1
    assert mcnemar_p(pairs(3, 3)) == 1


@pytest.mark.parametrize(("harmed", "fixed"), [(0, 7), (12, 30), (200, 260), (1, 0), (4000, 3800)])
def test_mcnemar_is_scipys_binomial_test(harmed, fixed):
    exact = stats.binomtest(harmed, harmed + fixed, 0.5).pvalue
    assert mcnemar_p(pairs(harmed, fixed, n=10_000)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("right", "n", "chance"), [(30, 100, 0.25), (0, 10, 0.5), (10, 10, 0.5), (640, 2376, 0.25)])
def test_above_chance_is_scipys_one_sided_binomial_test(right, n, chance):
    exact = stats.binomtest(right, n, chance, alternative="greater").pvalue
    assert above_chance_p(right, n, chance) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (37, 100), (2, 3)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(right, n, confidence):
    exact = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    found = wilson(right, n, confidence)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert found.low <= found.value <= found.high


def restricted_z(harmed, fixed, n, delta):
    """Tango's statistic with the likelihood's maximum found by search instead of by his formula."""

    def negative(x):  # x: share harmed; fixed share is x + delta
        rest = 1 - 2 * x - delta
        parts = ((harmed, x), (fixed, x + delta), (n - harmed - fixed, rest))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

    low, high = max(0, -delta), (1 - delta) / 2
    found = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-13})
    x = min((low, high, found.x), key=negative)
    return (fixed - harmed - n * delta) / math.sqrt(n * (2 * x + delta - delta**2))


@pytest.mark.parametrize(("harmed", "fixed", "n"), [(9, 4, 100), (1, 0, 44), (30, 41, 500), (0, 5, 60), (3, 3, 30)])
@pytest.mark.parametrize("delta", [-0.2, -0.05, 0.0, 0.03, 0.15])
def test_the_score_statistic_maximizes_the_likelihood(harmed, fixed, n, delta):
    assert tango_z(pairs(harmed, fixed, n), delta) == pytest.approx(restricted_z(harmed, fixed, n, delta), abs=2e-4)


def test_no_difference_makes_it_mcnemars_statistic():
    assert tango_z(pairs(9, 4), 0.0) == pytest.approx((4 - 9) / math.sqrt(13))


@pytest.mark.parametrize(("harmed", "fixed"), [(9, 4), (0, 0), (5, 0), (0, 5), (40, 60)])
def test_ends_of_the_interval_lie_where_the_test_turns(harmed, fixed):
    counted = pairs(harmed, fixed)
    found, z = interval(counted, 0.95), stats.norm.ppf(0.975)
    assert tango_z(counted, found.low + 1e-9) <= z <= tango_z(counted, found.low - 1e-9)
    assert tango_z(counted, found.high - 1e-9) >= -z >= tango_z(counted, found.high + 1e-9)
    assert found.low <= counted.difference <= found.high
    assert lower_bound(counted) > found.low


def test_unchanged_answers_leave_an_interval_of_z_squared_over_n():
    z2 = stats.norm.ppf(0.95) ** 2
    assert lower_bound(pairs(0, 0, n=1000)) == pytest.approx(-z2 / (1000 + z2), abs=1e-12)


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02, 0.1])
def test_the_least_number_of_questions_is_the_first_that_can_pass(margin):
    least = least_items(margin)
    assert lower_bound(pairs(0, 0, n=least)) > -margin
    assert lower_bound(pairs(0, 0, n=least - 1)) <= -margin


def test_questions_needed_by_hand():
    # (1.6449 + 0.8416)^2 * 0.04 / 0.005^2 = 6.1826 * 1600
    assert items_needed(0.005, 0.04) == 9893
    assert items_needed(0.01, 0.04) == 2474
    assert items_needed(0.01, 0.0) == least_items(0.01)


@pytest.mark.parametrize("margin", [0, -0.01, 1, float("nan")])
def test_margins_that_mean_nothing_are_refused(margin):
    with pytest.raises(QualityError, match="is not between 0 and 1"):
        least_items(margin)


def test_the_test_keeps_its_level_and_has_the_power_it_promises():
    """Simulated: a true loss of the margin passes in 5 % of trials, no loss at items_needed in 80 %."""
    import numpy as np

    rng = np.random.default_rng(0)
    margin, changed = 0.02, 0.06
    n = items_needed(margin, changed)

    def passed(loss, trials=400):
        shares = [(changed - loss) / 2 + loss, (changed - loss) / 2, 1 - changed]
        drawn = rng.multinomial(n, shares, trials)
        return sum(lower_bound(pairs(int(h), int(f), n)) > -margin for h, f, _ in drawn) / trials

    assert passed(margin) <= 0.08
    assert 0.74 <= passed(0.0) <= 0.87
