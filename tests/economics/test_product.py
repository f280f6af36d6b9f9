"""A product's file: what is refused, and in what words."""

from decimal import Decimal
from types import SimpleNamespace

import pytest

from halve.core.errors import ConfigError
from halve.economics import ApiPrice
from halve.economics.currency import USD, Currency, find_currency, read_currency, read_rates
from halve.economics.fields import read_decimal, read_share
from halve.economics.product_file import read_product

from .test_margin import API, MACHINES, OWN, raw

D = Decimal


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seets": 4}, r"seets: unknown key; did you mean 'seats'\? known keys are api_price_cut, "),
        ({"zzz": 4}, r"zzz: unknown key; known keys are"),
        ({"tokens": {"promt": 4, "answer": 1}}, r"tokens\.promt: unknown key; did you mean 'prompt'\?"),
        ({"tokens": {"prompt": 4}}, r"tokens: missing answer; give it"),
        ({"tokens": 4}, r"tokens: expected a section with keys, got 4"),
        ({"price_per_seat": -3}, r"price_per_seat: -3 must be from 0 to 1000000000"),
        ({"price_per_seat": "cheap"}, r"price_per_seat: 'cheap' is not a number, such as 12\.50"),
        ({"price_per_seat": True}, r"price_per_seat: True is not a number"),
        ({"price_per_seat": float("nan")}, r"price_per_seat: nan is not a finite number"),
        ({"price_per_seat": 0}, r"price_per_seat: 0 is no revenue"),
        ({"seats": 0}, r"seats: 0 is no volume, and of nothing there is no margin"),
        ({"requests_per_seat": 0}, r"requests_per_seat: 0 is no volume"),
        ({"tokens": {"prompt": 0, "answer": 0}}, r"tokens: 0 is no volume"),
        ({"tokens": {"prompt": 9, "answer": 1, "cached": 30}}, r"tokens\.cached: 30 could be a percentage or a factor"),
        ({"tokens": {"prompt": 9, "answer": 1, "cached": "130%"}}, r"tokens\.cached: '130%' must be from 0% to 100%"),
        ({"source": {}}, r"source: give one of api, machines, self_hosted; there is none"),
        ({"source": {"api": API, "machines": MACHINES}}, r"source: give one of .*; there are api and machines"),
        ({"source": {"api": {"model": "gpt-5"}}}, r"source\.api\.model: 'gpt-5' has no known price; write it as PROV"),
        ({"source": {"api": {"model": "x/y"}}}, r"source\.api\.model: 'x/y' has no known price"),
        ({"source": {"api": {"input_usd_per_mtok": 1}}}, r"source\.api: give model: PROVIDER/MODEL"),
        ({"source": {"machines": {**MACHINES, "usd_per_hour": -1}}}, r"machines\.usd_per_hour: -1 must be from 0"),
        ({"source": {"machines": {**MACHINES, "usd_per_hour": 10**7}}}, r"hour: 10000000 must be from 0 to 1000000$"),
        ({"source": {"machines": {**MACHINES, "utilization": 0}}}, r"utilization: 0 must be from 0\.1"),
        ({"source": {"machines": {**MACHINES, "spare": "1.5"}}}, r"machines\.spare: '1\.5' must be a whole number"),
        ({"source": {"self_hosted": {"input_usd_per_mtok": 1}}}, r"source\.self_hosted: missing output_usd_per_mtok"),
        ({"source": {"self_hosted": {**OWN, "input_usd_per_mtok": 10**6}}}, r"must be from 0 to 100000$"),
        ({"compression": {"cost_ratio": 1}}, r"compression: tokens come from an API, whose price no compression"),
        ({"compression": {}}, r"compression: give one of cost_ratio"),
        ({"source": {"machines": MACHINES}, "compression": {"cost_ratio": 1}}, r"give prefill_speedup and decode_sp"),
        ({"source": {"self_hosted": OWN}, "compression": {"decode_speedup": 1}}, r"so give cost_ratio, or a source"),
        ({"source": {"self_hosted": OWN}, "api_price_cut": {"pass_through": 1}}, r"pass_through needs a reference"),
        ({"currency": "EUR"}, r"currency: 'EUR' has no rate; state one, in the file \(rates: \{EUR: RATE@DATE\}\)"),
        ({"rates": {"EUR": 0.9}}, r"rates\.EUR: 0\.9 is not RATE@DATE, such as JPY: 155\.2@2026-11-20"),
        ({"rates": []}, r"rates: \[\] must hold lines"),
        ({"demand": {"elasticity": -1}}, r"demand\.elasticity: -1 must be from 0 to 5"),
        ({"growth": {"months": 0}}, r"growth\.months: 0 must be from 1 to 120"),
        ({"ranges": {"seat": "10%"}}, r"ranges\.seat: unknown key; did you mean 'seats'\?"),
        ({"ranges": {"seats": [5]}}, r"ranges\.seats: \[5\] must be \[low, high\]"),
        ({"ranges": {"seats": [5, 2]}}, r"ranges\.seats: \[5, 2\] must be \[low, high\], the low end first"),
        ({"tenants": []}, r"tenants: \[\] must hold lines such as acme: \{seats: 40\}"),
        ({"tenants": {"acme": {}}}, r"tenants\.acme: missing seats; give it"),
        ({"scenarios": {}}, r"scenarios: \{\} must be a list of \{name, set\}"),
        ({"scenarios": [{"name": "x"}]}, r"scenarios\[0\]: missing set; give it"),
        ({"scenarios": [{"name": "x", "set": []}]}, r"scenarios\[0\]\.set: \[\] must hold lines"),
        ({"scenarios": [{"name": "x", "set": {"seats.of": 1}}]}, r"scenarios\[0\]\.set\.seats\.of: seats is not a"),
        ({"scenarios": [{"name": "x", "set": {"sets": 1}}]}, r"scenarios\[0\] \(x\): sets: unknown key; did you mean"),
        ({"scenarios": [{"name": "x", "set": {"seats": 1}, "compressed": 1}]}, r"compressed: 1 must be true or false"),
        ({"scenarios": [{"name": "x", "set": {"seats": 1}, "compressed": True}]}, r"there is no section compression"),
        ({"name": 4}, r"name: 4 must be a text"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        read_product(raw(**changes))


def test_all_that_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"missing price_per_seat, requests_per_seat, source, tokens; give them"):
        read_product({"seats": 3})


