"""Sparse models with fewer experts: here, on disk, and in transformers."""

import json

import numpy as np
import pytest
import torch
import transformers

from halve.api.sparse import upcycle
from halve.checkpoint import open_checkpoint
from halve.compress.shrink import ShrunkSource, shrunk_config, shrunk_raw, write_shrunk
from halve.core.errors import PlanError
from halve.core.plan import ExpertGroup, ExpertPlan, LayerExperts, Plan
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, Decoder, load_config, load_decoder
from halve.models.embedded import embedded_model_path
from halve.search.expert_moves import without
from tests.models.test_moe import FAMILIES, IDS, sparse_model


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    sparse_model(request.param).save_pretrained(path)
    return path


def alone(*experts):
    return tuple(ExpertGroup(members=(e,), weights=(1.0,)) for e in experts)


def sparse_layers(config):
    return [i for i, layer in enumerate(config.layers) if layer.experts]


def logits(decoder, ids=IDS):
    with torch.no_grad():
        return decoder.logits(decoder.hidden(TokenBatch.whole([ids]))).numpy()


def opened(path):
    checkpoint = open_checkpoint(path)
    return checkpoint, load_config(checkpoint).with_kv_format("fp32")


@pytest.mark.parametrize("kind", ["prune", "merge", "top_k"])
def test_what_is_written_is_what_was_measured_and_what_transformers_computes(saved, kind, tmp_path):
    checkpoint, config = opened(saved)
    merged = ExpertGroup(members=(1, 2), weights=(0.25, 0.75))
    groups = (*alone(0, 3), *((merged,) if kind == "merge" else alone(2)))
    plan = ExpertPlan(layers=tuple(LayerExperts(layer=i, groups=groups) for i in sparse_layers(config)))
    if kind == "top_k":
        plan = ExpertPlan(top_k=1)
    spec = config.layers[sparse_layers(config)[0]].experts
    if kind != "top_k" and not spec.removable:
        checkpoint.close()
        with pytest.raises(PlanError, match=r"biases or groups of experts|4 of 3 experts"):
            shrunk_config(config, plan)
        return
    with checkpoint:
        source = CheckpointSource(checkpoint)
        made = shrunk_config(config, plan)
        found = logits(Decoder(made, TorchOps("cpu"), ShrunkSource(source, config, plan)))
        written = write_shrunk(checkpoint, source, config, plan, tmp_path / "out")
        if kind != "merge":
            lighter = without(load_decoder(checkpoint, config, TorchOps("cpu")), plan)
            np.testing.assert_allclose(logits(lighter), found, atol=1e-5 * max(1, np.abs(found).max()))
        before = logits(load_decoder(checkpoint, config, TorchOps("cpu")))
    assert written.with_kv_format("fp32").layers == made.layers
    with open_checkpoint(tmp_path / "out") as smaller:
        assert load_config(smaller).with_kv_format("fp32").layers == made.layers
    if spec.stacked:  # others read the experts of a layer from one tensor; ours are written one by one
        with open_checkpoint(tmp_path / "out") as smaller:
            expected = logits(load_decoder(smaller, made, TorchOps("cpu")))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        with torch.no_grad():
            expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert np.abs(found - before).max() > 1e-3 or plan.top_k == spec.top_k


def test_experts_that_are_alike_can_be_merged_without_loss(tmp_path):
    upcycle(embedded_model_path(), tmp_path / "up", experts=4, active=2)
    checkpoint, config = opened(tmp_path / "up")
    pairs = tuple(ExpertGroup(members=m, weights=(0.5, 0.5)) for m in ((0, 3), (1, 2)))
    plan = ExpertPlan(layers=tuple(LayerExperts(layer=i, groups=pairs) for i in range(config.num_layers)))
    with checkpoint:
        source = CheckpointSource(checkpoint)
        before = logits(Decoder(config, TorchOps("cpu"), source))
        after = logits(Decoder(shrunk_config(config, plan), TorchOps("cpu"), ShrunkSource(source, config, plan)))
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_plans_that_name_what_is_not_there_are_refused(saved):
    checkpoint, config = opened(saved)
    checkpoint.close()
    layers = sparse_layers(config)
    num_experts = config.layers[layers[0]].experts.num_experts

    def plan(groups, where=layers, **more):
        return ExpertPlan(layers=tuple(LayerExperts(layer=i, groups=groups) for i in where), **more)

    with pytest.raises(PlanError, match=f"has no expert {num_experts}; it has {num_experts}"):
        shrunk_config(config, plan(alone(0, 1, num_experts)))
    with pytest.raises(PlanError, match="the model's sparse layers"):
        shrunk_config(config, plan(alone(0, 1), where=[*layers, 7]))
    with pytest.raises(PlanError, match=r"experts.top_k: 2 of 1 experts"):
        shrunk_config(config, plan(alone(0), top_k=2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ExpertPlan(top_k=0), "top_k: 0 must be at least 1"),
        (lambda: ExpertGroup(members=(), weights=()), "each needs its own"),
        (lambda: ExpertGroup(members=(0, 1), weights=(0.5, 0.4)), "none below 0, sum 1"),
        (lambda: ExpertPlan(layers=(LayerExperts(layer=0, groups=()),)), "the same number of experts, at least one"),
        (lambda: ExpertPlan(layers=(LayerExperts(layer=0, groups=alone(1, 1)),)), "layer 0 names an expert twice"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(make, said):
    with pytest.raises(PlanError, match=said):
        make()


def test_a_plan_of_experts_comes_back_from_json_and_an_older_plan_has_none():
    plan = Plan(experts=ExpertPlan(top_k=1, layers=(LayerExperts(layer=0, groups=alone(2, 0)),)))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.experts.changes
    raw = json.loads(Plan().to_json())
    del raw["experts"]
    assert not Plan.from_json(json.dumps(raw)).experts.changes


def test_the_configuration_says_the_new_numbers():
    raw = {"num_local_experts": 8, "num_experts_per_tok": 2, "other": 1}
    plan = ExpertPlan(top_k=1, layers=(LayerExperts(layer=0, groups=alone(0, 4, 6)),))
    assert shrunk_raw(raw, plan) == {"num_local_experts": 3, "num_experts_per_tok": 1, "other": 1}
