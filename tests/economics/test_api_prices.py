"""Prices of closed APIs."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from halve.economics import api_price

pytest.importorskip("genai_prices")


def test_a_known_price_at_a_time():
    price = api_price("openai", "gpt-4o-mini", datetime(2026, 6, 1, tzinfo=UTC))
    assert (price.input_usd_per_mtok, price.output_usd_per_mtok) == (Decimal("0.15"), Decimal("0.6"))
    assert price.source.startswith("genai-prices ")


def test_what_is_not_known_is_none():
    assert api_price("openai", "no-such-model") is None
    assert api_price("nobody", "gpt-4o-mini") is None
