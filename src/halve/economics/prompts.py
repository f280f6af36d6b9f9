"""What prompts cost, and what changes to them save: arithmetic over counted tokens, worked step by step.

The cost of a log's prompts is brought down in this order, each step from where the one before it ended, so that the
savings add up and nothing is saved twice:

    cost as sent       (prompt - cached already) * input + cached already * cached input
    caching            -(found - cached already) * (input - cached input)
    reordering         -(found when reordered - found) * (input - cached input)
    trimming           -tokens * what they cost by then: cached input where they recur in the prefix, else input
    answers            -tokens * output

A month's dollars are the log's, times requests of a month over requests of the log.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from halve.economics.api_prices import MTOK
from halve.economics.product import SECONDS_PER_MONTH

Kind = Literal["cache", "reorder", "window", "examples", "repeats", "system", "run_on", "loop", "cut", "long"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPrices:
    """Dollars per million tokens; None where one is not known, never 0 for that."""

    input_usd_per_mtok: Decimal | None = None
    cached_input_usd_per_mtok: Decimal | None = None
    output_usd_per_mtok: Decimal | None = None
    origin: str = "not stated"

    @property
    def spared_by_cache(self) -> Decimal | None:
        """Input less cached input: what finding a million tokens in the cache spares."""
        if self.input_usd_per_mtok is None or self.cached_input_usd_per_mtok is None:
            return None
        return self.input_usd_per_mtok - self.cached_input_usd_per_mtok


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Where tokens go that need not. tokens: of the log. usd: what the change saves of the log's cost, None where a
    price is not known. keeps_answers: the model reads and writes the same; False where its answers may change and want
    checking. change: what to do. evidence: lines of the log and their texts.
    """

    kind: Kind
    tokens: int
    usd: Decimal | None
    keeps_answers: bool
    change: str
    evidence: tuple[str, ...] = ()


def usd_of(tokens: int, usd_per_mtok: Decimal | None) -> Decimal | None:
    """Tokens * price / a million: 2,500,000 at 0.40 $ are 1.00 $. None without a price."""
    return None if usd_per_mtok is None else tokens * usd_per_mtok / MTOK


def cost_as_sent(prompt: int, cached: int, answer: int, prices: PromptPrices) -> Decimal | None:
    """What a log costs: 10 M prompt tokens, 4 M of them cached, 2 M of answers at 0.50, 0.05, 1.50 $: 6.20 $.

    Without cached tokens their price is not asked for, and without answers neither is theirs.
    """
    parts = (
        usd_of(prompt - cached, prices.input_usd_per_mtok),
        usd_of(cached, prices.cached_input_usd_per_mtok) if cached else Decimal(0),
        usd_of(answer, prices.output_usd_per_mtok) if answer else Decimal(0),
    )
    known = [part for part in parts if part is not None]
    return sum(known, Decimal(0)) if len(known) == len(parts) else None


def trim_usd(tokens: int, recurring: bool, prices: PromptPrices) -> Decimal | None:
    """What leaving tokens out saves once prefixes are cached: at cached input where they recur, else at input.

    A million tokens of examples that are the same in every prompt, at 0.50 and 0.05 $: 0.05 $, since caching has saved
    the rest already.
    """
    return usd_of(tokens, prices.cached_input_usd_per_mtok if recurring else prices.input_usd_per_mtok)


def requests_per_month(num_requests: int, span_s: float | None) -> Decimal | None:
    """Requests * seconds of a month / seconds that they came in; None where these are not known.

    n requests come in n - 1 gaps: 101 requests within 1,000 s are one each 10 s, 262,800 a month.
    """
    if span_s is None or span_s <= 0 or num_requests < 2:
        return None
    return (num_requests - 1) * SECONDS_PER_MONTH / Decimal(str(span_s))


def monthly(usd: Decimal | None, num_requests: int, a_month: Decimal | None) -> Decimal | None:
    """Dollars of a month: of the log * requests of a month / requests of the log. 2 $ of 1,000 at 50,000: 100 $."""
    return None if usd is None or a_month is None else usd * a_month / num_requests
