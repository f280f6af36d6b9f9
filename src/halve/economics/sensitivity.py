"""What a margin hangs on: each driver alone at the ends of its range, the widest swing first (a tornado)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal

from halve.economics.margin import statement
from halve.economics.product import Machines, Product


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
