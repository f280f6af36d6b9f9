"""Plans that store each fused group in a format of its own: their rules, and that all engines run them alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from halve.checkpoint import open_checkpoint
from halve.compress import Choice, Hessians, apply_plan, calibrate, grouped_plan, resolve
from halve.core.errors import PlanError
from halve.core.plan import Plan
from halve.formats import FORMATS
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, LayerSpec, ModelConfig, load_config, load_decoder
from halve.models.config import Rope
from halve.models.names import groups
from tests.api.tiny import make_model
from tests.tools import ops_under_test

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=50,
    context=64,
    rms_norm_eps=1e-5,
    tied=False,
    attention_bias=False,
    mlp_bias=False,
    layers=(LayerSpec(rope=Rope(theta=1e4)),) * 12,
)
CHOICES = [Choice(format=f, method=m) for f, m in (("int8", "rtn"), ("int4-g32", "clip"), ("int3-g32", "gptq"))]
CHOICES += [Choice(format="bf16", method=None)]


def mixed(config, choices, **options):
    return grouped_plan(config, choices, **{"portable": False, "activations": "int8", "kv_cache": "bf16", **options})


@settings(max_examples=50, deadline=None)
@given(st.data(), st.booleans())
def test_every_module_gets_its_groups_choice(data, tied):
    config = replace(CONFIG, tied=tied)
    names = [g.name for g in groups(config)] + ([] if tied else ["embedding"])
    chosen = {name: data.draw(st.sampled_from(CHOICES)) for name in names}
    plan = mixed(config, chosen)
    for a in resolve(plan, config):
        want = chosen["lm_head" if tied and a.group == "embedding" else a.group]
        assert (a.format.name, a.method) == (want.format, want.method)
    assert Plan.from_json(plan.to_json()) == plan


def test_what_most_layers_have_is_said_once():
    chosen = {g.name: CHOICES[1] for g in groups(CONFIG)}
    rules = mixed(CONFIG, chosen).weights.rules
    assert [(r.pattern, r.format) for r in rules] == [("model.layers.*", "int4-g32"), ("lm_head", "int4-g32")]
    rules = mixed(CONFIG, chosen | {"layers.3.down": CHOICES[0], "layers.11.qkv": CHOICES[2]}).weights.rules
    assert [r.pattern for r in rules] == [
        "model.layers.11.self_attn.[qkv]_proj",
        "model.layers.3.mlp.down_proj",
        "model.layers.*",
        "lm_head",
    ]


def test_a_group_without_a_choice_stays_as_it_is():
    found = resolve(mixed(CONFIG, {"layers.1.o": CHOICES[0]}), CONFIG)
    assert [a.module.name for a in found if a.format] == ["model.layers.1.self_attn.o_proj"]


def test_a_name_that_is_no_group_is_refused():
    with pytest.raises(PlanError, match=r"choices: \['layers.12.o'\] are no groups of this model"):
        mixed(CONFIG, {"layers.12.o": CHOICES[0]})
    with pytest.raises(PlanError, match="embedding"):
        mixed(replace(CONFIG, tied=True), {"embedding": CHOICES[0]})


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """A mixed bundle, native and portable: other formats in other layers, one group left in bf16."""
    source = make_model(tmp_path_factory.mktemp("source") / "m")
    found = {}
    for portable in (False, True):
        out = tmp_path_factory.mktemp("mixed")
        with open_checkpoint(source) as checkpoint:
            config = load_config(checkpoint)
            hessians = Hessians(folder=tmp_path_factory.mktemp("hessians"))
            text = [np.random.default_rng(i).integers(2, config.vocab_size, 60).astype(np.int32) for i in range(10)]
            energies = calibrate(config, CheckpointSource(checkpoint), text, window_tokens=64, hessians=hessians)
            names = [g.name for g in groups(config)]
            formats = ["int4-g32", "int8", "int3-g64" if not portable else "int4-g64", "bf16", "int8-g32"]
            chosen = {
                name: Choice(format=f, method="gptq" if FORMATS[f].scaled else None)
                for name, f in zip(names, formats * 2, strict=False)
            }
            activations, kv_cache = ("fp32", "fp32") if portable else ("int8", "bf16")
            plan = grouped_plan(config, chosen, portable=portable, activations=activations, kv_cache=kv_cache)
            apply_plan(checkpoint, config, plan, out, energies=energies, hessians=hessians)
        found[portable] = out, plan, len(set(chosen.values()))
    return found


@pytest.mark.parametrize("portable", [False, True])
def test_native_and_reference_kernels_run_a_mixed_bundle_alike(made, portable):
    out, plan, num_formats = made[portable]
    assert num_formats >= 4
    batch = TokenBatch.whole([np.arange(2, 40, dtype=np.int32)])
    logits = []
    with open_checkpoint(out) as checkpoint:
        config = load_config(checkpoint, plan)
        for make in ops_under_test():
            ops = type(make())(activations=plan.activations.format)
            decoder = load_decoder(checkpoint, config, ops)
            logits.append(ops.to_host(decoder.logits(decoder.hidden(batch))))
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=2e-2 if plan.activations.format == "int8" else 1e-4)


@pytest.mark.filterwarnings("ignore")  # of the peer's, about its own internals
def test_transformers_reads_a_portable_mixed_bundle(made):
    out, plan, _ = made[True]
    tokens = np.arange(2, 60)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens[None])).logits[0].numpy()
    with open_checkpoint(out) as checkpoint:
        decoder = load_decoder(checkpoint, load_config(checkpoint, plan), TorchOps())
        found = decoder.logits(decoder.hidden(TokenBatch.whole([tokens.astype(np.int32)]))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)
