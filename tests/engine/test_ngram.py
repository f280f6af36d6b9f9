"""What followed when the last tokens came before."""

import itertools
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.engine.ngram import MAX_CHAIN, MAX_MATCH, NgramIndex


def guess(tokens, most=4):
    length, draft = NgramIndex().guess(array("i", tokens), most)
    return length, list(draft)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([], (0, [])),
        ([1], (0, [])),
        ([1, 1], (0, [])),
        ([1, 2, 3], (0, [])),
        ([1, 2, 3, 4, 1, 2], (2, [3, 4, 1, 2])),
        ([9, 1, 2, 3, 9, 1, 2], (3, [3, 9, 1, 2])),
        ([7, 7, 7], (2, [7, 7, 7, 7])),  # goes on repeating itself
        ([1, 2, 9, 1, 2, 9, 1, 2], (5, [9, 1, 2, 9])),
    ],
)
def test_a_guess_goes_on_as_the_text_did_before(tokens, found):
    assert guess(tokens) == found


def test_the_longest_context_wins_and_of_equal_ones_the_latest():
    assert guess([5, 1, 2, 3, 8, 1, 2, 4, 5, 1, 2], most=1) == (3, [3])
    assert guess([1, 2, 3, 1, 2, 4, 1, 2], most=1) == (2, [4])


def test_as_many_tokens_as_are_wanted():
    assert guess([1, 2, 3, 4, 5, 1, 2], most=2) == (2, [3, 4])
    assert guess([1, 2, 3, 1, 2], most=0) == (0, [])


def test_a_match_is_measured_up_to_a_length_and_looked_for_at_so_many_places():
    assert guess([*range(40), *range(40)])[0] == MAX_MATCH
    far = [3, 1, 2, 9] + [1, 2, 8] * MAX_CHAIN + [3, 1, 2]  # the longer context lies behind the end of the chain
    assert guess(far, most=1) == (2, [8])


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6))
def test_grown_token_by_token_it_says_what_it_says_at_once(tokens, most):
    index, growing = NgramIndex(), array("i")
    for token in tokens:
        growing.append(token)
        assert index.guess(growing, most) == NgramIndex().guess(growing, most)


@given(st.lists(st.integers(0, 2), min_size=2, max_size=40))
def test_what_it_says_agrees_is_there(tokens):
    length, draft = guess(tokens, most=1)
    if length:
        context = tokens[len(tokens) - length :]
        assert any(
            tokens[i : i + length] == context and tokens[i + length] == draft[0] for i in range(len(tokens) - length)
        )
    else:
        pairs = list(itertools.pairwise(tokens))
        assert pairs[-1] not in pairs[:-1]
