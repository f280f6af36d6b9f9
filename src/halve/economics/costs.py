"""What tokens cost on a machine of one's own, what an API asks for the same, and from which volume one beats the other.

Exact: money is `Decimal` dollars, and nothing is rounded before it is shown. Seconds come as floats from measurements
and are taken as the decimals they print as.

    usage cost        P / 3600 * seconds of work        what the work itself takes
    allocation cost   usage cost / utilization          what an always-on machine costs for it: compare this with APIs

A machine that is rented costs its price whether it works or not, so that utilization raises the cost of a token; it is
never a discount on the rent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from halve.core.errors import ConfigError
from halve.economics.api_prices import ApiPrice
from halve.economics.currency import USD, Currency
from halve.economics.roofline import Throughput

MTOK = 1_000_000
HOURS_PER_MONTH = Decimal(730)  # 365 * 24 / 12
SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600
MOST_MACHINES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Tokens of a request, on average. cached_tokens: of the prompt, that a cache already holds."""

    prompt_tokens: Decimal
    output_tokens: Decimal
    cached_tokens: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        if not (self.prompt_tokens >= 0 and self.output_tokens >= 0 and self.prompt_tokens + self.output_tokens > 0):
            raise ConfigError(
                f"workload: {self.prompt_tokens} prompt and {self.output_tokens} output tokens; both must be 0 or "
                "more, one of them above"
            )
        if not 0 <= self.cached_tokens <= self.prompt_tokens:
            raise ConfigError(
                f"workload: {self.cached_tokens} cached tokens must be from 0 to the prompt's {self.prompt_tokens}"
            )

    @property
    def tokens(self) -> Decimal:
        """Of prompt and answer."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCost:
    """Dollars per million tokens. input and output are of usage; a request costs the sum of its parts."""

    input_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    utilization: Decimal

    def request_usd(self, mix: Mix) -> Decimal:
        """Usage cost of one request; cached tokens take no prefill.

        1,000 in at $0.10 and 500 out at $0.40 a million: 0.0001 + 0.0002 = $0.0003.
        """
        computed = mix.prompt_tokens - mix.cached_tokens
        return (computed * self.input_usd_per_mtok + mix.output_tokens * self.output_usd_per_mtok) / MTOK

    def usage_usd_per_mtok(self, mix: Mix) -> Decimal:
        """Usage cost of a million tokens of prompt and answer together."""
        return self.request_usd(mix) * MTOK / mix.tokens

    def allocation_usd_per_mtok(self, mix: Mix) -> Decimal:
        """What a million tokens cost on a machine that is paid all the time: usage / utilization."""
        return self.usage_usd_per_mtok(mix) / self.utilization


def token_cost(usd_per_hour: Decimal, throughput: Throughput, utilization: Decimal) -> TokenCost:
    """P / 3600 / rate * 10^6, for prompts and answers each.

    $0.20 an hour at 90 tokens of answers a second: 0.20 / 3600 / 90 * 10^6 = $0.617 per million (not $0.0007, which is
    the price of a thousand). Raises ConfigError for a utilization beyond 0 to 1 or a price that is none.
    """
    if not 0 < utilization <= 1:
        raise ConfigError(f"utilization: {utilization} must be above 0 and at most 1 (the share of time with work)")
    if not (usd_per_hour.is_finite() and usd_per_hour >= 0):
        raise ConfigError(f"price per hour: {usd_per_hour} must be finite, 0 or more")
    per_second = usd_per_hour / 3600
    return TokenCost(
        input_usd_per_mtok=per_second / _decimal(throughput.prefill_tok_s) * MTOK,
        output_usd_per_mtok=per_second / _decimal(throughput.decode_tok_s) * MTOK,
        utilization=utilization,
    )


def seconds_per_request(throughput: Throughput, mix: Mix) -> Decimal:
    """Seconds of the machine that one request takes: computed prompt / prefill + answer / decode.

    1,000 at 10,000 a second and 200 at 1,000: 0.1 + 0.2 = 0.3 s.
    """
    computed = mix.prompt_tokens - mix.cached_tokens
    return computed / _decimal(throughput.prefill_tok_s) + mix.output_tokens / _decimal(throughput.decode_tok_s)


def joules_per_token(throughput: Throughput, mix: Mix) -> Decimal | None:
    """Energy of the machine's accelerators at full power over a request's tokens; None where power is not known."""
    if throughput.watts is None:
        return None
    return _decimal(throughput.watts) * seconds_per_request(throughput, mix) / mix.tokens


def api_request_usd(price: ApiPrice, mix: Mix, *, batch: bool = False) -> Decimal:
    """What an API asks for one request; cached tokens at its price for those, else at that of all input.

    batch: at its price for answers within a day, where it has one. 1,155 in at $0.25 and 211 out at $2 a million:
    0.00028875 + 0.000422 = $0.00071075.
    """
    discount = price.batch_discount if batch and price.batch_discount is not None else Decimal(1)
    cached = price.cached_usd_per_mtok if price.cached_usd_per_mtok is not None else price.input_usd_per_mtok
    computed = mix.prompt_tokens - mix.cached_tokens
    parts = (
        computed * price.input_usd_per_mtok + mix.cached_tokens * cached + mix.output_tokens * price.output_usd_per_mtok
    )
    return parts / MTOK * discount


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakEven:
    """From which monthly volume machines of one's own cost less than an API.

    tokens: of prompts and answers a month; None where no volume is enough, since a machine at its limit serves less
    than it costs. machines: that serve so many; load: of each, its share of time with work, at most the limit.
    share_of_capacity: the API's price of what a machine can serve a month, over what the machine costs.
    """

    tokens: Decimal | None
    requests: Decimal | None
    machines: int | None
    load: Decimal | None
    monthly_usd: Decimal | None
    capacity_tokens: Decimal
    api_usd_per_mtok: Decimal
    share_of_capacity: Decimal


def break_even(
    *,
    usd_per_hour: Decimal,
    throughput: Throughput,
    mix: Mix,
    api_usd_per_request: Decimal,
    monthly_ops_usd: Decimal = Decimal(0),
    most_utilization: Decimal = Decimal(1),
) -> BreakEven:
    """The smallest volume V at which n machines, n as few as serve it, cost as little as the API:

        V = (730 * P * n + ops) / api price of a token,   V <= n * most_utilization * capacity

    V depends on utilization only in that n must be enough: an idle hour costs as much as a busy one. A machine of
    $4,608 a month against $10 per million: 460.8 million tokens. Raises ConfigError for prices that are none.
    """
    for name, value in (("price per hour", usd_per_hour), ("operator cost", monthly_ops_usd)):
        if not (value.is_finite() and value >= 0):
            raise ConfigError(f"{name}: {value} must be finite, 0 or more")
    if not (api_usd_per_request.is_finite() and api_usd_per_request > 0):
        raise ConfigError(f"API price of a request: {api_usd_per_request} must be above 0")
    if not 0 < most_utilization <= 1:
        raise ConfigError(f"utilization: {most_utilization} must be above 0 and at most 1")
    per_token = api_usd_per_request / mix.tokens
    machine = HOURS_PER_MONTH * usd_per_hour
    full = SECONDS_PER_MONTH / seconds_per_request(throughput, mix) * mix.tokens
    capacity = most_utilization * full
    worth = capacity * per_token  # what the API asks for all that a machine serves
    share = worth / machine if machine else Decimal("Infinity")
    volume = machines = None
    if worth > machine or (worth == machine and not monthly_ops_usd):
        # n machines save n * (worth - machine) at their limit; operators must be paid from that.
        machines = 1 if worth == machine else max(1, _ceil(monthly_ops_usd / (worth - machine)))
        if machines <= MOST_MACHINES:
            volume = (machine * machines + monthly_ops_usd) / per_token
    found = volume is not None and machines is not None
    return BreakEven(
        tokens=volume,
        requests=volume / mix.tokens if volume is not None else None,
        machines=machines if found else None,
        load=volume / (full * machines) if volume is not None and machines is not None else None,
        monthly_usd=machine * machines + monthly_ops_usd if found and machines is not None else None,
        capacity_tokens=capacity,
        api_usd_per_mtok=per_token * MTOK,
        share_of_capacity=share,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Machines for a volume. load: of each; headroom: tokens a month that they could serve more within the limit."""

    machines: int
    load: Decimal
    headroom_tokens: Decimal
    monthly_usd: Decimal


