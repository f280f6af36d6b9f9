"""Gross margin of a product that runs on tokens: a statement of a month, and what changes it.

    revenue      = seats * price
    gross profit = revenue - tokens - other costs of seats - fixed costs - payment fees
    gross margin = gross profit / revenue

Everything is `Decimal` dollars of one month. What other rooms measure (speeds, losses) comes in as plain numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Literal

from halve.economics.api_prices import MTOK
from halve.economics.product import Machines, Product, TokenPrices

MANY = 10**12  # requests per seat beyond which nobody asks


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A month's dollars. machines: how many are paid; None where tokens are bought by the million.

    most_requests_per_seat: the largest whole number at which gross profit is not negative; None for any number.
    """

    seats: Decimal
    requests: Decimal
    tokens: Decimal
    revenue_usd: Decimal
    token_usd: Decimal
    seat_usd: Decimal
    fixed_usd: Decimal
    payment_usd: Decimal
    machines: int | None

    @property
    def cost_usd(self) -> Decimal:
        """Tokens + other costs of seats + fixed costs + payment fees."""
        return self.token_usd + self.seat_usd + self.fixed_usd + self.payment_usd

    @property
    def gross_profit_usd(self) -> Decimal:
        """Revenue - costs."""
        return self.revenue_usd - self.cost_usd

    @property
    def gross_margin(self) -> Decimal:
        """Gross profit / revenue: 9,000 of 12,000 $ are 0.75."""
        return self.gross_profit_usd / self.revenue_usd

    @property
    def token_share(self) -> Decimal:
        """Tokens / revenue: what of each dollar taken goes to inference."""
        return self.token_usd / self.revenue_usd

    @property
    def usd_per_request(self) -> Decimal:
        """Tokens' dollars / requests."""
        return self.token_usd / self.requests

    @property
    def usd_per_mtok(self) -> Decimal:
        """Tokens' dollars / million tokens, prompt (cached ones too) and answer together."""
        return self.token_usd * MTOK / self.tokens


def statement(product: Product) -> Statement:
    """A month of a product.

    400 seats at 30 $, 600 requests each of 1,200 + 220 tokens, 30 % cached, at 0.25 / 0.025 / 2.00 $ per million:
    revenue 12,000; prompt 288 M, cached 86.4 M, answers 52.8 M; tokens 201.6 * 0.25 + 86.4 * 0.025 + 52.8 * 2.00 =
    158.16 $; with 2 $ a seat, 1,000 $ fixed and 3 % fees: 12,000 - 158.16 - 800 - 1,000 - 360 = 9,681.84 $, 80.682 %.
    """
    traffic = product.traffic
    revenue = product.seats * product.usd_per_seat
    return Statement(
        seats=product.seats,
        requests=product.requests,
        tokens=traffic.prompt + traffic.answer,
        revenue_usd=revenue,
        token_usd=product.source.usd(traffic),
        seat_usd=product.seats * product.other_usd_per_seat,
        fixed_usd=product.other_usd_per_month,
        payment_usd=revenue * product.payment_share,
        machines=product.source.num_machines(traffic),
    )


def most_requests_per_seat(product: Product) -> int | None:
    """The largest whole number of requests per seat at which gross profit is not negative; -1 where even one loses.

    Found by halving, since machines make cost a staircase; it never falls with requests. None where any number pays,
    as with tokens that cost nothing. With the product of `statement`: 9,840 $ are left for tokens, 0.000659 $ a
    request and 400 seats: 9,840 / 0.2636 = 37,329.
    """

    def pays(requests: int) -> bool:
        return statement(replace(product, requests_per_seat=Decimal(requests))).gross_profit_usd >= 0

    if pays(MANY):
        return None
    if not pays(1):
        return -1
    low, high = 1, MANY
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


def with_price_of_seat(product: Product, usd: Decimal) -> Product:
    """The same product at another price, not below nothing."""
    return replace(product, usd_per_seat=max(usd, Decimal(0)))


def cheaper(prices: TokenPrices, cut: Decimal) -> TokenPrices:
    """Every price less `cut`: 2.00 $ less 30 % are 1.40 $."""
    cached = prices.cached_input_usd_per_mtok
    return replace(
        prices,
        input_usd_per_mtok=prices.input_usd_per_mtok * (1 - cut),
        output_usd_per_mtok=prices.output_usd_per_mtok * (1 - cut),
        cached_input_usd_per_mtok=None if cached is None else cached * (1 - cut),
    )


