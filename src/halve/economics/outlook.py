"""What follows from a product's margin: where a saving goes when cheaper tokens are used more, and the months ahead."""

from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Decimal

from halve.economics.margin import Statement, cheaper, compressed, statement, with_price_of_seat
from halve.economics.product import Product, TokenPrices


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
    if demand.seat_elasticity:
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
