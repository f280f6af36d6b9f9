"""Micro-dollars of seconds."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.errors import ConfigError
from halve.economics import Meter


def test_the_example_of_the_docstring():
    meter = Meter(Decimal("3.60"))
    charges = [meter.charge(15) for _ in range(100)]
    assert sum(charges) == 1
    assert set(charges) == {0, 1}


@given(st.decimals(0, 100, places=4), st.lists(st.integers(0, 10**9), max_size=50))
def test_charges_add_up_to_the_price_of_the_time(price, times):
    meter = Meter(price)
    charged = sum(meter.charge(one) for one in times)
    exact = Fraction(price) * sum(times) / 3600
    assert 0 <= exact - charged < 1


def test_without_a_price_nothing_is_zero():
    assert Meter(None).charge(10**9) is None


@pytest.mark.parametrize("price", ["-1", "NaN", "Infinity", "1e7"])
def test_an_absurd_price_is_refused(price):
    with pytest.raises(ConfigError, match="price per hour"):
        Meter(Decimal(price))
