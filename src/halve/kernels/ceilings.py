"""What this machine can do at most: how fast it reads memory, and multiplies, on the threads that our kernels run on.

Nothing here is computed for its result (csrc/ceilings.cpp). A product of M rows with a matrix of B bytes and W weights
takes at least max(B / read, M * W / rate) seconds, so that a kernel's speed is told as a fraction of a ceiling that
was measured beside it; a figure above the ceiling is a mistake of whoever measured it.

    read   an arena of huge pages, larger than any cache, read once by all threads (GB/s, GB = 10^9 bytes)
    int8   products of two bytes summed exactly in 32 bits (GMAC/s, 10^9 multiply-adds)
    int4   the same where one factor has 4 bits: without dot-product instructions, sums of eight fit into 16 bits
    bf16   products of two bf16 summed in float32, where the processor has them
    fp32   fused multiply-adds of float32
"""

import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from halve.core.certificate import Measured
from halve.core.errors import ConfigError, KernelError
from halve.core.units import format_bytes
from halve.hardware import Device, detect_cpu, free_memory_bytes
from halve.kernels.native_library import library

ARENA_BYTES = 1 << 30
HUGE_PAGE = 2 << 20  # bytes; also what one block of the read loop covers
LEAST_ARENA_BYTES = 1 << 28  # a smaller one would lie in the caches of a large server
READ = 0  # number of the read loop in csrc/ceilings.cpp
ROUNDS = 10_000  # of a block of an arithmetic loop, as in csrc/ceilings.cpp
BLOCKS = 400  # of a sample, for each thread: 10 to 40 ms, against microseconds of waking the team


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """One arithmetic loop of csrc/ceilings.cpp. macs: multiply-adds of a round; instruction: what it is made of."""

    number: int
    what: str
    instruction: str
    macs: int
    features: tuple[str, ...] = ()

    def refusal(self, device: Device) -> str | None:
        """Why this loop does not run on `device`, or None."""
        missing = [feature for feature in self.features if feature not in device.features]
        return f"needs {', '.join(missing)}" if missing else None


