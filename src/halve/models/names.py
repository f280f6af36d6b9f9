"""The name map: which tensors a model has, and which of them are fused. Search, kernels and files all read it here.

A fused group is what engines multiply in one product (q/k/v, gate/up), so its members share their input, and other
engines want them in one format.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from halve.models.config import ModelConfig

Kind = Literal["qkv", "o", "gate_up", "down", "lm_head"]
EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A matrix of the checkpoint: `name`.weight of `shape` [out, in], with `name`.bias [out] if `bias`."""

    name: str
    shape: tuple[int, int]
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedGroup:
    """Matrices that share their input and run as one product."""

    name: str  # "layers.0.qkv", "lm_head"
    kind: Kind
    layer: int | None
    members: tuple[Module, ...]


def layer_groups(config: ModelConfig, layer: int) -> dict[Kind, FusedGroup]:
    """The four products of one dense layer, in the order they run."""
    prefix = f"model.layers.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def group(kind: Kind, block: str, bias: bool, **shapes: tuple[int, int]) -> FusedGroup:
        members = tuple(Module(name=f"{prefix}.{block}.{n}", shape=s, bias=bias) for n, s in shapes.items())
        return FusedGroup(name=f"layers.{layer}.{kind}", kind=kind, layer=layer, members=members)

    attention = ("self_attn", config.attention_bias)
    mlp = ("mlp", config.mlp_bias)
    return {
        "qkv": group("qkv", *attention, q_proj=(queries, hidden), k_proj=(keys, hidden), v_proj=(keys, hidden)),
        "o": group("o", *attention, o_proj=(hidden, queries)),
        "gate_up": group("gate_up", *mlp, gate_proj=(inner, hidden), up_proj=(inner, hidden)),
        "down": group("down", *mlp, down_proj=(hidden, inner)),
    }


def head_group(config: ModelConfig) -> FusedGroup:
    """The last product; of a tied model, the embedding table itself."""
    name = EMBEDDING if config.tied else LM_HEAD
    module = Module(name=name, shape=(config.vocab_size, config.hidden_size))
    return FusedGroup(name="lm_head", kind="lm_head", layer=None, members=(module,))


def groups(config: ModelConfig) -> Iterator[FusedGroup]:
    """Every fused group in the order it runs; the embedding of an untied model is no product and not among them."""
    for layer in range(config.num_layers):
        yield from layer_groups(config, layer).values()
    yield head_group(config)


def modules(config: ModelConfig) -> Iterator[Module]:
    """Every matrix of the checkpoint, the embedding table first."""
    yield Module(name=EMBEDDING, shape=(config.vocab_size, config.hidden_size))
    for group in groups(config):
        if not (config.tied and group.kind == "lm_head"):
            yield from group.members


def layer_norms(layer: int) -> tuple[str, str]:
    """Gains before attention and before the feed-forward."""
    return (
        f"model.layers.{layer}.input_layernorm.weight",
        f"model.layers.{layer}.post_attention_layernorm.weight",
    )


def sinks_name(layer: int) -> str:
    """Attention sinks, one logit a head."""
    return f"model.layers.{layer}.self_attn.sinks"


def vectors(config: ModelConfig) -> Iterator[tuple[str, tuple[int]]]:
    """Every float vector of the checkpoint, norm gains and biases, with its shape."""
    for layer in range(config.num_layers):
        for name in layer_norms(layer):
            yield name, (config.hidden_size,)
        if config.layers[layer].sinks:
            yield sinks_name(layer), (config.num_heads,)
    yield FINAL_NORM, (config.hidden_size,)
    for module in modules(config):
        if module.bias:
            yield f"{module.name}.bias", (module.shape[0],)


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model; a tied table counts once."""
    return sum(m.shape[0] * m.shape[1] for m in modules(config)) + sum(shape[0] for _, shape in vectors(config))
