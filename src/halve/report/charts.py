"""The four charts of the page. Each is drawn twice, wide and narrow, and CSS shows the one that fits: text in a
scaled SVG shrinks with it, and a chart made for a desk can't be read on a phone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from halve.core.certificate import Measured
from halve.core.units import format_bytes
from halve.report.records import Candidate, GroupSize, LayerError
from halve.report.svg import (
    FONT_SIZE,
    MARKERS,
    Axis,
    Plot,
    bent_axis,
    drawing,
    join,
    label,
    line,
    linear_axis,
    log_axis,
    marker,
    round_out,
    shorten,
    tag,
    text_width,
)
from halve.report.words import loss, percent, times_smaller

WIDE, NARROW = 860, 350
OTHER = MARKERS - 1


def both(draw: Callable[[int], Markup]) -> Markup:
    """Draw for a desk and for a phone."""
    return join(tag("div", draw(width), class_=name) for width, name in ((WIDE, "wide"), (NARROW, "narrow")))


def series_of(groups: Sequence[GroupSize], layers: Sequence[LayerError]) -> dict[str, int]:
    """Give each group its sign on the whole page: the largest come first, those past the seventh share the last."""
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group.pattern] = sizes.get(group.pattern, 0) + group.bytes_before
    names = [*sorted(sizes, key=lambda name: -sizes[name]), *dict.fromkeys(e.group for e in layers)]
    return {name: min(i, OTHER) for i, name in enumerate(dict.fromkeys(names))}


def swatch(kind: int) -> Markup:
    """The sign of a series, to stand in a table beside its name."""
    return tag("svg", marker(kind, 8, 8, size=5), viewBox="0 0 16 16", class_="swatch", aria_hidden="true")


# --- quality --------------------------------------------------------------------------------------------------------


def loss_axis(values: Sequence[float], limit: float | None, max_ticks: int) -> Axis:
    """An axis for losses (fractions) that shows zero and the limit, and bends when some are far beyond them."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min([0.0, *finite]), max([limit or 0.0, *finite])
    if not (low or high):
        return linear_axis(0.0, 0.01, max_ticks)
    usual = limit or median([abs(v) for v in finite if v])
    if max(-low, high) <= 20 * usual:
        return linear_axis(low, high + 0.04 * (high - low), max_ticks)
    return bent_axis(low, high, limit or round_out(usual), max_ticks)


def _room_for(axis: Axis) -> float:
    return max(text_width(percent(tick), FONT_SIZE - 1) for tick in axis.ticks) + 14


def loss_chart(rows: Sequence[tuple[str, Measured]], limit: float | None, width: int) -> Markup:
    """Quality losses with intervals, one row each, against zero and the limit."""
    losses = [tuple(x - 1 for x in (m.value, m.low, m.high)) for _, m in rows]
    x = loss_axis([v for triple in losses for v in triple], limit, 8 if width > 500 else 4)
    top, step = 34.0, 50.0
    bottom = top + step * len(rows) + 6
    plot = Plot(left=14, right=width - 34, top=top, bottom=bottom, x=x, y=linear_axis(0, 1))
    parts = [line(plot.px(v), top, plot.px(v), bottom, "zero" if v == 0 else "grid") for v in x.ticks]
    parts += [label(percent(v), plot.px(v), bottom + 18, "middle", "tick") for v in x.ticks]
    parts.append(label("quality loss: perplexity over the original's, minus 1", plot.left, bottom + 40, class_="axis"))
    if limit is not None:
        parts += _limit_upright(plot, limit)
    for i, ((name, ratio), (value, low, high)) in enumerate(zip(rows, losses, strict=True)):
        parts += _loss_row(plot, name, ratio, (value, low, high), limit, top + step * i, width)
    title = "Quality loss with its interval" + (f" against the limit of {percent(limit)}" if limit is not None else "")
    return drawing(title, width, bottom + 50, *parts)


def _limit_upright(plot: Plot, limit: float) -> list[Markup]:
    x, text = plot.px(limit), f"limit {percent(limit)}"
    half = text_width(text) / 2
    at = min(max(x, plot.left + half), plot.right + 34 - half)
    return [line(x, plot.top - 12, x, plot.bottom, "limit"), label(text, at, plot.top - 18, "middle", "limit-name")]


