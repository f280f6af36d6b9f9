"""A plan carried out: the files that it writes, what they hold, and that a failure leaves none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from halve.checkpoint import open_checkpoint
from halve.compress import Energies, apply_plan, calibrate, uniform_plan
from halve.compress.rounding import relative_error, round_weight
from halve.core.errors import CheckpointError, FormatError, OutputError, PlanError
from halve.core.plan import KVCache, Plan, WeightRule, Weights
from halve.formats import FORMATS
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, load_config, load_decoder, stored_formats
from halve.models.names import groups, modules, vectors

CARRIED = {
    "tokenizer.json": b'{"model": {}}\r\n',
    "tokenizer_config.json": b"\xef\xbb\xbf{}",
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": "{{ 'ü' }}".encode(),
    "LICENSE": b"free\x00as in bytes",
    "README.md": b"# a model\n",
}
LEFT_BEHIND = {"pytorch_model.bin": b"pickle", "modeling_custom.py": b"import os", "optimizer.pt": b"x"}


def save_model(directory, dtype=torch.float32, shard_size="1GB", **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        max_position_embeddings=64,
        initializer_range=0.2,
        **changes,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(directory, max_shard_size=shard_size)
    for name, content in {**CARRIED, **LEFT_BEHIND}.items():
        (directory / name).write_bytes(content)
    return directory


SOURCES = {
    "untied_fp32": {},
    "tied_bf16": {"dtype": torch.bfloat16, "tie_word_embeddings": True},
    "sharded_fp16": {"dtype": torch.float16, "shard_size": "30KB"},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module", params=SOURCES, name="source")
def _source(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp(request.param), **SOURCES[request.param])


@pytest.fixture(scope="module", name="untied")
def _untied(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("untied"))


def energies_of(config):
    rng = np.random.default_rng(0)
    by_group = {g.name: rng.uniform(0.1, 5, g.members[0].shape[1]) for g in groups(config)}
    return Energies(by_group=by_group, num_tokens=100)


def uniform(config, name, method, portable, source_bits=32):
    return uniform_plan(config, FORMATS[name], method, portable=portable, source_bits=source_bits)


def files(directory):
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


CASES = [("int4-g32", "clip", False), ("int4-g32", "clip", True), ("int8", "rtn", False), ("int8", "rtn", True)]
CASES += [("fp8", "rtn", False), ("int3-g32", "rtn", True), ("int2-g32", "clip", False), ("int6-g32", "clip", True)]


@pytest.mark.parametrize(("name", "method", "portable"), CASES)
def test_a_written_model_holds_what_rounding_gave_and_reloads(source, tmp_path, name, method, portable):
    seen = []
    with open_checkpoint(source) as original:
        config = load_config(original)
        plan, energies = uniform(config, name, method, portable), energies_of(config)
        reports = apply_plan(original, config, plan, tmp_path, energies=energies, progress=lambda *at: seen.append(at))
        before = {m.name: original.read_weight(m.name, m.shape).dequantize() for m in modules(config)}
        kept = {n: original.reader.read(n).copy() for n, _ in vectors(config)}
    assert seen == [(i + 1, len(reports)) for i in range(len(reports))]
    assert files(tmp_path) == {"model.safetensors", "config.json", "halve/plan.json", *CARRIED}
    assert Plan.from_json((tmp_path / "halve/plan.json").read_text()) == plan
    with open_checkpoint(tmp_path) as written:
        assert written.is_bundle
        assert load_config(written, plan) == config.with_kv_format(plan.kv_cache.format)
        group_of = {m.name: g.name for g in groups(config) for m in g.members}
        for module, report in zip(modules(config), reports, strict=True):
            stored = written.read_weight(module.name, module.shape)
            rule = plan.weights.rule_for(module.name)
            fmt = FORMATS[rule.format] if rule else None
            energy = energies.by_group.get(group_of.get(module.name), np.ones(module.shape[1]))
            if module.name == "model.embed_tokens" and config.tied:
                energy = (energy + energy.mean()) / 2
            if fmt is not None:
                expected = round_weight(before[module.name], fmt, rule.method, energy)
                np.testing.assert_array_equal(stored.dequantize(), expected.dequantize())
                assert stored.format == fmt
                assert report.relative_error == relative_error(before[module.name], expected, energy)
            else:
                np.testing.assert_array_equal(stored.dequantize(), before[module.name])
                assert report.relative_error == 0
            assert (report.name, report.format_after) == (module.name, stored.format.name)
            assert (report.bytes_after, report.parameters) == (stored.size_bytes, before[module.name].size)
            assert report.group == group_of.get(module.name, "embedding")
        for vector, value in kept.items():
            np.testing.assert_array_equal(written.reader.read(vector), value)
        decoder = load_decoder(written, config, TorchOps())
        logits = decoder.logits(decoder.hidden(TokenBatch.whole([[1, 2, 3]])))
        assert torch.isfinite(logits).all()


def test_carried_files_come_byte_for_byte_and_nothing_else(untied, tmp_path):
    with open_checkpoint(untied) as original:
        config = load_config(original)
        apply_plan(original, config, uniform(config, "int8", "rtn", portable=False), tmp_path)
    for name, content in CARRIED.items():
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("portable", [False, True])
def test_the_configuration_is_the_originals_with_how_weights_are_stored(untied, tmp_path, portable):
    with open_checkpoint(untied) as original:
        config = load_config(original)
        apply_plan(original, config, uniform(config, "int4-g32", "rtn", portable), tmp_path)
    before, after = (json.loads((d / "config.json").read_text()) for d in (untied, tmp_path))
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def test_a_plan_that_compresses_nothing_writes_no_quantization(untied, tmp_path):
    plan = Plan(weights=Weights(rules=(WeightRule(pattern="*", format="bf16"),)))
    with open_checkpoint(untied) as original:
        config = load_config(original)
        reports = apply_plan(original, config, plan, tmp_path)
        weight = original.read_weight("lm_head", (60, 64)).codes
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert {(r.format_before, r.format_after, r.method) for r in reports} == {("fp32", "bf16", None)}
    with open_checkpoint(tmp_path) as written:
        np.testing.assert_array_equal(written.read_weight("lm_head", (60, 64)).codes, weight.astype("bfloat16"))


def test_an_empty_plan_copies_the_weights(source, tmp_path):
    with open_checkpoint(source) as original:
        config = load_config(original)
        reports = apply_plan(original, config, Plan(), tmp_path)
        with open_checkpoint(tmp_path) as written:
            for name in written.reader.names:
                np.testing.assert_array_equal(written.reader.read(name), original.reader.read(name))
    assert all((r.bytes_before, r.format_before) == (r.bytes_after, r.format_after) for r in reports)


def test_a_compressed_model_can_be_taken_as_it_is_and_compressed_in_part(untied, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    with open_checkpoint(untied) as original:
        config = load_config(original)
        apply_plan(original, config, uniform(config, "int8-g32", "rtn", portable=False), first)
    plan = Plan(weights=Weights(rules=(WeightRule(pattern="lm_head", format="int4-g32", method="rtn"),)))
    with open_checkpoint(first) as compressed:
        reports = apply_plan(compressed, config, plan, second)
        expected = round_weight(compressed.read_weight("lm_head", (60, 64)).dequantize(), FORMATS["int4-g32"], "rtn")
        with open_checkpoint(second) as written:
            formats = stored_formats(written, config)
            np.testing.assert_array_equal(written.read_weight("lm_head", (60, 64)).codes, expected.codes)
            q = "model.layers.0.self_attn.q_proj"
            np.testing.assert_array_equal(
                written.read_weight(q, (64, 64)).codes, compressed.read_weight(q, (64, 64)).codes
            )
    assert {name for name, fmt in formats.items() if fmt.name == "int4-g32"} == {"lm_head"}
    assert {r.format_after for r in reports} == {"int8-g32", "int4-g32"}


def test_the_same_plan_writes_the_same_bytes(untied, tmp_path):
    with open_checkpoint(untied) as original:
        config = load_config(original)
        energies = calibrate(config, CheckpointSource(original), [np.arange(20, dtype=np.int32)], window_tokens=20)
        for name in ("a", "b"):
            apply_plan(original, config, uniform(config, "int3-g32", "clip", False), tmp_path / name, energies=energies)
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def fails(source, tmp_path, plan, error, message, energies=None):
    out = tmp_path / "out"
    with open_checkpoint(source) as original, pytest.raises(error, match=message):
        apply_plan(original, load_config(original), plan, out, energies=energies)
    return out


def rule(pattern, name, method=None, portable=False):
    rules = (WeightRule(pattern=pattern, format=name, method=method),)
    return Plan(portable=portable, weights=Weights(rules=rules))


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        (rule("*", "int9", "rtn"), PlanError, "unknown format 'int9'"),
        (rule("nothing", "int8", "rtn"), PlanError, "matches no module"),
        (rule("*", "int4-g128", "rtn"), FormatError, "group_size 128 does not divide in_features 64"),
        (rule("*.q_proj", "int8", "rtn", portable=True), PlanError, "one format for a fused group"),
        (rule("*.layers.*", "int8", "clip"), PlanError, "q_proj: method clip needs energies of its inputs; calibrate"),
    ],
)
def test_a_plan_that_can_not_be_carried_out_leaves_nothing(untied, tmp_path, plan, error, message):
    assert not fails(untied, tmp_path, plan, error, message).exists()


@pytest.mark.parametrize(
    "change", [lambda e: e.pop("layers.1.down"), lambda e: e.update({"layers.1.down": np.ones(5)})]
)
def test_energies_of_another_model_are_refused_before_any_file(untied, tmp_path, change):
    with open_checkpoint(untied) as original:
        by_group = dict(energies_of(load_config(original)).by_group)
    change(by_group)
    message = r"layers\.1\.mlp\.down_proj: the energies do not hold 96 inputs of 'layers\.1\.down'"
    energies = Energies(by_group=by_group, num_tokens=1)
    out = fails(untied, tmp_path, rule("*.layers.*", "int8", "clip"), PlanError, message, energies)
    assert not out.exists()


def damaged(directory, name, value):
    """A saved model with one value of a tensor changed."""
    source = save_model(directory)
    state = load_file(source / "model.safetensors")
    state[name].view(-1)[7] = value
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_leaves_no_file(tmp_path, name):
    source = damaged(tmp_path / "source", name, float("nan"))
    out = fails(source, tmp_path, rule("*.layers.*", "int8", "rtn"), CheckpointError, f"{name}: nan at")
    assert not files(out)


def test_a_weight_that_a_format_can_not_hold_leaves_no_file(tmp_path):
    source = damaged(tmp_path / "source", "lm_head.weight", 1e6)
    assert not files(
        fails(source, tmp_path, rule("*", "fp16"), FormatError, r"fp16: a weight of size 1e\+06 is beyond")
    )


def test_a_model_that_is_there_already_is_never_overwritten(untied, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"mine")
    fails(untied, tmp_path, rule("*", "int8", "rtn"), OutputError, r"model\.safetensors: exists already")
    assert (out / "model.safetensors").read_bytes() == b"mine"
    assert files(out) == {"model.safetensors"}


def test_an_output_that_is_no_directory_is_named(untied, tmp_path):
    (tmp_path / "out").write_text("a file")
    fails(untied, tmp_path, rule("*", "int8", "rtn"), OutputError, "out/halve: can't make this directory: ")


@pytest.mark.parametrize("name", ["config.json", "halve/plan.json", "tokenizer.json"])
def test_a_file_that_can_not_be_written_is_named(untied, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    fails(untied, tmp_path, rule("*", "int8", "rtn"), OutputError, f"{name}.*: can't be (written|copied)")


def test_a_file_that_changes_while_it_is_copied_is_noticed(untied, tmp_path, monkeypatch):
    def short(source, target):
        target.write_bytes(b"")

    monkeypatch.setattr("halve.compress.apply.shutil.copyfile", short)
    fails(untied, tmp_path, rule("*", "int8", "rtn"), CheckpointError, "changed while it was copied; run again")


def test_the_plan_keeps_what_says_nothing_of_weights(untied, tmp_path):
    plan = replace(rule("*", "int8", "rtn"), kv_cache=KVCache(format="fp32"))
    with open_checkpoint(untied) as original:
        apply_plan(original, load_config(original), plan, tmp_path)
    assert Plan.from_json((tmp_path / "halve/plan.json").read_text()) == plan
