"""Times of products and all else: how they are added up, kept on disk, and refused when they are another machine's."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from halve.core.errors import ConfigError
from halve.core.workload import Workload
from halve.engine import simulate
from halve.kernels import native, native_library
from halve.models import LayerSpec, ModelConfig
from halve.models.config import Rope
from halve.search import device_table as module
from halve.search.device_table import DeviceTable, Line, PlannedTimes, device_key, device_table

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=200,
    context=128,
    rms_norm_eps=1e-5,
    tied=True,
    attention_bias=False,
    mlp_bias=False,
    layers=(LayerSpec(rope=Rope(theta=1e4)),) * 2,
)
FORMATS = ("int8", "int4-g32", "int4-g64", "bf16")

runs_native = pytest.mark.skipif(native_library.available() is not None, reason="the C++ kernels are not built")


def line(*seconds):
    return Line(counts=tuple(range(1, len(seconds) + 1)), seconds=seconds)


def test_a_line_is_straight_between_its_points_and_beyond_the_last_and_never_falls():
    one = Line(counts=(1, 3, 5), seconds=(1.0, 3.0, 2.0))
    assert [one.at(x) for x in (0, 1, 2, 3, 4, 7)] == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert Line(counts=(1, 2), seconds=(1.0, 2.0)).at(4) == 4.0
    assert Line(counts=(2,), seconds=(5.0,)).at(100) == 5.0


@pytest.mark.parametrize(
    ("counts", "seconds"), [((), ()), ((1, 1), (1.0, 1.0)), ((2, 1), (1.0, 1.0)), ((1,), (1.0, 2.0)), ((1,), (-1.0,))]
)
def test_a_line_that_is_none_is_refused(counts, seconds):
    with pytest.raises(ConfigError, match="device table"):
        Line(counts=counts, seconds=seconds)


def table(**products):
    kinds = {kind: {"a": line(1.0), "b": line(10.0)} for kind in ("qkv", "o", "gate_up", "down")}
    return DeviceTable(
        device={},
        num_layers=2,
        products={**kinds, "lm_head": {"a": line(100.0, 101.0)}, **products},
        rest=line(1000.0),
        pair=line(0.5),
    )


def test_a_step_is_the_sum_of_its_groups_the_head_the_rest_and_its_pairs():
    formats = {f"layers.{i}.{kind}": "a" for i in range(2) for kind in ("qkv", "o", "gate_up", "down")}
    times = PlannedTimes(table(), {**formats, "layers.1.o": "b", "lm_head": "a"})
    assert times.of(1, 1, 4) == 7 + 10 + 100 + 1000 + 2
    assert times.of(1, 2, 0) == 7 + 10 + 101 + 1000
    assert times.of(1, 0, 0) == 7 + 10 + 1000


def test_answers_beside_a_prompt_pay_for_their_keys_as_answers():
    pair = Line(counts=(1, 32, 64, 128), seconds=(10.0, 10.0, 1.0, 1.0))
    times = PlannedTimes(
        DeviceTable(device={}, num_layers=1, products={"lm_head": {"a": line(0.0)}}, rest=line(0.0), pair=pair),
        {"lm_head": "a"},
    )
    answer, prompt = (
        SimpleNamespace(num_tokens=1, start=99, draft=()),
        SimpleNamespace(num_tokens=100, start=0, draft=()),
    )

    def seconds(*chunks):
        return times.of_step(SimpleNamespace(chunks=chunks, num_sampled=1))

    assert seconds(answer) == 100 * 10
    assert seconds(prompt) == 5050
    assert seconds(answer, prompt, answer) == 2 * seconds(answer) + seconds(prompt)


def test_a_format_without_times_is_named():
    with pytest.raises(ConfigError, match="no times of lm_head in int2-g32"):
        PlannedTimes(table(), {"lm_head": "int2-g32"}).of(1, 1, 0)


@runs_native
def test_a_simulator_runs_on_planned_times():
    formats = {f"layers.{i}.{kind}": "a" for i in range(2) for kind in ("qkv", "o", "gate_up", "down")}
    times = PlannedTimes(table(), {**formats, "lm_head": "a"})
    workload = Workload.poisson(requests_per_s=1.0, num_requests=5, prompt_tokens=8, output_tokens=4)
    assert simulate(workload, times.of_step, num_blocks=64).output_tokens == 20


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    if native_library.available() is not None:
        pytest.skip("the C++ kernels are not built")
    folder, ops = tmp_path_factory.mktemp("tables"), native.NativeOps(activations="int8")
    seen = []
    found = device_table(CONFIG, ops, FORMATS, kv_format="bf16", folder=folder, progress=lambda *at: seen.append(at))
    return folder, ops, found, seen


def test_every_format_that_fits_has_its_times(made):
    _, ops, found, seen = made
    for kind in ("qkv", "o", "gate_up", "lm_head"):
        assert found.products[kind].keys() == set(FORMATS)
    assert found.products["down"].keys() == {"int8", "int4-g32", "bf16"}  # 96 inputs are not two groups of 64
    assert seen[-1] == (19, 19)
    assert found.device["model"] == ops.device.model
    assert all(s > 0 for lines in found.products.values() for one in lines.values() for s in one.seconds)
    assert found.rest.counts[0] == 1
    assert max(found.rest.counts) < CONFIG.context
    assert np.isfinite(found.rest.at(500) + found.pair.at(500))


def again(made, formats=FORMATS, monkeypatch=None):
    folder, ops, *_ = made
    if monkeypatch:
        monkeypatch.setattr(module, "_Bench", None)  # calling it fails
    return device_table(CONFIG, ops, formats, kv_format="bf16", folder=folder)


@runs_native
def test_times_hold_for_the_formats_of_the_layers_caches():
    keys = {
        str(formats): device_key(CONFIG, native.NativeOps(), formats, "1")["kv_cache"]
        for formats in ("int4", ["int4", "int4"], ["int8", "int4"], ["int4", "int8"])
    }
    assert list(keys.values()) == ["int4", "int4", "int8 int4", "int4 int8"]


def test_what_is_on_disk_is_not_measured_again(made, monkeypatch):
    assert again(made, monkeypatch=monkeypatch) == made[2]


def test_formats_that_are_new_are_added(made):
    more = again(made, (*FORMATS, "int3-g32"))
    assert "int3-g32" in more.products["qkv"]
    assert more.products["qkv"]["int8"] == made[2].products["qkv"]["int8"]


@pytest.mark.parametrize("fault", ["another machine", "broken", "another version"])
def test_a_table_that_is_not_this_machines_is_measured_again_and_that_is_said(made, fault, caplog):
    (path,) = made[0].glob("*.json")
    before = path.read_text()
    raw = json.loads(before)
    if fault == "another machine":
        raw["device"]["model"] = "Elsewhere"
    elif fault == "another version":
        raw["rest"]["seconds"] = "none"
    path.write_text("{" if fault == "broken" else json.dumps(raw))
    with caplog.at_level(logging.WARNING):
        found = again(made, ("int8",))
    assert "measured again" in caplog.text
    assert found.device == made[2].device
    path.write_text(before)


def test_without_a_folder_nothing_is_kept(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device_table(CONFIG, made[1], ("int8",), kv_format="bf16", folder=None)
    assert not list(tmp_path.iterdir())
