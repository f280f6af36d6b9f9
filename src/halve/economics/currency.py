"""Money in other currencies, by rates that someone stated with a date: there is no rate that is simply known.

All arithmetic is in dollars; a currency is how amounts are read from a file and shown to people.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from halve.core.errors import ConfigError
from halve.core.record import shown
from halve.economics.fields import nearest, read_decimal

SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "CNY": "CN¥", "KRW": "₩", "INR": "₹"}
WHOLE = frozenset({"JPY", "KRW", "VND", "CLP", "ISK", "HUF"})  # shown without minor units


@dataclass(frozen=True, kw_only=True, slots=True)
class Currency:
    """per_usd: units for one dollar. as_of: the day of the rate, None for the dollar itself."""

    code: str
    per_usd: Decimal
    as_of: date | None = None

    def of_usd(self, usd: Decimal) -> Decimal:
        """An amount in this currency: usd * per_usd. 100 $ at 155.2 yen are 15,520 yen."""
        return usd * self.per_usd

    def to_usd(self, amount: Decimal) -> Decimal:
        """Dollars of an amount: amount / per_usd. 15,520 yen at 155.2 are 100 $."""
        return amount / self.per_usd

    def say(self, usd: Decimal) -> str:
        """Dollars as an amount for people: `$1,234.50`, `¥155,200`; below one unit with three digits: `$0.00125`."""
        amount = self.of_usd(usd)
        sign, size = ("−" if amount < 0 else ""), abs(amount)
        mark = SYMBOLS.get(self.code, f"{self.code} ")
        if 0 < size < 1:
            small = size.quantize(Decimal(1).scaleb(size.adjusted() - 2), ROUND_HALF_EVEN)
            digits = max(2, -small.normalize().adjusted() + len(small.normalize().as_tuple().digits) - 1)
            return f"{sign}{mark}{small:.{digits}f}"
        places = 0 if self.code in WHOLE else 2
        return f"{sign}{mark}{size.quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN):,.{places}f}"

    def say_price(self, usd: Decimal) -> str:
        """A price of a unit, with five digits where it has them: `$0.87`, `¥135.02`, `$0.034722`."""
        amount = self.of_usd(usd)
        places = 0 if self.code in WHOLE else 2
        if amount:
            digits = amount.quantize(Decimal(1).scaleb(min(0, amount.adjusted() - 4)), ROUND_HALF_EVEN).normalize()
            places = max(places, -int(digits.as_tuple().exponent))
        sign = "−" if amount < 0 else ""
        return f"{sign}{SYMBOLS.get(self.code, f'{self.code} ')}{abs(amount):,.{places}f}"

    @property
    def stated(self) -> str:
        """`1 USD = 155.2 JPY, 2026-11-20`; nothing for the dollar."""
        return "" if self.as_of is None else f"1 USD = {self.per_usd:f} {self.code}, {self.as_of.isoformat()}"


USD = Currency(code="USD", per_usd=Decimal(1))


def read_currency(text: Any, where: str = "--currency") -> Currency:
    """`JPY=155.2@2026-11-20`: so many units for a dollar on that day. Raises ConfigError."""
    if text == "USD":
        return USD
    found = re.fullmatch(r"([A-Z]{3})=([^@]+)@(.+)", str(text).strip())
    if found is None:
        raise ConfigError(
            f"{where}: {shown(text)} is not CODE=RATE@DATE, such as JPY=155.2@2026-11-20 (units for one dollar, and "
            "the day of the rate)"
        )
    return _dated(found[1], found[2], found[3], where)


def read_rates(raw: Any, where: str = "rates") -> dict[str, Currency]:
    """Rates of a file: `{JPY: 155.2@2026-11-20}`. Raises ConfigError."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: {shown(raw)} must hold lines such as JPY: 155.2@2026-11-20")
    rates = {}
    for code, text in raw.items():
        found = re.fullmatch(r"([^@]+)@(.+)", str(text).strip())
        if found is None or not re.fullmatch(r"[A-Z]{3}", str(code)):
            raise ConfigError(f"{where}.{code}: {shown(text)} is not RATE@DATE, such as JPY: 155.2@2026-11-20")
        rates[str(code)] = _dated(str(code), found[1], found[2], f"{where}.{code}")
    return rates


def _dated(code: str, rate: str, day: str, where: str) -> Currency:
    per_usd = read_decimal(rate, where, "155.2")
    if not Decimal("0.000001") <= per_usd <= 1_000_000_000:
        raise ConfigError(f"{where}: {rate} {code} for a dollar must be from 0.000001 to 1000000000")
    if code == "USD" and per_usd != 1:
        raise ConfigError(f"{where}: a dollar is one dollar, not {rate}; name another currency")
    try:
        as_of = date.fromisoformat(day.strip())
    except ValueError:
        raise ConfigError(f"{where}: {day!r} is not a day, such as 2026-11-20") from None
    return Currency(code=code, per_usd=per_usd, as_of=as_of)


def find_currency(code: str, rates: Mapping[str, Currency], where: str = "currency") -> Currency:
    """A currency by its code. Raises ConfigError for one that nobody stated a rate for."""
    if code == "USD":
        return USD
    if code not in rates:
        hint = nearest(code, ["USD", *rates]) or ";"
        raise ConfigError(
            f"{where}: {code!r} has no rate{hint} state one, in the file (rates: {{{code}: RATE@DATE}}) or by "
            f"--currency {code}=RATE@DATE"
        )
    return rates[code]
