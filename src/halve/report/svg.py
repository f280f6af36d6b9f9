"""Drawing by hand: SVG elements as escaped strings, axes with round ticks, and the width of a text.

An `Axis` is linear, or symmetric-logarithmic: values up to +-`knee` lie on a straight piece on each side of zero,
`knee_units` long, and every factor of ten beyond takes one unit more. So zero, 1e-6 and 1e6 fit on one axis.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup

FONT_SIZE = 13
MARKERS = 8  # shapes and colours of a series; the last one is for "other"


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """One element. Attribute `text_anchor` is written `text-anchor`, `class_` `class`; None leaves it out.

    Children and values are escaped unless they are Markup.
    """
    written = "".join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup(written), join(children))


def join(parts: Iterable[str]) -> Markup:
    """Concatenate, escaping what is not Markup."""
    return Markup("").join(parts)


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def drawing(title: str, width: float, height: float, *parts: str) -> Markup:
    """The whole picture; `title` is what a screen reader says."""
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=title)


def label(text: str, x: float, y: float, anchor: str = "start", class_: str | None = None) -> Markup:
    """A text at its baseline."""
    return tag("text", text, x=float(x), y=float(y), text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def marker(kind: int, x: float, y: float, tip: str | None = None, size: float = 4.0) -> Markup:
    """The sign of series `kind`: a shape and a colour, so that either alone tells it apart."""
    s = size
    shapes = (
        f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",
        f"M{x:.1f} {y - s * 1.2:.1f}l{s * 1.2:.1f} {s * 2.1:.1f}h{-s * 2.4:.1f}z",
        f"M{x:.1f} {y - s * 1.4:.1f}l{s * 1.4:.1f} {s * 1.4:.1f}l{-s * 1.4:.1f} {s * 1.4:.1f}"
        f"l{-s * 1.4:.1f} {-s * 1.4:.1f}z",
        f"M{x:.1f} {y + s * 1.2:.1f}l{s * 1.2:.1f} {-s * 2.1:.1f}h{-s * 2.4:.1f}z",
        f"M{x - s * 0.4:.1f} {y - s * 1.3:.1f}h{s * 0.8:.1f}v{s * 2.6:.1f}h{-s * 0.8:.1f}z",
        f"M{x - s * 1.3:.1f} {y - s * 0.4:.1f}h{s * 2.6:.1f}v{s * 0.8:.1f}h{-s * 2.6:.1f}z",
        f"M{x - s * 0.7:.1f} {y - s * 0.7:.1f}h{s * 1.4:.1f}v{s * 1.4:.1f}h{-s * 1.4:.1f}z",
    )
    return tag("path", *([tag("title", tip)] if tip else []), d=shapes[kind], class_=f"mark c{kind}")


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """Width in pixels of a text in a common sans-serif, a little on the safe side."""
    return sum(size if unicodedata.east_asian_width(char) in "WF" else size * 0.6 for char in text)


def shorten(text: str, width: float, size: float = FONT_SIZE) -> str:
    """Cut a text with `…` so that it fits."""
    if text_width(text, size) <= width:
        return text
    kept = ""
    for char in text:
        if text_width(f"{kept}{char}…", size) > width:
            break
        kept += char
    return f"{kept.rstrip()}…"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Values to 0 .. 1. knee None: linear."""

    low: float
    high: float
    ticks: tuple[float, ...]
    knee: float | None = None
    knee_units: float = 1.0

    def at(self, value: float) -> float:
        """Place of a value: 0 at `low`, 1 at `high`."""
        low, high = self._bend(self.low), self._bend(self.high)
        return (self._bend(value) - low) / (high - low)

    def _bend(self, value: float) -> float:
        if self.knee is None:
            return value
        size = abs(value) / self.knee
        return math.copysign(size * self.knee_units if size <= 1 else self.knee_units + math.log10(size), value)


