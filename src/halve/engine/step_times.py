"""How long a step takes, from a table: what a simulator runs on, and what says whether a longer step pays.

A step of T tokens, of which R rows are sampled, takes

    table(T) + (R - 1) * row_s + pairs * pair_s

table: the products of T tokens and all else that goes by tokens, one row sampled; between its points along a straight
line, beyond the last along the last line. row_s: each further row through the last product. pairs: keys that queries
meet, summed over the tokens; c tokens of a sequence from position s on meet c * s + c * (c + 1) / 2. `measure_steps`
takes the figures from a runner; it ignores what a mixed batch costs beside the sum of its parts.
"""

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from halve.core.errors import ConfigError
from halve.engine.runner import Runner
from halve.engine.scheduler import Step
from halve.kernels.ops import TokenBatch
from halve.kernels.sampling import SamplingBatch

POINTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of a step; the top of this file says how they add up. Raises ConfigError.

    tokens: rising, from 1 on. seconds: of a step of so many tokens of one sequence from its beginning, one row sampled,
    less what pair_s says of it.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    row_s: float = 0.0
    pair_s: float = 0.0
    version: int = 1

    def __post_init__(self) -> None:
        if self.version != 1:
            raise ConfigError(f"step_times: version {self.version} was written by a newer Halve (this one reads 1)")
        rising = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        if not self.tokens or len(self.tokens) != len(self.seconds) or self.tokens[0] < 1 or not rising:
            raise ConfigError(
                f"step_times: {len(self.tokens)} tokens {self.tokens!r:.80} and {len(self.seconds)} seconds; give one "
                "for each, tokens rising from 1 or more"
            )
        numbers = (*self.seconds, self.row_s, self.pair_s)
        if not all(0 <= value < math.inf for value in numbers):
            raise ConfigError(f"step_times: {numbers!r:.80} must all be finite, 0 or more")

    def of(self, num_tokens: int, num_rows: int, num_pairs: float) -> float:
        """Seconds of a step."""
        return self._table(num_tokens) + max(0, num_rows - 1) * self.row_s + num_pairs * self.pair_s

    def of_step(self, step: Step) -> float:
        """Seconds of a planned step."""
        num_tokens, num_pairs = 0, 0.0
        for chunk in step.chunks:
            count = chunk.num_tokens + len(chunk.draft)
            num_tokens += count
            num_pairs += count * chunk.start + count * (count + 1) / 2
        return self.of(num_tokens, step.num_sampled, num_pairs)

    def _table(self, num_tokens: int) -> float:
        tokens, seconds = self.tokens, self.seconds
        if num_tokens <= tokens[0] or len(tokens) == 1:
            return seconds[0]
        at = min(bisect_left(tokens, num_tokens), len(tokens) - 1)
        low, high = tokens[at - 1], tokens[at]
        share = (num_tokens - low) / (high - low)
        return seconds[at - 1] + share * max(0.0, seconds[at] - seconds[at - 1])


def measure_steps(
    runner: Runner,
    *,
    points: Sequence[int] = POINTS,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTimes:
    """The table of a runner that nobody else uses just now; what its cache holds is overwritten. Medians of `repeats`.

    points: tokens of a step; those that its cache or context can't hold are left out.
    """
    most = min(runner.context, runner.num_blocks * runner.block_size) - 1
    points = sorted({point for point in points if point <= most} | {1})

    def seconds(num_tokens: int, num_rows: int, start: int = 0) -> float:
        batch = _chunk(runner, num_tokens, start)
        rows, sampling = np.arange(num_tokens - num_rows, num_tokens, dtype=np.int32), SamplingBatch.greedy(num_rows)
        taken = []
        for _ in range(repeats + 1):
            started = clock()
            runner.run(batch, rows, sampling)
            taken.append(clock() - started)
        return statistics.median(taken[1:])  # the first one makes room

    raw = [seconds(point, 1) for point in points]
    several = max(point for point in points if point <= 8)
    row_s = max(0.0, seconds(several, several) - raw[points.index(several)]) / max(1, several - 1)
    pair_s = max(0.0, seconds(1, 1, start=most) - raw[0]) / max(1, most)
    table = [max(0.0, taken - point * (point + 1) / 2 * pair_s) for point, taken in zip(points, raw, strict=True)]
    return StepTimes(tokens=tuple(points), seconds=tuple(table), row_s=row_s, pair_s=pair_s)


def _chunk(runner: Runner, num_tokens: int, start: int) -> TokenBatch:
    """Tokens of one sequence from `start` on, in the first blocks of the cache."""
    size = runner.block_size
    positions = np.arange(start, start + num_tokens, dtype=np.int32)
    return TokenBatch(
        token_ids=(positions % runner.vocab_size).astype(np.int32),
        positions=positions,
        cu_seqlens=np.array([0, num_tokens], np.int32),
        slot_mapping=positions,
        block_tables=np.arange(-(-(start + num_tokens) // size), dtype=np.int32)[None],
    )
