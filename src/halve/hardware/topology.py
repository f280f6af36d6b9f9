"""How the processors that this process may use hang together, and how many threads of work they deserve.

Linux's /sys says which logical processors are hyper-threads of one physical core and which memory node each is at, and
the cgroup says how much of their time this process may take. Elsewhere every processor counts as a core of its own.

A product of matrices keeps a core's multipliers and its share of the memory's lines busy by itself: a second thread on
the same core only waits for them, and a thread on another node reads weights through the link between nodes, which is
slower than either node's memory. Hence the default: one thread for each physical core, of one node, within affinity and
quota.
"""

import math
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """One physical core. cpus: its logical processors that this process may use. node: the memory it is at."""

    cpus: tuple[int, ...]
    node: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """What this process may use. quota: processors' worth of time that its cgroup allows, None for no limit.

    here: the node that this process runs at, None where the system does not say. num_online: processors of the machine.
    """

    cores: tuple[Core, ...]
    quota: float | None
    here: int | None
    num_online: int

    @property
    def cpus(self) -> tuple[int, ...]:
        """Logical processors of its affinity."""
        return tuple(sorted(cpu for core in self.cores for cpu in core.cpus))

    @property
    def nodes(self) -> tuple[int, ...]:
        """Memory nodes of its cores."""
        return tuple(sorted({core.node for core in self.cores}))

    @property
    def num_cores(self) -> int:
        """Physical cores within the quota, which is rounded up."""
        return within(len(self.cores), self.quota)


@dataclass(frozen=True, kw_only=True, slots=True)
class Threads:
    """How many threads to compute on, on which processors (one of each core), and why so."""

    num_threads: int
    cpus: tuple[int, ...]
    reason: str


def read_topology(root: Path = Path("/"), affinity: Collection[int] | None = None) -> Topology:
    """Read what the system says; `root` holds its `sys` and `proc`. affinity: None for this process's own."""
    allowed = _affinity() if affinity is None else set(affinity)
    system = root / "sys/devices/system"
    node_of = {cpu: node for node, cpus in _nodes(system / "node") for cpu in cpus}
    seen: set[int] = set()
    cores = []
    for cpu in sorted(allowed):
        if cpu in seen:
            continue
        siblings = {cpu} | (_siblings(system / "cpu" / f"cpu{cpu}" / "topology") & allowed)
        seen |= siblings
        cores.append(Core(cpus=tuple(sorted(siblings)), node=node_of.get(cpu, 0)))
    online = parse_cpu_list(_read(system / "cpu" / "online")) or allowed
    running_on = _running_on(_read(root / "proc/self/stat"))
    here = None if running_on is None else node_of.get(running_on)
    return Topology(cores=tuple(cores), quota=read_quota(root), here=here, num_online=len(online))


def default_threads(topology: Topology) -> Threads:
    """One thread for each physical core of one memory node, cut to the quota.

    The node with the most cores; of equals the one where this process runs, so that two engines that the system
    started on different nodes stay there.
    """
    by_node: dict[int, list[Core]] = {}
    for core in topology.cores:
        by_node.setdefault(core.node, []).append(core)
    node = min(by_node, key=lambda n: (-len(by_node[n]), n != topology.here, n))
    cores = by_node[node]
    num_threads = within(len(cores), topology.quota)
    reason = f"one for each of {len(cores)} physical core{'s' if len(cores) > 1 else ''}"
    if (logical := sum(len(core.cpus) for core in cores)) > len(cores):
        reason += f", which have {logical} hyper-threads"
    if len(by_node) > 1:
        reason += f", of memory node {node} (one of {len(by_node)})"
    if len(topology.cpus) < topology.num_online:
        reason += f", within the {len(topology.cpus)} of {topology.num_online} processors that this process may use"
    if num_threads < len(cores):
        reason += f", cut to the cgroup's quota of {topology.quota:g}"
    return Threads(num_threads=num_threads, cpus=tuple(core.cpus[0] for core in cores[:num_threads]), reason=reason)


def within(count: int, quota: float | None) -> int:
    """That many, cut to a quota, which is rounded up, and at least 1."""
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def parse_cpu_list(text: str) -> set[int]:
    """Processors of a list as `0-3,8,10-11`; none for words that are no such list."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            return set()
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def read_quota(root: Path = Path("/")) -> float | None:
    """The least of the quotas of this process's cgroup and those around it, of version 2 or 1; None for no limit."""
    paths = {"": "/", "cpu": "/"}  # a container sees its own cgroup as the root, whatever its path says
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            paths[""] = path
        elif "cpu" in controllers.split(","):
            paths["cpu"] = path
    mount = root / "sys/fs/cgroup"
    found = [parse_quota(_read(place / "cpu.max")) for place in _upward(mount, paths[""])]
    for controller in ("cpu", "cpu,cpuacct"):
        for place in _upward(mount / controller, paths["cpu"]):
            words = (_read(place / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
            found.append(parse_quota(" ".join(words)))
    return min((quota for quota in found if quota is not None), default=None)


def parse_quota(text: str) -> float | None:
    """Processors of `QUOTA PERIOD` (`150000 100000` is 1.5), None for `max`, -1 or words unknown."""
    quota, _, period = text.strip().partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)


def _upward(mount: Path, path: str) -> Iterable[Path]:
    """A cgroup's directory and those around it, up to the mount."""
    parts = [part for part in path.split("/") if part not in ("", "..", ".")]
    return [mount.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]


def _siblings(topology: Path) -> set[int]:
    """All hyper-threads of a processor's core; `core_cpus_list` is the newer name."""
    return parse_cpu_list(_read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list"))


def _nodes(system: Path) -> list[tuple[int, set[int]]]:
    return [
        (int(path.name[4:]), parse_cpu_list(_read(path / "cpulist")))
        for path in system.glob("node[0-9]*")
        if path.name[4:].isdecimal()
    ]


def _affinity() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _running_on(stat: str) -> int | None:
    """The processor in the text of /proc/self/stat."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[36]) if len(fields) > 36 and fields[36].isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
