"""The solver against every choice there is, against random ones, and its proof."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import QualityError
from halve.search.solver import front, solve


def instance(seed, num_groups, num_options):
    """Costs that rise and losses that fall with bits, with noise, as formats do."""
    rng = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(num_groups):
        bits = np.sort(rng.uniform(2, 8.5, num_options))
        size, sensitivity = rng.lognormal(0, 1), rng.lognormal(0, 2)
        costs.append(size * bits * rng.uniform(0.9, 1.1, num_options))
        losses.append(sensitivity * 4.0**-bits * rng.uniform(0.7, 1.3, num_options))
    return costs, losses


def exhaustive(costs, losses, limit):
    best = np.inf
    for chosen in itertools.product(*(range(len(c)) for c in costs)):
        if sum(x[c] for x, c in zip(losses, chosen, strict=True)) <= limit:
            best = min(best, sum(x[c] for x, c in zip(costs, chosen, strict=True)))
    return best


def middle(losses, share):
    low, high = sum(x.min() for x in losses), sum(x.max() for x in losses)
    return float(low * (high / low) ** share)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.floats(0.0, 1.0))
def test_small_cases_are_solved_as_by_trying_every_choice(seed, num_groups, num_options, share):
    costs, losses = instance(seed, num_groups, num_options)
    limit = middle(losses, share) * 1.0001
    found = solve(costs, losses, limit)
    assert found.cost == pytest.approx(exhaustive(costs, losses, limit), rel=1e-6)
    assert found.loss <= limit * (1 + 1e-8)
    assert found.bound <= found.cost
    assert found.gap < 1e-6
    assert found.cost == pytest.approx(sum(c[i] for c, i in zip(costs, found.chosen, strict=True)))
    assert found.loss == pytest.approx(sum(x[i] for x, i in zip(losses, found.chosen, strict=True)))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_no_random_plan_within_the_limit_is_cheaper(share):
    costs, losses = instance(7, 40, 10)
    limit = middle(losses, share)
    found, rng = solve(costs, losses, limit), np.random.default_rng(0)
    others = []
    while len(others) < 200:
        chosen = [int(np.argmin(c + rng.lognormal(0, 3) * x)) for c, x in zip(costs, losses, strict=True)]
        chosen = [int(rng.integers(10)) if rng.random() < 0.1 else c for c in chosen]
        if sum(x[c] for x, c in zip(losses, chosen, strict=True)) <= limit:
            others.append(sum(c[i] for c, i in zip(costs, chosen, strict=True)))
        else:
            others.append(np.inf)
    assert found.cost <= min(others)


def test_a_model_of_128_groups_and_10_options_is_solved_to_a_proven_gap():
    costs, losses = instance(3, 128, 10)
    found = solve(costs, losses, middle(losses, 0.5))
    assert found.gap < 1e-4


def test_a_loose_limit_takes_the_cheapest_and_a_tight_one_the_best():
    costs, losses = instance(1, 6, 6)
    cheap = solve(costs, losses, 1e9)
    assert cheap.cost == pytest.approx(sum(c.min() for c in costs))
    assert cheap.gap == 0
    tight = solve(costs, losses, sum(x.min() for x in losses))
    assert tight.loss == pytest.approx(sum(x.min() for x in losses))


def test_a_limit_below_the_least_loss_is_refused_with_the_least():
    costs, losses = instance(1, 4, 4)
    least = sum(x.min() for x in losses)
    with pytest.raises(QualityError, match=rf"no plan loses .* or less by this model; the least is {least:.3g}"):
        solve(costs, losses, least * 0.9)


def test_losses_may_be_below_zero_as_measured_ones_are():
    costs = [np.array([1.0, 2.0]), np.array([1.0, 2.0])]
    losses = [np.array([0.5, -0.1]), np.array([0.3, 0.2])]
    assert solve(costs, losses, 0.25).chosen == (1, 0)
    assert solve(costs, losses, 0.15).chosen == (1, 1)


def test_options_that_another_beats_are_never_taken():
    costs, losses = [np.array([1.0, 1.0, 2.0, 3.0])], [np.array([3.0, 2.0, 2.5, 1.0])]
    assert {one.chosen for one in front(costs, losses)} == {(1,), (3,)}


def test_a_front_goes_from_the_cheapest_to_the_best_and_each_point_is_the_cheapest_of_its_loss():
    costs, losses = instance(5, 5, 5)
    points = front(costs, losses, num_points=20)
    assert points[0].cost == pytest.approx(sum(c.min() for c in costs))
    assert points[-1].loss == pytest.approx(sum(x.min() for x in losses))
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(points))
    for point in points:
        assert point.cost == pytest.approx(exhaustive(costs, losses, point.loss * (1 + 1e-9)), rel=1e-6)
