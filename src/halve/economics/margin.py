"""Gross margin of a product that runs on tokens: a statement of a month, and what changes it.

    revenue      = seats * price
    gross profit = revenue - tokens - other costs of seats - fixed costs - payment fees
    gross margin = gross profit / revenue

Everything is `Decimal` dollars of one month. What other rooms measure (speeds, losses) comes in as plain numbers.
"""

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from halve.economics.api_prices import MTOK
from halve.economics.product import Product, TokenPrices

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
    """The same product at another price; at most 99 % of the old one go, since of no revenue there is no margin."""
    return replace(product, usd_per_seat=max(usd, product.usd_per_seat / 100))


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
    product: Product
    statement: Statement
    most_requests_per_seat: int | None

    @property
    def usd_per_seat(self) -> Decimal:
        """Of this row, in which a cut may have been passed on."""
        return self.product.usd_per_seat


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
        product=product,
        statement=statement(product),
        most_requests_per_seat=most_requests_per_seat(product),
    )
