"""What `halve bench` found, as one page or one drawing: a bar for each engine, with its rounds' range.

`render_bench` makes the page, `draw_bench` the drawing alone; `metric_words` and `figure` say rows in words.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from halve.core.units import format_bytes
from halve.report.charts import both
from halve.report.filling import fill
from halve.report.svg import MARKERS, Plot, drawing, join, label, line, linear_axis, marker, shorten, tag, text_width
from halve.report.words import number, printable

OTHER = MARKERS - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """An engine at a measure. value: None where it has no figure; note: why, or what there is to add."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Engines at one measure; more is better unless it is a time or a size."""

    metric: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPoint:
    """One replay of an engine: tokens/s, and the time per token that 95 % of its requests kept."""

    name: str
    tok_s: float
    time_per_token_ms: float
    load: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPage:
    """Everything on the page. engines: names in the order of their colours. level_ms: of the replay, or None.

    ratios, facts and ceilings are rows of cells. created: a date as it should be shown.
    """

    title: str
    sentence: str
    device: str
    created: str
    engines: tuple[str, ...]
    charts: tuple[Bars, ...]
    points: tuple[LoadPoint, ...]
    level_ms: float | None
    ratios: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, ...], ...]
    ceilings: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    command: str


def render_bench(page: BenchPage) -> str:
    """The page as one HTML document that loads nothing: CSS and charts are inline, there is no script."""
    return fill(
        "bench",
        page=page,
        bars=both(lambda width: bar_chart(page.charts, page.engines, width)),
        curve=both(lambda width: curve_chart(page.points, page.engines, page.level_ms, width)) if page.points else None,
    )


def draw_bench(page: BenchPage, width: int = 860) -> str:
    """The bars as a drawing of its own, with its style in it."""
    parts, height = _bars(page.charts, page.engines, width)
    style = tag("style", Markup(_css()))
    paper = tag("rect", x=-12.0, y=-12.0, width=width + 24.0, height=height + 24, class_="paper")
    view = f"-12 -12 {width + 24:g} {height + 24:g}"
    chart = tag("svg", style, paper, *parts, xmlns="http://www.w3.org/2000/svg", viewBox=view, width=width + 24)
    return printable(f"{chart}\n")


@cache
def _css() -> str:
    return files("halve.report").joinpath("templates/page.css").read_text(encoding="utf-8")


def metric_words(metric: str) -> str:
    """Say what a metric is: `decode_b8_tok_s` is `decode, batch 8`."""
    patterns = {
        r"decode_b(\d+)_tok_s": r"decode, batch \1",
        r"prefill_(\d+)_tok_s": r"prompt of \1 tokens",
        r"replay_tok_s": "replay within the level",
        r"replay_at_once_tok_s": "replay, all at once",
        r"replay_ttft_p(\d+)_ms": r"time to first token, p\1",
        r"replay_time_per_token_p(\d+)_ms": r"time per token, p\1",
        r"peak_bytes_at_batch_1": "peak memory, batch 1",
        r"peak_bytes": "peak memory",
    }
    return next((re.sub(p, words, metric) for p, words in patterns.items() if re.fullmatch(p, metric)), metric)


def unit_of(metric: str) -> str:
    """The unit that a metric's name ends in."""
    return "tokens/s" if metric.endswith("_tok_s") else "ms" if metric.endswith("_ms") else "bytes"


def figure(metric: str, value: float) -> str:
    """Say a figure of a metric, with its unit where it is not told beside it."""
    return format_bytes(value) if unit_of(metric) == "bytes" else number(value)


def spread_words(metric: str, value: float | None, low: float | None, high: float | None) -> str:
    """Say a figure with its range, or that there is none."""
    if value is None or low is None or high is None:
        return "no figure"
    said = figure(metric, value)
    return said if low == high else f"{said} [{figure(metric, low)}, {figure(metric, high)}]"


def bar_chart(charts: Sequence[Bars], engines: Sequence[str], width: int) -> Markup:
    """A block for each measure, each with a scale of its own; a bar for each engine, a whisker for its range."""
    parts, height = _bars(charts, engines, width)
    title = "; ".join(metric_words(block.metric) for block in charts)
    return drawing(f"Engines side by side: {title}", width, height, *parts)


