"""Costs by hand, what must hold for any price, and errors of others that are not repeated here."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.errors import ConfigError
from halve.economics.api_prices import ApiPrice
from halve.economics.costs import (
    HOURS_PER_MONTH,
    Mix,
    api_request_usd,
    break_even,
    fleet,
    joules_per_token,
    seconds_per_request,
    token_cost,
    verdict,
)
from halve.economics.roofline import Throughput

D = Decimal
money = st.decimals(min_value=D("0.01"), max_value=D(100), places=4)
counts = st.integers(min_value=1, max_value=100_000)


def rates(prefill=10_000.0, decode=1_000.0, watts=None):
    return Throughput(
        prefill_tok_s=prefill, decode_tok_s=decode, sequences=8, basis="measured", origin="by hand", watts=watts
    )


def mix(prompt=1000, output=200, cached=0):
    return Mix(prompt_tokens=D(prompt), output_tokens=D(output), cached_tokens=D(cached))


def test_a_million_tokens_by_hand():
    """$3.60 an hour is $0.001 a second: 10,000 prompt tokens, or 1,000 of answers."""
    cost = token_cost(D("3.60"), rates(), D("0.5"))
    assert cost.input_usd_per_mtok == D("0.1")
    assert cost.output_usd_per_mtok == D("1")
    assert cost.request_usd(mix()) == D("0.0001") + D("0.0002")
    assert cost.usage_usd_per_mtok(mix()) == D("0.25")
    assert cost.allocation_usd_per_mtok(mix()) == D("0.5")
    assert seconds_per_request(rates(), mix()) == D("0.3")


def test_cached_tokens_take_no_prefill():
    cost = token_cost(D("3.60"), rates(), D(1))
    assert cost.request_usd(mix(cached=1000)) == D("0.0002")
    assert seconds_per_request(rates(), mix(cached=500)) == D("0.25")


def test_energy_by_hand():
    """700 W for 0.3 s over 1,200 tokens: 0.175 J a token; unknown power is unknown."""
    assert joules_per_token(rates(watts=700.0), mix()) == D("0.175")
    assert joules_per_token(rates(), mix()) is None


def price(**more):
    return ApiPrice(name="API", input_usd_per_mtok=D("0.25"), output_usd_per_mtok=D(2), source="by hand", **more)


def test_a_request_of_an_api_by_hand():
    asked = mix(1155, 211, 155)
    assert api_request_usd(price(), asked) == D("0.00028875") + D("0.000422")
    cached = price(cached_usd_per_mtok=D("0.025"), batch_discount=D("0.5"))
    assert api_request_usd(cached, asked) == D("0.00025") + D("0.000003875") + D("0.000422")
    assert api_request_usd(cached, asked, batch=True) == api_request_usd(cached, asked) / 2
    assert api_request_usd(price(), asked, batch=True) == api_request_usd(price(), asked)


def test_a_machine_of_4608_dollars_breaks_even_at_460_million_tokens_whatever_its_utilization():
    """Not at 0.46 million, and not at another volume when machines are allowed less work (learnAI, ch. 9)."""
    hour = D(4608) / HOURS_PER_MONTH
    per_request = D(10) * mix().tokens / 1_000_000
    found = [
        break_even(
            usd_per_hour=hour, throughput=rates(), mix=mix(), api_usd_per_request=per_request, most_utilization=D(share)
        )
        for share in ("1", "0.4", "0.1")
    ]
    for even in found:
        assert even.tokens is not None
        assert abs(even.tokens - 460_800_000) < D("0.001")
        assert even.machines == 1


def test_ninety_tokens_a_second_at_twenty_cents_cost_62_cents_a_million():
    """Not 0.0007, which is the price of a thousand (Cortensor)."""
    cost = token_cost(D("0.20"), rates(decode=90.0), D(1))
    assert round(cost.output_usd_per_mtok, 3) == D("0.617")


def test_idle_hours_of_an_always_on_machine_are_paid():
    """A month costs 730 hours, not 730 hours times utilization (llmtco, kickllm)."""
    plan = fleet(
        tokens_per_month=D(1_000_000), usd_per_hour=D(1), throughput=rates(), mix=mix(), most_utilization=D("0.4")
    )
    assert (plan.machines, plan.monthly_usd) == (1, D(730))
    assert token_cost(D(1), rates(), D("0.4")).allocation_usd_per_mtok(mix()) == (
        token_cost(D(1), rates(), D(1)).usage_usd_per_mtok(mix()) / D("0.4")
    )


def test_a_request_is_charged_its_share_of_steps_and_not_its_duration():
    """Eight requests side by side each last 8 * 0.2 s of decoding and are charged 0.2 s (LiteLLM's cost_per_second)."""
    assert token_cost(D(3600), rates(), D(1)).request_usd(mix(prompt=0)) == D("0.2")


def test_machines_that_serve_less_than_they_cost_never_break_even():
    even = break_even(usd_per_hour=D(10), throughput=rates(), mix=mix(), api_usd_per_request=D("0.0001"))
    assert even.tokens is None
    assert even.machines is None
    assert even.share_of_capacity < 1


def test_operators_are_paid_by_what_machines_save_at_their_limit():
    """A machine of $730 serves what an API asks $2,628 for: $5,000 of operators want three machines' savings."""
    even = break_even(
        usd_per_hour=D(1), throughput=rates(), mix=mix(), api_usd_per_request=D("0.0003"), monthly_ops_usd=D(5000)
    )
    assert even.machines == 3
    assert even.monthly_usd == D(730) * 3 + 5000
    assert even.load is not None
    assert D(2) / 3 < even.load <= 1


@given(money, money, counts, counts)
def test_costs_rise_with_the_price(low, more, prompt, output):
    asked = mix(prompt, output)
    cheap, dear = (token_cost(hour, rates(), D("0.4")).allocation_usd_per_mtok(asked) for hour in (low, low + more))
    assert cheap < dear


@given(money, counts, counts, counts, counts)
def test_requests_cost_the_sum_of_their_parts(hour, a, b, c, d):
    cost = token_cost(hour, rates(), D("0.4"))
    both = cost.request_usd(mix(a + c, b + d))
    assert abs(both - cost.request_usd(mix(a, b)) - cost.request_usd(mix(c, d))) < D("1e-20")


@given(money, st.decimals(min_value=D("0.00001"), max_value=D("0.1"), places=6), counts, counts)
def test_at_break_even_both_cost_the_same_and_a_token_less_is_dearer(hour, request, prompt, output):
    asked = mix(prompt, output)
    even = break_even(usd_per_hour=hour, throughput=rates(), mix=asked, api_usd_per_request=request)
    if even.tokens is None:
        capacity = D(3600) * HOURS_PER_MONTH / seconds_per_request(rates(), asked) * request
        assert capacity < hour * HOURS_PER_MONTH
        return
    api = even.tokens / asked.tokens * request
    assert even.monthly_usd is not None
    assert abs(api - even.monthly_usd) < D("1e-12") * max(api, 1)
    assert even.load is not None
    assert even.load <= 1 + D("1e-20")


@given(st.decimals(min_value=D(1), max_value=D(10) ** 9, places=0), st.sampled_from(["1", "0.4", "0.05"]))
def test_fleets_serve_their_volume_with_one_machine_less_too_few(tokens, share):
    plan = fleet(tokens_per_month=tokens, usd_per_hour=D(1), throughput=rates(), mix=mix(), most_utilization=D(share))
    assert plan.load <= D(share) + D("1e-20")
    assert plan.headroom_tokens >= -D("1e-15")
    if plan.machines > 1:
        assert plan.load * plan.machines / (plan.machines - 1) > D(share)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: token_cost(D(1), rates(), D(0)), "utilization: 0 must be above 0"),
        (lambda: token_cost(D(1), rates(), D("1.2")), "utilization: 1.2"),
        (lambda: token_cost(D(-1), rates(), D(1)), "price per hour: -1"),
        (lambda: token_cost(D("NaN"), rates(), D(1)), "price per hour: NaN"),
        (lambda: mix(0, 0), "0 prompt and 0 output tokens"),
        (lambda: mix(10, 5, 11), "11 cached tokens must be from 0 to the prompt's 10"),
        (lambda: rates(decode=0.0), "decode_tok_s 0.0 must be above 0"),
        (
            lambda: break_even(usd_per_hour=D(1), throughput=rates(), mix=mix(), api_usd_per_request=D(0)),
            "API price of a request: 0 must be above 0",
        ),
        (
            lambda: fleet(
                tokens_per_month=D(0), usd_per_hour=D(1), throughput=rates(), mix=mix(), most_utilization=D(1)
            ),
            "tokens per month: 0 must be above 0",
        ),
    ],
)
def test_numbers_that_can_not_be_are_refused(call, said):
    with pytest.raises(ConfigError) as error:
        call()
    assert said in str(error.value)


def test_the_verdict_says_who_is_cheaper_even_if_it_is_the_api():
    rivals = [("Groq", D("0.05")), ("OpenAI", D("0.5"))]
    assert verdict(D("0.08"), rivals, "not certified") == (
        "the API is cheaper for you: Groq asks $0.05 per million tokens, your own machine costs $0.08 (not certified)"
    )
    assert verdict(D("0.025"), rivals) == (
        "your own machine is cheaper: $0.025 per million tokens, 2.0 times less than Groq, 20.0 times less than OpenAI"
    )
    assert "one's own machine" in verdict(D("0.025"), [])
