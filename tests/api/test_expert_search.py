"""`optimize` on a sparse model: formats of its own for each group, changes of experts that are measured first."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers

import halve
from halve.api import pipeline
from halve.api import plans as plan_finding
from halve.api.cost_again import _formats
from halve.api.expert_moves import judge_experts
from halve.api.plans import find_plans
from halve.api.progress import SILENT
from halve.api.study import Question
from halve.api.texts import prepare_texts
from halve.api.verify import _bytes_ratio
from halve.checkpoint import open_checkpoint
from halve.compress import Choice
from halve.compress.shrink import write_shrunk
from halve.core.errors import QualityError
from halve.core.plan import ExpertGroup, ExpertPlan, LayerExperts
from halve.evaluate.scorer import DecoderScorer
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, load_config, load_decoder, stored_formats
from halve.models.embedded import SPARSE, embedded_model_path
from halve.text import Tokenizer
from tests.api.tiny import BOS, EOS, VOCABULARY, tokenizer

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def saved(path, kind, config):
    """A random model with the tiny tokenizer."""
    torch.manual_seed(0)
    kind(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return path


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    config = transformers.MixtralConfig(**SIZES, intermediate_size=32, num_hidden_layers=1, num_local_experts=4)
    return saved(tmp_path_factory.mktemp("sparse"), transformers.MixtralForCausalLM, config)


@pytest.fixture
def ranked_by_bytes(monkeypatch):
    """Plans as on a device whose steps are not timed: what is chosen is the same everywhere."""
    monkeypatch.setattr(plan_finding, "_table", lambda *_: None)


def moves(path):
    front = json.loads((path / "halve" / "front.json").read_text())
    return {move["rejected"]: move for move in front["rejected_moves"] if move["part"] == "experts"}, front


@pytest.mark.usefixtures("ranked_by_bytes")
def test_pruning_is_refused_with_its_figure_when_fidelity_falls(sparse, text, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "halve"):
        made = halve.optimize(sparse, tmp_path / "out", max_quality_loss="2%", calibration=text, method="clip")
    refused, front = moves(made.path)
    pruned = refused["1 of 4 experts left out"]
    assert pruned["loss"] > 0.0198
    assert "refused: beyond the limit of 0.0198" in pruned["why"]
    assert pruned["why"] in caplog.text
    assert "2 of 4 experts left out" not in refused  # a kind that was refused goes no further
    assert made.certificate.quality.kl_mean.high <= 0.0198
    assert load_config(open_checkpoint(made.path)).layers[0].experts.num_experts == 4
    # Groups have formats of their own, and of a layer's experts those that lose more have more bits.
    chosen = next(point for point in front["points"] if point["chosen"])
    assert any("of experts" in line for line in chosen["layers"])
    assert any(len(formats_of_experts(made.path, part)) > 1 for part in ("w1", "w2"))
    assert formats_of_experts(made.path, "w1") == formats_of_experts(made.path, "w3")
    assert halve.verify(made.path, against=sparse).answer == "holds"


def formats_of_experts(path, part):
    with open_checkpoint(path) as bundle:
        names = [f"model.layers.0.block_sparse_moe.experts.{e}.{part}" for e in range(4)]
        return {bundle.layout.format_of(name).name for name in names}


def test_a_portable_plan_has_one_format_for_a_layers_experts(sparse, text, tmp_path):
    made = halve.optimize(
        sparse, tmp_path / "out", max_quality_loss="10%", calibration=text, method="clip", portable=True
    )
    assert [len(formats_of_experts(made.path, part)) for part in ("w1", "w2", "w3")] == [1, 1, 1]


def test_what_a_plan_of_fewer_experts_left_undone_is_told(sparse, text, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(pipeline, "find_plans", lambda *given: found.append(find_plans(*given)) or found[0])
    halve.optimize(sparse, tmp_path / "out", max_quality_loss="30%", calibration=text, method="clip")
    (plans,) = found
    pruned = next(one for one in plans.experts if one.move.kind == "prune")
    parts, _ = plans.studied.parts(pruned.config)
    assert any(one.move.kind == "top_k" for one in plans.experts)
    for one in (None, *plans.experts):
        config = plans.question.config if one is None else one.config
        choices = {p.name: Choice(format="int8", method="clip") for p in plans.studied.parts(config)[0]}
        plan = plans.candidates[0].plan
        if one is not None:
            plan = replace(plan, experts=one.move.plan)
        moves = plans.moves(replace(plans.candidates[0], choices=choices, plan=plan), room=0.2)
        assert {m.part for m in moves if m.part.startswith("layers.")} <= choices.keys()
        assert any(m.part.startswith("layers.0.down") for m in moves)
    assert "layers.0.down" in {part.name for part in parts}  # experts that are no longer those that were weighed


@pytest.mark.usefixtures("ranked_by_bytes")
def test_fewer_experts_a_token_are_taken_where_the_limit_allows_and_hold_on_sealed_text(sparse, text, tmp_path):
    made = halve.optimize(sparse, tmp_path / "out", max_quality_loss="30%", calibration=text, method="clip")
    plan = json.loads((made.path / "halve" / "plan.json").read_text())
    experts = load_config(open_checkpoint(made.path)).layers[0].experts
    assert (experts.top_k, experts.num_experts) == (1, 4)
    assert plan["experts"]["top_k"] == 1
    assert made.certificate.verdict == "pass"
    assert made.certificate.quality.kl_mean.high <= 0.263
    assert "saves less for its loss" in next(iter(moves(made.path)[0].values()))["why"]


def test_no_expert_of_a_trained_model_goes_for_nothing():
    with open_checkpoint(embedded_model_path(SPARSE)) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        question = Question(
            checkpoint=checkpoint,
            config=config,
            source=stored_formats(checkpoint, config),
            method="clip",
            portable=False,
            device="cpu",
            texts=prepare_texts(None, tokenizer, config, selected=True),
            model_sha256="",
            activations=("fp32",),
            kv_caches=("fp32",),
        )
        original = DecoderScorer(load_decoder(checkpoint, config, TorchOps(widened=True)), keep_bytes=1 << 29)
        judged = judge_experts(question, original, 0.001, SILENT)
    assert [move.move.name for move in judged] == [
        "1 experts a token",
        "2 of 8 experts left out",
        "2 of 8 experts merged",
    ]
    assert not any(move.accepted for move in judged)
    assert all("refused: beyond the limit of 0.001" in move.why for move in judged)
    alone, left_out, merged = (move.kl for move in judged)
    assert alone.low > 0.5  # half a feed-forward
    assert 0.001 < left_out.low < left_out.high < merged.high < 0.02


def test_plans_of_a_sparse_model_are_ranked_by_seconds_and_keep_a_service_level(sparse, text, tmp_path):
    with pytest.raises(QualityError, match="no plan keeps this service level"):
        halve.optimize(sparse, tmp_path / "out", max_quality_loss="5%", calibration=text, slo="tpot=0.0001ms")
    made = halve.optimize(
        sparse, tmp_path / "out", max_quality_loss="5%", calibration=text, slo="ttft=10s,tpot=1s", method="clip"
    )
    assert moves(made.path)[1]["basis"] == "seconds"
    assert made.certificate.workload_cost is not None
    assert made.certificate.workload_cost.replayed is not None


def test_a_service_level_is_refused_before_any_work_where_layers_differ(tmp_path, text):
    config = transformers.Qwen3MoeConfig(
        **SIZES,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        head_dim=8,
        num_experts=4,
        mlp_only_layers=[0],
    )
    path = saved(tmp_path / "model", transformers.Qwen3MoeForCausalLM, config)
    with pytest.raises(halve.core.errors.ConfigError, match="ranked by bytes"):
        halve.optimize(path, tmp_path / "out", max_quality_loss="2%", slo="ttft=1s", calibration=text, method="clip")


def test_a_bundle_of_fewer_experts_is_counted_by_what_it_has(sparse, tmp_path):
    groups = tuple(ExpertGroup(members=(e,), weights=(1.0,)) for e in (0, 2, 3))
    plan = ExpertPlan(layers=(LayerExperts(layer=0, groups=groups),))
    with open_checkpoint(sparse) as original:
        config = load_config(original)
        write_shrunk(original, CheckpointSource(original), config, plan, tmp_path / "fewer")
        with open_checkpoint(tmp_path / "fewer") as fewer:
            assert load_config(fewer).layers[0].experts.num_experts == 3
            assert 0.9 < _bytes_ratio(fewer, original) < 1  # a token still runs through two; the router has fewer rows
            formats, reads = _formats(fewer)
            assert formats["layers.0.down"] == "bf16"
            assert (reads["layers.0.down"].top_k, len(reads["layers.0.down"].own)) == (2, 3)
