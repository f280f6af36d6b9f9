"""Charts of a product's margin: scenarios, the tornado, where a saving goes, months ahead.

Each is drawn for a language and a width; values come as floats, with the words that are to stand beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from halve.report.svg import Plot, drawing, label, line, linear_axis, marker, shorten, tag, text_width

ROW = 46.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A driver: the margins at its low and its high value (fractions), and its words."""

    name: str
    values: str
    at_low: float
    at_high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A bar with words; kind: of colour. between: what the value may be, for a whisker."""

    name: str
    said: str
    value: float
    kind: int
    is_sum: bool = False
    between: tuple[float, float] | None = None


def _percent(value: float) -> str:
    return f"{value * 100:.2f}".rstrip("0").rstrip(".").replace("-", "−") + " %"


def tornado(ranges: Sequence[Range], now: float, words: tuple[str, str, str, str], width: int) -> Markup:
    """Bars from the margin now to the margins at the ends of each driver's range, one driver a row.

    words: the title for readers of the screen, of the axis, and what the colours of the low and high end mean.
    """
    title, axis_title, low_word, high_word = words
    ends = [v for r in ranges for v in (r.at_low, r.at_high)] + [now]
    axis = linear_axis(min(ends), max(ends), 8 if width > 500 else 4)
    # Figures stand beside the bars, so bars keep away from the edges.
    room = text_width(_percent(min(ends)), 12) + 12
    top = 44.0
    bottom = top + ROW * len(ranges) + 4
    plot = Plot(left=room, right=width - room, top=top, bottom=bottom, x=axis, y=linear_axis(0, 1))
    parts = [line(plot.px(v), top, plot.px(v), bottom, "grid") for v in axis.ticks]
    parts += [label(_percent(v), plot.px(v), bottom + 18, "middle", "tick") for v in axis.ticks]
    parts.append(label(axis_title, 0, bottom + 42, class_="axis"))
    parts.append(line(plot.px(now), top - 4, plot.px(now), bottom, "zero"))
    parts += _key([(1, low_word), (0, high_word)], 12.0, width)
    for i, one in enumerate(ranges):
        parts += _range(plot, one, now, top + ROW * i, width)
    return drawing(title, width, bottom + 52, *parts)


def _key(entries: Sequence[tuple[int, str]], y: float, width: int) -> list[Markup]:
    parts, x = [], 0.0
    for kind, words in entries:
        if x and x + text_width(words) + 30 > width:
            x, y = 0.0, y + 18
        parts += [
            tag("rect", x=x, y=y - 6, width=12.0, height=12.0, class_=f"bar c{kind}"),
            label(words, x + 18, y + 5),
        ]
        x += text_width(words) + 38
    return parts


def _range(plot: Plot, one: Range, now: float, y: float, width: int) -> list[Markup]:
    name = shorten(one.name, width - text_width(one.values) - 12)
    parts = [
        tag("rect", x=0.0, y=y + 1, width=text_width(f"{name}  {one.values}"), height=17.0, class_="paper"),
        tag(
            "text", tag("tspan", f"{name}  ", class_="strong"), tag("tspan", one.values, class_="tick"), x=0.0, y=y + 14
        ),
    ]
    middle = plot.px(now)
    for value, kind in ((one.at_low, 1), (one.at_high, 0)):
        x = plot.px(value)
        parts.append(
            tag("rect", x=min(x, middle), y=y + 20, width=max(abs(x - middle), 1.0), height=14.0, class_=f"bar c{kind}")
        )
    left, right = sorted((one.at_low, one.at_high))
    for value, side, anchor in ((left, -5, "end"), (right, 5, "start")):
        edge = min(plot.px(value), middle) if side < 0 else max(plot.px(value), middle)
        parts.append(label(_percent(value), edge + side, y + 32, anchor, "tick halo"))
    return parts


def steps(rows: Sequence[Step], words: str, width: int) -> Markup:
    """A waterfall lying down: each bar begins where the one before it ended; sums begin at zero."""
    edges, at = [0.0], 0.0
    for row in rows:
        at = row.value if row.is_sum else at + row.value
        edges.append(at)
    low, high = min(edges), max(edges)
    span = (high - low) or 1.0
    scale = (width - 8) / span
    parts: list[Markup] = []
    y, start = 4.0, 0.0
    zero = (0 - low) * scale + 4
    for row in rows:
        begin = 0.0 if row.is_sum else start
        end = row.value if row.is_sum else start + row.value
        name = shorten(row.name, width - text_width(row.said) - 12)
        parts.append(tag("text", tag("tspan", f"{name}  "), tag("tspan", row.said, class_="strong"), x=0.0, y=y + 12))
        x = (min(begin, end) - low) * scale + 4
        parts.append(tag("rect", x=x, y=y + 18, width=max(abs(end - begin) * scale, 1.0), height=14.0,
                         class_=f"bar c{row.kind}"))  # fmt: skip
        if row.between is not None:
            first, last = (zero + end * scale for end in row.between)
            parts.append(line(first, y + 25, last, y + 25, "whisker"))
            parts += [line(end, y + 20, end, y + 30, "whisker") for end in (first, last)]
        parts.append(line(zero, y + 15, zero, y + 35, "zero"))
        start = end
        y += ROW
    return drawing(words, width, y, *parts)


def bars(rows: Sequence[Step], words: str, width: int) -> Markup:
    """One bar for each, from zero; below zero they go to the left."""
    ends = [0.0, *(r.value for r in rows), *(end for r in rows for end in r.between or ())]
    low, high = min(ends), max(ends)
    scale = (width - 8) / ((high - low) or 1.0)
    zero = -low * scale + 4
    parts: list[Markup] = []
    y = 4.0
    for row in rows:
        name = shorten(row.name, width - text_width(row.said) - 12)
        parts.append(tag("text", tag("tspan", f"{name}  "), tag("tspan", row.said, class_="strong"), x=0.0, y=y + 12))
        x = zero + min(row.value, 0.0) * scale
        parts.append(tag("rect", x=x, y=y + 18, width=max(abs(row.value) * scale, 1.0), height=14.0,
                         class_=f"bar c{row.kind}"))  # fmt: skip
        if row.between is not None:
            first, last = (zero + end * scale for end in row.between)
            parts.append(line(first, y + 25, last, y + 25, "whisker"))
            parts += [line(end, y + 20, end, y + 30, "whisker") for end in (first, last)]
        parts.append(line(zero, y + 15, zero, y + 35, "zero"))
        y += ROW
    return drawing(words, width, y, *parts)


def months(series: Sequence[tuple[str, int, Sequence[float]]], words: tuple[str, str, str], width: int) -> Markup:
    """Margins month by month, a line for each series. words: for the screen reader, of the axes x and y."""
    title, x_title, y_title = words
    values = [v for _, _, points in series for v in points]
    count = max(len(points) for _, _, points in series)
    x = linear_axis(0, max(count - 1, 1), 12 if width > 500 else 6)
    y = linear_axis(min(values), max(values), 6)
    left = max(text_width(_percent(tick)) for tick in y.ticks) + 12
    height = 280.0
    plot = Plot(left=left, right=width - 14, top=36, bottom=height - 48, x=x, y=y)
    parts = [plot.frame(lambda v: f"{v:g}", _percent, x_title, y_title)]
    for name, kind, points in series:
        spots = [(plot.px(i), plot.py(v)) for i, v in enumerate(points)]
        way = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
        parts.append(tag("polyline", points=way, class_=f"trace c{kind}"))
        parts += [
            marker(kind, px, py, f"{name}, {i}: {_percent(v)}", size=3.5)
            for i, ((px, py), v) in enumerate(zip(spots, points, strict=True))
        ]
    for name, kind, _ in series:
        height += 20
        parts += [marker(kind, 8, height - 16), label(shorten(name, width - 24), 20, height - 12, class_="tick")]
    return drawing(title, width, height, *parts)
