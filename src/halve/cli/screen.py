"""What both tables and bars stand on: consoles, JSON on stdout, progress on stderr."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from halve.core.record import to_dict
from halve.core.units import format_duration

if TYPE_CHECKING:  # rich takes longer to load than weights to read: only where it draws
    from rich.console import Console, RenderableType
    from rich.table import Table

    from halve.api.progress import Standing


@cache
def error_console() -> "Console":
    """The console for talk."""
    from rich.console import Console

    return Console(stderr=True)


def talks_to_terminal() -> bool:
    """Whether talk goes to a terminal; rich may be told so (FORCE_COLOR), or that it does not (TERM=dumb)."""
    told = {"FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"} & os.environ.keys()
    return (sys.stderr.isatty() or bool(told)) and error_console().is_terminal


def console() -> "Console":
    """The console for data, as wide as the terminal, or wide enough for tables when piped."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def print_json(record: Any) -> None:
    """One JSON object on stdout."""
    json.dump(to_dict(record), sys.stdout, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()  # a reader that went away is noticed here, not while Python shuts down


class ShellProgress:
    """Bars on stderr where that is a terminal, under a table of the plans tried so far."""

    def __init__(self) -> None:
        self._standing: Standing | None = None
        self._at = 0.0

    def standing(self, found: "Standing") -> None:
        """Keep it: bars from now on stand under it."""
        self._standing, self._at = found, time.monotonic()

    def _table(self) -> "Iterable[RenderableType]":
        """The best plan so far first, then what was tried."""
        if self._standing is None:
            return
        yield standing_table(self._standing, time.monotonic() - self._at)

    @contextmanager
    def task(self, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """One bar, gone when the task ends."""
        if not talks_to_terminal():
            yield lambda done, total: None
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        above = self._table

        class Under(Progress):
            def get_renderables(self) -> "Iterable[RenderableType]":
                yield from above()
                yield from super().get_renderables()

        bar = Under(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=error_console(),
            transient=True,
        )
        with bar:
            identity = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(identity, completed=done, total=total)


SHOWN = 8  # plans of the table


def standing_table(found: "Standing", passed_s: float = 0.0) -> "Table":
    """Plans tried so far, cheapest first, the best so far marked. passed_s: since it was so."""
    from rich.table import Table

    left = format_duration(max(0.0, found.seconds_left - passed_s))
    table = Table(
        title=f"limit {found.limit:.3%}, {'roughly ' if found.guessed else ''}{left} left", title_justify="left"
    )
    for column in ("", "plan", f"cost ({found.basis}) / original", "quality loss", "within the limit"):
        table.add_column(column, justify="right" if "/" in column or "loss" in column else "left")
    best = found.best
    at = 0 if best is None else found.tried.index(best)
    first = max(0, min(at - SHOWN // 2, len(found.tried) - SHOWN))
    for one in found.tried[first : first + SHOWN]:
        loss = one.ppl_ratio
        table.add_row(
            "best" if one is best else "",
            one.plan,
            f"{one.cost_ratio:.3f}x",
            f"{loss.value - 1:.3%} [{loss.low - 1:.3%}, {loss.high - 1:.3%}]",
            "yes" if one.passed else "no",
            style="bold" if one is best else None,
        )
    return table
