"""Seconds at counts, as they are measured."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from halve.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Seconds at rising counts, straight between them and beyond the last. Raises ConfigError for what is no line."""

    counts: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        if not self.counts or len(self.counts) != len(self.seconds) or not rising:
            raise ConfigError(f"device table: counts {self.counts!r:.80} need as many seconds, and must rise")
        if not all(0 <= s < float("inf") for s in self.seconds):
            raise ConfigError(f"device table: seconds {self.seconds!r:.80} must be finite, 0 or more")

    def at(self, count: float) -> float:
        """Seconds at a count, never fewer than at a lower one: what is measured to fall is measured wrong."""
        counts, seconds = self.counts, self.seconds
        if count <= counts[0] or len(counts) == 1:
            return seconds[0]
        i = min(bisect_left(counts, count), len(counts) - 1)
        share = (count - counts[i - 1]) / (counts[i] - counts[i - 1])
        return seconds[i - 1] + share * max(0.0, seconds[i] - seconds[i - 1])

    def near(self, count: float) -> float:
        """Seconds at a count of what may fall, within the counts that were measured."""
        return float(np.interp(count, self.counts, self.seconds))

    def rising(self) -> "Line":
        """The same where no count takes longer than a higher one: what disturbs a measurement only ever adds."""
        lowest = np.minimum.accumulate(self.seconds[::-1])[::-1]
        return Line(counts=self.counts, seconds=tuple(lowest.tolist()))

    def followed_by(self, other: "Line") -> "Line":
        """Itself and then another line, whose counts are beyond its own."""
        return Line(counts=self.counts + other.counts, seconds=self.seconds + other.seconds)