def linear_axis(low: float, high: float, max_ticks: int = 6) -> Axis:
    """Round ends and ticks (steps of 1, 2 or 5 times a power of ten) around low .. high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = round_out((high - low) / max_ticks * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))
    return Axis(low=ticks[0], high=ticks[-1], ticks=ticks)


def log_axis(low: float, high: float, max_ticks: int = 8, zero: bool = False) -> Axis:
    """Logarithmic from 0 < low to high; with `zero`, 0 has a place of its own half a unit below."""
    bottom, top = round_in(low), round_out(high)
    top = top if top > bottom else bottom * 10
    ticks = log_ticks(bottom, top, max_ticks)
    if zero:
        return Axis(low=0.0, high=top, ticks=(0.0, *ticks), knee=bottom, knee_units=0.5)
    return Axis(low=bottom, high=top, ticks=ticks, knee=bottom)


def bent_axis(low: float, high: float, knee: float, max_ticks: int = 9) -> Axis:
    """Linear and roomy (three units) from zero to +-knee, logarithmic beyond. low <= 0 <= high."""
    inner = linear_axis(0, knee, max(max_ticks // 2, 2)).ticks
    ticks = {v for v in inner if v <= knee * 1.001}
    bottom, top = 0.0, max(round_out(high), knee)
    if low < 0:
        steps = math.ceil(-low / inner[1] - 1e-9)
        bottom = -inner[1] * steps if -low <= knee else -round_out(-low)
        ticks.add(bottom)
    if top > knee * 1.9:
        ticks.update(log_ticks(knee * 1.9, top, max(max_ticks - len(ticks), 4)))
    return Axis(low=bottom, high=top, ticks=tuple(sorted(ticks)), knee=knee, knee_units=3.0)


def log_ticks(low: float, high: float, max_ticks: int) -> tuple[float, ...]:
    """Ticks at 1, 2 and 5 times powers of ten; fewer, where that would be too many."""
    powers = range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = tuple(
            v for i in powers for v in (float(f"{f}e{i}") for f in factors) if low * 0.999 <= v <= high * 1.001
        )
        if len(ticks) <= max_ticks:
            return ticks
    return ticks[:: math.ceil(len(ticks) / max_ticks)]


def round_out(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below value > 0."""
    power = math.floor(math.log10(value) - 1e-9)
    return next(v for v in (float(f"{f}e{power}") for f in (1, 2, 5, 10)) if v >= value * 0.999999)


def round_in(value: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above value > 0."""
    power = math.floor(math.log10(value) + 1e-9)
    return next(v for v in (float(f"{f}e{power}") for f in (5, 2, 1)) if v <= value * 1.000001)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """The rectangle between two axes, in pixels."""

    left: float
    top: float
    right: float
    bottom: float
    x: Axis
    y: Axis

    def px(self, value: float) -> float:
        """Pixel of a value on the x axis."""
        return self.left + self.x.at(value) * (self.right - self.left)

    def py(self, value: float) -> float:
        """Pixel of a value on the y axis, which grows upward."""
        return self.bottom - self.y.at(value) * (self.bottom - self.top)

    def frame(self, say_x: Callable[[float], str], say_y: Callable[[float], str], x_title: str, y_title: str) -> Markup:
        """Grid, ticks and titles: the title of y stands above the plot, where it can be read without turning."""
        rows = [line(self.left, self.py(v), self.right, self.py(v), "zero" if v == 0 else "grid") for v in self.y.ticks]
        names = [label(say_y(v), self.left - 8, self.py(v) + 4, "end", "tick") for v in self.y.ticks]
        feet = [label(say_x(v), self.px(v), self.bottom + 18, "middle", "tick") for v in self.x.ticks]
        titles = [
            label(y_title, 0, self.top - 16, class_="axis"),
            label(x_title, self.right, self.bottom + 40, "end", "axis"),
        ]
        base = line(self.left, self.bottom, self.right, self.bottom, "base")
        return join([*rows, base, *names, *feet, *titles])