def after_api_cut(product: Product) -> Product:
    """The product once an API is cheaper by `api_price_cut`.

    Tokens that come from an API cost so much less. And customers, who could go to someone who buys there, get
    `pass_through` of what the cut spares such a seat: price - pass_through * cut * (API's dollars per seat). At 12 $
    per seat, a cut of 30 % and half of it passed on: 1.80 $ off the price.
    """
    cut, source = product.api_cut, product.source
    if isinstance(source, TokenPrices) and source.kind == "api":
        source = cheaper(source, cut.cut)
    off = Decimal(0)
    if cut.reference is not None and cut.pass_through:
        off = cut.pass_through * cut.cut * cut.reference.usd(product.traffic) / product.seats
    return with_price_of_seat(product, product.usd_per_seat - off).on(source)


def compressed(product: Product) -> Product | None:
    """The product on what its compressed model runs on; None where the file has no such section."""
    return None if product.compression is None else product.on(product.compression.source)


Case = Literal["now", "compressed", "api_cut", "compressed_api_cut", "seats_x2", "requests_x2", "compressed_seats_x2",
               "compressed_requests_x2", "stated"]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioRow:
    """One way that things can be. name: of a stated scenario, else empty. quality_loss: of the model that answers;
    None where it is the one of now, or not stated (`compressed` tells which).
    """

    case: Case
    name: str
    compressed: bool
    quality_loss: Decimal | None
    statement: Statement
    most_requests_per_seat: int | None
    usd_per_seat: Decimal


def scenario_rows(product: Product) -> list[ScenarioRow]:
    """Now, compressed, after the API's cut, at twice the seats, at twice the requests of a seat, and as stated."""
    smaller = compressed(product)

    def times(base: Product, seats: int, requests: int) -> Product:
        return replace(base, seats=base.seats * seats, requests_per_seat=base.requests_per_seat * requests)

    cases: list[tuple[Case, Product | None]] = [
        ("now", product),
        ("compressed", smaller),
        ("api_cut", after_api_cut(product)),
        ("compressed_api_cut", smaller and after_api_cut(smaller)),
        ("seats_x2", times(product, 2, 1)),
        ("compressed_seats_x2", smaller and times(smaller, 2, 1)),
        ("requests_x2", times(product, 1, 2)),
        ("compressed_requests_x2", smaller and times(smaller, 1, 2)),
    ]
    rows = [_row(case, one) for case, one in cases if one is not None]
    for scenario in product.scenarios:
        changed = (scenario.compressed and compressed(scenario.product)) or scenario.product
        rows.append(_row("stated", changed, scenario.name, scenario.compressed))
    return rows


def _row(case: Case, product: Product, name: str = "", is_compressed: bool | None = None) -> ScenarioRow:
    smaller = case.startswith("compressed") if is_compressed is None else is_compressed
    loss = product.compression.quality_loss if smaller and product.compression else None
    return ScenarioRow(
        case=case,
        name=name,
        compressed=smaller,
        quality_loss=loss,
        statement=statement(product),
        most_requests_per_seat=most_requests_per_seat(product),
        usd_per_seat=product.usd_per_seat,
    )


# Sensitivity


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """What one driver does to the gross margin. low, high: its values; at_low, at_high: the margins there.

    profit_at_low, profit_at_high: gross profit in dollars.
    """

    driver: str
    value: Decimal
    low: Decimal
    high: Decimal
    at_low: Decimal
    at_high: Decimal
    profit_at_low: Decimal
    profit_at_high: Decimal

    @property
    def swing(self) -> Decimal:
        """|margin at low - margin at high|."""
        return abs(self.at_high - self.at_low)


DEFAULT_RANGE = Decimal("0.2")
_MONEY = {"price_per_seat": "usd_per_seat", "other_costs.per_seat": "other_usd_per_seat",
          "other_costs.per_month": "other_usd_per_month"}  # fmt: skip
