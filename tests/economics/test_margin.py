"""Gross margin: golden figures by hand, and what must hold for any product."""

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import ConfigError
from halve.economics.margin import after_api_cut, compressed, most_requests_per_seat, scenario_rows, statement
from halve.economics.margin_tables import margin_tables, rounded
from halve.economics.outlook import demand_curve, demand_response, months_ahead, payback_months
from halve.economics.product import Machines, TokenPrices, Traffic
from halve.economics.product_file import read_product
from halve.economics.sensitivity import tornado

D = Decimal

API = {"input_usd_per_mtok": "0.25", "cached_input_usd_per_mtok": "0.025", "output_usd_per_mtok": 2}
OWN = {"input_usd_per_mtok": "0.10", "output_usd_per_mtok": "0.80"}
MACHINES = {"usd_per_hour": "0.80", "prefill_tok_s": 10000, "decode_tok_s": 1000, "utilization": "40%"}


def raw(**changes):
    return {
        "price_per_seat": 30,
        "seats": 400,
        "requests_per_seat": 600,
        "tokens": {"prompt": 1200, "cached": "30%", "answer": 220},
        "source": {"api": API},
        "other_costs": {"per_seat": 2, "per_month": 1000, "payment_share": "3%"},
        **changes,
    }


def product(**changes):
    return read_product(raw(**changes))


def test_a_month_by_hand():
    # 201.6 M * 0.25 + 86.4 M * 0.025 + 52.8 M * 2.00 = 50.40 + 2.16 + 105.60 = 158.16
    one = statement(product())
    assert (one.revenue_usd, one.token_usd) == (12000, D("158.16"))
    assert (one.seat_usd, one.fixed_usd, one.payment_usd) == (800, 1000, 360)
    assert one.gross_profit_usd == D("9681.84")
    assert one.gross_margin == D("0.80682")
    assert one.token_share == D("0.01318")
    assert one.usd_per_request == D("0.000659")
    assert one.machines is None


def test_tokens_of_an_api_by_hand():
    prices = TokenPrices(kind="api", name="x", origin="", input_usd_per_mtok=D("0.5"), output_usd_per_mtok=D("1.5"),
                         cached_input_usd_per_mtok=D("0.05"))  # fmt: skip
    traffic = Traffic(prompt=D(10_000_000), cached=D(4_000_000), answer=D(2_000_000))
    assert prices.usd(traffic) == D("6.20")


def test_cached_input_of_an_unknown_price_is_not_free():
    with pytest.raises(ConfigError, match=r"API: the price of cached input is not known; give cached_input_usd_per"):
        product(source={"api": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2}})
    assert product(
        source={"api": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2}}, tokens={"prompt": 1, "answer": 1}
    )


def test_machines_by_hand():
    # 6 M / 10,000 + 2 M / 1,000 = 600 + 2,000 = 2,600 s
    machines = Machines(name="m", usd_per_hour=D("0.80"), prefill_tok_s=D(10_000), decode_tok_s=D(1000),
                        utilization=D("0.4"))  # fmt: skip
    traffic = Traffic(prompt=D(10_000_000), cached=D(4_000_000), answer=D(2_000_000))
    assert machines.busy_s(traffic) == 2600
    assert machines.usd(traffic) == 584  # one of them, 730 h
    # busy 2,628,000 s of 40 % of 2,628,000: 2.5, so 3
    much = Traffic(prompt=D(0), cached=D(0), answer=D(2_628_000_000))
    assert machines.num_machines(much) == 3
    assert machines.usd(much) == 1752
    assert replace(machines, spare=1, operator_usd_per_month=D(500)).usd(much) == 4 * 584 + 500


def test_an_always_on_machine_is_not_multiplied_by_its_utilization():
    """llmtco.com and kickllm.com: monthly = $/h * 730 * utilization. Paid is the whole month."""
    half, full = (
        statement(product(source={"machines": {**MACHINES, "utilization": share}})).token_usd for share in ("50%", 1)
    )
    assert half == full == 584