def _loss_row(
    plot: Plot,
    name: str,
    ratio: Measured,
    values: tuple[float, float, float],
    limit: float | None,
    y: float,
    width: int,
) -> list[Markup]:
    value, low, high = values
    said = loss(ratio, limit)
    figure = f"{said.value} % ({said.interval})"
    room = width - plot.left - text_width(figure) - 16
    name = shorten(name, room)
    head = [
        tag("rect", x=plot.left + 2, y=y + 6, width=text_width(f"{name}  {figure}"), height=16, class_="paper"),
        tag("text", tag("tspan", f"{name}  "), tag("tspan", figure, class_="strong"), x=plot.left + 6, y=y + 18),
    ]
    if not all(map(math.isfinite, values)):
        return head
    over = limit is not None and high > limit
    y += 36
    return [
        *head,
        tag("rect", x=plot.px(low), y=y - 4, width=max(plot.px(high) - plot.px(low), 2), height=8, rx=2,
            class_="interval over" if over else "interval"),
        tag("circle", cx=plot.px(value), cy=y, r=6, class_="point over" if over else "point"),
    ]  # fmt: skip


# --- size -----------------------------------------------------------------------------------------------------------


def size_chart(groups: Sequence[GroupSize], series: Mapping[str, int], width: int) -> Markup:
    """Bytes by group before and after, as two bars on one scale."""
    before, after = (sum(g.bytes_before for g in groups), sum(g.bytes_after for g in groups))
    scale = (width - 2) / max(before, after, 1)
    order = sorted(groups, key=lambda g: (series[g.pattern], -g.bytes_before))
    parts: list[Markup] = []
    for row, (name, total) in enumerate((("original", before), ("smaller", after))):
        top, x = 8.0 + row * 84, 1.0
        note = f"{name}: {format_bytes(total)}" + (f", {times_smaller(after, before)}" if row else "")
        parts.append(label(note, 1, top + 12, class_="strong"))
        for group in order:
            size = group.bytes_after if row else group.bytes_before
            parts.append(_segment(group, size, group.format_after if row else group.format_before,
                                  series[group.pattern], x, top + 22, size * scale))  # fmt: skip
            x += size * scale
    title = f"Bytes of weights by group: {format_bytes(before)} before, {format_bytes(after)} after"
    return drawing(title, width, 166, *parts)


def _segment(group: GroupSize, size: int, format_: str, kind: int, x: float, y: float, width: float) -> Markup:
    tip = tag("title", f"{group.pattern}: {format_bytes(size)}, {format_}")
    gap = 1.0 if width > 4 else 0.0
    parts = [tag("rect", x=x, y=y, width=max(width - gap, 0.0), height=44, class_=f"bar c{kind}")]
    name = shorten(group.pattern, width - 12)
    if len(name) >= min(len(group.pattern), 8):  # a stump of a name says nothing
        parts.append(label(name, x + 6, y + 19, class_=f"on c{kind}"))
        parts.append(label(shorten(format_bytes(size), width - 12), x + 6, y + 36, class_=f"on c{kind}"))
    return tag("g", tip, *parts)


# --- error by layer -------------------------------------------------------------------------------------------------


def layer_chart(layers: Sequence[LayerError], series: Mapping[str, int], width: int) -> Markup:
    """Relative output error of every module over its layer, on a logarithmic axis; zero has a line of its own."""
    wide = width > 500
    shown = [e for e in layers if math.isfinite(e.relative_error)]
    names = _names(shown, series)
    outside = any(e.layer is None for e in shown)
    lane = 70.0 if outside else 10.0
    right = width - lane - (176 if wide else 4)
    x = _layer_axis([e.layer for e in shown if e.layer is not None], 14 if wide else 6)
    y = _error_axis([e.relative_error for e in shown])
    height = 340.0
    plot = Plot(left=_room_for(y), right=right, top=40, bottom=height - 48, x=x, y=y)
    parts = [plot.frame(lambda v: f"{v:g}", percent, "layer", "error of the module's output, relative to the output")]
    parts += _layer_marks(shown, series, plot, lane if outside else 0.0, tips=wide)
    if wide:
        parts += _names_at_right(names, shown, series, plot, width - 160)
    else:
        for kind, text in names:
            parts += [marker(kind, 8, height + 10), label(shorten(text, width - 24), 20, height + 14, class_="tick")]
            height += 20
    return drawing("Relative output error of each module, by layer and group", width, height + 8, *parts)


