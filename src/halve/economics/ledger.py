"""One priced use of a machine, and the arithmetic that makes all uses add up to its price.

A machine costs p dollars an hour whether it works or not. A request is charged for its share of the seconds that steps
took (`StepOutput.prefill_s`, `decode_s`), what is left of a stretch of time is idle:

    price of a stretch = sum of requests + idle          (allocation cost: all of it, over the tokens served)
    usage cost         = sum of requests                 (what the work itself took)

Money is whole micro-dollars. What a share has beyond them is carried on to the next, so that any number of entries
differs from the exact sum by less than one micro-dollar, and nothing is lost or charged twice.
"""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from halve.core.errors import ConfigError

MICRO = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One line of the books; lines are added, never changed.

    kind: `request` for one answer to a client, `idle` for time in which the machine was paid and not used.
    at: seconds since 1970. prompt_tokens include cached_tokens. prefill_us, decode_us: microseconds of the machine.
    micro_usd: None where the machine's price is not known, never 0 for that.
    """

    kind: Literal["request", "idle"]
    at: float
    model: str
    key_id: str | None = None
    request_id: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_us: int = 0
    decode_us: int = 0
    micro_usd: int | None = None
    version: int = 1


class Meter:
    """Micro-dollars of seconds of one machine.

    usd_per_hour: its price; None where it is not known. Raises ConfigError for one that is negative or no number.
    """

    def __init__(self, usd_per_hour: Decimal | None) -> None:
        if usd_per_hour is not None and not (usd_per_hour.is_finite() and 0 <= usd_per_hour <= 1_000_000):
            raise ConfigError(f"price per hour: {usd_per_hour} must be from 0 to 1000000 dollars")
        self.usd_per_hour = usd_per_hour
        self._carried = Fraction(0)  # micro-dollars, from 0 to below 1

    @property
    def micro_usd_per_second(self) -> Fraction | None:
        """Exact; None without a price."""
        return None if self.usd_per_hour is None else Fraction(self.usd_per_hour) * MICRO / 3600

    def charge(self, microseconds: int) -> int | None:
        """What so many microseconds cost, with what earlier charges left over.

        At 3.60 $ an hour a microsecond costs 0.001 micro-dollars, so a hundred charges of 15 us are 1 in all: every
        tenth or so is 1 and the others are 0.
        """
        rate = self.micro_usd_per_second
        if rate is None:
            return None
        exact = self._carried + rate * Fraction(microseconds, MICRO)
        whole = exact.numerator // exact.denominator
        self._carried = exact - whole
        return whole
