"""Two models, the same questions: is the smaller one no worse, and how many questions does it take to say so?

Both models see every question, so only the questions that one answers and the other does not say anything: `harmed`
are those that the original alone answers, `fixed` those that the smaller alone does. Comparing two accuracies as if
their questions were different ones needs about eight times as many (0.8 right, 4 % changed).

- McNemar's exact test asks whether harmed and fixed differ by more than chance. Source: McNemar 1947; exact: binomial.
- Non-inferiority asks the question that matters: can accuracy have fallen by as much as a margin? Tango's score
  interval answers it, which keeps its level where few answers change, unlike the interval of Wald (width 0 when none
  does). Source: Tango 1998, Statistics in Medicine 17:891; eq. 4 and its one-sided use.
- How many questions: n = (z_level + z_power)^2 * f / margin^2 for a share f of changed answers and no true loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from halve.core.certificate import Measured
from halve.core.errors import QualityError

LEVEL = 0.05  # of the one-sided test of non-inferiority
POWER = 0.8
_STEPS = 100  # of bisection: more than a float holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Counts over questions: both right, only the original (harmed), only the smaller (fixed), neither."""

    both: int
    harmed: int
    fixed: int
    neither: int

    @classmethod
    def of(cls, original: Sequence[bool], smaller: Sequence[bool]) -> "Pairs":
        """From whether each question was answered. Raises QualityError for lists of other lengths, or empty ones."""
        if len(original) != len(smaller) or not original:
            raise QualityError(
                f"paired answers: {len(original)} and {len(smaller)}; give one of each for every question"
            )
        pairs = list(zip(map(bool, original), map(bool, smaller), strict=True))
        return cls(
            both=pairs.count((True, True)),
            harmed=pairs.count((True, False)),
            fixed=pairs.count((False, True)),
            neither=pairs.count((False, False)),
        )

    @property
    def n(self) -> int:
        """Questions."""
        return self.both + self.harmed + self.fixed + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the smaller model minus the original's."""
        return (self.fixed - self.harmed) / self.n


def mcnemar_p(pairs: Pairs) -> float:
    """Exact two-sided p-value that harmed and fixed are equally likely; 1 where no answer changed."""
    changed, fewer = pairs.harmed + pairs.fixed, min(pairs.harmed, pairs.fixed)
    return min(1.0, 2 * _binomial_tail(changed, 0.5, upto=fewer))


def above_chance_p(right: int, n: int, chance: float) -> float:
    """One-sided p-value of the binomial test: how likely `right` of n or more are, guessing with `chance`."""
    return 1.0 if right == 0 else _binomial_tail(n, 1 - chance, upto=n - right)


def wilson(right: int, n: int, confidence: float) -> Measured:
    """An accuracy with Wilson's score interval. Source: Wilson 1927."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n of n an end is exact, and rounding must not move it past the value.
    return Measured(value=share, low=min(max(middle - half, 0.0), share), high=max(min(middle + half, 1.0), share), n=n)


def tango_z(pairs: Pairs, difference: float) -> float:
    """Tango's score statistic that the true difference of accuracies is `difference`: standard normal if it is."""
    n, up, down, delta = pairs.n, pairs.fixed, pairs.harmed, difference
    # The likelihood's maximum under that difference: the share that is harmed solves a x^2 + b x + c = 0.
    a, b = 2.0 * n, -up - down + (2 * n - up + down) * delta
    c = -down * delta * (1 - delta)
    harmed = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * harmed + delta * (1 - delta))
    apart = up - down - n * delta
    if variance <= 0:
        return 0.0 if apart == 0 else math.copysign(math.inf, apart)
    return apart / math.sqrt(variance)


def lower_bound(pairs: Pairs, level: float = LEVEL) -> float:
    """The lowest difference of accuracies that a one-sided test at `level` does not refute, -1 to 1."""
    z = NormalDist().inv_cdf(1 - level)
    return _bisect(lambda delta: tango_z(pairs, delta) > z, -1.0, pairs.difference)


def interval(pairs: Pairs, confidence: float) -> Measured:
    """The difference of accuracies with Tango's two-sided score interval."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    value = pairs.difference
    low = _bisect(lambda delta: tango_z(pairs, delta) > z, -1.0, value)
    high = _bisect(lambda delta: tango_z(pairs, delta) >= -z, value, 1.0)
    return Measured(value=value, low=min(low, value), high=max(high, value), n=pairs.n)


def least_items(margin: float, level: float = LEVEL) -> int:
    """The fewest questions by which the margin can be shown at all: when not one answer changes.

    Tango's lower bound is then -z^2 / (n + z^2). Raises QualityError for a margin outside 0 to 1.
    """
    if not 0 < margin < 1:
        raise QualityError(f"margin: {margin!r} is not between 0 and 1; write it as 1% or 0.01")
    z2 = NormalDist().inv_cdf(1 - level) ** 2
    return math.floor(z2 * (1 - margin) / margin) + 1


def items_needed(margin: float, changed_share: float, *, level: float = LEVEL, power: float = POWER) -> int:
    """Questions that a model which truly loses nothing needs, to be shown non-inferior with probability `power`.

    changed_share: of questions that exactly one of the models answers.
    """
    normal = NormalDist()
    z = normal.inv_cdf(1 - level) + normal.inv_cdf(power)
    return max(least_items(margin, level), math.ceil(z * z * changed_share / margin**2))


def _binomial_tail(n: int, p: float, *, upto: int) -> float:
    """P(X <= upto) for X of n trials at p; by logarithms, so that no n is too large."""
    if upto >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    log_p, log_q, base = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    terms = (
        math.exp(base - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q)
        for k in range(upto + 1)
    )
    return min(1.0, math.fsum(terms))


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds from `low` up to some point stops to hold."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if is_below(middle):
            low = middle
        else:
            high = middle
    return high
