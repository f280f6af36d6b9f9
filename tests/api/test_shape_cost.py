"""A plan in layers of another shape: what is stored where, and what is added up."""

from dataclasses import replace

import pytest

from halve.api import shape_cost as module
from halve.api.progress import SILENT
from halve.formats import FORMATS
from halve.kernels import native_library
from halve.models.config import LayerSpec, ModelConfig, Rope
from halve.models.names import EMBEDDING, groups

SMALL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context=1024,
    rms_norm_eps=1e-5,
    tied=True,
    attention_bias=False,
    mlp_bias=False,
    layers=(LayerSpec(rope=Rope(theta=10000.0)),) * 4,
)


def stored(config, name):
    return {m.name: FORMATS[name] for g in groups(config) for m in g.members} | {EMBEDDING: FORMATS["int8"]}


def test_each_part_is_stored_as_the_same_part_at_the_same_depth():
    formats = stored(SMALL, "int4-g32")
    for group in groups(SMALL):
        if group.kind == "down" and group.layer >= 2:
            formats |= {m.name: FORMATS["int3-g32"] for m in group.members}
    large = replace(SMALL, layers=SMALL.layers * 2)
    found = module.mapped(formats, SMALL, large)
    downs = [found[g.members[0].name].name for g in groups(large) if g.kind == "down"]
    assert downs == ["int4-g32"] * 4 + ["int3-g32"] * 4
    assert found[EMBEDDING].name == "int8"
    narrow = replace(large, hidden_size=48, head_dim=12)  # 32 does not divide 48
    assert module.mapped(formats, SMALL, narrow)["model.layers.0.self_attn.q_proj"].name == "int8"


@pytest.mark.skipif(native_library.available() is not None, reason="the C++ kernels are not built")
def test_a_step_is_what_four_layers_take_and_the_others_like_them(monkeypatch):
    monkeypatch.setattr(module, "LLAMA_1B", replace(SMALL, layers=SMALL.layers * 4))
    monkeypatch.setattr(module, "ROUNDS", 3)
    found = module.shape_cost(stored(SMALL, "int4-g32"), SMALL, "int8", SILENT)
    assert (found.layers, found.layers_built) == (16, 4)
    assert [step.batch for step in found.steps] == [1, 8]
    assert all(0 < step.smaller_s < 1 and step.ratio.value > 0 for step in found.steps)