def fleet(
    *, tokens_per_month: Decimal, usd_per_hour: Decimal, throughput: Throughput, mix: Mix, most_utilization: Decimal
) -> Fleet:
    """As few machines as serve a volume within a limit of utilization: n = ceil(V / (limit * capacity)), at least 1.

    Raises ConfigError for a volume of zero, or one that no number of machines here serves.
    """
    if not (tokens_per_month.is_finite() and tokens_per_month > 0):
        raise ConfigError(f"tokens per month: {tokens_per_month} must be above 0")
    full = SECONDS_PER_MONTH / seconds_per_request(throughput, mix) * mix.tokens
    capacity = most_utilization * full
    machines = max(1, _ceil(tokens_per_month / capacity))
    if machines > MOST_MACHINES:
        raise ConfigError(f"tokens per month: {tokens_per_month} would take {machines:,} machines; choose faster ones")
    return Fleet(
        machines=machines,
        load=tokens_per_month / (full * machines),
        headroom_tokens=capacity * machines - tokens_per_month,
        monthly_usd=HOURS_PER_MONTH * usd_per_hour * machines,
    )


def verdict(
    own_usd_per_mtok: Decimal,
    rivals: Sequence[tuple[str, Decimal]],
    quality: str | None = None,
    currency: Currency = USD,
) -> str:
    """One line: who is cheapest, by how much. quality: what is known of one's own model's, said beside it."""
    own = currency.say_price(own_usd_per_mtok)
    beside = f" ({quality})" if quality else ""
    if not rivals:
        return f"one's own machine: {own} per million tokens{beside}"
    name, price = min(rivals, key=lambda one: one[1])
    dearest, top = max(rivals, key=lambda one: one[1])
    if price < own_usd_per_mtok:
        return (
            f"the API is cheaper for you: {name} asks {currency.say_price(price)} per million tokens, your own "
            f"machine costs {own}{beside}"
        )
    rest = "" if len(rivals) == 1 else f", {_times(top / own_usd_per_mtok)} less than {dearest}"
    return (
        f"your own machine is cheaper: {own} per million tokens, "
        f"{_times(price / own_usd_per_mtok)} less than {name}{rest}{beside}"
    )


def _times(ratio: Decimal) -> str:
    return f"{ratio:.1f} times" if ratio < 100 else f"{ratio:.0f} times"


def _ceil(value: Decimal) -> int:
    whole = int(value)
    return whole + (whole < value)


def _decimal(value: float) -> Decimal:
    """A measurement as the decimal that it prints as."""
    return Decimal(repr(float(value)))
