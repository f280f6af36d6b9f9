"""The verbs that only look."""

import json
import os

import halve
from halve.api.describe import processor_facts
from halve.core.certificate import Measured
from halve.core.record import to_dict
from halve.formats import FORMATS
from halve.hardware.topology import Core, Topology
from halve.kernels.ceilings import Ceilings

CEILINGS = Ceilings(
    read_gb_s={
        "1": Measured(value=20.0, low=19.0, high=21.0, n=9),
        "2": Measured(value=40.0, low=39.0, high=41.0, n=9),
    },
    int8_gmac_s={n: Measured(value=200.0, low=190.0, high=210.0, n=9) for n in ("1", "2")},
    int4_gmac_s=None,
    bf16_gmac_s=None,
    fp32_gmac_s=None,
    instructions={"int8": "vpdpbusd zmm"},
    refused={"bf16": "vdpbf16ps zmm: needs avx512_bf16"},
    arena_bytes=1 << 30,
)


def tensor_bytes(path):
    raw = (path / "model.safetensors").read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


def test_inspect_names_what_outsiders_rely_on(tiny):
    facts = to_dict(halve.inspect(tiny))
    assert facts.keys() >= {"architecture", "parameters", "active_parameters", "bytes", "groups"}
    assert all(group.keys() == {"pattern", "format", "parameters", "bytes"} for group in facts["groups"])
    json.dumps(facts, allow_nan=False)


def test_bytes_and_parameters_of_the_groups_add_up_to_the_file(tiny, passed, measured, portable):
    for path in (tiny, passed.path, measured.path, portable.path):
        facts = halve.inspect(path)
        assert sum(group.bytes for group in facts.groups) == tensor_bytes(path)
        assert sum(group.parameters for group in facts.groups) == facts.parameters
        assert facts.bytes == (path / "model.safetensors").stat().st_size


def test_inspect_of_a_model_says_its_licence_and_cache(tiny):
    facts = halve.inspect(tiny)
    assert (facts.architecture, facts.licence, facts.bundle, facts.verdict) == (
        "LlamaForCausalLM",
        "apache-2.0",
        False,
        None,
    )
    assert facts.kv_cache_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, k and v, heads, head_dim, float32


def test_inspect_of_a_bundle_says_formats_and_verdict(passed):
    facts = halve.inspect(passed.path)
    assert (facts.bundle, facts.verdict) == (True, "pass")
    assert {g.format for g in facts.groups if g.pattern.endswith("_proj")} == {"int8"}
    assert facts.kv_cache_bytes_per_token == 2 * 2 * 2 * 16 * 2  # bf16


def test_doctor_names_what_outsiders_rely_on():
    facts = to_dict(halve.doctor())
    assert facts.keys() >= {"device", "features", "kernels", "ceilings"}
    assert {row["format"] for row in facts["kernels"]} == set(FORMATS)
    for row in facts["kernels"]:
        assert row.keys() == {"op", "format", "kernel", "refused"}
        assert all(refused.keys() == {"kernel", "reason"} for refused in row["refused"])
    json.dumps(facts, allow_nan=False)


def machine(*cores):
    """Cores as their node and logical processors."""
    made = tuple(Core(cpus=cpus, node=node) for node, cpus in cores)
    return Topology(cores=made, quota=None, here=None, num_online=sum(len(core.cpus) for core in made))


def test_doctor_says_how_many_threads_there_are_and_why():
    facts = to_dict(halve.doctor())["processors"]
    assert facts["default_threads"] <= facts["num_cores"] <= facts["num_cpus"] <= facts["num_online"]
    assert facts["reason"].startswith("one for each of ")
    assert sorted(cpu for cpus in facts["nodes"].values() for cpu in cpus) == sorted(os.sched_getaffinity(0))


def test_two_engines_on_one_node_are_told_to_share_it_by_whole_cores():
    facts = processor_facts(machine(*((0, (cpu, cpu + 4)) for cpu in range(4))))
    assert (facts.num_cpus, facts.num_cores, facts.default_threads) == (8, 4, 4)
    assert "taskset -c 0,1,4,5 halve ...; taskset -c 2,3,6,7 halve ..." in facts.advice


def test_two_engines_on_two_nodes_are_told_to_take_one_each():
    facts = processor_facts(machine((0, (0,)), (0, (1,)), (1, (2,)), (1, (3,))))
    assert facts.nodes == {"0": (0, 1), "1": (2, 3)}
    assert "numactl --cpunodebind=0 --membind=0 halve ...; numactl --cpunodebind=1" in facts.advice


def test_a_single_core_is_not_shared():
    assert processor_facts(machine((0, (0, 1)))).advice is None


def test_doctor_says_why_the_native_kernels_are_not_there(monkeypatch):
    monkeypatch.setattr("halve.kernels.native_library.available", lambda: "not built")
    facts = halve.doctor()
    assert facts.native == "not built"
    assert {row["kernel"] for row in facts.kernels} == {"torch_reference"}
    assert facts.kernels[0]["refused"] == [{"kernel": "native", "reason": "not built"}]


def test_doctor_measures_only_when_asked(monkeypatch):
    asked = []

    def measure(*, progress):
        asked.append(progress)
        progress(1, 1)
        return CEILINGS

    monkeypatch.setattr("halve.kernels.ceilings.measure", measure)
    assert halve.doctor().ceilings is None
    assert not asked
    assert halve.doctor(measure=True).ceilings == CEILINGS
