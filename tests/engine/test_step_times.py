"""What a step takes, from a table."""

import math
from collections.abc import Iterator

import pytest

from halve.core.errors import ConfigError
from halve.core.record import from_json, to_json
from halve.engine import StepTimes, measure_steps
from halve.engine.block_pool import BlockPool
from halve.engine.scheduler import Scheduler
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch

from .toy import StubRunner, request

TIMES = StepTimes(tokens=(1, 4, 8), seconds=(1.0, 1.3, 2.1), row_s=0.01, pair_s=0.001)


@pytest.mark.parametrize(("num_tokens", "seconds"), [(1, 1.0), (3, 1.2), (4, 1.3), (6, 1.7), (8, 2.1), (10, 2.5)])
def test_between_points_and_beyond_the_last_time_goes_along_a_line(num_tokens, seconds):
    assert TIMES.of(num_tokens, 1, 0) == pytest.approx(seconds)


def test_rows_and_pairs_add_up():
    assert TIMES.of(4, 3, 100) == pytest.approx(1.3 + 2 * 0.01 + 0.1)
    assert TIMES.of(4, 0, 0) == pytest.approx(1.3)


def test_one_point_holds_everywhere_and_a_table_that_falls_is_level():
    assert StepTimes(tokens=(2,), seconds=(0.5,)).of(100, 1, 0) == 0.5
    assert StepTimes(tokens=(1, 2), seconds=(0.5, 0.4)).of(9, 1, 0) == 0.5


def test_a_planned_step_is_priced_by_what_it_holds():
    scheduler = Scheduler(BlockPool(16, 4), context=64, max_num_seqs=2, max_tokens_per_step=8)
    scheduler.add(request("a", range(6)))
    step = scheduler.schedule()
    assert TIMES.of_step(step) == pytest.approx(TIMES.of(6, 1, 21))
    scheduler.commit(step, [9])
    assert TIMES.of_step(scheduler.schedule()) == pytest.approx(TIMES.of(1, 1, 7))


def test_a_table_goes_through_json():
    assert from_json(StepTimes, to_json(TIMES)) == TIMES


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": (), "seconds": ()}, "0 tokens"),
        ({"tokens": (1, 2)}, "2 tokens .* and 3 seconds"),
        ({"tokens": (1, 4, 4)}, "rising from 1"),
        ({"tokens": (0, 4, 8)}, "rising from 1"),
        ({"seconds": (1.0, -1.0, 1.0)}, "must all be finite, 0 or more"),
        ({"row_s": math.nan}, "must all be finite"),
        ({"version": 2}, "version 2 was written by a newer Halve"),
    ],
)
def test_a_table_that_cannot_be_is_refused(change, what):
    fields = {"tokens": TIMES.tokens, "seconds": TIMES.seconds, **change}
    with pytest.raises(ConfigError, match=what):
        StepTimes(**fields)


class Clocked(StubRunner):
    """Takes the time of a table."""

    def __init__(self, times: StepTimes, **sizes: int) -> None:
        super().__init__(**sizes)
        self.times, self.now = times, 0.0

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        self.now += self.times.of(batch.num_tokens, len(rows), float((batch.positions + 1).sum()))
        return super().run(batch, rows, sampling)

    def clock(self) -> Iterator[float]:
        return self.now


def test_a_measurement_finds_the_table_of_a_runner():
    runner = Clocked(StepTimes(tokens=(1, 4, 8, 64), seconds=(1.0, 1.3, 2.1, 9.0), row_s=0.01, pair_s=1e-5))
    found = measure_steps(runner, points=(1, 4, 8, 64), repeats=1, clock=runner.clock)
    assert found.tokens == (1, 4, 8, 64)
    assert found.seconds == pytest.approx((1.0, 1.3, 2.1, 9.0), rel=1e-3)
    assert found.row_s == pytest.approx(0.01)
    assert found.pair_s == pytest.approx(1e-5, rel=1e-2)


def test_a_measurement_leaves_out_what_the_cache_cannot_hold():
    runner = Clocked(TIMES, num_blocks=2, block_size=4, context=64)
    assert measure_steps(runner, repeats=1, clock=runner.clock).tokens == (1, 2, 3, 4, 5, 6, 7)
