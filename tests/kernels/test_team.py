"""The team of threads: how strong, and where it runs."""

import os
import subprocess
import sys

import pytest

from halve.core.errors import ConfigError
from halve.hardware.topology import Core, Topology
from halve.kernels import native_library, team

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")


@pytest.mark.parametrize("num_threads", [0, -1, 1025])
def test_a_number_of_threads_out_of_range_is_refused(num_threads):
    with pytest.raises(ConfigError, match=f"num_threads: {num_threads} is not between 1 and 1024"):
        team.grow(num_threads)


def test_a_core_that_the_process_may_not_use_is_refused():
    with pytest.raises(ConfigError, match=r"cores: \[4095\] can't be used by this process; it may use \["):
        team.pin([4095])


def topology(*, nodes):
    cores = tuple(Core(cpus=(cpu,), node=cpu % nodes) for cpu in range(4))
    return Topology(cores=cores, quota=None, here=None, num_online=4)


def test_on_one_memory_node_workers_run_where_the_system_likes(monkeypatch):
    monkeypatch.setattr(team, "read_topology", lambda: topology(nodes=1))
    assert team.home() == ()


def test_on_several_memory_nodes_workers_keep_to_one_unless_threads_were_asked_for(monkeypatch):
    monkeypatch.setattr(team, "read_topology", lambda: topology(nodes=2))
    assert team.home() == (2,)  # of the node's cores 0 and 2; the caller is a thread of the team
    assert team.home(3) == ()


PINNED = """
import os
from pathlib import Path
from halve.kernels import team
core = sorted(os.sched_getaffinity(0))[0]
team.grow(2)
team.pin([core])
team.grow(3)  # a later worker too
allowed = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
assert sum(cores == {core} for cores in allowed) >= 2 or len(os.sched_getaffinity(0)) == 1, allowed
team.pin([])
everywhere = os.sched_getaffinity(0)
assert all(os.sched_getaffinity(int(task.name)) == everywhere for task in Path("/proc/self/task").iterdir())
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say where threads may run")
def test_workers_are_kept_on_cores_and_let_go_again():
    done = subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
