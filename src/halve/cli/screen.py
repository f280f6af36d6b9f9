"""What both tables and bars stand on: consoles, JSON on stdout, progress on stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from halve.core.record import to_dict

if TYPE_CHECKING:  # rich takes longer to load than weights to read: only where it draws
    from rich.console import Console


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
    """Bars on stderr where that is a terminal; a line for each task where it is not."""

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

        bar = Progress(
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
