"""Cores, hyper-threads, memory nodes and quotas of machines that are not here, as trees of files."""

import pytest

from halve.hardware.topology import default_threads, parse_cpu_list, parse_quota, read_quota, read_topology


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture
def machine(tmp_path):
    """Write a machine of `cores` lists of hyper-threads, at `nodes` node -> cpu list; returns its root."""

    def make(cores, nodes=(), running_on=None, name="core_cpus_list"):
        cpus = sorted(cpu for core in cores for cpu in core)
        for core in cores:
            for cpu in core:
                siblings = ",".join(map(str, sorted(core)))
                write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/{name}", siblings)
        write(tmp_path / "sys/devices/system/cpu/online", f"0-{cpus[-1]}")
        for node, cpu_list in dict(nodes).items():
            write(tmp_path / f"sys/devices/system/node/node{node}/cpulist", cpu_list)
        write(tmp_path / "sys/devices/system/node/possible", "0-7")
        if running_on is not None:
            write(tmp_path / "proc/self/stat", "7 (a (b) c) R " + "0 " * 35 + f"{running_on} 0")
        return tmp_path

    return make


HYPER_THREADED = [(cpu, cpu + 4) for cpu in range(4)]


def test_hyper_threads_of_a_core_count_once(machine):
    topology = read_topology(machine(HYPER_THREADED), affinity=range(8))
    assert [core.cpus for core in topology.cores] == HYPER_THREADED
    threads = default_threads(topology)
    assert (threads.num_threads, threads.cpus) == (4, (0, 1, 2, 3))
    assert threads.reason == "one for each of 4 physical cores, which have 8 hyper-threads"


def test_the_older_name_of_the_siblings_is_read_too(machine):
    assert len(read_topology(machine(HYPER_THREADED, name="thread_siblings_list"), affinity=range(8)).cores) == 4


def test_processors_outside_the_affinity_do_not_count(machine):
    topology = read_topology(machine(HYPER_THREADED), affinity={1, 5, 6})
    assert [core.cpus for core in topology.cores] == [(1, 5), (6,)]
    assert default_threads(topology).reason == (
        "one for each of 2 physical cores, which have 3 hyper-threads, "
        "within the 3 of 8 processors that this process may use"
    )


def test_a_machine_that_says_nothing_has_a_core_for_each_processor(tmp_path):
    topology = read_topology(tmp_path, affinity={0, 1, 2})
    assert [core.cpus for core in topology.cores] == [(0,), (1,), (2,)]
    assert (topology.nodes, topology.quota, topology.here, topology.num_online) == ((0,), None, None, 3)


TWO_NODES = {0: "0-1,4-5", 1: "2-3,6-7"}


def test_threads_keep_to_one_memory_node(machine):
    threads = default_threads(read_topology(machine(HYPER_THREADED, TWO_NODES), affinity=range(8)))
    assert (threads.num_threads, threads.cpus) == (2, (0, 1))
    assert "of memory node 0 (one of 2)" in threads.reason


def test_of_equal_nodes_the_one_where_the_process_runs_is_taken(machine):
    topology = read_topology(machine(HYPER_THREADED, TWO_NODES, running_on=7), affinity=range(8))
    assert topology.here == 1
    assert default_threads(topology).cpus == (2, 3)


def test_a_larger_node_is_taken_wherever_the_process_runs(machine):
    root = machine([(0,), (1,), (2,)], {0: "0", 1: "1-2"}, running_on=0)
    assert default_threads(read_topology(root, affinity=range(3))).cpus == (1, 2)


def test_within_the_affinity_only_one_node_may_be_left(machine):
    topology = read_topology(machine(HYPER_THREADED, TWO_NODES), affinity={2, 3})
    assert topology.nodes == (1,)
    assert "memory node" not in default_threads(topology).reason


@pytest.mark.parametrize(("quota", "threads"), [("max 100000", 4), ("150000 100000", 2), ("1000 100000", 1)])
def test_a_quota_cuts_the_threads_and_is_rounded_up(machine, quota, threads):
    root = machine(HYPER_THREADED)
    write(root / "sys/fs/cgroup/cpu.max", quota)
    topology = read_topology(root, affinity=range(8))
    assert (default_threads(topology).num_threads, topology.num_cores) == (threads, threads)
    assert ("quota" in default_threads(topology).reason) == (threads < 4)


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("max 100000\n", None),
        ("100000 100000\n", 1.0),
        ("150000 100000\n", 1.5),
        ("50000 25000", 2.0),
        ("", None),
        ("100000", None),
        ("100000 0", None),
        ("-1 100000", None),
        ("0 100000", None),
    ],
)
def test_a_quota_is_processors_worth_of_time(text, quota):
    assert parse_quota(text) == quota


def test_the_least_quota_on_the_way_up_holds(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/user.slice/job")
    write(tmp_path / "sys/fs/cgroup/user.slice/job/cpu.max", "max 100000")
    write(tmp_path / "sys/fs/cgroup/user.slice/cpu.max", "250000 100000")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "400000 100000")
    assert read_quota(tmp_path) == 2.5


def test_quotas_of_the_older_cgroups_are_read(tmp_path):
    write(tmp_path / "proc/self/cgroup", "4:memory:/x\n1:cpu,cpuacct:/job\n0::/")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "300000")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert read_quota(tmp_path) == 3.0


def test_a_container_that_sees_its_cgroup_as_the_root_is_read_there(tmp_path):
    write(tmp_path / "proc/self/cgroup", "0::/../../docker/4711")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "200000 100000")
    assert read_quota(tmp_path) == 2.0


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,5\n", {0, 1, 2, 5}), ("7", {7}), ("", set()), ("0-x", set()), ("a,1", set())]
)
def test_lists_of_processors_are_read_and_other_words_are_none(text, cpus):
    assert parse_cpu_list(text) == cpus


def test_this_machine_has_a_thread_for_this_process():
    threads = default_threads(read_topology())
    assert 1 <= threads.num_threads == len(threads.cpus)