def test_the_most_a_seat_may_ask_by_hand():
    # 12,000 - 800 - 1,000 - 360 = 9,840 $; 400 seats at 0.000659 $ a request: 37,329.2
    assert most_requests_per_seat(product()) == 37_329
    free = {"self_hosted": {"input_usd_per_mtok": 0, "output_usd_per_mtok": 0}}
    assert most_requests_per_seat(product(source=free)) is None
    assert most_requests_per_seat(product(price_per_seat=1)) == -1


def test_an_api_cut_by_hand():
    # tokens 158.16 * 0.7 = 110.712; passed on: 0.5 * 0.3 * 158.16 / 400 = 0.05931 a seat
    cut = product(api_price_cut={"cut": "30%", "pass_through": "50%"})
    one = statement(after_api_cut(cut))
    assert one.token_usd == D("110.712")
    assert one.revenue_usd == 400 * (30 - D("0.05931"))
    own = product(source={"self_hosted": OWN}, api_price_cut={"pass_through": 1, "reference": API})
    after = statement(after_api_cut(own))
    assert after.token_usd == statement(own).token_usd
    assert after.revenue_usd == 12000 - D("0.3") * D("158.16")


def test_compression_by_each_way():
    by_ratio = product(source={"self_hosted": OWN}, compression={"cost_ratio": "0.5", "quality_loss": "0.4%"})
    # 201.6 * 0.10 + 52.8 * 0.80 = 62.40
    assert statement(by_ratio).token_usd == D("62.40")
    assert statement(compressed(by_ratio)).token_usd == D("31.20")
    speeds = {"prefill_speedup": "1.6", "decode_speedup": 2}
    by_speed = product(source={"machines": MACHINES}, compression=speeds)
    assert (compressed(by_speed).source.prefill_tok_s, compressed(by_speed).source.decode_tok_s) == (16000, 2000)
    moved = product(compression={"source": {"self_hosted": OWN}})
    assert statement(compressed(moved)).token_usd == D("62.40")
    assert compressed(product()) is None


def test_scenarios_say_the_loss_beside_the_money():
    rows = scenario_rows(
        product(
            source={"self_hosted": OWN},
            compression={"cost_ratio": "0.5", "quality_loss": "0.4%"},
            scenarios=[{"name": "long", "set": {"tokens.answer": 440}, "compressed": True}],
        )
    )
    assert [row.case for row in rows] == [
        "now", "compressed", "api_cut", "compressed_api_cut", "seats_x2", "compressed_seats_x2", "requests_x2",
        "compressed_requests_x2", "stated",
    ]  # fmt: skip
    assert {row.quality_loss for row in rows if row.compressed} == {D("0.004")}
    assert {row.quality_loss for row in rows if not row.compressed} == {None}
    by = {row.case: row.statement for row in rows}
    assert by["seats_x2"].revenue_usd == 24000
    assert by["requests_x2"].revenue_usd == 12000
    assert by["requests_x2"].token_usd == by["seats_x2"].token_usd == D("124.80")
    assert by["stated"].token_usd == (D("20.16") + 2 * D("42.24")) / 2
    assert [row.case for row in scenario_rows(product())] == ["now", "api_cut", "seats_x2", "requests_x2"]


def test_a_tornado_by_hand():
    free = {"self_hosted": {"input_usd_per_mtok": 0, "output_usd_per_mtok": 0}}
    bars = tornado(product(source=free, other_costs={"per_month": 3000}))
    by = {bar.driver: bar for bar in bars}
    # 1 - 3,000 / 9,600 and 1 - 3,000 / 14,400
    assert by["price_per_seat"].at_low == D("0.6875")
    assert rounded(by["price_per_seat"].at_high, 9) == 0.791666667
    assert bars[0].driver in ("price_per_seat", "seats")
    assert bars[0].swing >= bars[-1].swing
    assert "other_costs.per_seat" not in by  # it is 0
    assert by["tokens.prompt"].swing == 0


def test_stated_ranges_are_used_and_shares_stay_shares():
    bars = tornado(
        product(
            source={"machines": {**MACHINES, "utilization": "90%"}},
            ranges={"price_per_seat": [20, 45], "source.utilization": "50%", "seats": "10%"},
        )
    )
    by = {bar.driver: (bar.low, bar.high) for bar in bars}
    assert by["price_per_seat"] == (20, 45)
    assert by["source.utilization"] == (D("0.45"), 1)
    assert by["seats"] == (360, 440)


