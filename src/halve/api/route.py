"""`halve route`: what routing between a cheap and a dear model costs and keeps, on questions with known answers."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halve.api.questions_routed import Questions, read_questions
from halve.api.saved_router import SavedRouter, extra_usd
from halve.core.errors import ConfigError, OutputError
from halve.core.record import to_dict
from halve.core.units import parse_percent
from halve.economics import api_price
from halve.economics.fields import read_number
from halve.economics.margin_tables import rounded
from halve.economics.product_file import MOST_USD_PER_MTOK
from halve.economics.routing import Curve, Interval, Outcomes, Prices, Strategy, Verdict, certify, choose
from halve.evaluate.router import Router, features_of, fit, gains_of_unseen

if TYPE_CHECKING:
    from halve.report.routing import RoutingPage

LEARNED = "learned from words of the prompt, on the half that the threshold is chosen on"
POWERS = (0.0, 0.5, 1.0)  # of what a request costs more, by which its gain is divided
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """What `route` found. curve, oracle and short: strategies at shares of the dear model, on the unseen half.

    recovered, apgr: of the gap between the models, the mean over budgets of dollars and of calls; 0.5 is a coin.
    more_than_short: of dollars, how much more than the rule that sends the shortest prompts to the dear model.
    short_as_good, coin_as_good, oracle_as_good: those that are right as often as the router; None where none is.
    requests_per_month: for the money of a month.
    """

    path: str
    num_questions: int
    cheap: Prices
    dear: Prices
    scores: str
    verdict: Verdict
    always_cheap: Strategy
    always_dear: Strategy
    coin_as_good: Strategy | None
    oracle_as_good: Strategy
    short_as_good: Strategy | None
    recovered: Interval | None
    more_than_short: Interval | None
    apgr: Interval | None
    calls_for_half: float | None
    calls_for_80_percent: float | None
    curve: tuple[Strategy, ...]
    oracle: tuple[Strategy, ...]
    short: tuple[Strategy, ...]
    requests_per_month: int | None
    notes: tuple[str, ...]
    version: int = 1

    @property
    def is_better(self) -> bool:
        """Whether it is shown to be better than the rule of the shortest prompts."""
        return self.more_than_short is not None and self.more_than_short.low > 0

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The router and its frames, for a table."""
        frames = (self.short_as_good, self.coin_as_good, self.oracle_as_good)
        return (self.always_cheap, self.verdict.strategy, *(one for one in frames if one), self.always_dear)

    @property
    def saved_share(self) -> Decimal:
        """Of the dollars of always asking the dear model."""
        dear = self.always_dear.usd_per_million
        return 1 - self.verdict.strategy.usd_per_million / dear if dear else Decimal(0)

    def usd_per_month(self, strategy: Strategy) -> Decimal | None:
        """Dollars a month; None without a number of requests."""
        return (
            None if self.requests_per_month is None else strategy.usd_per_million * self.requests_per_month / 1_000_000
        )

    def page(self) -> "RoutingPage":
        """As the report takes it."""
        from halve.report.routing import RoutingPage

        return RoutingPage(
            title=f"{self.cheap.name} · {self.dear.name}",
            created=datetime.now(UTC).date().isoformat(),
            cheap=self.cheap,
            dear=self.dear,
            verdict=self.verdict,
            saved_share=self.saved_share,
            recovered=self.recovered,
            more_than_short=self.more_than_short,
            strategies=self.strategies,
            curve=self.curve,
            oracle=self.oracle,
            short=self.short,
            requests_per_month=self.requests_per_month,
            notes=(f"{self.scores}; {self.num_questions:,} questions of {Path(self.path).name}", *self.notes),
        )

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values; infinite thresholds are null, and `dear_share` tells which."""
        verdict = self.verdict
        return {
            "path": self.path,
            "num_questions": self.num_questions,
            "models": {
                which: {
                    "name": one.name,
                    "input_usd_per_mtok": rounded(one.input_usd_per_mtok, 9),
                    "output_usd_per_mtok": rounded(one.output_usd_per_mtok, 9),
                    "origin": one.origin,
                }
                for which, one in (("cheap", self.cheap), ("dear", self.dear))
            },
            "scores": self.scores,
            "limit": verdict.limit,
            "answer": verdict.answer,
            "chosen_on": verdict.chosen_on,
            "certified_on": verdict.certified_on,
            "loss_where_chosen": verdict.loss_where_chosen,
            "saved_share": rounded(self.saved_share, 9),
            "recovered": to_dict(self.recovered),
            "apgr": to_dict(self.apgr),
            "more_than_short": to_dict(self.more_than_short),
            "is_better": self.is_better,
            "calls_for_half": self.calls_for_half,
            "calls_for_80_percent": self.calls_for_80_percent,
            "strategies": [self._plain(one) for one in self.strategies],
            "curve": [self._plain(one) for one in self.curve],
            "oracle": [self._plain(one) for one in self.oracle],
            "short": [self._plain(one) for one in self.short],
            "requests_per_month": self.requests_per_month,
            "notes": list(self.notes),
            "version": self.version,
        }

    def _plain(self, one: Strategy) -> dict[str, Any]:
        threshold = one.threshold if one.threshold is not None and math.isfinite(one.threshold) else None
        return {
            "name": one.name,
            "threshold": threshold,
            "dear_share": one.dear_share,
            "accuracy": to_dict(one.accuracy),
            "loss": to_dict(one.loss),
            "usd_per_million": rounded(one.usd_per_million),
            "usd_per_month": rounded(self.usd_per_month(one)),
        }


def read_model(text: str, flag: str) -> tuple[str, str, Prices]:
    """`COLUMN=INPUT/OUTPUT` in dollars of a million tokens, or `COLUMN=PROVIDER/MODEL`: column, length column, prices.

    COLUMN:LENGTH names the column of the answers' lengths too. Raises ConfigError.
    """
    columns, found, price = text.partition("=")
    column, _, length = columns.partition(":")
    first, slash, second = price.partition("/")
    if not (column and found and slash):
        raise ConfigError(
            f"{flag} {text!r:.80}: write COLUMN=INPUT/OUTPUT, dollars of a million tokens such as small=0.05/0.08, or "
            "COLUMN=PROVIDER/MODEL"
        )
    if first.strip()[:1].isdigit() or first.strip()[:1] in ("-", ".", "$"):
        prices = [read_number(one, f"{flag} {column}", high=MOST_USD_PER_MTOK) for one in (first, second)]
        return (
            column,
            length,
            Prices(
                name=column,
                input_usd_per_mtok=prices[0],
                output_usd_per_mtok=prices[1],
                origin="stated on the command line",
            ),
        )
    known = api_price(first, second)
    if known is None:
        raise ConfigError(
            f"{flag} {price}: has no known price; with the package genai-prices installed (halve[serve]) names are as "
            "openai/gpt-5-mini; or state COLUMN=INPUT/OUTPUT"
        )
    return (
        column,
        length,
        Prices(
            name=column,
            input_usd_per_mtok=known.input_usd_per_mtok,
            output_usd_per_mtok=known.output_usd_per_mtok,
            origin=f"{known.name}, {known.source}",
        ),
    )


def route(
    path: Path | str,
    *,
    cheap: str,
    dear: str,
    score: str | None = None,
    max_quality_loss: str | float = "1%",
    answer_tokens: int | None = None,
    requests_per_month: int | None = None,
    plot: Path | None = None,
    save: Path | None = None,
    seed: int = 0,
) -> Routed:
    """What a router between two models costs and keeps.

    path: .jsonl, also .gz or .xz; a line has `prompt` and for each model a column: true or false, or 0 to 1, how right
    its answer was; maybe COLUMN_tokens or COLUMN_chars, how long. cheap, dear: as `read_model` reads them. score: a
    column of your own router, higher where the dear model helps; without it one is learned on the first half.
    max_quality_loss: points of accuracy. answer_tokens: of an answer whose length the file doesn't tell. plot: an .svg
    or .html file. save: where the router that was certified goes (.npz). seed: of the halves.

    Raises DataError for the file, ConfigError for the rest, OutputError.
    """
    first, first_length, cheap_prices = read_model(cheap, "--cheap")
    second, second_length, dear_prices = read_model(dear, "--dear")
    if first == second:
        raise ConfigError(f"--cheap and --dear are both {first!r}; a router needs two models")
    limit = parse_percent(max_quality_loss, "--max-quality-loss")
    for name, value in (("answer_tokens", answer_tokens), ("requests_per_month", requests_per_month)):
        if value is not None and not 1 <= value <= 10**12:
            raise ConfigError(f"{name}: {value} must be from 1 to {10**12}")
    if save is not None and score is not None:
        raise ConfigError("--save: there is no router to save where --score has its own; leave one of them out")
    if plot is not None and plot.suffix not in (".svg", ".html"):
        raise ConfigError(f"--plot {plot}: ends in neither .svg nor .html")
    columns = ((first, first_length), (second, second_length))
    found = read_questions(Path(path), columns, score, answer_tokens)
    costs = np.stack(
        [p.pico_usd(found.prompt_tokens, found.answer_tokens[i]) for i, p in enumerate((cheap_prices, dear_prices))]
    )
    notes = found.notes
    if costs[0].sum() >= costs[1].sum():
        notes.append(f"{first} costs no less than {second} on these questions: there is nothing to save by routing")
    order = np.random.default_rng(seed).permutation(len(found.prompts))
    half = len(order) // 2
    parts = np.sort(order[:half]), np.sort(order[half:])
    extra = extra_usd(found.prompt_tokens, found.answer_tokens[:, parts[0]].mean(axis=1), cheap_prices, dear_prices)
    gains, router = _gains(found, *parts, seed)

    def curve(power: float, part: Array) -> Curve:
        return Curve(Outcomes(score=gains / extra**power, right=found.right, pico_usd=costs).rows(part), seed=seed)

    powers = POWERS if router else (0.0,)
    tried = [(one, choose(one, limit), power) for power in powers for one in [curve(power, parts[0])]]
    first_half, threshold, power = min(tried, key=lambda one: one[0].cost_at(one[1]))
    second_half = curve(power, parts[1])
    verdict = certify(first_half, second_half, limit, threshold)
    short = Curve(Outcomes(score=1 / extra, right=found.right, pico_usd=costs).rows(parts[1]), seed=seed)
    result = _result(
        Path(path), found, (second_half, short), verdict, (cheap_prices, dear_prices), score, requests_per_month
    )
    if save is not None and router is not None:
        SavedRouter(
            router=router,
            threshold=threshold,
            power=power,
            cheap=cheap_prices,
            dear=dear_prices,
            answer_tokens=found.answer_tokens[:, parts[0]].mean(axis=1),
        ).save(save)
    if plot is not None:
        _plot(plot, result)
    return result


def _gains(found: Questions, chosen_on: Array, unseen: Array, seed: int) -> tuple[Array, Router | None]:
    """How much each question gains by the dear model: the file's own score, or that of a router that is learned."""
    if found.scores is not None:
        return found.scores, None
    features = features_of(found.prompts)
    learned = features.rows(chosen_on)
    right = found.right[:, chosen_on]
    router = fit(learned, right, seed)
    gains = np.zeros(len(found.prompts))
    # A router flatters itself on what it learned from, so there each part is scored by one that did not see it.
    gains[chosen_on] = gains_of_unseen(learned, right, seed)
    gains[unseen] = router.gain(features.rows(unseen))
    return gains, router