def _layer_axis(numbers: Sequence[int], max_ticks: int) -> Axis:
    low, high = min(numbers, default=0), max(numbers, default=0)
    if low == high:
        return Axis(low=low - 1, high=low + 1, ticks=(float(low),) if numbers else ())
    step = max(round(linear_axis(0, high - low, max_ticks).ticks[1]), 1)
    pad = (high - low) * 0.02 + 0.2
    ticks = tuple(float(v) for v in range(-(-low // step) * step, high + 1, step))
    return Axis(low=low - pad, high=high + pad, ticks=ticks)


def _error_axis(errors: Sequence[float]) -> Axis:
    positive = [v for v in errors if v > 0]
    if not positive:
        return linear_axis(0, 0.01)
    top = max(positive)
    least = max(min(positive), top * 1e-9)  # nine decades are enough for eyes; less is drawn near zero
    return log_axis(least, top, zero=min(errors) < least)


def _names(layers: Sequence[LayerError], series: Mapping[str, int]) -> list[tuple[int, str]]:
    present = dict.fromkeys(e.group for e in layers)
    named = sorted((series[name], name) for name in present if series[name] != OTHER)
    others = [name for name in present if series[name] == OTHER]
    if others:
        named.append((OTHER, others[0] if len(others) == 1 else f"{len(others)} other groups"))
    return named


def _layer_marks(
    layers: Sequence[LayerError], series: Mapping[str, int], plot: Plot, lane: float, tips: bool
) -> list[Markup]:
    worst: dict[int, dict[int, float]] = {}
    for e in layers:
        if e.layer is not None:
            of_kind = worst.setdefault(series[e.group], {})
            of_kind[e.layer] = max(of_kind.get(e.layer, 0.0), e.relative_error)
    parts = [
        tag("polyline", points=" ".join(f"{plot.px(n):.1f},{plot.py(v):.1f}" for n, v in sorted(of_kind.items())),
            class_=f"trace c{kind}")
        for kind, of_kind in sorted(worst.items())
        if kind != OTHER
    ]  # fmt: skip
    if lane:
        parts.append(line(plot.right + 8, plot.top, plot.right + 8, plot.bottom, "grid"))
        parts.append(label("outside", plot.right + lane / 2 + 4, plot.bottom + 18, "middle", "tick"))
    size = 4.0 if len({e.layer for e in layers}) <= 40 else 3.0
    for e in layers:
        x = plot.px(e.layer) if e.layer is not None else plot.right + lane / 2 + 4
        tip = f"{e.name}: {percent(e.relative_error)} ({e.format}, {e.method})" if tips else None
        parts.append(marker(series[e.group], x, plot.py(e.relative_error), tip, size))
    return parts


def _names_at_right(
    names: Sequence[tuple[int, str]], layers: Sequence[LayerError], series: Mapping[str, int], plot: Plot, x: float
) -> list[Markup]:
    def height(kind: int) -> float:
        return median(plot.py(e.relative_error) for e in layers if series[e.group] == kind)

    parts: list[Markup] = []
    ordered = sorted(names, key=lambda entry: height(entry[0]))
    spacing = 20.0
    y = plot.top
    for i, (kind, text) in enumerate(ordered):
        last = plot.bottom - spacing * (len(ordered) - 1 - i)
        y = min(max(height(kind), y), last)
        parts += [marker(kind, x, y), label(shorten(text, WIDE - x - 14), x + 12, y + 4)]
        y += spacing
    return parts


# --- candidates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "_Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def drawable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that were judged and came out finite, the chosen one last, so that it lies on top."""
    judged = [
        c for c in candidates
        if c.ppl_ratio and all(map(math.isfinite, (c.ppl_ratio.value, c.ppl_ratio.low, c.ppl_ratio.high)))
    ]  # fmt: skip
    return sorted(judged, key=lambda c: c.chosen)


def candidate_chart(candidates: Sequence[Candidate], limit: float | None, width: int) -> Markup:
    """Bytes read per token against quality loss with intervals; the chosen plan is ringed and named."""
    wide = width > 500
    shown = [(c, c.ppl_ratio) for c in drawable(candidates) if c.ppl_ratio]
    sizes = [c.bytes_per_token for c, _ in shown]
    losses = [x - 1 for _, m in shown for x in (m.value, m.low, m.high)]
    height = 400.0 if wide else 350.0
    x_axis, y_axis = _bytes_axis(sizes, 8 if wide else 4), loss_axis(losses, limit, 10)
    plot = Plot(left=_room_for(y_axis), right=width - 24, top=44, bottom=height - 48, x=x_axis, y=y_axis)
    parts = [
        plot.frame(format_bytes, percent, "bytes of weights read per token", "quality loss on the selection split")
    ]
    taken: list[_Box] = []
    if limit is not None:
        y, text = plot.py(limit), f"limit {percent(limit)}"
        parts += [line(plot.left, y, plot.right, y, "limit"), label(text, plot.right, y - 6, "end", "limit-name halo")]
        taken.append(_Box(plot.right - text_width(text) - 4, y - 20, plot.right, y + 2))
        taken.append(_Box(plot.left, y - 2, plot.right, y + 2))
    taken.append(_Box(plot.left, plot.py(0) - 2, plot.right, plot.py(0) + 2))
    spots = [(plot.px(c.bytes_per_token), plot.py(m.value - 1)) for c, m in shown]
    taken += [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    for (c, m), (x, y) in zip(shown, spots, strict=True):
        parts.append(_candidate_mark(plot, c, m, limit, x, y, tips=wide))
    parts += _candidate_names([c for c, _ in shown], spots, taken, plot, 16 if wide else 7)
    return drawing("Every candidate: bytes read per token against quality loss", width, height, *parts)


def _bytes_axis(sizes: Sequence[int], max_ticks: int) -> Axis:
    low, high = min(sizes), max(sizes)
    if low > 0 and high > 50 * low:
        return log_axis(low, high, max_ticks)
    return linear_axis(0, high * 1.02, max_ticks)


def _candidate_mark(
    plot: Plot, c: Candidate, ratio: Measured, limit: float | None, x: float, y: float, tips: bool
) -> Markup:
    over = " over" if limit is not None and ratio.high - 1 > limit else ""
    said = loss(ratio, limit)
    tip = [tag("title", f"{c.format} {c.method}: {said.value} % ({said.interval}), {c.outcome}")] if tips else []
    whisker = line(x, plot.py(ratio.low - 1), x, plot.py(ratio.high - 1), f"whisker{over}")
    if over:  # a cross, so that colour is not the only sign
        shape = tag("path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8", class_="cross")
    else:
        shape = tag("circle", cx=x, cy=y, r=4.5, class_="point")
    ring = [tag("circle", cx=x, cy=y, r=10, class_="ring")] if c.chosen else []
    return tag("g", *tip, whisker, shape, *ring)


def _candidate_names(
    shown: Sequence[Candidate], spots: Sequence[tuple[float, float]], taken: list[_Box], plot: Plot, most: int
) -> list[Markup]:
    """Name as many as fit without covering each other: the chosen one always, then those that nothing beats."""
    parts: list[Markup] = []

    def beaten(i: int) -> bool:
        x, y = spots[i]
        return any(other != (x, y) and other[0] <= x and other[1] >= y for other in spots)

    for i in sorted(range(len(shown)), key=lambda i: (not shown[i].chosen, beaten(i), -spots[i][1])):
        if len(parts) >= most:
            break
        chosen = shown[i].chosen
        text = shorten(f"{shown[i].format} {shown[i].method}".strip(), 190 if plot.right > 500 else 130)
        text = f"chosen: {text}" if chosen else text
        box = _place(text_width(text), spots[i], 14 if chosen else 8, taken, plot, force=chosen)
        if box:
            taken.append(box)
            x, y, class_ = spots[i][0], box.bottom - 3, "strong halo" if chosen else "halo"
            if box.right <= x:
                parts.append(label(text, box.right, y, "end", class_))
            elif box.left >= x:
                parts.append(label(text, box.left, y, class_=class_))
            else:
                parts.append(label(text, (box.left + box.right) / 2, y, "middle", class_))
    return parts


def _place(
    width: float, spot: tuple[float, float], gap: float, taken: Sequence[_Box], plot: Plot, force: bool
) -> _Box | None:
    """A free box beside, above or below the spot. With `force` the least covered one, where none is free."""
    x, y = spot
    corners = [(x + gap, y - 7), (x - gap - width, y - 7), (x - width / 2, y - gap - 13), (x - width / 2, y + gap + 1)]
    least, right = plot.left + 2, plot.right + 22
    boxes = []
    for left, top in corners:
        fits = left >= least and left + width <= right and plot.top - 8 <= top and top + 14 <= plot.bottom
        if fits or force:
            start = max(min(left, right - width), least)
            boxes.append((not fits, _Box(start, top, start + width, top + 14)))
    covered = [(sum(box.overlaps(other) for other in taken), misfit, i) for i, (misfit, box) in enumerate(boxes)]
    if not covered:
        return None
    overlaps, _, best = min(covered)
    return boxes[best][1] if force or not overlaps else None
