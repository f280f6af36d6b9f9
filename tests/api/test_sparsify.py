"""Dense models cut into experts: the cut, the files, recovery, the verdict."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from halve.api.sparsify import Row, sparsify, verdict_of
from halve.checkpoint import open_checkpoint
from halve.cli.main import app
from halve.compress import distil as recovery
from halve.compress.distil import recover
from halve.compress.experts import Split, SplitFeedForward, balanced, make_router, order_neurons, refit_down
from halve.compress.sparsify import split_layers, split_of, target_of, write_sparse
from halve.core.certificate import Measured
from halve.core.errors import ConfigError, DataError, OutputError
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, load_config, load_decoder
from tests.api.tiny import VOCABULARY, make_model

IDS = np.random.default_rng(0).integers(3, VOCABULARY, 40).astype(np.int32)
TEXT = [np.random.default_rng(i).integers(3, VOCABULARY, 60).astype(np.int32) for i in range(40)]


def cut(path, out, *, experts=4, active=2, shared=0):
    with open_checkpoint(path) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        split = split_of(config, experts=experts, active=active, shared=shared)
        found = list(split_layers(config, CheckpointSource(checkpoint), TEXT, split, window_tokens=64))
        write_sparse(checkpoint, config, split, (made for made, _ in found), out)
    return found


def loaded(path):
    with open_checkpoint(path) as checkpoint:
        return load_decoder(checkpoint, load_config(checkpoint).with_kv_format("fp32"), TorchOps("cpu"))


def logits(path):
    decoder = loaded(path)
    with torch.no_grad():
        return decoder.logits(decoder.hidden(TokenBatch.whole([IDS]))).numpy()


def test_clusters_have_equal_sizes_and_keep_what_is_alike_together():
    random = torch.Generator().manual_seed(0)
    kind = torch.arange(60) % 3
    likeness = torch.randn(60, 3, generator=random) * 0.1 + torch.nn.functional.one_hot(kind, 3)
    assert torch.equal(balanced(likeness, 20), kind)
    crowded = likeness.clone()
    crowded[:, 0] += 2  # all want the first
    assert torch.bincount(balanced(crowded, 20)).tolist() == [20, 20, 20]


def test_neurons_that_speak_together_become_experts_and_those_that_always_do_are_shared():
    split = Split(experts=4, active=1, shared=1, size=4)
    loud = torch.full((300, 16), 0.01)
    places = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    loud[:, places[:4]] = 5.0
    for token in range(300):
        group = token % 3
        loud[token, places[4 + 4 * group : 8 + 4 * group]] = 3.0 + 0.01 * token % 7
    order, nearest = order_neurons(loud, split)
    assert set(order[:4].tolist()) == set(places[:4].tolist())
    expected = {frozenset(places[4 + 4 * g : 8 + 4 * g].tolist()) for g in range(3)}
    assert {frozenset(order[4 + 4 * e : 8 + 4 * e].tolist()) for e in range(3)} == expected
    assert [int(n) in set(order[4 + 4 * e : 8 + 4 * e].tolist()) for e, n in enumerate(nearest)] == [True] * 3


def test_the_router_that_finds_more_is_taken():
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(200, 8, generator=random) for _ in range(5)]
    true = torch.randn(4, 8, generator=random)
    lengths = [(x @ true.t()).exp() for x in inputs]
    rows, kind, captured = make_router(inputs, lengths, true, 1)
    assert kind == "representative"
    assert captured > 0.5
    assert float((torch.cat(inputs) @ rows.t()).std()) == pytest.approx(0.1, rel=0.2)
    _, kind, found = make_router(inputs, lengths, torch.randn(4, 8, generator=random), 1)
    assert kind == "fitted"
    assert captured * 0.8 < found <= captured


def test_the_down_projection_makes_up_for_neurons_that_are_left_out():
    random = torch.Generator().manual_seed(0)
    kept, down = torch.randn(500, 12, generator=random), torch.randn(6, 12, generator=random)
    target = kept @ torch.randn(12, 6, generator=random)
    found = refit_down(kept.t() @ kept, kept.t() @ target, down)
    assert float((kept @ found.t() - target).norm() / target.norm()) < 0.01


@pytest.mark.parametrize(("shared", "kind"), [(0, "MixtralForCausalLM"), (1, "Qwen2MoeForCausalLM")])
def test_the_result_is_in_transformers_what_it_is_here(tiny, tmp_path, shared, kind):
    found = cut(tiny, tmp_path / "out", shared=shared)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(model).__name__ == kind
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    ours = logits(tmp_path / "out")
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - logits(tiny)).max() > 1e-3  # it left something out
    # What was measured while cutting is what the files compute, but for bf16.
    decoder, x = loaded(tmp_path / "out"), torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    made, facts = found[0]
    x = x[:, : made.gate.shape[1]]
    got = decoder.layers[0].feed_forward(x)
    want = made(decoder.layers[0].normed(x))
    assert float((got - want).norm() / want.norm()) < 0.02
    assert 0 < facts.captured <= 1
    assert facts.least <= 2 / (4 - shared) <= facts.most
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_with_all_experts_active_hardly_anything_is_lost(tiny, tmp_path):
    facts = [fact for _, fact in cut(tiny, tmp_path / "out", active=4)]
    assert all(fact.error < 0.25 for fact in facts), facts
    fewer = [fact for _, fact in cut(tiny, tmp_path / "fewer", active=1)]
    assert all(few.error > all_.error for few, all_ in zip(fewer, facts, strict=True))


def test_attention_that_no_sparse_family_has_makes_a_native_model(tmp_path):
    path = make_model(tmp_path / "biased", attention_bias=True)
    cut(path, tmp_path / "out", shared=1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["HalveMoeForCausalLM"]
    assert np.isfinite(logits(tmp_path / "out")).all()
    with pytest.raises(ValueError, match="halve_moe"):
        transformers.AutoConfig.from_pretrained(tmp_path / "out")


def test_families_by_their_attention(tiny):
    with open_checkpoint(tiny) as checkpoint:
        config = load_config(checkpoint)
    plain, shared = Split(experts=4, active=1, shared=0, size=8), Split(experts=4, active=1, shared=1, size=8)
    normed = replace(config, layers=tuple(replace(x, qk_norm="head") for x in config.layers))
    assert target_of(normed, plain) == "Qwen3MoeForCausalLM"
    with pytest.raises(ConfigError, match="leave out --shared"):
        target_of(normed, shared)
    half = replace(config, attention_bias=True, output_bias=False)
    assert target_of(half, shared) == "Qwen2MoeForCausalLM"
    with pytest.raises(ConfigError, match="add --shared 1"):
        target_of(half, plain)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"experts": 5}, r"--experts 5: does not divide the \d+ neurons of a feed-forward; \[.*4.*\] do"),
        ({"experts": 1}, "--experts 1: must be from 2"),
        ({"experts": 4, "active": 5}, "--active 5: must be from 1 to the 4 experts"),
        ({"experts": 4, "active": 3, "shared": 2}, "--active 3: must be from 1 to the 2 experts that are not shared"),
        ({"experts": 4, "active": 0}, "--active 0"),
        ({"experts": 4, "shared": 4}, "--shared 4: must be from 0 to 3"),
        ({"recover_time": "5m"}, "recover_time: there is nothing to recover on"),
        ({"recover_steps": 0}, "recover_steps: 0 must be at least 1"),
    ],
)
def test_numbers_that_can_not_be_are_refused_before_any_work(tiny, tmp_path, flags, said):
    with pytest.raises(ConfigError, match=said):
        sparsify(tiny, tmp_path / "out", **flags)
    assert not list(tmp_path.iterdir())


def test_what_is_sparse_biased_compressed_or_there_already_is_not_cut(tiny, passed, text, tmp_path):
    cut(tiny, tmp_path / "sparse")
    with pytest.raises(ConfigError, match="is sparse already"):
        sparsify(tmp_path / "sparse", tmp_path / "out")
    with pytest.raises(ConfigError, match="the model is compressed"):
        sparsify(passed.path, tmp_path / "out")
    with pytest.raises(ConfigError, match="feed-forward has biases"):
        sparsify(make_model(tmp_path / "biased", mlp_bias=True), tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        sparsify(tiny, tmp_path / "out", experts=4)
    with pytest.raises(DataError, match="sealed text that the verdict is read from"):
        sparsify(tiny, tmp_path / "other", experts=4, calibration=text, recover_on=text)
    with pytest.raises(DataError, match="calibration text holds no tokens"):
        list(split_layers(*of_layers(tiny), [], Split(experts=4, active=1, shared=0, size=8), window_tokens=8))
    assert not (tmp_path / "other").exists()


def of_layers(path):
    checkpoint = open_checkpoint(path)
    return load_config(checkpoint).with_kv_format("fp32"), CheckpointSource(checkpoint)


@pytest.mark.parametrize("most", [recovery.FULL_PARAMETERS, 0], ids=["full", "lora"])
def test_recovery_brings_the_model_back_and_repeats_itself(tiny, tmp_path, monkeypatch, most):
    monkeypatch.setattr(recovery, "FULL_PARAMETERS", most)
    monkeypatch.setattr(recovery, "STEP_TOKENS", 128)
    monkeypatch.setitem(recovery.LEARNING_RATES, "lora", 5e-3)
    layers = [made for made, _ in cut(tiny, tmp_path / "out", active=1, shared=1)]
    dense = loaded(tiny)
    runs = [recover(dense, layers, TEXT, window_tokens=64, steps=30, seed=3) for _ in range(2)]
    assert runs[0][3].mode == ("full" if most else "lora")
    assert runs[0][3].steps == 30
    monkeypatch.setattr(recovery, "TOLD", 5)
    losses = recover(dense, layers, TEXT, window_tokens=64, steps=30, seed=3)[3]
    assert losses.last_kl < 0.97 * losses.first_kl
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(one.down, other.down)
        assert torch.equal(one.router, other.router)
        assert not one.down.requires_grad
    assert not torch.equal(runs[0][0][0].gate, layers[0].gate)


def test_recovery_ends_when_the_time_is_over_and_needs_text(tiny, tmp_path):
    layers = [made for made, _ in cut(tiny, tmp_path / "out")]
    ticks = iter(range(100))
    record = recover(
        loaded(tiny), layers, TEXT, window_tokens=64, steps=50, seconds=4, clock=lambda: float(next(ticks))
    )[3]
    assert 1 <= record.steps < 6
    with pytest.raises(DataError, match="text to recover on holds no tokens"):
        recover(loaded(tiny), layers, [], window_tokens=64, steps=1)


def row(name, kind, fmt, share, kl=None, spread=0.001, speed=None):
    measured = None if kl is None else Measured(value=kl, low=kl - spread, high=kl + spread, n=9)
    ratio = None if kl is None else Measured(value=1 + kl, low=1.0, high=2 + kl, n=9)
    speed = speed and Measured(value=speed, low=speed, high=speed, n=5)
    return Row(
        name=name,
        kind=kind,
        format=fmt,
        bytes_per_token=int(1000 * share),
        of_dense=share,
        perplexity=10.0,
        ppl_ratio=ratio,
        kl=measured,
        decode_tok_s=speed,
    )


def test_the_verdict_is_by_the_best_dense_model_of_no_more_bytes():
    rows = [
        row("dense", "dense", "bf16", 1.0),
        row("sparse", "sparse", "bf16", 0.7, 0.9),
        row("sparse, recovered", "sparse", "bf16", 0.7, 0.3, speed=10.0),
        row("sparse, int4", "sparse", "int4-g32", 0.2, 0.35, speed=20.0),
        row("dense, int8", "dense", "int8", 0.5, 0.01, speed=40.0),
    ]
    better, said = verdict_of(rows)
    assert better == "mixed"
    assert "Dense is better: sparse, recovered (bf16) reads 0.70" in said
    assert "at 4.0 times its tokens a second" in said
    assert "no dense model of one format that was tried reads as little" in said
    assert verdict_of([*rows, row("dense, int3", "dense", "int3-g64", 0.19, 0.2)])[0] == "dense"
    better, said = verdict_of([*rows[:1], rows[3], row("dense, int3", "dense", "int3-g64", 0.19, 0.5)])
    assert better == "sparse"
    assert said.startswith("Sparse is better")
    better, said = verdict_of([*rows[:1], rows[3], row("dense, int3", "dense", "int3-g64", 0.19, 0.351)])
    assert (better, said[:23]) == ("mixed", "No difference was found")


def test_the_command_writes_measures_and_judges(tiny, text, tmp_path):
    lessons = tmp_path / "lessons.jsonl"
    lessons.write_text("".join(json.dumps({"text": f"Lesson {i} about {i * i} things."}) + "\n" for i in range(80)))
    command = ["sparsify", str(tiny), "-o", str(tmp_path / "out"), "--experts", "4", "--active", "1", "--shared", "1"]
    more = ["--calibration", str(text), "--recover", str(lessons), "--recover-steps", "3", "--json"]
    ran = CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
    made = json.loads(ran.stdout)
    assert made["architecture"] == "Qwen2MoeForCausalLM"
    assert made["active_share"] == 0.5
    assert made["recovery"]["steps"] == 3
    assert [r["kind"] for r in made["rows"]][:3] == ["dense", "sparse", "sparse"]
    assert all(r["decode_tok_s"]["value"] > 0 for r in made["rows"])
    assert made["active_parameters"] < made["dense_parameters"] < made["parameters"]
    assert made["better"] in ("dense", "sparse", "mixed")
    assert made["verdict"].endswith(".")
    assert np.isfinite(logits(tmp_path / "out")).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lessons.jsonl", "out"]


def test_the_table_says_what_the_record_says(capsys):
    from halve.cli.sparse_tables import sparsified

    rows = (row("dense", "dense", "bf16", 1.0, speed=3.0), row("sparse", "sparse", "bf16", 0.7, 0.9))
    done = SimpleNamespace(steps=3, tokens=300, seconds=1.0, first_kl=0.5, last_kl=0.4)
    sparsified(
        SimpleNamespace(
            path="out",
            architecture="MixtralForCausalLM",
            native=False,
            experts=8,
            active=2,
            shared=1,
            active_share=0.375,
            parameters=100,
            active_parameters=60,
            dense_parameters=90,
            rows=rows,
            recovery=done,
            verdict="Dense is better.",
        )
    )
    said = capsys.readouterr().out
    for words in (
        "1 shared and 2 of 7 experts",
        "37.5%",
        "KL 0.500 to 0.400",
        "Dense is better.",
        "which transformers",
    ):
        assert words in said
    assert isinstance(SplitFeedForward, type)