def halving(**demand):
    free = {"per_seat": 0}
    return product(
        source={"self_hosted": {"input_usd_per_mtok": 0, "output_usd_per_mtok": "1.893939393939393939393939394"}},
        compression={"cost_ratio": "0.5"},
        other_costs=free,
        demand=demand,
    )


@pytest.mark.parametrize(
    ("elasticity", "requests", "spent"),
    [(0, "600", "0"), ("0.5", "848.53", "20.71"), (1, "1200", "50"), (2, "2400", "150")],
)
def test_where_a_saving_goes_by_hand(elasticity, requests, spent):
    """100 $ of tokens become 50 at the same use; r = 0.5."""
    found = demand_response(halving(elasticity=elasticity))
    assert round(found.saved_usd, 6) == 50
    assert round(found.requests_per_seat, 2) == D(requests)
    assert round(-found.more_tokens_usd, 2) == D(spent)
    assert round(found.kept_usd, 2) == 50 - D(spent)
    assert round(found.spent_share, 4) == D(spent) / 50


def test_a_lower_price_brings_seats():
    found = demand_response(halving(elasticity=0, pass_through="100%", seat_elasticity=1))
    # 50 $ over 400 seats: 0.125 off 30 $; seats * 30 / 29.875
    assert round(found.usd_per_seat, 9) == D("29.875")
    assert round(found.lower_price_usd, 6) == -50
    assert round(found.after.seats, 4) == D("401.6736")
    assert round(found.after.revenue_usd, 6) == 12000


def test_months_ahead_by_hand():
    growing = product(growth={"seats_per_month": "5%", "months": 2, "api_price_per_year": "-50%"})
    months = months_ahead(growing)
    assert [month.now.seats for month in months] == [400, 420, 441]
    assert months[0].now == statement(growing)
    # a sixth of a year at half price a year: 0.5 ** (1/6)
    assert round(months[2].now.usd_per_request / months[0].now.usd_per_request, 6) == D("0.890899")


def test_payback_by_hand():
    one = product(source={"self_hosted": OWN}, compression={"cost_ratio": "0.5", "one_time_usd": "15.60"})
    assert payback_months(one) == D("0.5")
    assert payback_months(product()) is None


numbers = st.decimals(min_value="0.01", max_value="10000", places=2)
shares = st.decimals(min_value="0", max_value="1", places=3)


@st.composite
def products(draw):
    machines = draw(st.booleans())
    if machines:
        rates = {name: draw(numbers) for name in ("usd_per_hour", "prefill_tok_s", "decode_tok_s")}
        source = {"machines": {**rates, "utilization": draw(st.decimals("0.01", "1", places=2))}}
        smaller = {"prefill_speedup": draw(st.decimals("1", "4", places=2)), "decode_speedup": 2}
    else:
        names = ("input_usd_per_mtok", "cached_input_usd_per_mtok", "output_usd_per_mtok")
        source = {"self_hosted": {name: draw(numbers) for name in names}}
        smaller = {"cost_ratio": draw(st.decimals("0.05", "1", places=2))}
    return read_product(
        {
            "price_per_seat": draw(numbers),
            "seats": draw(st.integers(1, 5000)),
            "requests_per_seat": draw(st.integers(1, 5000)),
            "tokens": {"prompt": draw(st.integers(1, 9999)), "cached": draw(shares), "answer": 99},
            "source": source,
            "compression": smaller,
            "other_costs": {"per_seat": draw(numbers), "per_month": draw(numbers), "payment_share": draw(shares)},
            "demand": {"elasticity": draw(st.decimals(0, 3, places=1)), "pass_through": draw(shares),
                       "seat_elasticity": draw(st.decimals(0, 2, places=1))},
        }
    )  # fmt: skip


