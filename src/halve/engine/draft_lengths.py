"""How many guesses pay: what a step of more rows costs here, how often guesses are right, and the best number of them.

A step of B sequences gives B tokens and takes cost(B) seconds. With m guesses behind some of them it takes cost(B + m)
and gives more: the j-th guess of a sequence whose guesses are each right with probability a counts a**j, since all
before it must be right too. `allot` takes the likeliest guesses first and stops where tokens per second are most. Where
a step is bound by reading weights (a batch of one) rows are nearly free and many pay; where it is bound by arithmetic
none do.

Both sides are measured while the engine runs, so there is nothing to set: costs are the lower quarter of the latest
steps of so many rows, since what disturbs a step only makes it longer; rates are counts that forget, with those of the
engine as a whole behind those of a request.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

KEPT = 8  # latest times of a number of rows
SLOPE = 0.12  # what a further row is taken to cost, as a share of a step, before it was measured
FIRST_AT_MOST = 1.5  # times what was expected, that the first step of a number of rows counts: memory is laid out in it
BELIEF = 3.0  # guesses of its own that weigh as much as all that the engine knows
MEMORY = 0.95  # a count's weight after one more guess; of the engine's counts, 1 - (1 - MEMORY) / 10
LEAST = 0.1  # a guess less likely than this is not made: what it could bring is within what is not known of its cost
BEGIN, GO_ON = 1.04, 1.01  # guesses begin when they promise so many times the speed, and end when they promise less


class StepCosts:
    """Seconds of steps by their number of rows. Between those that were seen along a line."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._rows: list[int] = []
        self._seconds: list[float] = []
        self._capped: set[int] = set()  # numbers of rows whose one time is not what it took

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step of so many rows has taken so long."""
        rows = _rounded(num_rows)
        times = self._times.get(rows)
        if times is None:
            most = FIRST_AT_MOST * self.of(rows)
            if 0 < most < seconds:
                seconds = most
                self._capped.add(rows)
            times = self._times[rows] = deque(maxlen=KEPT)
            at = bisect_left(self._rows, rows)
            self._rows.insert(at, rows)
            self._seconds.insert(at, seconds)
        elif rows in self._capped:
            self._capped.discard(rows)
            times.clear()
        times.append(seconds)
        self._seconds[bisect_left(self._rows, rows)] = sorted(times)[(len(times) - 1) // 4]

    def knows(self, num_rows: int) -> bool:
        """Whether steps of about so many rows were seen."""
        return _rounded(num_rows) in self._times

    def seen(self) -> list[tuple[int, float]]:
        """Numbers of rows and seconds, as far as they were seen."""
        return list(zip(self._rows, self._seconds, strict=True))

    def of(self, num_rows: int) -> float:
        """Seconds of a step; 0 while none was seen at all."""
        rows, seconds = self._rows, self._seconds
        if not rows:
            return 0.0
        at = bisect_left(rows, num_rows)
        if at < len(rows) and rows[at] == num_rows:
            return seconds[at]
        if 0 < at < len(rows):
            share = (num_rows - rows[at - 1]) / (rows[at] - rows[at - 1])
            return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])
        end = 0 if at == 0 else len(rows) - 1
        if len(rows) == 1:
            slope = SLOPE * seconds[0] / (1 + SLOPE * (rows[0] - 1))
        else:
            slope = max(0.0, (seconds[-1] - seconds[0]) / (rows[-1] - rows[0]))
        return max(seconds[end] / 2, seconds[end] + slope * (num_rows - rows[end]))


def _rounded(num_rows: int) -> int:
    """Few enough numbers of rows that each is seen often: steps of 1 to 16, of 4 to 64, of 16 beyond."""
    unit = 1 if num_rows <= 16 else 4 if num_rows <= 64 else 16
    return round(num_rows / unit) * unit


class Rate:
    """How often guesses are right, of those whose predecessors were; the latest count most."""

    def __init__(self, memory: float = MEMORY) -> None:
        self._memory = memory
        self.right = self.tried = 0.0

    def observe(self, num_accepted: int, num_proposed: int) -> None:
        """Of so many guesses in a row the first so many were right."""
        for i in range(num_accepted + (num_accepted < num_proposed)):
            self.right = self.right * self._memory + (i < num_accepted)
            self.tried = self.tried * self._memory + 1

    def among(self, prior: float, weight: float) -> float:
        """The rate, with as much weight of a prior one."""
        return (self.right + weight * prior) / (self.tried + weight)


class Rates:
    """Of guesses by their kind, such as the length of the context that agreed: of a request and of the engine.

    first: of each kind, what is taken for its rate before anything is known.
    """

    def __init__(self, first: Mapping[int, float], engine: "Rates | None" = None) -> None:
        self._first, self._engine = first, engine
        self._of: dict[int, Rate] = {}

    def observe(self, kind: int, num_accepted: int, num_proposed: int) -> None:
        """Count guesses, here and in the engine's."""
        if kind not in self._of:
            self._of[kind] = Rate(MEMORY if self._engine else 1 - (1 - MEMORY) / 10)
        self._of[kind].observe(num_accepted, num_proposed)
        if self._engine:
            self._engine.observe(kind, num_accepted, num_proposed)

    def of(self, kind: int) -> float:
        """The probability that a guess of this kind is right."""
        prior = self._engine.of(kind) if self._engine else self._first[kind]
        rate = self._of.get(kind)
        return prior if rate is None else rate.among(prior, BELIEF)


class Candidate(NamedTuple):
    """A sequence that could have guesses: the rate of each of them, and the most it can have."""

    rate: float
    most: int


def allot(
    candidates: Sequence[Candidate],
    num_rows: int,
    cost: Callable[[int], float],
    *,
    draft_cost: Callable[[int], float] | None = None,
    pays: float = BEGIN,
) -> tuple[list[int], float]:
    """How many guesses each candidate should have for the most tokens per second, and how many times those without.

    num_rows: of the step without any, B. cost: seconds of a step of so many rows. draft_cost: seconds to make one
    more guess for each of so many sequences; None where that takes no time. pays: none, unless they promise this much
    more tokens per second than no guesses.
    """
    gains = sorted(
        ((rate**j, -j, i) for i, (rate, most) in enumerate(candidates) for j in range(1, most + 1) if rate**j >= LEAST),
        reverse=True,
    )
    tokens, plain = float(num_rows), num_rows / max(cost(num_rows), 1e-12)
    numbers, best, best_speed = [0] * len(candidates), [0] * len(candidates), pays * plain
    width: list[int] = []  # how many sequences have a guess at each depth
    drafting = 0.0
    for m, (gain, minus_depth, i) in enumerate(gains, start=1):
        depth = -minus_depth
        tokens += gain
        numbers[i] = depth
        if draft_cost:
            if depth > len(width):
                width.append(0)
            drafting += draft_cost(width[depth - 1] + 1) - (draft_cost(width[depth - 1]) if width[depth - 1] else 0.0)
            width[depth - 1] += 1
        speed = tokens / max(cost(num_rows + m) + drafting, 1e-12)
        if speed > best_speed:
            best, best_speed = numbers[:], speed
    return best, max(1.0, best_speed / plain) if any(best) else 1.0
