"""A product that is sold by the seat and runs on tokens: the records, and what its tokens cost.

All money is in dollars; `halve.economics.product_file` reads products from files in any currency with a stated rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Literal

from halve.core.errors import ConfigError
from halve.economics.api_prices import MTOK
from halve.economics.currency import Currency

HOURS_PER_MONTH = 730  # 365 * 24 / 12
SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Tokens of a month. prompt includes cached."""

    prompt: Decimal
    cached: Decimal
    answer: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPrices:
    """Tokens bought by the million, from an API or at what one's own machines were found to cost.

    cached_input_usd_per_mtok: None where it is not known. origin: where the prices are from, with a date.
    """

    kind: Literal["api", "self_hosted"]
    name: str
    input_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    cached_input_usd_per_mtok: Decimal | None
    origin: str

    def usd(self, traffic: Traffic) -> Decimal:
        """(prompt - cached) * input + cached * cached input + answer * output, per million.

        10 M prompt tokens, of them 4 M cached, and 2 M of answers at 0.50, 0.05 and 1.50 $:
        6 * 0.50 + 4 * 0.05 + 2 * 1.50 = 6.20 $.
        """
        cached = self.cached_input_usd_per_mtok
        if cached is None and traffic.cached:
            raise ConfigError(
                f"{self.name}: the price of cached input is not known; give cached_input_usd_per_mtok, or cached: 0"
            )
        return (
            (traffic.prompt - traffic.cached) * self.input_usd_per_mtok
            + traffic.cached * (cached or 0)
            + traffic.answer * self.output_usd_per_mtok
        ) / MTOK

    def num_machines(self, traffic: Traffic) -> int | None:
        """Nobody counts them here."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """Machines that are paid by the hour, around the clock.

    prefill_tok_s, decode_tok_s: tokens a second of one machine that does only that. utilization: the share of the time
    that a service level lets it work. minimum: always on; spare: beside those that the traffic needs.
    """

    name: str
    usd_per_hour: Decimal
    prefill_tok_s: Decimal
    decode_tok_s: Decimal
    utilization: Decimal
    minimum: int = 1
    spare: int = 0
    operator_usd_per_month: Decimal = Decimal(0)
    origin: str = ""
    kind: Literal["machines"] = "machines"

    def busy_s(self, traffic: Traffic) -> Decimal:
        """Seconds of one machine: (prompt - cached) / prefill + answer / decode; a cached token is not computed.

        6 M tokens at 10,000/s and 2 M at 1,000/s: 600 + 2,000 = 2,600 s.
        """
        return (traffic.prompt - traffic.cached) / self.prefill_tok_s + traffic.answer / self.decode_tok_s

    def num_machines(self, traffic: Traffic) -> int:
        """max(minimum, busy seconds / (utilization * seconds of a month), rounded up) + spare.

        2,628,000 s busy at 40 % of 2,628,000: 2.5, so 3; with one spare 4.
        """
        needed = self.busy_s(traffic) / (self.utilization * SECONDS_PER_MONTH)
        return max(self.minimum, int(needed.to_integral_value(ROUND_CEILING))) + self.spare

    def usd(self, traffic: Traffic) -> Decimal:
        """Machines * 730 h * price + operators, whether the machines work or not.

        3 machines at 0.80 $: 3 * 730 * 0.80 = 1,752 $ a month. Utilization is not a factor: it decides how many.
        """
        paid = self.num_machines(traffic) * HOURS_PER_MONTH * self.usd_per_hour
        return paid + self.operator_usd_per_month


Source = TokenPrices | Machines


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """What compressing the model changes: speeds or prices by factors, or the whole source.

    quality_loss: share of the original's quality that is lost at most; None where it is not stated.
    """

    source: Source
    quality_loss: Decimal | None
    one_time_usd: Decimal
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiCut:
    """An API falls in price by `cut`, and customers get `pass_through` of what that spares a competitor's seat."""

    cut: Decimal
    pass_through: Decimal
    reference: TokenPrices | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """How use answers to cheaper tokens. elasticity: of requests per seat to the cost of a request (1: what is saved
    is spent on more). pass_through: share of the saving per seat that its price falls by. seat_elasticity: of seats to
    that price.
    """

    elasticity: Decimal
    pass_through: Decimal
    seat_elasticity: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Shares by which things grow, each month or year; months: how far to look."""

    seats_per_month: Decimal
    requests_per_month: Decimal
    api_price_per_year: Decimal
    months: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """A customer whose key is in the ledger."""

    seats: Decimal
    usd_per_seat: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """The product with other values. compressed: on its compressed source."""

    name: str
    product: "Product"
    compressed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A month of it. prompt_tokens and answer_tokens are of one request, cached a share of the prompt.

    given: paths of the keys that were stated, such as `tokens.cached`; whatever else there is are defaults.
    """

    name: str
    currency: Currency
    usd_per_seat: Decimal
    seats: Decimal
    requests_per_seat: Decimal
    prompt_tokens: Decimal
    cached: Decimal
    answer_tokens: Decimal
    source: Source
    compression: Compression | None
    other_usd_per_seat: Decimal
    other_usd_per_month: Decimal
    payment_share: Decimal
    api_cut: ApiCut
    demand: Demand
    growth: Growth
    ranges: Mapping[str, Decimal | tuple[Decimal, Decimal]]
    tenants: Mapping[str, Tenant]
    scenarios: tuple[Scenario, ...]
    rates: Mapping[str, Currency]
    given: frozenset[str]

    @property
    def requests(self) -> Decimal:
        """Of a month: seats * requests per seat."""
        return self.seats * self.requests_per_seat

    @property
    def traffic(self) -> Traffic:
        """Tokens of a month: requests * tokens of one.

        400 seats of 600 requests are 240,000; at 1,200 + 220 tokens, 30 % cached: 288 M prompt tokens, 86.4 M of them
        cached, and 52.8 M of answers.
        """
        prompt = self.requests * self.prompt_tokens
        return Traffic(prompt=prompt, cached=prompt * self.cached, answer=self.requests * self.answer_tokens)

    def on(self, source: Source) -> "Product":
        """The same product with its tokens from elsewhere."""
        return replace(self, source=source)
