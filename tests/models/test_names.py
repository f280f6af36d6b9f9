"""The name map against the state dict of transformers' LlamaForCausalLM."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halve.models import read_config
from halve.models.names import LM_HEAD, groups, head_group, layer_groups, modules, num_parameters, vectors

SHAPES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "attention_biases": {"attention_bias": True},
    "all_biases_tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "grouped_heads": {"num_key_value_heads": 2, "head_dim": 24},
}


@pytest.fixture(scope="module", params=SHAPES, name="model")
def _model(request):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=128,
        **SHAPES[request.param],
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def ours(model):
    return read_config({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})


def test_names_and_shapes_are_exactly_those_of_the_state_dict(model):
    config = ours(model)
    named = {f"{m.name}.weight": m.shape for m in modules(config)} | dict(vectors(config))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied:
        del theirs[f"{LM_HEAD}.weight"]  # the table again
    assert named == theirs


def test_parameters_are_counted_as_transformers_counts_them(model):
    assert num_parameters(ours(model)) == sum(p.numel() for p in model.parameters())


def test_the_published_number_of_parameters_of_llama_2_7b_comes_out():
    config = LlamaConfig(intermediate_size=11008, num_attention_heads=32, architectures=["LlamaForCausalLM"])
    assert num_parameters(read_config(config.to_dict())) == 6_738_415_616


def test_every_module_is_in_one_group_and_members_share_their_width(model):
    config = ours(model)
    names = [m.name for group in groups(config) for m in group.members]
    assert len(names) == len(set(names)) == 3 * 7 + 1
    assert {m.name for m in modules(config)} - set(names) == (set() if config.tied else {"model.embed_tokens"})
    for group in groups(config):
        assert len({m.shape[1] for m in group.members}) == 1


def test_groups_come_in_the_order_they_run(model):
    kinds = [group.kind for group in groups(ours(model))]
    assert kinds == ["qkv", "o", "gate_up", "down"] * 3 + ["lm_head"]
    assert [g.name for g in layer_groups(ours(model), 2).values()] == [
        *("layers.2.qkv", "layers.2.o", "layers.2.gate_up", "layers.2.down")
    ]


def test_the_head_of_a_tied_model_is_its_table(model):
    config = ours(model)
    (member,) = head_group(config).members
    assert member.name == ("model.embed_tokens" if config.tied else "lm_head")
    assert not member.bias


def test_a_layer_with_sinks_has_one_logit_a_head_more(model):
    config = ours(model)
    layers = (replace(config.layers[0], sinks=True), *config.layers[1:])
    with_sinks = dict(vectors(replace(config, layers=layers)))
    assert with_sinks.items() - dict(vectors(config)).items() == {("model.layers.0.self_attn.sinks", (4,))}
