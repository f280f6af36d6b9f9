"""Accounts of tenants and models: nothing is lost or charged twice."""

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from halve.economics.product import SECONDS_PER_MONTH
from halve.economics.product_file import read_product
from halve.economics.tenants import Use, keep_books, spread

from .test_margin import OWN, raw

D = Decimal

MONTH = D(SECONDS_PER_MONTH)


def use(name, model="base", micro_usd=100, tokens=1000, unpriced=0):
    return Use(key=name and f"id-{name}", name=name, model=model, requests=2, prompt_tokens=tokens, cached_tokens=0,
               completion_tokens=0, micro_usd=micro_usd, unpriced=unpriced)  # fmt: skip


def product(**tenants):
    return read_product(raw(source={"self_hosted": OWN}, tenants=tenants))


def test_accounts_by_hand():
    # acme used 75 and globex 25 of 100 $; 40 $ of idle time go 30 and 10. Over half a month.
    uses = [use("acme", micro_usd=75_000_000, tokens=3000), use("globex", micro_usd=25_000_000)]
    books = keep_books(product(acme={"seats": 10}, globex={"seats": 4, "price_per_seat": 50}), uses,
                       40_000_000, MONTH / 2)  # fmt: skip
    acme, globex = books.tenants
    assert (acme.token_usd, globex.token_usd) == (105, 35)
    assert (acme.revenue_usd, globex.revenue_usd) == (150, 100)
    assert acme.other_usd == 10 + D("4.50")  # 2 $ a seat, 3 % of what it pays
    assert acme.contribution_usd == D("30.50")
    assert round(acme.margin, 6) == D("0.203333")
    assert acme.usd_per_mtok == 35_000
    assert books.total_micro_usd == 140_000_000
    (model,) = books.models
    assert (model.token_usd, model.revenue_usd) == (140, 250)


def test_an_adapter_bears_its_part():
    uses = [use("acme", tokens=3000, micro_usd=90), use("acme", "adapter", tokens=1000, micro_usd=10)]
    books = keep_books(product(acme={"seats": 10}), uses, 10, MONTH)
    assert [m.name for m in books.models] == ["base", "adapter"]
    assert [m.idle_micro_usd for m in books.models] == [9, 1]
    assert [m.revenue_usd for m in books.models] == [225, 75]
    assert [t.name for t in books.tenants] == ["acme"]


def test_what_is_not_known_is_unknown():
    uses = [use("acme"), use("stranger"), use(None), use("globex", micro_usd=50, unpriced=1)]
    books = keep_books(product(acme={"seats": 1}, globex={"seats": 1}, gone={"seats": 1}), uses, 0, MONTH)
    by = {account.name: account for account in books.tenants}
    assert by["stranger"].revenue_usd is by["stranger"].margin is None
    assert by[""].margin is None
    assert by["globex"].margin is by["globex"].usd_per_mtok is None
    assert not by["globex"].cost_known
    assert by["acme"].margin is not None
    assert books.models[0].revenue_usd is None
    assert books.missing == ("gone",)


def test_idle_time_of_unpriced_requests_goes_by_tokens():
    uses = [use("a", micro_usd=0, tokens=30, unpriced=1), use("b", micro_usd=0, tokens=10, unpriced=1)]
    books = keep_books(product(), uses, 8, MONTH)
    assert [t.idle_micro_usd for t in books.tenants] == [6, 2]


def test_spread_by_hand():
    assert spread(10, [1, 1, 1]) == [4, 3, 3]
    assert spread(10, [0, 0]) == [0, 0]
    assert spread(0, [1]) == [0]


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**12), min_size=1, max_size=9))
def test_parts_add_up_and_are_near_their_share(amount, weights):
    parts = spread(amount, weights)
    if sum(weights):
        assert sum(parts) == amount
        assert all(abs(part * sum(weights) - amount * w) < sum(weights) for part, w in zip(parts, weights, strict=True))
