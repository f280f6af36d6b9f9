"""A clock is believed when others agree with it: every speed of a certificate is seconds of one.

The clock that measures is held against the system's others, one of them read from a file, and against the processor
time of this process, which cannot pass faster than its cores allow. One that runs slow makes every model look fast.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from halve.core.errors import QualityError

SHARE = 0.02  # by which two clocks may part; adjustments of the system's time stay below 0.0005
SLACK_S = 0.05  # /proc/uptime tells hundredths of a second, and reading takes time


def _named(clock: int) -> Callable[[], float]:
    return lambda: time.clock_gettime(clock)


def _uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def witnesses() -> dict[str, Callable[[], float]]:
    """Every other clock of this system, in seconds."""
    names = ("CLOCK_MONOTONIC", "CLOCK_MONOTONIC_RAW", "CLOCK_BOOTTIME")
    found = {name: _named(getattr(time, name)) for name in names if hasattr(time, name)}
    return found | ({"/proc/uptime": _uptime} if Path("/proc/uptime").exists() else {})


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def witnessed(others: Mapping[str, Callable[[], float]] | None = None) -> Iterator[None]:
    """Measure inside by `time.perf_counter`. Raises QualityError when it disagrees with another clock (None: all)."""
    others = witnesses() if others is None else others
    before = {name: read() for name, read in others.items()}
    started, cpu = time.perf_counter(), _cpu_s()
    yield
    cpu, seconds = _cpu_s() - cpu, time.perf_counter() - started
    for name, read in others.items():
        told = read() - before[name]
        if abs(told - seconds) > SHARE * max(told, seconds) + SLACK_S:
            raise QualityError(
                f"clock: {seconds:.2f} s by the one that measures speed, {told:.2f} s by {name}; no speed can be "
                "certified by it. If the machine slept meanwhile, run it again"
            )
    most = (os.cpu_count() or 1) * (seconds * (1 + SHARE) + SLACK_S)
    if cpu > most:
        raise QualityError(
            f"clock: {seconds:.2f} s passed by the one that measures speed, and the processors worked for {cpu:.2f} s, "
            f"more than {os.cpu_count()} can in that time; no speed can be certified by it"
        )