@given(products())
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_product(one):
    now = statement(one)
    assert now.revenue_usd == now.gross_profit_usd + now.token_usd + now.seat_usd + now.fixed_usd + now.payment_usd
    # Cheaper or equal tokens never cost more; a dearer source never costs less.
    assert statement(compressed(one)).token_usd <= now.token_usd
    name = "usd_per_hour" if isinstance(one.source, Machines) else "output_usd_per_mtok"
    dearer = one.on(replace(one.source, **{name: getattr(one.source, name) + 1}))
    assert statement(dearer).token_usd > now.token_usd
    # More use never costs less, and the most that pays is where it says.
    assert statement(replace(one, requests_per_seat=one.requests_per_seat + 1)).token_usd >= now.token_usd
    most = most_requests_per_seat(one)
    if most is not None and most > 0:
        at, beyond = (statement(replace(one, requests_per_seat=D(most + more))) for more in (0, 1))
        assert at.gross_profit_usd >= 0 > beyond.gross_profit_usd
    # The steps of the response add up to the profit afterwards.
    response = demand_response(one)
    assert abs(now.gross_profit_usd + response.kept_usd - response.after.gross_profit_usd) < D("1e-9")
    for bar in tornado(one):
        assert bar.low <= bar.value <= bar.high


@given(st.integers(1, 10**7), st.integers(1, 10**7), shares, numbers, numbers)
def test_dollars_of_requests_add_up(prompt, answer, cached, dear, cheap):
    prices = TokenPrices(kind="api", name="x", origin="", input_usd_per_mtok=dear, output_usd_per_mtok=dear,
                         cached_input_usd_per_mtok=cheap)  # fmt: skip
    one = Traffic(prompt=D(prompt), cached=prompt * cached, answer=D(answer))
    both = Traffic(prompt=one.prompt * 2, cached=one.cached * 2, answer=one.answer * 2)
    assert prices.usd(both) == 2 * prices.usd(one)


def test_rows_of_tables_recompute():
    one = product(source={"self_hosted": OWN}, compression={"cost_ratio": "0.5"})
    tables = margin_tables(scenario_rows(one), tornado(one), demand_curve(one), months_ahead(one))
    for row in tables.scenarios:
        costs = row["token_usd"] + row["seat_usd"] + row["fixed_usd"] + row["payment_usd"]
        assert row["gross_profit_usd"] == pytest.approx(row["revenue_usd"] - costs, abs=1e-5)
        assert row["gross_margin"] == pytest.approx(row["gross_profit_usd"] / row["revenue_usd"], abs=1e-8)
        assert row["token_usd"] == pytest.approx(row["usd_per_mtok"] * row["tokens"] / 1e6, abs=1e-3)
        assert row["revenue_usd"] == row["seats"] * row["usd_per_seat"]
        fresh = (row["prompt_tokens"] - row["cached_tokens"]) * row["input_usd_per_mtok"]
        answers = row["answer_tokens"] * row["output_usd_per_mtok"]
        cached = row["cached_tokens"] * row["cached_input_usd_per_mtok"]
        assert row["token_usd"] == pytest.approx((fresh + cached + answers) / 1e6, abs=1e-5)
        assert row["usd_per_hour"] is None
    for row in tables.demand:
        steps = row["saved_usd"] + row["more_tokens_usd"] + row["lower_price_usd"] + row["more_seats_usd"]
        assert row["kept_usd"] == pytest.approx(steps, abs=1e-5)
    assert len(tables.months) == 2 * 13
    assert tables.tenants == tables.models == []


def test_rows_of_machines_recompute():
    one = product(source={"machines": {**MACHINES, "operator_usd_per_month": 500}})
    for row in margin_tables(scenario_rows(one), tornado(one), [], months_ahead(one)).scenarios:
        paid = row["machines"] * 730 * row["usd_per_hour"] + row["operator_usd_per_month"]
        assert row["token_usd"] == pytest.approx(paid)
        assert row["input_usd_per_mtok"] is None


def test_numbers_keep_their_digits():
    assert rounded(D("9681.84")) == 9681.84
    assert rounded(D("12000.000000")) == 12000
    assert isinstance(rounded(D(12000)), int)
    assert rounded(D(1) / 3, 9) == 0.333333333
    assert rounded(None) is None
