"""Answers that part, tasks that are guessed: what a canary notices."""

import pytest

from halve.core.certificate import Measured
from halve.core.errors import QualityError
from halve.evaluate.answering import counted
from halve.evaluate.canary import canary, first_difference
from halve.evaluate.paired import Pairs


class Asked:
    """Four choices."""

    name, kind, sha256, chance = "mine", "choice", "0" * 64, 0.25


def task(both, harmed, fixed, neither):
    return counted(Asked(), Pairs(both=both, harmed=harmed, fixed=fixed, neither=neither), margin=None)


def rate(value):
    return Measured(value=value, low=value * 0.9, high=value * 1.1, n=50)


def test_answers_part_behind_what_they_share():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2
    assert first_difference([5], [1]) == 0


def test_where_answers_part_is_told_with_an_interval():
    found = canary([3, 48, 10, 48, 20, 48, 48, 5], 48, rate(0.02))
    assert (found.kind, found.task, found.num_prompts, found.max_tokens) == ("divergence", None, 8, 48)
    assert found.divergence.low <= found.divergence.value <= found.divergence.high
    assert found.same == 0.5
    assert found.p10 < found.p90 == 48


def test_answers_that_part_as_often_as_first_choices_differ_pass_even_in_two_bits():
    canary([0, 1, 0, 2, 0, 0, 1, 0] * 3, 48, rate(0.55))
    canary([5, 9, 3, 6, 12, 1, 8, 5] * 3, 48, rate(0.12))


def test_decoding_that_is_broken_is_noticed_though_the_text_is_predicted_well():
    with pytest.raises(QualityError, match=r"24 of 24 greedy answers part .*decoding is broken"):
        canary([0, 1, 2] * 8, 48, rate(0.02))


def test_one_early_difference_is_no_alarm():
    canary([0, *[48] * 23], 48, rate(0.001))


def test_a_task_that_the_original_answers_is_the_canary():
    found = canary([48] * 24, 48, rate(0.01), [task(60, 5, 4, 31)])
    assert (found.kind, found.task) == ("task", "mine")
    with pytest.raises(QualityError, match=r"mine: the original answers 65\.0%, .* no better than a guess"):
        canary([48] * 24, 48, rate(0.01), [task(10, 55, 15, 20)])


def test_a_task_that_the_original_guesses_tells_nothing():
    assert canary([48] * 24, 48, rate(0.01), [task(20, 6, 4, 70)]).kind == "divergence"


def test_without_prompts_there_is_no_canary():
    with pytest.raises(QualityError, match="no prompts"):
        canary([], 48, rate(0.01))