LOOPS = (  # of each kind the fastest first
    Loop(number=9, what="int8", instruction="tdpbssd", macs=4 * 16 * 16 * 64, features=("amx_tile", "amx_int8")),
    Loop(number=1, what="int8", instruction="vpdpbusd zmm", macs=12 * 64, features=("avx512f", "avx512_vnni")),
    Loop(number=2, what="int8", instruction="vpdpbusd ymm", macs=12 * 32, features=("avx2", "avx_vnni")),
    Loop(number=3, what="int8", instruction="vpmaddubsw vpmaddwd vpaddd", macs=5 * 32, features=("avx2",)),
    Loop(number=9, what="int4", instruction="tdpbssd", macs=4 * 16 * 16 * 64, features=("amx_tile", "amx_int8")),
    Loop(number=1, what="int4", instruction="vpdpbusd zmm", macs=12 * 64, features=("avx512f", "avx512_vnni")),
    Loop(number=2, what="int4", instruction="vpdpbusd ymm", macs=12 * 32, features=("avx2", "avx_vnni")),
    Loop(number=4, what="int4", instruction="8 vpmaddubsw 7 vpaddw vpmaddwd vpaddd", macs=16 * 32, features=("avx2",)),
    Loop(number=10, what="bf16", instruction="tdpbf16ps", macs=4 * 16 * 16 * 32, features=("amx_tile", "amx_bf16")),
    Loop(number=5, what="bf16", instruction="vdpbf16ps zmm", macs=12 * 32, features=("avx512f", "avx512_bf16")),
    Loop(number=6, what="fp32", instruction="vfmadd231ps zmm", macs=12 * 16, features=("avx512f",)),
    Loop(number=7, what="fp32", instruction="vfmadd231ps ymm", macs=12 * 8, features=("avx2", "fma")),
    Loop(number=8, what="fp32", instruction="multiply and add, 4 floats", macs=12 * 4),
)
ARITHMETIC = tuple(dict.fromkeys(loop.what for loop in LOOPS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What `measure` found. Each mapping goes from a number of threads to median, slowest and fastest sample.

    instructions: what each kind of arithmetic ran on; refused: why a kind that is null has no loop here.
    arena_bytes: how much memory the read loop covered.
    """

    read_gb_s: Mapping[str, Measured]
    int8_gmac_s: Mapping[str, Measured] | None
    int4_gmac_s: Mapping[str, Measured] | None
    bf16_gmac_s: Mapping[str, Measured] | None
    fp32_gmac_s: Mapping[str, Measured] | None
    instructions: Mapping[str, str]
    refused: Mapping[str, str]
    arena_bytes: int


class Arena:
    """Memory to read: huge pages where the system gives them, written once so that every page is there.

    Raises ConfigError for a size that caches could hold, or that is more than half of the free memory.
    """

    def __init__(self, size_bytes: int = ARENA_BYTES) -> None:
        if size_bytes < LEAST_ARENA_BYTES or size_bytes % HUGE_PAGE:
            raise ConfigError(
                f"arena_bytes: {size_bytes} must be a multiple of {HUGE_PAGE} and at least {LEAST_ARENA_BYTES}, "
                "so that no cache holds it"
            )
        free = free_memory_bytes()
        if free is not None and 2 * size_bytes > free:
            raise ConfigError(
                f"arena_bytes: {format_bytes(size_bytes)} is more than half of the {format_bytes(free)} of memory "
                f"that is free; end other programs, or take a smaller one (at least {format_bytes(LEAST_ARENA_BYTES)})"
            )
        self.size_bytes = size_bytes
        memory = mmap.mmap(-1, size_bytes + HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(memory, np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        self._pages = whole[start : start + size_bytes]
        self._pages[:] = 1

    def read_gb_s(self, num_threads: int) -> float:
        """Read it once on that many threads."""
        return self.size_bytes / _run(READ, self._pages.ctypes.data, self.size_bytes // HUGE_PAGE, num_threads) / 1e9


def loop_for(what: str, device: Device) -> Loop | None:
    """The fastest loop of a kind of arithmetic that `device` has, or None."""
    return next((loop for loop in LOOPS if loop.what == what and loop.refusal(device) is None), None)


def gmac_s(loop: Loop, num_threads: int) -> float:
    """Multiply-adds a second, in 10^9, of one short sample on that many threads."""
    blocks = BLOCKS * num_threads
    return blocks * ROUNDS * loop.macs / _run(loop.number, None, blocks, num_threads) / 1e9


def thread_counts(num_cores: int) -> list[int]:
    """Numbers of threads worth a measurement: every one up to 4, then doubling, and all cores."""
    doubling = [2**n for n in range(2, num_cores.bit_length())]
    return sorted({n for n in (1, 2, 3, *doubling, num_cores) if n <= num_cores})


def measure(
    *,
    num_threads: int | None = None,
    samples: int = 9,
    arena_bytes: int = ARENA_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Ceilings:
    """Measure every ceiling of this machine on 1 to `num_threads` threads (None: all cores), some seconds in all.

    progress: samples done, samples in all. Raises KernelError without the C++ library, ConfigError for settings that
    measure nothing, or an arena that memory has no room for.
    """
    library()  # refuses here, before memory is taken
    device = detect_cpu()
    most = device.num_cores if num_threads is None else num_threads
    if not 1 <= most <= device.num_cores:
        raise ConfigError(f"num_threads: {most} is not between 1 and the {device.num_cores} cores of this process")
    if samples < 3:
        raise ConfigError(f"samples: {samples} is too few for a median with a spread; take 3 or more")
    arena = Arena(arena_bytes)
    counts = thread_counts(most)
    loops = {what: loop for what in ARITHMETIC if (loop := loop_for(what, device))}
    total, done = (len(loops) + 1) * len(counts) * samples, 0

    def sample(once: Callable[[int], float]) -> Iterator[tuple[str, Measured]]:
        nonlocal done
        for threads in counts:
            once(threads)  # wakes the team, and the clock of the cores
            found = []
            for _ in range(samples):
                found.append(once(threads))
                done += 1
                if progress:
                    progress(done, total)
            yield str(threads), Measured(value=median(found), low=min(found), high=max(found), n=samples)

    read = dict(sample(arena.read_gb_s))
    rates: dict[str, Any] = {f"{what}_gmac_s": None for what in ARITHMETIC}
    for what, loop in loops.items():
        rates[f"{what}_gmac_s"] = dict(sample(lambda threads, loop=loop: gmac_s(loop, threads)))  # type: ignore[misc]
    return Ceilings(
        read_gb_s=read,
        **rates,
        instructions={what: loop.instruction for what, loop in loops.items()},
        refused={what: _refusals(what, device) for what in ARITHMETIC if what not in loops},
        arena_bytes=arena_bytes,
    )


def _refusals(what: str, device: Device) -> str:
    return "; ".join(f"{loop.instruction}: {loop.refusal(device)}" for loop in LOOPS if loop.what == what)


def _run(number: int, arena: int | None, blocks: int, num_threads: int) -> float:
    """Seconds that a loop took."""
    started = time.perf_counter()
    missing = library().halve_ceiling(number, arena, blocks, num_threads)
    seconds = time.perf_counter() - started
    if missing:
        raise KernelError(
            f"ceiling loop {number} is not in this build of the C++ part; reinstall halve on this machine"
        )
    return seconds