def _result(
    path: Path,
    found: Questions,
    curves: tuple[Curve, Curve],
    verdict: Verdict,
    prices: tuple[Prices, Prices],
    score: str | None,
    requests_per_month: int | None,
) -> Routed:
    curve, short = curves
    cheap, dear = curve.always("cheap"), curve.always("dear")
    accuracy = verdict.strategy.accuracy.value
    gaining = curve.oracle()
    span = np.linspace(cheap.accuracy.value, gaining.accuracy.value, 11)
    oracle = [curve.oracle(float(one)) for one in span]
    notes = list(found.notes)
    recovered = curve.recovered("dollars")
    if recovered is None:
        better, worse = prices[0].name, prices[1].name
        notes.append(f"{worse} is not right more often than {better} here: always ask {better}")
    more = curve.recovers_more(short)
    if more is not None and more.low <= 0:
        notes.append("the router is not shown to be better than sending the shortest prompts to the dear model")
    return Routed(
        path=str(path),
        num_questions=len(found.prompts),
        cheap=prices[0],
        dear=prices[1],
        scores=f"column {score}"
        if score
        else "learned from words of the prompt, on the half that the threshold is chosen on",
        verdict=verdict,
        always_cheap=cheap,
        always_dear=dear,
        coin_as_good=curve.coin_as_good(accuracy),
        oracle_as_good=curve.oracle(accuracy),
        recovered=recovered,
        more_than_short=more,
        short_as_good=short.as_good(accuracy, "short"),
        apgr=curve.recovered("calls"),
        calls_for_half=curve.calls_for(0.5),
        calls_for_80_percent=curve.calls_for(0.8),
        curve=tuple(curve.points()),
        oracle=tuple(oracle),
        short=tuple(short.points(11)),
        requests_per_month=requests_per_month,
        notes=tuple(notes),
    )


# The file


# The router, kept


def _plot(path: Path, result: Routed) -> None:
    from halve.report.routing import draw_routing, render_routing

    page = result.page()
    text = draw_routing(page) if path.suffix == ".svg" else render_routing(page)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}; give --plot a file in a folder") from error