_PLAIN = {"seats": "seats", "requests_per_seat": "requests_per_seat", "tokens.prompt": "prompt_tokens",
          "tokens.cached": "cached", "tokens.answer": "answer_tokens", **_MONEY}  # fmt: skip
_SHARES = ("tokens.cached", "source.utilization")
_LEAST = Decimal("0.000001")


def tornado(product: Product) -> list[Bar]:
    """Each driver alone at its low and high value, the widest swing first.

    A range is the file's, or 20 % below and above; shares stay within 0 and 1. A driver that is 0 or not part of this
    product is left out. Price per seat of 30 $ and costs of 3,000 $ for 400 seats: at 24 $ the margin is 1 - 3,000 /
    9,600 = 68.75 %, at 36 $ 1 - 3,000 / 14,400 = 79.17 %: a swing of 10.42 points.
    """
    bars = []
    for driver, value, put in _drivers(product):
        if not value:
            continue
        low, high = _range(product, driver, value)
        if driver in _SHARES:
            high = min(high, Decimal(1))
        below, above = statement(put(max(low, _LEAST))), statement(put(high))
        bars.append(
            Bar(
                driver=driver,
                value=value,
                low=low,
                high=high,
                at_low=below.gross_margin,
                at_high=above.gross_margin,
                profit_at_low=below.gross_profit_usd,
                profit_at_high=above.gross_profit_usd,
            )
        )
    return sorted(bars, key=lambda bar: (-bar.swing, bar.driver))


def _range(product: Product, driver: str, value: Decimal) -> tuple[Decimal, Decimal]:
    given = product.ranges.get(driver, DEFAULT_RANGE)
    return given if isinstance(given, tuple) else (value * (1 - given), value * (1 + given))


def _drivers(product: Product) -> list[tuple[str, Decimal, Callable[[Decimal], Product]]]:
    """Name, value, and how to set it."""
    found: list[tuple[str, Decimal, Callable[[Decimal], Product]]] = []
    for driver, attribute in _PLAIN.items():

        def put(value: Decimal, attribute: str = attribute) -> Product:
            changed: dict[str, Decimal] = {attribute: value}
            return replace(product, **changed)  # type: ignore[arg-type]

        found.append((driver, getattr(product, attribute), put))
    names = (
        "usd_per_hour prefill_tok_s decode_tok_s utilization operator_usd_per_month"
        if isinstance(product.source, Machines)
        else "input_usd_per_mtok cached_input_usd_per_mtok output_usd_per_mtok"
    )
    for name in names.split():

        def put_source(value: Decimal, name: str = name) -> Product:
            changed: dict[str, Decimal] = {name: value}
            return product.on(replace(product.source, **changed))  # type: ignore[arg-type]

        found.append((f"source.{name}", getattr(product.source, name) or Decimal(0), put_source))
    return found


# Where the saving goes


@dataclass(frozen=True, kw_only=True, slots=True)
class DemandResponse:
    """Gross profit from now to compressed, step by step; the steps add up exactly.

    saved_usd: tokens as many as now, for less. more_tokens_usd: what customers then use more (negative).
    lower_price_usd: what they pay less, less its payment fees. more_seats_usd: what comes of new seats. requests and
    seats: afterwards. spent_share: of the saving, what went into tokens; None where nothing was saved.
    """

    before: Statement
    after: Statement
    saved_usd: Decimal
    more_tokens_usd: Decimal
    lower_price_usd: Decimal
    more_seats_usd: Decimal
    requests_per_seat: Decimal
    usd_per_seat: Decimal
    cost_per_request_ratio: Decimal

    @property
    def kept_usd(self) -> Decimal:
        """Gross profit afterwards less before: the sum of the four steps."""
        return self.saved_usd + self.more_tokens_usd + self.lower_price_usd + self.more_seats_usd

    @property
    def spent_share(self) -> Decimal | None:
        """-more_tokens / saved: of 100 $ saved 60 on more tokens are 0.6; above 1 the bill has grown."""
        return -self.more_tokens_usd / self.saved_usd if self.saved_usd > 0 else None