def _bars(charts: Sequence[Bars], engines: Sequence[str], width: int) -> tuple[list[Markup], float]:
    """The blocks, and how high they are together."""
    y = 4.0
    parts: list[Markup] = []
    kinds = {name: min(i, OTHER) for i, name in enumerate(engines)}
    for block in charts:
        scale = (width - 8) / (max((bar.high or 0.0 for bar in block.bars), default=0.0) or 1.0)
        parts.append(label(f"{metric_words(block.metric)}, {unit_of(block.metric)}", 0, y + 14, class_="strong"))
        y += 26
        for bar in block.bars:
            parts += _bar(bar, block.metric, kinds[bar.name], y, scale, width)
            y += 42
        y += 14
    return parts, y


def _bar(bar: Bar, metric: str, kind: int, y: float, scale: float, width: int) -> list[Markup]:
    said = spread_words(metric, bar.value, bar.low, bar.high)
    words = f"{said}, {bar.note}" if bar.note else said
    if text_width(bar.name) + text_width(words) + 28 > width and bar.value is not None:
        words = said  # on a phone the figures come first
    name = shorten(bar.name, max(width * 0.45, width - text_width(words) - 28))
    words = shorten(words, width - text_width(name) - 28)
    parts = [
        marker(kind, 6, y + 8),
        tag("text", tag("tspan", f"{name}  "), tag("tspan", words, class_="tick"), x=16.0, y=y + 12),
    ]
    if bar.value is None or bar.low is None or bar.high is None:
        return parts
    middle = y + 24.0
    parts.append(tag("rect", x=0.0, y=y + 18, width=max(bar.value * scale, 1.0), height=12.0, class_=f"bar c{kind}"))
    if bar.low < bar.high:
        low, high = bar.low * scale, bar.high * scale
        parts += [
            line(low, middle, high, middle, "base"),
            *(line(x, middle - 4, x, middle + 4, "base") for x in (low, high)),
        ]
    return parts


def curve_chart(points: Sequence[LoadPoint], engines: Sequence[str], level_ms: float | None, width: int) -> Markup:
    """Tokens a second against the time per token of 95 % of the requests; a line joins an engine's loads."""
    kinds = {name: min(i, OTHER) for i, name in enumerate(engines)}
    times = [point.time_per_token_ms for point in points] + ([level_ms] if level_ms else [])
    wide = width > 500
    height, named = 320.0, [name for name in engines if any(point.name == name for point in points)]
    x = linear_axis(0, max(times), 8 if wide else 4)
    y = linear_axis(0, max(point.tok_s for point in points), 6)
    left = max(text_width(number(tick)) for tick in y.ticks) + 12
    plot = Plot(left=left, right=width - 14, top=40, bottom=height - 48, x=x, y=y)
    parts = [plot.frame(number, number, "time per token that 95 % of requests kept, ms", "tokens of answers a second")]
    if level_ms:
        at = plot.px(level_ms)
        parts.append(line(at, plot.top, at, plot.bottom, "limit"))
        anchor = "start" if at < width / 2 else "end"
        beside = at + (6 if anchor == "start" else -6)
        parts.append(label(f"level {number(level_ms)} ms", beside, plot.bottom - 8, anchor, "limit-name halo"))
    for name in named:
        own = sorted((p for p in points if p.name == name), key=lambda p: p.time_per_token_ms)
        spots = [(plot.px(p.time_per_token_ms), plot.py(p.tok_s)) for p in own]
        way = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
        parts.append(tag("polyline", points=way, class_=f"trace c{kinds[name]}"))
        parts += [
            marker(kinds[name], px, py, f"{name}, {p.load}: {number(p.tok_s)} tokens/s" if wide else None)
            for p, (px, py) in zip(own, spots, strict=True)
        ]
    for name in named:
        height += 20
        parts += [marker(kinds[name], 8, height - 16), label(shorten(name, width - 24), 20, height - 12, class_="tick")]
    return drawing("Tokens a second against time per token, by load", width, height, join(parts))
