"""Times of products and all else: how they are added up, kept on disk, and refused when they are another machine's."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from halve.core.errors import ConfigError
from halve.core.workload import Workload
from halve.engine import simulate
from halve.kernels import native, native_library
from halve.models import LayerSpec, ModelConfig
from halve.models.config import Experts, Rope
from halve.models.names import groups
from halve.search import device_table as module
from halve.search.device_table import DeviceTable, PlannedTimes, StepShape, device_table
from halve.search.line import Line
from halve.search.reads import Reads

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
    assert [one.near(x) for x in (0, 4, 7)] == [1.0, 2.5, 2.0]
    assert Line(counts=(1, 2, 4), seconds=(2.0, 9.0, 3.0)).rising() == Line(counts=(1, 2, 4), seconds=(2.0, 3.0, 3.0))
    assert Line(counts=(1,), seconds=(1.0,)).followed_by(Line(counts=(2,), seconds=(3.0,))).at(1.5) == 2.0


@pytest.mark.parametrize(
    ("counts", "seconds"), [((), ()), ((1, 1), (1.0, 1.0)), ((2, 1), (1.0, 1.0)), ((1,), (1.0, 2.0)), ((1,), (-1.0,))]
)
def test_a_line_that_is_none_is_refused(counts, seconds):
    with pytest.raises(ConfigError, match="device table"):
        Line(counts=counts, seconds=seconds)


KINDS = ("qkv", "o", "gate_up", "down")
ONE_ANSWER = StepShape(1, 4, 0, 0.0, 1)


def table(**changed):
    products = {kind: {"a": line(1.0), "b": line(10.0)} for kind in KINDS}
    return DeviceTable(
        **{
            "device": {},
            "num_layers": 2,
            "products": {"int8": {**products, "lm_head": {"a": line(100.0, 101.0)}}},
            "rest": {"bf16": line(1000.0), "int8": line(2000.0)},
            "pair": {"bf16": line(0.5), "int8": line(0.25)},
            "engine": line(1e4, 3e4),
            **changed,
        }
    )


def times_of(formats, caches=("bf16", "bf16"), activations="int8", **changed):
    return PlannedTimes(table(**changed), formats, activations, caches)


ALL_A = {**{f"layers.{i}.{kind}": "a" for i in range(2) for kind in KINDS}, "lm_head": "a"}


def test_a_step_is_the_sum_of_its_groups_the_head_the_rest_its_pairs_and_the_engine():
    times = times_of({**ALL_A, "layers.1.o": "b"})
    assert times.model_s(ONE_ANSWER) == 7 + 10 + 100 + 1000 + 2
    assert times.of(ONE_ANSWER) == times.model_s(ONE_ANSWER) + 1e4
    assert times.model_s(StepShape(1, 0, 0, 0.0, 2)) == 7 + 10 + 101 + 1000
    assert times.model_s(StepShape(1, 0, 0, 0.0, 0)) == 7 + 10 + 1000


def test_fewer_experts_a_token_take_as_long_as_fewer_tokens():
    products = {kind: {"a": line(1.0, 2.0, 3.0, 4.0)} for kind in ("qkv", "o", "gate_up", "down", "shared_down")}
    measured = table(products={"int8": {**products, "lm_head": {"a": line(0.0)}}}, top_k=4)
    formats = {f"layers.0.{kind}": "a" for kind in products} | {"lm_head": "a"}
    of = {None: {}, 2: {f"layers.0.{kind}": Reads.even(8, 2) for kind in ("gate_up", "down")}}
    whole, half = (PlannedTimes(measured, formats, "int8", ("bf16",), of[top_k]) for top_k in (None, 2))
    shape = StepShape(4, 0.0, 0, 0.0, 1)
    assert whole.products_s(shape) == 5 * 4.0
    assert half.products_s(shape) == 3 * 4.0 + 2 * 2.0
    assert half.products_s(ONE_ANSWER) == 3 * 1.0 + 2 * 0.5


def test_some_experts_take_their_share_of_what_all_take():
    products = {"gate_up": {"a": line(4.0, 8.0), "b": line(2.0, 4.0)}, "lm_head": {"a": line(0.0)}}
    measured = table(products={"int8": products}, top_k=2)
    some, rest = Reads(own=(1.0, 0.5), layer=(1.0, 0.5, 0.5)), Reads(own=(0.5,), layer=(1.0, 0.5, 0.5))
    formats = {"layers.0.gate_up[0,2]": "a", "layers.0.gate_up[1]": "b", "lm_head": "a"}
    times = PlannedTimes(
        measured, formats, "int8", ("bf16",), {"layers.0.gate_up[0,2]": some, "layers.0.gate_up[1]": rest}
    )
    assert times.products_s(ONE_ANSWER) == pytest.approx(4.0 * 0.75 + 2.0 * 0.25)
    assert times.products_s(StepShape(2, 0, 0, 0.0, 0)) == pytest.approx(8.0 * 1.75 / 2.5 + 4.0 * 0.75 / 2.5)


def test_layers_whose_caches_differ_take_each_their_share():
    assert times_of({}, ("bf16", "int8")).others_s(ONE_ANSWER) == (1000 + 2 + 2000 + 1) / 2


def test_answers_beside_a_prompt_pay_for_their_keys_as_answers():
    pair = Line(counts=(1, 32, 64, 128), seconds=(10.0, 10.0, 1.0, 1.0))
    nothing = {"rest": {"bf16": line(0.0)}, "pair": {"bf16": pair}, "engine": line(0.0)}
    times = times_of({"lm_head": "a"}, products={"int8": {"lm_head": {"a": line(0.0)}}}, **nothing)
    answer = SimpleNamespace(num_tokens=1, start=99, draft=())
    prompt = SimpleNamespace(num_tokens=100, start=0, draft=())

    def seconds(*chunks):
        return times.of_step(SimpleNamespace(chunks=chunks, num_sampled=1))

    assert seconds(answer) == 100 * 10
    assert seconds(prompt) == 5050
    assert seconds(answer, prompt, answer) == 2 * seconds(answer) + seconds(prompt)


def test_what_was_not_timed_is_named():
    with pytest.raises(ConfigError, match="no times of lm_head in int2-g32 with int8 activations"):
        times_of({"lm_head": "int2-g32"}).of(ONE_ANSWER)
    with pytest.raises(ConfigError, match="no times of lm_head in a with bf16 activations"):
        times_of({"lm_head": "a"}, activations="bf16").of(ONE_ANSWER)
    with pytest.raises(ConfigError, match="no times of a cache in int4; measure it again"):
        times_of({}, ("bf16", "int4"))


@runs_native
def test_a_simulator_runs_on_planned_times():
    times = times_of(ALL_A)
    workload = Workload.poisson(requests_per_s=1.0, num_requests=5, prompt_tokens=8, output_tokens=4)
    assert simulate(workload, times.of_step, num_blocks=64).output_tokens == 20


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    if native_library.available() is not None:
        pytest.skip("the C++ kernels are not built")
    folder, seen = tmp_path_factory.mktemp("tables"), []
    found = device_table(
        CONFIG, {"int8": FORMATS}, caches=["bf16"], folder=folder, progress=lambda *at: seen.append(at)
    )
    return folder, found, seen


def test_every_format_that_fits_has_its_times(made):
    _, found, seen = made
    products = found.products["int8"]
    for kind in ("qkv", "o", "gate_up", "lm_head"):
        assert products[kind].keys() == set(FORMATS)
    assert products["down"].keys() == {"int8", "int4-g32", "bf16"}  # 96 inputs are not two groups of 64
    assert seen[-1] == (20, 20)
    assert found.device["model"] == native.NativeOps().device.model
    assert all(s > 0 for lines in products.values() for one in lines.values() for s in one.seconds)
    rest, pair = found.rest["bf16"], found.pair["bf16"]
    assert rest.counts[0] == 1
    assert max(rest.counts) < CONFIG.context
    assert np.isfinite(rest.at(500) + pair.near(500))
    assert 0 < found.engine.at(1) < found.engine.at(32) < 0.1


def again(made, monkeypatch=None, **changed):
    if monkeypatch:
        monkeypatch.setattr(module, "Stopwatch", None)  # calling it fails
        monkeypatch.setattr(module, "engine_line", None)
    return device_table(CONFIG, **{"formats": {"int8": FORMATS}, "caches": ["bf16"], "folder": made[0], **changed})


@runs_native
@pytest.mark.parametrize("shared", [0, 64])
def test_steps_of_a_sparse_model_are_timed_and_foretold(tmp_path, shared):
    experts = Experts(num_experts=8, top_k=2, intermediate_size=96, renormalize=True, shared_size=shared)
    layer = LayerSpec(rope=Rope(theta=1e4), experts=experts, qk_norm="head")
    config = replace(CONFIG, layers=(layer, layer))
    found = device_table(config, {"int8": ("int4-g32", "int8")}, caches=("bf16",), folder=tmp_path)
    kinds = {"qkv", "o", "gate_up", "down", "lm_head"} | ({"shared_gate_up", "shared_down"} if shared else set())
    assert found.products["int8"].keys() == kinds
    assert found.top_k == 2
    times = PlannedTimes(found, {g.name: "int4-g32" for g in groups(config)}, "int8", ("bf16", "bf16"))
    assert 0 < times.of(ONE_ANSWER) < times.of(StepShape(32, 32 * 100.0, 0, 0.0, 32))
    assert "8 2 96" in found.device["shapes"]


def test_what_is_on_disk_is_not_measured_again(made, monkeypatch):
    assert again(made, monkeypatch=monkeypatch) == made[1]


def test_formats_activations_and_caches_that_are_new_are_added(made):
    more = again(made, formats={"int8": (*FORMATS, "int3-g32"), "bf16": ["int8"]}, caches=["int4", "bf16"])
    assert "int3-g32" in more.products["int8"]["qkv"]
    assert more.products["int8"]["qkv"]["int8"] == made[1].products["int8"]["qkv"]["int8"]
    assert more.products["bf16"]["qkv"].keys() == {"int8"}
    assert more.rest.keys() == {"bf16", "int4"}
    assert more.rest["bf16"] == made[1].rest["bf16"]


def test_a_run_that_was_killed_goes_on_behind_what_it_measured(tmp_path, monkeypatch):
    if native_library.available() is not None:
        pytest.skip("the C++ kernels are not built")

    def killed(done, _):
        if done == 3:
            raise KeyboardInterrupt

    given = {"formats": {"int8": ["int8"]}, "caches": ["bf16"], "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        device_table(CONFIG, **given, progress=killed)
    (path,) = tmp_path.glob("*.json")
    before, seen = json.loads(path.read_text()), []
    found = device_table(CONFIG, **given, progress=lambda *at: seen.append(at))
    assert seen[-1] == (3, 3)  # of six
    assert found.rest["bf16"].seconds == tuple(before["rest"]["bf16"]["seconds"])


@pytest.mark.parametrize("fault", ["another machine", "broken", "another version"])
def test_a_table_that_is_not_this_machines_is_measured_again_and_that_is_said(made, fault, caplog):
    (path,) = made[0].glob("*.json")
    before = path.read_text()
    raw = json.loads(before)
    if fault == "another machine":
        raw["device"]["model"] = "Elsewhere"
    elif fault == "another version":
        raw["rest"]["bf16"]["seconds"] = "none"
    path.write_text("{" if fault == "broken" else json.dumps(raw))
    with caplog.at_level(logging.WARNING):
        found = again(made, formats={"int8": ["int8"]})
    assert "measured again" in caplog.text
    assert found.device == made[1].device
    path.write_text(before)


@runs_native
def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device_table(CONFIG, {"int8": ["int8"]}, caches=["bf16"], folder=None)
    assert not list(tmp_path.iterdir())
