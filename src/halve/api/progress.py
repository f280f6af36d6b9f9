"""How long work tells how far it is. The shell draws bars; a program that imports Halve sees nothing by default."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from halve.core.certificate import Measured

Advance = Callable[[int, int], None]  # done, in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A plan that was judged. cost_ratio: over the original's, in `Standing.basis`; ppl_ratio: on selection text."""

    plan: str
    cost_ratio: float
    ppl_ratio: Measured
    passed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where a search stands: plans tried, cheapest first; the best so far is the first that passed.

    basis: `seconds` of the workload by the simulation, or `bytes` that a token reads. seconds_left: of the time given,
    or a rough guess where none was (`guessed`).
    """

    tried: tuple[Tried, ...]
    limit: float
    basis: str
    seconds_left: float
    guessed: bool

    @property
    def best(self) -> Tried | None:
        """The cheapest that is within the limit."""
        return next((one for one in self.tried if one.passed), None)


class Progress(Protocol):
    """Opens one task after another."""

    def task(self, what: str, unit: str) -> AbstractContextManager[Advance]:
        """A context that gives a function to call with (done, in all)."""

    def standing(self, found: Standing) -> None:
        """A plan more has been judged: what the best is now."""


class Silent:
    """Progress that nobody sees."""

    @contextmanager
    def task(self, what: str, unit: str) -> Iterator[Advance]:
        """A task that is not shown."""
        yield lambda done, total: None

    def standing(self, found: Standing) -> None:
        """Not shown either."""


SILENT = Silent()