def demand_response(product: Product, elasticity: Decimal | None = None) -> DemandResponse | None:
    """What cheaper tokens set off; None without compression.

    r = tokens' dollars per request after / before, at the same use. Then, in this order,

        requests per seat *= r ** -elasticity              price -= pass_through * saving per seat
        seats *= (new price / old price) ** -seat_elasticity

    From 100 to 50 $ of tokens (r = 0.5) at elasticity 1: twice the requests, 100 $ again: all of the saving is spent.
    At 0.5: 1.414 times the requests, 70.71 $: 20.71 of the 50 $ saved. At 2: four times, 200 $. elasticity: instead of
    the file's.
    """
    smaller = compressed(product)
    if smaller is None:
        return None
    demand = product.demand
    power = demand.elasticity if elasticity is None else elasticity
    first, same = statement(product), statement(smaller)
    ratio = same.token_usd / first.token_usd if first.token_usd else Decimal(1)
    more = smaller.requests_per_seat
    if ratio > 0:
        more *= ratio**-power
    used = replace(smaller, requests_per_seat=more)
    off = demand.pass_through * max(first.token_usd - same.token_usd, Decimal(0)) / product.seats
    priced = with_price_of_seat(used, used.usd_per_seat - off)
    seats = product.seats
    if demand.seat_elasticity and priced.usd_per_seat > 0:
        seats *= (priced.usd_per_seat / product.usd_per_seat) ** -demand.seat_elasticity
    last = replace(priced, seats=seats)
    steps = [statement(one) for one in (product, smaller, used, priced, last)]
    profits = [one.gross_profit_usd for one in steps]
    return DemandResponse(
        before=first,
        after=steps[-1],
        saved_usd=profits[1] - profits[0],
        more_tokens_usd=profits[2] - profits[1],
        lower_price_usd=profits[3] - profits[2],
        more_seats_usd=profits[4] - profits[3],
        requests_per_seat=more,
        usd_per_seat=last.usd_per_seat,
        cost_per_request_ratio=ratio,
    )


ELASTICITIES = tuple(Decimal(e) for e in ("0", "0.5", "1", "1.5", "2"))


def demand_curve(product: Product) -> list[tuple[Decimal, DemandResponse]]:
    """The response at elasticities from none to 2, and at the file's; nothing without compression."""
    found = []
    for elasticity in sorted({*ELASTICITIES, product.demand.elasticity}):
        response = demand_response(product, elasticity)
        if response is not None:
            found.append((elasticity, response))
    return found


# Months ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class Month:
    """number: 0 is now. compressed: None without such a section."""

    number: int
    now: Statement
    compressed: Statement | None


def months_ahead(product: Product) -> list[Month]:
    """As things grow: seats * (1 + g)^m, whole ones, requests per seat * (1 + h)^m, an API's prices * (1 + y)^(m/12).

    400 seats that grow by 5 % a month are 420 after one and 441 after two.
    """
    result = []
    for number in range(product.growth.months + 1):
        base = _grown(product, number)
        smaller = compressed(base)
        result.append(
            Month(number=number, now=statement(base), compressed=None if smaller is None else statement(smaller))
        )
    return result


def _grown(product: Product, number: int) -> Product:
    growth = product.growth
    seats = (product.seats * (1 + growth.seats_per_month) ** number).quantize(Decimal(1), ROUND_HALF_EVEN)
    falls = 1 - (1 + growth.api_price_per_year) ** (Decimal(number) / 12)

    def priced(source: object) -> object:
        return cheaper(source, falls) if isinstance(source, TokenPrices) and source.kind == "api" else source

    compression = product.compression
    if compression is not None:
        compression = replace(compression, source=priced(compression.source))  # type: ignore[arg-type]
    return replace(
        product,
        seats=max(seats, Decimal(1)) if number else product.seats,
        requests_per_seat=product.requests_per_seat * (1 + growth.requests_per_month) ** number,
        source=priced(product.source),  # type: ignore[arg-type]
        compression=compression,
    )


def payback_months(product: Product) -> Decimal | None:
    """One-time dollars of compressing / dollars it saves a month; None where it saves nothing or isn't asked.

    40 $ once for 80 $ a month: half a month.
    """
    smaller = compressed(product)
    if smaller is None or product.compression is None:
        return None
    saved = statement(product).token_usd - statement(smaller).token_usd
    return product.compression.one_time_usd / saved if saved > 0 else None
