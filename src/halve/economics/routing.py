"""Routing priced: a cheap model for most requests, a dear one for the rest, by a score that says who gains by it.

A request goes to the dear model where its score is at least a threshold. What that costs and how often it is right is
counted on questions whose answers by both models are known; `loss` is the share of questions that are answered right by
the dear model alone and no longer by the router, so 0.01 is one point of accuracy. Three frames tell what a curve is
worth: a coin, an oracle that knows both answers, and the rule that knows nothing of either model and sends those there
that cost least more, short prompts mostly. Where prompts differ in length that rule alone saves much, and a router that
is no better has learned nothing.

A threshold is chosen on one half of the questions and certified on the other: the half that it was chosen on flatters
it. Intervals are percentile bootstraps over questions, both models' answers resampled together.

Money is whole pico-dollars: tokens * micro-dollars of a million tokens. Sources: RouteLLM (arXiv:2406.18665) for the
gap recovered (PGR), its mean over the curve (APGR) and the share of calls that a part of it takes (CPT).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from halve.core.errors import ConfigError, DataError

Array = np.ndarray[Any, np.dtype[Any]]

PICO = 10**12
RESAMPLES = 1000
CONFIDENCE = 0.95
MOST_DRAWS = 200_000_000  # of all resamples together; with more questions there are fewer of them
ROOM = 1.28 * 2**0.5
CUTS = 201  # thresholds that are tried
POINTS = 21  # of the curve that is told


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """A model's dollars per million tokens. origin: where they are from."""

    name: str
    input_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    origin: str

    def pico_usd(self, prompt_tokens: Array, answer_tokens: Array) -> Array:
        """Of each request, int64: 150 + 80 tokens at 0.60 and 2.00 $ are 150 * 600,000 + 80 * 2,000,000 = 250 u$.

        A price is taken to the micro-dollar per million tokens.
        """
        prices = [
            int((usd * 1_000_000).to_integral_value()) for usd in (self.input_usd_per_mtok, self.output_usd_per_mtok)
        ]
        return np.asarray(prompt_tokens, np.int64) * prices[0] + np.asarray(answer_tokens, np.int64) * prices[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Questions: score float64 [n], the higher the more the dear model helps; right, whether (or how far, 0 to 1) the
    cheap and the dear answer are right, float64 [2, n]; pico_usd int64 [2, n], what they cost. Raises DataError.
    """

    score: Array
    right: Array
    pico_usd: Array

    def __post_init__(self) -> None:
        n = len(self.score)
        if n < 2 or self.right.shape != (2, n) or self.pico_usd.shape != (2, n):
            raise DataError(
                f"routing: {n} questions; at least 2 are needed, each with a score, two answers and two costs"
            )
        if not (np.isfinite(self.score).all() and np.isfinite(self.right).all()):
            raise DataError("routing: a score or an answer is no finite number")

    def rows(self, which: Array) -> "Outcomes":
        """Some of them."""
        return Outcomes(score=self.score[which], right=self.right[:, which], pico_usd=self.pico_usd[:, which])


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """A way to answer all questions. dear_share: of the questions that the dear model answers. loss: against always
    asking it. usd_per_million: dollars of a million such requests.
    """

    name: str
    threshold: float | None
    dear_share: float
    accuracy: Interval
    loss: Interval
    usd_per_million: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a threshold keeps a limit on questions that it was not chosen on.

    holds: the interval of the loss lies within the limit; broken: beyond it; not_shown: the questions are too few to
    say.
    """

    limit: float
    answer: Literal["holds", "not_shown", "broken"]
    chosen_on: int
    certified_on: int
    loss_where_chosen: float
    strategy: Strategy


def usd_per_million(pico_usd: int, num_requests: int) -> Decimal:
    """Dollars of a million requests: 250,000,000 pico-dollars of one request are 250 $ of a million.

    Exact but for the last division.
    """
    return Decimal(pico_usd) / (num_requests * (PICO // 1_000_000))


class Resamples:
    """Bootstrap over questions: for each, how often it is drawn in each resample. The same for all that is asked."""

    def __init__(self, n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        resamples = max(100, min(resamples, MOST_DRAWS // n))
        self._draws = np.empty((resamples, n), np.int16)
        for draw in self._draws:
            draw[:] = np.bincount(rng.integers(0, n, n), minlength=n)

    def sums_to(self, values: Array, order: Array, cuts: Array) -> Array:
        """Sums of values over the first `cuts` questions in an order, float64 [resamples, cuts]."""
        result = np.empty((len(self._draws), len(cuts)))
        ordered = values[order]
        for i, draw in enumerate(self._draws):
            sums = np.concatenate([[0.0], np.cumsum(draw[order] * ordered)])
            result[i] = sums[cuts]
        return result


def interval(value: float, resampled: Array, confidence: float = CONFIDENCE) -> Interval:
    """Percentiles of resampled values around an estimate."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(value=float(value), low=float(low), high=float(high))


class Curve:
    """All thresholds of some questions at once. order: the questions from the highest score down."""

    def __init__(self, outcomes: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.outcomes, self.n = outcomes, len(outcomes.score)
        self.order = np.argsort(-outcomes.score, kind="stable")
        self.scores = outcomes.score[self.order]
        self._draws = Resamples(self.n, resamples=resamples, seed=seed)
        self._gain = outcomes.right[1] - outcomes.right[0]
        everyone = np.array([self.n])
        self._cheap = self._draws.sums_to(outcomes.right[0], self.order, everyone)[:, 0] / self.n
        self._dear = self._draws.sums_to(outcomes.right[1], self.order, everyone)[:, 0] / self.n

    def count_at(self, threshold: float) -> int:
        """Questions whose score is at least the threshold."""
        return int(np.searchsorted(-self.scores, -threshold, side="right"))

    def cost_at(self, threshold: float) -> int:
        """Pico-dollars of all questions at a threshold."""
        count, cost = self.count_at(threshold), self.outcomes.pico_usd
        return int(cost[1, self.order[:count]].sum() + cost[0, self.order[count:]].sum())

    def thresholds(self, number: int = CUTS) -> list[float]:
        """From none to all of the questions for the dear model: infinity, then scores that are there, falling."""
        at = np.unique(np.linspace(0, self.n - 1, number).astype(int))
        return [float("inf"), *dict.fromkeys(float(self.scores[i]) for i in at)]

    def at(self, threshold: float, name: str = "router") -> Strategy:
        """The router at one threshold."""
        return self._at([threshold], name)[0]

    def _at(self, thresholds: Sequence[float], name: str) -> list[Strategy]:
        counts = np.array([self.count_at(threshold) for threshold in thresholds])
        gained = self._draws.sums_to(self._gain, self.order, counts) / self.n
        return [
            self._strategy(name, threshold, self.order[:count], self._cheap + gained[:, i])
            for i, (threshold, count) in enumerate(zip(thresholds, counts, strict=True))
        ]

    def _strategy(self, name: str, threshold: float | None, dear: Array, resampled: Array) -> Strategy:
        right, cost = self.outcomes.right, self.outcomes.pico_usd
        is_dear = np.zeros(self.n, bool)
        is_dear[dear] = True
        accuracy = float(np.where(is_dear, right[1], right[0]).mean())
        return Strategy(
            name=name,
            threshold=threshold,
            dear_share=len(dear) / self.n,
            accuracy=interval(accuracy, resampled),
            loss=interval(float(right[1].mean()) - accuracy, self._dear - resampled),
            usd_per_million=usd_per_million(int(np.where(is_dear, cost[1], cost[0]).sum()), self.n),
        )

    def losses(self, thresholds: Sequence[float]) -> tuple[Array, Array]:
        """Loss at each threshold, and where it lies with room enough to be certified on as many other questions."""
        cuts = np.array([self.count_at(threshold) for threshold in thresholds])
        gained = self._draws.sums_to(self._gain, self.order, cuts) / self.n
        kept = np.concatenate([[0.0], np.cumsum(self._gain[self.order])])[cuts] / self.n
        resampled = (self._dear - self._cheap)[:, None] - gained
        high = np.quantile(resampled, 1 - (1 - CONFIDENCE) / 2, axis=0)
        return self._gain.mean() - kept, high + ROOM * resampled.std(axis=0)

    # Frames

    def always(self, model: Literal["cheap", "dear"]) -> Strategy:
        """One model for everything."""
        if model == "cheap":
            return self._strategy("always cheap", None, self.order[:0], self._cheap)
        return self._strategy("always dear", None, self.order, self._dear)

    def coin(self, share: float) -> Strategy:
        """A coin that sends a share to the dear model, on average: (1 - share) * cheap + share * dear."""
        right, cost = self.outcomes.right, self.outcomes.pico_usd
        accuracy = (1 - share) * right[0].mean() + share * right[1].mean()
        resampled = (1 - share) * self._cheap + share * self._dear
        part = Decimal(str(round(share, 12)))
        cheap, dear = (usd_per_million(int(cost[model].sum()), self.n) for model in (0, 1))
        return Strategy(
            name="coin",
            threshold=None,
            dear_share=share,
            accuracy=interval(float(accuracy), resampled),
            loss=interval(float(right[1].mean() - accuracy), self._dear - resampled),
            usd_per_million=cheap * (1 - part) + dear * part,
        )

    def coin_as_good(self, accuracy: float) -> Strategy | None:
        """The coin that is right as often; None where no share of the dear model is."""
        cheap, dear = (float(self.outcomes.right[model].mean()) for model in (0, 1))
        if dear <= cheap:
            return self.coin(0.0) if accuracy <= cheap else None
        share = (accuracy - cheap) / (dear - cheap)
        return self.coin(min(max(share, 0.0), 1.0)) if share <= 1 + 1e-9 else None

    def oracle(self, accuracy: float | None = None) -> Strategy:
        """Who knows both answers: asks the dear model where it alone is right, where a dollar gains most first.

        accuracy: no more often than it takes to be right in this share of the questions; None: wherever it gains.
        """
        extra = np.maximum(self.outcomes.pico_usd[1] - self.outcomes.pico_usd[0], 1)
        best = np.argsort(-(self._gain / extra), kind="stable")
        count = int((self._gain > 0).sum())
        if accuracy is not None:
            sums = np.concatenate([[0.0], np.cumsum(self._gain[best[:count]])]) / self.n
            reached = sums >= accuracy - self.outcomes.right[0].mean() - 1e-12
            count = int(np.argmax(reached)) if reached.any() else count
        gained = self._draws.sums_to(self._gain, best, np.array([count]))[:, 0] / self.n
        return self._strategy("oracle", None, best[:count], self._cheap + gained)

    def recovered(self, of: Literal["calls", "dollars"]) -> Interval | None:
        """Mean share of the gap between the models that is recovered, over all budgets from none to all.

        of: budgets of calls to the dear model (RouteLLM's APGR), or of the dollars that it costs more. A coin has 0.5
        of both. None where the dear model is not better. Of 4 questions with gains 1, 0, 0, 0 in the order of their
        scores: 0 at no calls, then 1 at 1/4, 2/4, 3/4 and 4/4: 0.8 over these five.
        """
        value, resampled = self._recovered(of)
        return None if value is None else interval(value, resampled[np.isfinite(resampled)])

    def recovers_more(self, other: "Curve") -> Interval | None:
        """Of the gap, over budgets of dollars, how much more than another score of the same questions.

        Both are resampled together, so that what is hard about the questions cancels out.
        """
        mine, theirs = self._recovered("dollars"), other._recovered("dollars")
        if mine[0] is None or theirs[0] is None:
            return None
        difference = mine[1] - theirs[1]
        return interval(mine[0] - theirs[0], difference[np.isfinite(difference)])

    def _recovered(self, of: Literal["calls", "dollars"]) -> tuple[float | None, Array]:
        """The estimate, and its value in each resample: NaN in one whose dear model is not better."""
        total = float(self._gain.sum())
        if total <= 0:
            return None, np.empty(0)
        budgets = np.linspace(0, 1, 101)
        if of == "calls":
            cuts = np.unique((budgets * self.n).astype(int))
        else:
            cost = self.outcomes.pico_usd[:, self.order]
            spent = np.maximum.accumulate(np.concatenate([[0], np.cumsum(cost[1] - cost[0])])).astype(float)
            cuts = np.searchsorted(spent, budgets * spent[-1], side="right") - 1
        value = float(np.concatenate([[0.0], np.cumsum(self._gain[self.order])])[cuts].mean() / total)
        gained = self._draws.sums_to(self._gain, self.order, cuts).mean(axis=1)
        gaps = (self._dear - self._cheap) * self.n
        return value, np.divide(gained, gaps, out=np.full_like(gained, np.nan), where=gaps > 0)

    def as_good(self, accuracy: float, name: str) -> Strategy | None:
        """The least share of the dear model at which this score is right as often; None where none is."""
        sums = np.concatenate([[0.0], np.cumsum(self._gain[self.order])]) / self.n
        reached = sums >= accuracy - self.outcomes.right[0].mean() - 1e-12
        if not reached.any():
            return None
        count = int(np.argmax(reached))
        threshold = float("inf") if count == 0 else float(self.scores[count - 1])
        return self.at(threshold, name)

    def calls_for(self, recovered: float) -> float | None:
        """CPT: the least share of calls to the dear model at which so much of the gap is recovered, such as 0.5."""
        total = float(self._gain.sum())
        if total <= 0:
            return None
        sums = np.concatenate([[0.0], np.cumsum(self._gain[self.order])])
        return float(np.argmax(sums >= recovered * total - 1e-12)) / self.n

    def points(self, number: int = POINTS) -> list[Strategy]:
        """The curve: the router at evenly spaced shares of the dear model, its ends among them."""
        return self._at(self.thresholds(number), "router")


def choose(curve: Curve, limit: float) -> float:
    """The threshold of least cost whose loss is within the limit, with room.

    The loss that will be found on other questions differs from the one here by sqrt(2) standard errors, and there the
    upper end of its interval must lie within the limit. So here that end is kept ROOM standard errors below it, with
    which nine thresholds in ten are certified; without, every second one. Minus infinity (everything to the dear model)
    is always within. Raises ConfigError for a limit that is none.
    """
    if not 0 <= limit < 1:
        raise ConfigError(f"quality limit: {limit} must be from 0 to below 1, such as 0.01 for one point of accuracy")
    thresholds = curve.thresholds()
    _, high = curve.losses(thresholds)
    within = [threshold for threshold, loss in zip(thresholds, high, strict=True) if loss <= limit]
    return min([*within, float("-inf")], key=curve.cost_at)


def certify(chosen_on: Curve, unseen: Curve, limit: float, threshold: float | None = None) -> Verdict:
    """Choose on one half, or take a threshold that was, and tell what it does on the other."""
    threshold = choose(chosen_on, limit) if threshold is None else threshold
    strategy = unseen.at(threshold)
    loss = strategy.loss
    answer: Literal["holds", "not_shown", "broken"] = (
        "holds" if loss.high <= limit else "broken" if loss.low > limit else "not_shown"
    )
    return Verdict(
        limit=limit,
        answer=answer,
        chosen_on=chosen_on.n,
        certified_on=unseen.n,
        loss_where_chosen=float(chosen_on.losses([threshold])[0][0]),
        strategy=strategy,
    )
