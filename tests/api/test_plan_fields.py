"""A field of a plan is what the engine runs: kernels, bytes that a step reads, and results change with it."""

import numpy as np
import pytest

import halve
from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan, uniform_plan
from halve.core.errors import PlanError
from halve.core.plan import KVCache, Plan
from halve.engine import EngineConfig
from halve.formats import FORMATS
from halve.kernels import native_library
from halve.kernels.cuda import rows as cuda_rows
from halve.models import load_config
from halve.models.names import num_parameters, vectors
from tests.tools import not_of_time

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ kernels are not built")

PROMPT = list(range(5, 65))
LAYERS, KV_HEADS, DIM, BLOCK = 2, 2, 16, 16  # of the tiny model; tokens a block


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    """Write the tiny model by a plan, once for each."""
    made = {}

    def make(name="int4-g32", **fields):
        key = (name, *sorted(fields.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("plan") / "out"
            made[key].mkdir()
            with open_checkpoint(tiny) as checkpoint:
                config = load_config(checkpoint)
                plan = uniform_plan(config, FORMATS[name], "rtn", portable=False, source_bits=16, **fields)
                apply_plan(checkpoint, config, plan, made[key], energies=None)
        return made[key]

    return make


def products_of(model):
    return {kernel for operation, kernel in model.kernels.items() if operation.startswith("linear")}


def test_activations_choose_the_kernels_of_the_products_and_change_their_results(bundle):
    models = {name: halve.load(bundle(activations=name)) for name in ("fp32", "bf16", "int8")}
    kinds = {name: {kernel.split("_")[2] for kernel in products_of(model)} for name, model in models.items()}
    assert kinds == {"fp32": {"float"}, "bf16": {"float"}, "int8": {"dot"}}
    logits = {name: model.logits(PROMPT) for name, model in models.items()}
    moved = {name: np.abs(logits[name] - logits["fp32"]).mean() for name in ("bf16", "int8")}
    assert 0 < moved["bf16"] < moved["int8"] < 0.2 * logits["fp32"].std()


def test_the_caches_format_is_what_the_engine_keeps_and_reads(bundle):
    models = {name: halve.load(bundle(kv_cache=name)) for name in ("fp32", "bf16", "int8", "int4")}
    # Integers with a scale of 16 bits for a head, which has fewer than 32 dims here.
    per_head = {"fp32": 4 * DIM, "bf16": 2 * DIM, "int8": DIM + 2, "int4": DIM // 2 + 2}
    for name, model in models.items():
        expected = LAYERS * 2 * KV_HEADS * per_head[name]
        assert model.config.kv_cache_bytes_per_token == expected
        held = sum(layer.data.nbytes for layer in model.decoder.new_cache(3, BLOCK))
        # A group of 32 dims lies whole in memory: here half of an int4 block's values is padding.
        assert held == 3 * BLOCK * (expected if name != "int4" else LAYERS * KV_HEADS * (DIM // 2 + 16 + 2 * 2))
    logits = {name: model.logits(PROMPT) for name, model in models.items()}
    moved = {name: np.abs(logits[name] - logits["fp32"]).mean() for name in ("bf16", "int8", "int4")}
    assert 0 < moved["bf16"] < moved["int8"] < 0.5 * moved["int4"] < 0.2 * logits["fp32"].std()


def test_layers_keep_their_caches_in_formats_of_their_own(bundle, monkeypatch):
    path = bundle(kv_cache="int8")
    whole = {name: halve.load(path, plan=Plan(kv_cache=KVCache(format=name))) for name in ("int8", "int4")}
    mixed = halve.load(path, plan=Plan(kv_cache=KVCache.of_layers(["int8", "int4"])))
    per_token = {name: model.config.kv_cache_bytes_per_token for name, model in whole.items()}
    assert mixed.config.kv_cache_bytes_per_token == (per_token["int8"] + per_token["int4"]) // 2
    first, second = mixed.decoder.new_cache(3, BLOCK)
    assert first.data.nbytes == whole["int8"].decoder.new_cache(3, BLOCK)[0].data.nbytes
    assert second.data.nbytes == whole["int4"].decoder.new_cache(3, BLOCK)[1].data.nbytes
    logits = {name: model.logits(PROMPT) for name, model in {**whole, "mixed": mixed}.items()}
    moved = {name: np.abs(logits[name] - logits["int8"]).mean() for name in ("int4", "mixed")}
    assert 0 < moved["mixed"] < moved["int4"]
    monkeypatch.setattr(native_library, "available", lambda: "hidden by a test")
    torch_logits = halve.load(path, plan=mixed.plan).logits(PROMPT)
    assert np.abs(torch_logits - logits["mixed"]).mean() < 0.3 * moved["mixed"]
    with pytest.raises(PlanError, match=r"kv_cache.layers: \[2\] of a model with layers 0 to 1"):
        halve.load(path, plan=Plan(kv_cache=KVCache.of_layers(["int8", "int8", "int4"])))


def test_a_layers_format_that_kernels_lack_is_refused_by_name(bundle, monkeypatch):
    plan = Plan(kv_cache=KVCache.of_layers(["int8", "fp8"]))
    with pytest.raises(PlanError, match=r"kv_cache fp8: our C\+\+ on the CPU computes fp32, bf16, int8, int4"):
        halve.load(bundle(), plan=plan)
    monkeypatch.setattr(cuda_rows, "refusal", lambda device: None)
    plan = Plan(kv_cache=KVCache.of_layers(["bf16", "int4"]))
    with pytest.raises(
        PlanError, match="kv_cache int4: our CUDA kernels compute fp32, bf16, int8, fp8; run on the CPU"
    ):
        halve.load(bundle(), plan=plan, device="cuda")


def test_a_smaller_cache_format_holds_more_tokens_in_the_same_memory(bundle):
    free = {}
    for name in ("fp32", "bf16", "int8", "int4"):
        with_room = EngineConfig(max_num_seqs=512)
        free[name] = (
            halve.load(bundle(kv_cache=name), engine=with_room, cache_bytes=200_000).engine.metrics().blocks_free
        )
    assert free["bf16"] == pytest.approx(2 * free["fp32"], abs=2)
    assert free["int8"] == pytest.approx(4 * DIM / (DIM + 2) * free["fp32"], abs=4)
    assert free["int4"] == pytest.approx(4 * DIM / (DIM / 2 + 2) * free["fp32"], abs=7)


def test_the_format_of_weights_chooses_kernels_and_the_bytes_that_they_read(bundle):
    bits = {}
    for name in ("int8", "int5-g32", "int4-g32", "int2-g32", "fp8"):
        model = halve.load(bundle(name))
        suffix = name.replace("-", "_")
        (kernel,) = products_of(model)
        assert kernel.endswith(f"_{'float' if name == 'fp8' else 'dot'}_{suffix}")
        read = sum(linear.matrix.data.nbytes for p in model.decoder.projections() for linear in p.linears)
        table = model.config.vocab_size * model.config.hidden_size  # looked up, not multiplied
        norms = sum(shape[0] for _, shape in vectors(model.config))
        bits[name] = 8 * read / (num_parameters(model.config) - table - norms)
    assert bits["int2-g32"] < bits["int4-g32"] < bits["int5-g32"] < bits["int8"]
    assert bits["int8"] < 2.5 * bits["int4-g32"]


def test_requests_in_one_batch_share_the_steps_that_read_the_weights(bundle):
    prompts = [[5 + i, 6, 7, 8] for i in range(4)]
    answers, steps = {}, {}
    for max_num_seqs in (1, 4):
        config = EngineConfig(max_num_seqs=max_num_seqs, deterministic=True)
        model = halve.load(bundle(), engine=config)
        answers[max_num_seqs] = [a.token_ids for a in model.generate_all(prompts, max_tokens=12, ignore_eos=True)]
        steps[max_num_seqs] = model.engine.metrics().num_steps
    assert answers[1] == answers[4]
    assert steps[1] >= 4 * 12
    assert steps[4] < steps[1] / 2


def test_the_command_of_the_certificate_says_what_was_rounded_and_the_plan_holds_it(tiny, text, tmp_path):
    out = tmp_path / "out"
    options = {"format": "int8", "method": "rtn", "activations": "bf16", "kv_cache": "int8"}
    made = halve.optimize(tiny, out, calibration=text, **options)
    assert "--activations bf16 --kv-cache int8" in made.certificate.inputs.command
    plan = halve.load(out).plan
    assert (plan.activations.format, plan.kv_cache.format) == ("bf16", "int8")
    assert halve.inspect(out).kv_cache_bytes_per_token == LAYERS * 2 * KV_HEADS * (DIM + 2)
    assert not_of_time(halve.verify(out, against=tiny).differences) == []
    assert "rounded to 8-bit integers, one 16-bit scale for each token and head" in made.report.read_text()


def test_a_bundle_with_an_int4_cache_is_certified_by_the_engine_and_verifies(tiny, text, tmp_path):
    out = tmp_path / "out"
    options = {"format": "int8", "method": "rtn", "activations": "fp32", "kv_cache": "int4"}
    made = halve.optimize(tiny, out, calibration=text, **options)
    assert "--kv-cache int4" in made.certificate.inputs.command
    assert made.certificate.served.kv_cache == "int4"
    assert halve.inspect(out).kv_cache_bytes_per_token == LAYERS * 2 * KV_HEADS * (DIM // 2 + 2)
    assert not_of_time(halve.verify(out, against=tiny).differences) == []
    assert "rounded to 4-bit integers, one 16-bit scale for each 32 numbers of a head" in made.report.read_text()


def test_what_is_certified_is_rounded_as_the_plan_says(tiny, text, tmp_path):
    kl = {}
    for activations, kv_cache in [("fp32", "fp32"), ("int8", "fp32"), ("fp32", "int8"), ("fp32", "int4")]:
        options = {"format": "int8", "method": "rtn", "activations": activations, "kv_cache": kv_cache}
        made = halve.optimize(tiny, tmp_path / f"{activations}-{kv_cache}", calibration=text, **options)
        kl[activations, kv_cache] = made.certificate.quality.kl_mean.value
    assert kl["int8", "fp32"] > 1.05 * kl["fp32", "fp32"]
    assert kl["fp32", "int8"] > 1.01 * kl["fp32", "fp32"]
    assert kl["fp32", "int4"] > 1.5 * kl["fp32", "int8"]


def test_a_portable_bundle_with_rounded_activations_is_refused_before_any_work(tiny, text, tmp_path):
    for options in ({"activations": "int8"}, {"kv_cache": "int8"}):
        with pytest.raises(PlanError, match="a portable plan computes in float32"):
            halve.optimize(tiny, tmp_path / "out", format="int8", portable=True, calibration=text, **options)
    with pytest.raises(PlanError, match="activations: 'int4' is not one of auto, fp32, bf16, int8, fp8"):
        halve.optimize(tiny, tmp_path / "out", format="int8", activations="int4", calibration=text)
    assert list(tmp_path.iterdir()) == []


def test_fp8_activations_and_cache_are_refused_on_the_cpu_before_any_work_and_run_on_torch(
    bundle, tiny, text, tmp_path, monkeypatch
):
    for options, known in (
        ({"activations": "fp8"}, "fp32, bf16, int8"),
        ({"kv_cache": "fp8"}, "fp32, bf16, int8, int4"),
    ):
        (what,) = options
        refused = rf"{what} fp8: our C\+\+ on the CPU computes {known}; use device cuda"
        with pytest.raises(PlanError, match=refused):
            halve.optimize(tiny, tmp_path / "out", format="fp8", calibration=text, **options)
        with pytest.raises(PlanError, match=refused):
            halve.load(bundle("fp8", **options))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(native_library, "available", lambda: "hidden by a test")
    exact = halve.load(bundle("fp8", activations="fp32", kv_cache="fp32")).logits(PROMPT)
    for options in ({"activations": "fp8"}, {"kv_cache": "fp8"}):
        given = {"activations": "fp32", "kv_cache": "fp32", **options}
        model = halve.load(bundle("fp8", **given))
        moved = np.abs(model.logits(PROMPT) - exact).mean()
        assert 0 < moved < 0.2 * exact.std()
        assert model.generate(PROMPT, max_tokens=4).completion_tokens == 4
