"""Arithmetic of prompts, by hand."""

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from halve.economics.prompts import PromptPrices, cost_as_sent, monthly, requests_per_month, trim_usd, usd_of

D = Decimal
PRICES = PromptPrices(
    input_usd_per_mtok=D("0.50"), cached_input_usd_per_mtok=D("0.05"), output_usd_per_mtok=D("1.50"), origin="test"
)


def test_costs_by_hand():
    assert usd_of(2_500_000, D("0.40")) == 1
    assert usd_of(1, None) is None
    assert cost_as_sent(10_000_000, 4_000_000, 2_000_000, PRICES) == D("6.20")
    assert PRICES.spared_by_cache == D("0.45")
    assert trim_usd(1_000_000, True, PRICES) == D("0.05")
    assert trim_usd(1_000_000, False, PRICES) == D("0.50")


def test_what_is_not_known_is_none_and_not_zero():
    nothing = PromptPrices()
    assert nothing.spared_by_cache is None
    assert cost_as_sent(1, 0, 0, nothing) is None
    half = PromptPrices(input_usd_per_mtok=D(1))
    assert half.spared_by_cache is None
    assert cost_as_sent(1_000_000, 0, 0, half) == 1
    assert cost_as_sent(1_000_000, 1, 0, half) is None
    assert cost_as_sent(1_000_000, 0, 1, half) is None


def test_a_month_by_hand():
    assert requests_per_month(101, 1000.0) == 262_800
    assert requests_per_month(1, 10.0) is None
    assert requests_per_month(10, 0.0) is None
    assert requests_per_month(10, None) is None
    assert monthly(D(2), 1000, D(50_000)) == 100
    assert monthly(None, 1000, D(1)) is None
    assert monthly(D(2), 1000, None) is None


@given(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12))
def test_steps_add_up(prompt, found, more):
    """Cost as sent, less caching, less reordering: the cost with all of it found in the cache."""
    found = min(found, prompt)
    more = min(more, prompt - found)
    first = cost_as_sent(prompt, 0, 0, PRICES)
    steps = [usd_of(tokens, PRICES.spared_by_cache) for tokens in (found, more)]
    assert first - sum(steps) == cost_as_sent(prompt, found + more, 0, PRICES)
