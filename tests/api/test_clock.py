"""A clock that lies is caught by others, and a speed beyond the machine by its limits."""

import time

import pytest

from halve.api import clock
from halve.api.clock import witnessed
from halve.api.roofline import Judged, rooflines
from halve.api.versus.figures import Ceiling
from halve.core.errors import QualityError

REAL = time.perf_counter


def test_clocks_that_agree_pass():
    with witnessed():
        time.sleep(0.1)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_clock_that_runs_slow_or_fast_is_caught(monkeypatch, factor):
    monkeypatch.setattr(time, "perf_counter", lambda: REAL() * factor)
    with pytest.raises(QualityError, match="no speed can be certified by it"), witnessed():
        time.sleep(0.3)


def test_where_every_clock_lies_the_processors_time_tells(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: REAL() * 0.01)
    used = iter([0.0, 100.0])
    monkeypatch.setattr(clock, "_cpu_s", lambda: next(used))
    with pytest.raises(QualityError, match=r"the processors worked for 100\.00 s"), witnessed({}):
        time.sleep(0.01)


class Machine:
    """10 GB/s and 100 GMAC/s, with a cache of 1 MB."""

    cached_bytes = 1_000_000

    def __call__(self):
        return Ceiling(10.0, {"int8": 100.0, "fp32": 50.0})


def speed(tok_s, size=1_000_000_000, macs=1_000_000_000):
    return Judged(model="smaller", decode_tok_s=tok_s, bytes_per_step=size, macs=macs)


def test_a_speed_within_the_limits_is_told_as_shares_of_them():
    (found,) = rooflines([speed(5.0)], Machine())
    assert found.memory_fraction == pytest.approx(0.5)
    assert found.arithmetic_fraction == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("tok_s", "size", "macs", "what"),
    [(11.0, 1_000_000_000, 10, "would read 11.0 GB/s"), (9.0, 10, 12_000_000_000, "would take 108 GMAC/s")],
)
def test_a_speed_above_the_limits_fails(tok_s, size, macs, what):
    with pytest.raises(QualityError, match=f"smaller model: .*{what}.* is not certified"):
        rooflines([speed(tok_s, size, macs)], Machine())


def test_memory_that_gave_more_while_a_speed_was_measured_is_its_limit():
    (found,) = rooflines([speed(11.0)], Machine(), read_gb_s=12.0)
    assert found.memory_fraction == pytest.approx(11 / 12)
    assert found.read_gb_s == 12.0
    with pytest.raises(QualityError, match="is not certified"):
        rooflines([speed(11.0)], Machine(), read_gb_s=9.0)


def test_weights_that_a_cache_holds_have_no_limit_of_memory():
    (found,) = rooflines([speed(100_000.0, size=900_000, macs=1000)], Machine())
    assert found.memory_fraction is None
