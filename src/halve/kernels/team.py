"""The one team of threads of this process, which every kernel shares: how many, and on which cores."""

import ctypes
import logging
import os
from collections.abc import Sequence

from halve.core.errors import ConfigError
from halve.hardware import default_threads, read_topology
from halve.kernels.native_library import library

log = logging.getLogger("halve.kernels")

MAX_THREADS = 1024


def grow(num_threads: int | None = None) -> int:
    """Make the team `num_threads` strong, the caller included.

    None: one thread for each physical core of one memory node, within affinity and quota; `halve doctor` says how many
    and why. A team never shrinks; work asked for on fewer threads takes fewer. Returns num_threads. Raises ConfigError.
    """
    wanted = default_threads(read_topology()).num_threads if num_threads is None else num_threads
    if not 1 <= wanted <= MAX_THREADS:
        raise ConfigError(f"num_threads: {num_threads} is not between 1 and {MAX_THREADS}")
    if (strength := library().halve_grow_team(wanted)) < wanted:
        log.warning("the system gave %d of %d threads; products run on those", strength, wanted)
    return wanted


def home(num_threads: int | None = None) -> tuple[int, ...]:
    """Where to keep the workers when nobody says: on a machine of several memory nodes the cores of one of them, since
    weights that lie at another node come slowly; else, or when `num_threads` was said, wherever the system likes.
    """
    topology = read_topology()
    if num_threads is not None or len(topology.nodes) < 2:
        return ()
    cpus = default_threads(topology).cpus
    return cpus[1:] or cpus  # the caller, which stays as it is, is the first thread of the team


def pin(cores: Sequence[int]) -> None:
    """Keep worker i on cores[i % len(cores)]; none lets every worker run anywhere again.

    Workers are all threads of the team but the caller's, which stays as it is. For a machine that several engines
    share, each on cores of its own. Raises ConfigError for a core that this process may not use.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if wrong := sorted(set(cores) - allowed):
        raise ConfigError(f"cores: {wrong} can't be used by this process; it may use {sorted(allowed)}")
    array = (ctypes.c_int32 * max(len(cores), 1))(*cores)
    if library().halve_pin_team(ctypes.addressof(array), len(cores)):
        raise ConfigError(f"cores: the system did not let workers be kept on {list(cores)}; leave them unpinned")
