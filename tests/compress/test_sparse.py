"""Sparse models through calibration, plans, files and back; and upcycling."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from halve.api.sparse import upcycle as verb
from halve.checkpoint import open_checkpoint
from halve.compress import Upcycling, apply_plan, calibrate, resolve, uniform_plan, upcycle
from halve.compress.clusters import cluster_rows
from halve.compress.resolve import Choice, grouped_plan
from halve.core.errors import ConfigError, DataError, OutputError
from halve.core.plan import WeightRule, Weights
from halve.data import encode, read_documents
from halve.data.mixed import mixed_text_paths
from halve.formats import FORMATS
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import sizes
from halve.models.embedded import embedded_model_path
from halve.models.load import CheckpointSource, load_config, load_decoder
from halve.models.names import groups
from halve.search import bytes_per_token, uniform_candidates
from halve.text import Tokenizer
from tests.models.test_moe import FAMILIES, IDS, sparse_model

TEXT = [np.random.default_rng(i).integers(3, 96, 40).astype(np.int32) for i in range(4)]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    sparse_model(request.param).save_pretrained(path)
    return path


def opened(path):
    checkpoint = open_checkpoint(path)
    return checkpoint, load_config(checkpoint).with_kv_format("fp32")


def logits(path, ops):
    checkpoint, config = opened(path)
    with checkpoint:
        decoder = load_decoder(checkpoint, config, ops)
    return ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([IDS]))))


def test_every_expert_has_energies_of_its_own(saved):
    checkpoint, config = opened(saved)
    with checkpoint:
        energies = calibrate(config, CheckpointSource(checkpoint), TEXT, window_tokens=64)
    expected = {a.inputs for a in resolve(plan_of(config), config)} - {"embedding"}
    assert expected <= energies.by_group.keys()
    for group in groups(config):
        for module in group.members:
            if module.expert is not None:
                assert energies.by_group[f"{group.name}.{module.expert}"].shape == (module.shape[1],)


def plan_of(config, fmt="int4-g32", method="clip"):
    return uniform_plan(config, FORMATS[fmt], method, portable=False, source_bits=32)


@pytest.mark.parametrize("fmt", ["int8", "int4-g32"])
def test_a_compressed_sparse_model_comes_back_near_the_original(saved, fmt, tmp_path):
    checkpoint, config = opened(saved)
    with checkpoint:
        energies = calibrate(config, CheckpointSource(checkpoint), TEXT, window_tokens=64)
        reports = apply_plan(checkpoint, config, plan_of(config, fmt), tmp_path / "made", energies=energies)
    assert all(report.format_after == fmt for report in reports)
    before, after = logits(saved, TorchOps("cpu")), logits(tmp_path / "made", TorchOps("cpu"))
    error = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert error < {"int8": 0.1, "int4-g32": 0.7}[fmt]
    native = logits(tmp_path / "made", NativeOps(activations="fp32"))
    np.testing.assert_allclose(native, after, atol=1e-3 * np.abs(after).max())


def test_experts_are_clipped_where_a_plan_says_gptq(saved, tmp_path):
    from halve.compress import Hessians

    checkpoint, config = opened(saved)
    (tmp_path / "moments").mkdir()
    hessians = Hessians(folder=tmp_path / "moments")
    with checkpoint:
        energies = calibrate(config, CheckpointSource(checkpoint), TEXT, window_tokens=64, hessians=hessians)
        plan = plan_of(config, method="gptq")
        reports = apply_plan(checkpoint, config, plan, tmp_path / "made", energies=energies, hessians=hessians)
    methods = {(".experts." in report.name): report.method for report in reports if "layers" in report.name}
    assert methods == {True: "clip", False: "gptq"}


def test_a_plan_by_groups_names_experts_in_few_rules(saved):
    checkpoint, config = opened(saved)
    checkpoint.close()
    choices = {g.name: Choice(format="int8", method="rtn") for g in groups(config)}
    sparse = next(g for g in groups(config) if g.kind == "down" and g.members[0].expert is not None)
    choices[sparse.name] = Choice(format="int4-g32", method="clip")
    plan = grouped_plan(config, choices, portable=False, activations="fp32", kv_cache="fp32")
    assigned = {a.module.name: a.format.name for a in resolve(plan, config) if a.format}
    for group in groups(config):
        for module in group.members:
            assert assigned[module.name] == ("int4-g32" if group.name == sparse.name else "int8")
    assert len(plan.weights.rules) <= 12


def test_a_token_reads_the_experts_that_it_runs_through(saved):
    checkpoint, config = opened(saved)
    checkpoint.close()
    source = {m.name: FORMATS["bf16"] for g in groups(config) for m in g.members} | {
        "model.embed_tokens": FORMATS["bf16"]
    }
    sparse = sizes.bytes_per_token(config, source)
    experts = sum(
        2 * m.shape[0] * m.shape[1] + 4 * m.bias * m.shape[0]
        for g in groups(config)
        for m in g.members
        if m.expert is not None
    )
    spec = next(layer.experts for layer in config.layers if layer.experts)
    everyone = replace(
        config,
        layers=tuple(
            replace(x, experts=x.experts and replace(x.experts, top_k=spec.num_experts)) for x in config.layers
        ),
    )
    assert sizes.bytes_per_token(everyone, source) - sparse == round(experts * (1 - spec.top_k / spec.num_experts))
    found = uniform_candidates(config, source, portable=False, activations="int8", kv_cache="bf16")
    read = [bytes_per_token(config, resolve(c.plan, config), source) for c in found]
    assert read == sorted(read) == [c.bytes_per_token for c in found]


def test_an_upcycled_model_is_the_dense_one_in_transformers_and_here(tmp_path):
    dense = embedded_model_path()
    made = verb(dense, tmp_path / "up", experts=4, active=2)
    assert (made.experts, made.active) == (4, 2)
    ids = torch.randint(3, 8000, (1, 40), generator=torch.Generator().manual_seed(0))
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (dense, tmp_path / "up")
    ]
    assert isinstance(models[1], transformers.MixtralForCausalLM)
    with torch.no_grad():
        first, second = (model(ids).logits for model in models)
    np.testing.assert_allclose(second.numpy(), first.numpy(), atol=1e-4)
    checkpoint, config = opened(tmp_path / "up")
    with checkpoint:
        decoder = load_decoder(checkpoint, config, TorchOps("cpu"))
    ours = decoder.logits(decoder.hidden(TokenBatch.whole([ids[0].numpy().astype(np.int32)]))).numpy()
    np.testing.assert_allclose(ours, first[0].numpy(), atol=1e-4)
    assert made.parameters == sum(p.numel() for p in models[1].parameters())
    assert (tmp_path / "up" / "tokenizer.json").exists()


@pytest.mark.parametrize(("active", "divisor"), [(2, 2), (4, 2), (4, 4)])
def test_slices_of_feed_forwards_are_the_dense_model_together(tmp_path, active, divisor):
    dense = embedded_model_path()
    made = verb(dense, tmp_path / "up", experts=8, active=active, width_divisor=divisor)
    ids = torch.randint(3, 8000, (1, 40), generator=torch.Generator().manual_seed(0))
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (dense, tmp_path / "up")
    ]
    assert models[1].config.intermediate_size == models[0].config.intermediate_size // divisor
    with torch.no_grad():
        first, second = (model(ids).logits for model in models)
    np.testing.assert_allclose(second.numpy(), first.numpy(), atol=1e-4)
    checkpoint, config = opened(tmp_path / "up")
    with checkpoint:
        decoder = load_decoder(checkpoint, config, NativeOps(activations="fp32"))
    ours = decoder.logits(decoder.hidden(TokenBatch.whole([ids[0].numpy().astype(np.int32)])))
    np.testing.assert_allclose(decoder.ops.to_host(ours), first[0].numpy(), atol=1e-4)
    routers = 4 * 8 * 256
    assert made.equal
    assert made.parameters == sum(p.numel() for p in models[1].parameters())
    feed_forwards = 4 * 3 * 256 * 512
    assert made.active_parameters - routers == made.dense_parameters + (active // divisor - 1) * feed_forwards


def test_a_share_of_the_neurons_can_be_new(tmp_path):
    dense = embedded_model_path()
    whole, half = (
        verb(dense, tmp_path / name, experts=4, active=2, width_divisor=2, reinit=reinit)
        for name, reinit in (("whole", 0.0), ("half", 0.5))
    )
    assert (whole.equal, half.equal, half.reinit) == (True, False, 0.5)
    changed = {}
    for expert in range(4):
        for name, neurons in (("w1", 0), ("w3", 0), ("w2", 1)):
            key = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
            first, second = (load_file(Path(x.path) / "model.safetensors")[key].float() for x in (whole, half))
            differ = (first != second).any(dim=1 - neurons)
            assert int(differ.sum()) == 128  # of 256
            old, new = (x.movedim(neurons, 0)[differ] for x in (first, second))
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.05)
            changed[expert, name] = differ
    assert all(torch.equal(changed[e, "w1"], changed[e, name]) for e in range(4) for name in ("w2", "w3"))
    assert not torch.equal(changed[0, "w1"], changed[2, "w1"])  # copies of one slice part ways


def test_routers_by_clusters_share_tokens_evenly_and_keep_the_model_equal(tmp_path):
    dense, text = embedded_model_path(), mixed_text_paths()[0]
    verb(dense, tmp_path / "up", experts=8, active=2, width_divisor=2, cluster=text)
    ids = encode(read_documents(text), Tokenizer.from_directory(dense), vocab_size=8192)[0][:400]
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (dense, tmp_path / "up")
    ]
    with torch.no_grad():
        first = models[0](torch.from_numpy(ids)[None].long()).logits
        second = models[1](torch.from_numpy(ids)[None].long(), output_router_logits=True)
    np.testing.assert_allclose(second.logits.numpy(), first.numpy(), atol=1e-4)
    for layer in second.router_logits:
        assert torch.equal(layer[:, 0::2], layer[:, 1::2])  # both halves of a copy
        loads = torch.bincount(layer[:, 0::2].argmax(1), minlength=4) / len(layer)
        assert loads.min() > 0.1
        assert loads.max() < 0.45


def test_clusters_are_told_apart_whatever_they_have_in_common():
    random = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(16, 16, generator=random)).Q[:4]
    labels = torch.arange(4).repeat(50)
    inputs = 30 + 3 * centres[labels] + 0.1 * torch.randn(200, 16, generator=random)
    rows = cluster_rows(inputs, 4, torch.Generator().manual_seed(0))
    chosen = (inputs @ rows.t()).argmax(1)
    assert torch.bincount(chosen, minlength=4).tolist() == [50] * 4
    assert all(len(set(chosen[labels == label].tolist())) == 1 for label in range(4))
    assert (inputs @ rows.t()).std().item() == pytest.approx(1.5, rel=1e-3)
    assert not cluster_rows(inputs, 1, random).any()


@pytest.mark.parametrize(
    ("experts", "active", "more", "said"),
    [
        (1, 1, {}, "--experts 1: must be from 2"),
        (4, 5, {}, "--active 5: must be from 1 to the 4"),
        (4, 0, {}, "--active 0"),
        (4, 2, {"width_divisor": 0}, "--width-divisor 0: must be 1 or more"),
        (4, 1, {"width_divisor": 2}, "--experts 4 and --active 1 must be multiples"),
        (6, 3, {"width_divisor": 3}, "--width-divisor 3: does not divide the feed-forwards' width, 512"),
        (4, 2, {"reinit": 1.0}, "--reinit 1: must be a share"),
    ],
)
def test_numbers_that_make_no_sparse_model_are_refused(experts, active, more, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        verb(embedded_model_path(), tmp_path / "up", experts=experts, active=active, **more)
    assert not list(tmp_path.iterdir())


def test_text_to_cluster_holds_a_token_for_each_copy(tmp_path):
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match=r"the text to cluster has \d+ tokens, for 64 copies; give more text"):
        verb(embedded_model_path(), tmp_path / "up", experts=64, active=1, cluster=tmp_path / "short.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_what_is_sparse_or_compressed_or_there_already_is_not_upcycled(saved, tmp_path):
    with pytest.raises(ConfigError, match="only dense Llama models"):
        verb(saved, tmp_path / "up", experts=2, active=1)
    (tmp_path / "up").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        verb(embedded_model_path(), tmp_path / "up", experts=2, active=1)


def test_routers_are_the_same_for_a_seed(tmp_path):
    checkpoint, config = opened(embedded_model_path())
    with checkpoint:
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            upcycle(checkpoint, config, tmp_path / name, Upcycling(num_experts=2, active=1, seed=seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


def test_rules_reach_experts_by_their_names(saved):
    checkpoint, config = opened(saved)
    checkpoint.close()
    plan = plan_of(config)
    rules = (WeightRule(pattern="*experts.1.*", format="int8", method="rtn"), *plan.weights.rules)
    assigned = resolve(replace(plan, weights=Weights(rules=rules)), config)
    eight = {a.module.expert for a in assigned if a.format and a.format.name == "int8"}
    assert eight == {1}
