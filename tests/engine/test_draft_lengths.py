"""How many guesses pay."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.engine.draft_lengths import BEGIN, GO_ON, LEAST, Candidate, Rates, StepCosts, allot


def test_costs_are_of_the_latest_steps_without_those_that_were_disturbed():
    costs = StepCosts()
    assert costs.of(3) == 0
    for seconds in [9.0, 1.0, 1.1, 1.1, 50.0]:
        costs.observe(3, seconds)
    assert costs.of(3) == 1.1
    for _ in range(20):
        costs.observe(3, 2.0)
    assert costs.of(3) == 2.0


def test_between_what_was_seen_costs_go_along_a_line_and_beyond_it_on():
    costs = StepCosts()
    costs.observe(2, 1.0)
    assert costs.of(2) < costs.of(3) < 1.5
    assert 0.5 <= costs.of(1) < 1.0
    costs.observe(6, 2.0)
    assert costs.of(4) == pytest.approx(1.5)
    assert costs.of(8) == pytest.approx(2.5)
    assert costs.of(1) == pytest.approx(0.75)


def test_the_first_step_of_a_number_of_rows_counts_no_more_than_could_be_expected():
    costs = StepCosts()
    costs.observe(1, 1.0)
    costs.observe(9, 50.0)
    assert costs.of(9) < 3.1
    for _ in range(3):
        costs.observe(9, 50.0)
    assert costs.of(9) == 50.0


def test_large_steps_are_counted_together_with_their_neighbours():
    costs = StepCosts()
    costs.observe(101, 1.0)
    assert costs.knows(100)
    assert costs.knows(97)
    assert not costs.knows(60)
    assert costs.of(96) == 1.0


def test_a_request_begins_with_what_the_engine_knows_and_comes_to_its_own():
    kinds = {2: 0.3, 4: 0.6}
    engine = Rates(kinds)
    first, second = Rates(kinds, engine), Rates(kinds, engine)
    assert first.of(2) == 0.3
    for _ in range(30):
        first.observe(2, 0, 4)
    assert first.of(2) < 0.1
    assert second.of(2) == engine.of(2) < 0.2
    assert second.of(4) == 0.6  # another kind
    for _ in range(30):
        second.observe(2, 4, 4)
    assert second.of(2) > 0.8


def test_after_a_wrong_guess_the_ones_behind_it_are_not_counted():
    one, other = Rates({0: 0.5}), Rates({0: 0.5})
    one.observe(0, 1, 8)
    other.observe(0, 1, 2)
    assert one.of(0) == other.of(0)


def flat(rows):
    return 1.0


def by_rows(rows):
    return float(rows)


def test_where_rows_are_free_all_guesses_pay_and_where_they_cost_what_they_bring_none():
    assert allot([Candidate(0.6, 4)], 1, flat) == ([4], pytest.approx(1 + 0.6 + 0.36 + 0.216 + 0.1296))
    assert allot([Candidate(0.99, 4)], 1, by_rows) == ([0], 1.0)
    assert allot([], 1, flat) == ([], 1.0)


def test_the_likelier_guesses_come_first():
    numbers, _ = allot([Candidate(0.9, 8), Candidate(0.2, 8)], 2, lambda rows: 1 + 0.05 * rows)
    assert numbers[0] > numbers[1]


def test_with_more_sequences_fewer_guesses_pay():
    def cost(rows):
        return max(1.0, rows / 8)

    most = [max(allot([Candidate(0.8, 8)] * n, n, cost)[0]) for n in (1, 2, 4, 8, 16)]
    assert most == sorted(most, reverse=True)
    assert most[0] == 7
    assert most[-1] == 0


def test_a_small_gain_is_not_begun_but_kept():
    candidates = [Candidate(0.5, 1)]
    assert allot(candidates, 1, lambda rows: {1: 1.0, 2: 1.47}[rows], pays=BEGIN)[0] == [0]
    assert allot(candidates, 1, lambda rows: {1: 1.0, 2: 1.47}[rows], pays=GO_ON)[0] == [1]


def test_an_unlikely_guess_is_not_made_however_cheap():
    assert allot([Candidate(0.4, 8)], 1, flat)[0] == [2]
    assert allot([Candidate(LEAST / 2, 8)], 1, flat)[0] == [0]


def test_guesses_that_take_time_to_make_must_pay_for_it():
    assert allot([Candidate(0.8, 4)], 1, flat, draft_cost=lambda n: 0.1)[0] != [0]
    assert allot([Candidate(0.8, 4)], 1, flat, draft_cost=lambda n: 1.0)[0] == [0]
    together = allot([Candidate(0.8, 1)] * 4, 4, flat, draft_cost=lambda n: 0.7)  # one run of the draft for all four
    assert together[0] == [1] * 4
    assert allot([Candidate(0.8, 1)], 4, flat, draft_cost=lambda n: 0.7)[0] == [0]


@given(
    st.lists(st.tuples(st.floats(0.5, 1), st.integers(0, 3)), min_size=1, max_size=3),
    st.lists(st.floats(0.01, 1), min_size=13, max_size=13),
)
def test_no_other_numbers_promise_more(given_candidates, steps):
    """Against all of them, one by one; costs rise with the rows in any way."""
    candidates = [Candidate(rate, most) for rate, most in given_candidates]
    costs = list(itertools.accumulate(steps))
    rows = len(candidates)

    def speed(numbers):
        tokens = rows + sum(c.rate**j for c, n in zip(candidates, numbers, strict=True) for j in range(1, n + 1))
        return tokens / costs[rows + sum(numbers)]

    numbers, gain = allot(candidates, rows, lambda n: costs[n], pays=1.0)
    best = max(speed(one) for one in itertools.product(*(range(c.most + 1) for c in candidates)))
    assert speed(numbers) == pytest.approx(best)
    assert gain == pytest.approx(best / speed([0] * rows))