def test_an_api_is_priced_by_its_name():
    def price_of(provider, model):
        assert (provider, model) == ("openai", "gpt-x")
        return ApiPrice(name="OpenAI X", input_usd_per_mtok=D(1), output_usd_per_mtok=D(4), source="list 1")

    one = read_product(
        raw(source={"api": {"model": "openai/gpt-x", "cached_input_usd_per_mtok": "0.1"}}), price_of=price_of
    )
    assert (one.source.name, one.source.input_usd_per_mtok, one.source.origin) == ("OpenAI X", 1, "list 1")
    assert one.source.cached_input_usd_per_mtok == D("0.1")
    assert one.api_cut.reference == one.source


def test_a_list_that_knows_the_price_of_cached_input():
    known = SimpleNamespace(
        name="X", input_usd_per_mtok=D(1), output_usd_per_mtok=D(4), cached_usd_per_mtok=D("0.2"), source="list 1"
    )
    one = read_product(raw(source={"api": {"model": "a/b"}}), price_of=lambda provider, model: known)
    assert one.source.cached_input_usd_per_mtok == D("0.2")
    stated = {"api": {"model": "a/b", "cached_input_usd_per_mtok": "0.3"}}
    assert read_product(
        raw(source=stated), price_of=lambda provider, model: known
    ).source.cached_input_usd_per_mtok == D("0.3")


def test_customers_pay_in_their_currency():
    one = read_product(raw(currency="JPY", price_per_seat=4656, rates={"JPY": "155.2@2026-11-20"}))
    assert one.usd_per_seat == 30
    assert one.currency.stated == "1 USD = 155.2 JPY, 2026-11-20"
    beside = read_product(raw(currency="JPY", price_per_seat=300), rates={"JPY": read_currency("JPY=150@2026-11-21")})
    assert beside.usd_per_seat == 2


def test_money_in_words():
    yen = read_currency("JPY=155.2@2026-11-20")
    assert yen.say(D(100)) == "¥15,520"
    assert USD.say(D("-1234.5")) == "−$1,234.50"
    assert USD.say(D("0.00125")) == "$0.00125"
    assert USD.say(D("0.5")) == "$0.50"
    assert USD.say(D(0)) == "$0.00"
    assert USD.say_price(D("0.87")) == "$0.87"
    assert yen.say_price(D("0.87")) == "¥135.02"
    assert USD.say_price(D("0.0347222222")) == "$0.034722"
    assert Currency(code="CHF", per_usd=D("0.9")).say(D(10)) == "CHF 9.00"
    assert yen.to_usd(yen.of_usd(D(7))) == 7
    assert USD.stated == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("JPY", r"--currency: 'JPY' is not CODE=RATE@DATE, such as JPY=155\.2@2026-11-20"),
        ("yen=155@2026-11-20", "is not CODE=RATE@DATE"),
        ("JPY=155@soon", r"--currency: 'soon' is not a day, such as 2026-11-20"),
        ("JPY=0@2026-11-20", r"0 JPY for a dollar must be from 0\.000001 to 1000000000"),
        ("JPY=-1@2026-11-20", "must be from"),
        ("JPY=x@2026-11-20", r"'x' is not a number, such as 155\.2"),
        ("USD=2@2026-11-20", "a dollar is one dollar"),
    ],
)
def test_rates_that_are_none(text, said):
    with pytest.raises(ConfigError, match=said):
        read_currency(text)


def test_a_currency_near_a_known_one_is_offered():
    with pytest.raises(ConfigError, match=r"did you mean 'JPY'\?"):
        find_currency("JPX", read_rates({"JPY": "155.2@2026-11-20"}))
    assert find_currency("USD", {}) is USD
    assert read_currency("USD") is USD


def test_numbers_are_read_by_their_digits():
    assert read_decimal("1_000.5", "x") == D("1000.5")
    assert read_decimal("$3", "x") == 3
    assert read_share("12.5 %", "x") == D("0.125")
    assert read_share(0.3, "x") == D("0.3")
