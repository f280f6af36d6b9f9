"""How long work tells how far it is. The shell draws bars; a program that imports Halve sees nothing by default."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int, int], None]  # done, in all


class Progress(Protocol):
    """Opens one task after another."""

    def task(self, what: str, unit: str) -> AbstractContextManager[Advance]:
        """A context that gives a function to call with (done, in all)."""


class Silent:
    """Progress that nobody sees."""

    @contextmanager
    def task(self, what: str, unit: str) -> Iterator[Advance]:
        """A task that is not shown."""
        yield lambda done, total: None


SILENT = Silent()
