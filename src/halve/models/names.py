"""The name map: which tensors a model has, and which of them are fused. Search, kernels and files all read it here.

A fused group is what engines multiply in one product (q/k/v, gate/up), so its members share their input, and other
engines want them in one format.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from halve.models.config import ModelConfig

Kind = Literal["qkv", "q_b", "kv_b", "o", "gate_up", "down", "shared_gate_up", "shared_down", "lm_head"]
EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A matrix of the checkpoint: `name`.weight of `shape` [out, in], with `name`.bias [out] if `bias`.

    expert: of its layer, None for one that every token meets.
    """

    name: str
    shape: tuple[int, int]
    bias: bool = False
    expert: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedGroup:
    """Matrices that share their input and run as one product; or those of all experts of a layer, each with its rows.

    All experts of a layer are one group, which mostly is stored alike; `of_expert` is one expert's part, `of_experts`
    that of some which are stored in another way than the rest.
    """

    name: str  # "layers.0.qkv", "lm_head"
    kind: Kind
    layer: int | None
    members: tuple[Module, ...]

    def of_expert(self, expert: int) -> "FusedGroup":
        """The part of one expert, as it is multiplied; its name is the group's with the expert's number."""
        members = tuple(m for m in self.members if m.expert == expert)
        return replace(self, name=f"{self.name}.{expert}", members=members)

    def of_experts(self, experts: Collection[int]) -> "FusedGroup":
        """The part of some experts, named after them: `layers.3.down[0-2,5]`. `kind_of`, `experts_of` read the name."""
        members = tuple(m for m in self.members if m.expert in experts)
        return replace(self, name=f"{self.name}[{ranges(experts, ',')}]", members=members)


def ranges(numbers: Iterable[int], between: str = ", ") -> str:
    """`0-3, 5`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return between.join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def kind_of(name: str) -> str:
    """The kind of a group, or of a part of its experts, by its name."""
    return name.rpartition(".")[2].partition("[")[0]


def experts_of(name: str) -> tuple[str, tuple[int, ...] | None]:
    """The group of a name of `FusedGroup.of_experts`, and the experts; None of a whole group's name."""
    group, bracket, inside = name.partition("[")
    if not bracket:
        return name, None
    found: list[int] = []
    for run in inside.removesuffix("]").split(","):
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    return group, tuple(found)


# How checkpoints call the parts of a sparse feed-forward: its block, then gate, up and down.
EXPERT_NAMES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe": ("w1", "w3", "w2"),
    "feed_forward": ("gate_proj", "up_proj", "down_proj"),
}


def layer_groups(config: ModelConfig, layer: int) -> dict[Kind, FusedGroup]:
    """The products of one layer, in the order they run: four, two more of a shared expert and of latent attention."""
    prefix = f"model.layers.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size

    def group(kind: Kind, block: str, bias: bool, **shapes: tuple[int, int]) -> FusedGroup:
        members = tuple(Module(name=f"{prefix}.{block}.{n}", shape=s, bias=bias) for n, s in shapes.items())
        return FusedGroup(name=f"layers.{layer}.{kind}", kind=kind, layer=layer, members=members)

    shapes = _attention_shapes(config)
    attention: dict[Kind, FusedGroup] = {
        kind: group(kind, "self_attn", bias, **members) for kind, (bias, members) in shapes.items()
    }
    experts = config.layers[layer].experts
    if experts is None:
        mlp = (config.dense_name, config.mlp_bias)
        return {
            **attention,
            "gate_up": group("gate_up", *mlp, gate_proj=(inner, hidden), up_proj=(inner, hidden)),
            "down": group("down", *mlp, down_proj=(hidden, inner)),
        }
    gate, up, down = EXPERT_NAMES[experts.names]

    def of_experts(kind: Kind, shape: tuple[int, int], *parts: str) -> FusedGroup:
        members = tuple(
            Module(name=f"{prefix}.{experts.names}.experts.{e}.{part}", shape=shape, bias=experts.bias, expert=e)
            for e in range(experts.num_experts)
            for part in parts
        )
        return FusedGroup(name=f"layers.{layer}.{kind}", kind=kind, layer=layer, members=members)

    width = experts.intermediate_size
    found: dict[Kind, FusedGroup] = {
        **attention,
        "gate_up": of_experts("gate_up", (width, hidden), gate, up),
        "down": of_experts("down", (hidden, width), down),
    }
    if shared := experts.shared_size:
        block = (f"{experts.names}.{experts.shared_name}", False)
        found["shared_gate_up"] = group("shared_gate_up", *block, gate_proj=(shared, hidden), up_proj=(shared, hidden))
        found["shared_down"] = group("shared_down", *block, down_proj=(hidden, shared))
    return found


def _attention_shapes(config: ModelConfig) -> dict[Kind, tuple[bool, dict[str, tuple[int, int]]]]:
    """Products of attention in the order they run: whether they have a bias, and each matrix by its name."""
    hidden, heads, bias = config.hidden_size, config.num_heads, config.attention_bias
    output_bias = bias if config.output_bias is None else config.output_bias
    queries, keys = heads * config.head_dim, config.num_kv_heads * config.head_dim
    if (latent := config.latent) is None:
        return {
            "qkv": (bias, {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}),
            "o": (output_bias, {"o_proj": (hidden, queries)}),
        }
    asked = (latent.query_rank, "q_a_proj") if latent.query_rank else (queries, "q_proj")
    latents = {asked[1]: (asked[0], hidden), "kv_a_proj_with_mqa": (latent.kv_rank + latent.rope_dim, hidden)}
    found: dict[Kind, tuple[bool, dict[str, tuple[int, int]]]] = {"qkv": (bias, latents)}
    if latent.query_rank:
        found["q_b"] = (False, {"q_b_proj": (queries, latent.query_rank)})
    found["kv_b"] = (False, {"kv_b_proj": (heads * (latent.plain_dim + latent.value_dim), latent.kv_rank)})
    found["o"] = (output_bias, {"o_proj": (hidden, heads * latent.value_dim)})
    return found


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


def group_pattern(config: ModelConfig, layer: int, kind: Kind) -> str:
    """Shell wildcards of the modules of a group, {} for the layer; alike for layers that are alike."""
    if kind in ("qkv", "q_b", "kv_b", "o"):
        of_latents = "*[qa]_proj*"  # q_proj or q_a_proj, and kv_a_proj_with_mqa
        leaf = (of_latents if config.latent else "[qkv]_proj") if kind == "qkv" else f"{kind}_proj"
        return f"model.layers.{{}}.self_attn.{leaf}"
    experts = config.layers[layer].experts
    if experts is None:
        return f"model.layers.{{}}.{config.dense_name}." + ("[gu]*_proj" if kind == "gate_up" else "down_proj")
    if kind.startswith("shared_"):
        leaf = "[gu]*_proj" if kind == "shared_gate_up" else "down_proj"
        return f"model.layers.{{}}.{experts.names}.{experts.shared_name}.{leaf}"
    names = ("w[13]", "w2") if experts.names == "block_sparse_moe" else ("[gu]*_proj", "down_proj")
    return f"model.layers.{{}}.{experts.names}.experts.*." + names[kind == "down"]


def layer_of(module: str) -> int:
    """The layer of a module below `model.layers.`."""
    return int(module.split(".")[2])


def layer_norms(layer: int) -> tuple[str, str]:
    """Gains before attention and before the feed-forward."""
    return (
        f"model.layers.{layer}.input_layernorm.weight",
        f"model.layers.{layer}.post_attention_layernorm.weight",
    )


def qk_norms(layer: int) -> tuple[str, str]:
    """Gains of queries and of keys."""
    return f"model.layers.{layer}.self_attn.q_norm.weight", f"model.layers.{layer}.self_attn.k_norm.weight"


def qk_norm_sizes(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Widths of both norms: a head's, or all heads'."""
    if config.layers[layer].qk_norm == "head":
        return config.head_dim, config.head_dim
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim


def router_name(config: ModelConfig, layer: int) -> str:
    """The router of a sparse layer, [experts, hidden]; it stays as it is stored."""
    experts = config.layers[layer].experts
    assert experts is not None
    return f"model.layers.{layer}.{experts.names}.{experts.router_name}.weight"


def router_vectors(config: ModelConfig, layer: int) -> dict[str, str]:
    """What a router has beside its matrix, [experts] each: its `bias`, and the `correction` of its choice."""
    experts, router = config.layers[layer].experts, router_name(config, layer).removesuffix(".weight")
    assert experts is not None
    found = {"bias": f"{router}.bias"} if experts.router_bias else {}
    return found | ({"correction": f"{router}.e_score_correction_bias"} if experts.correction else {})


def latent_norms(config: ModelConfig, layer: int) -> dict[str, tuple[str, int]]:
    """Gains of the latents, `q` where queries have one and `kv`: name and width."""
    latent, prefix = config.latent, f"model.layers.{layer}.self_attn"
    if latent is None:
        return {}
    found = {"q": (f"{prefix}.q_a_layernorm.weight", latent.query_rank)} if latent.query_rank else {}
    return found | {"kv": (f"{prefix}.kv_a_layernorm.weight", latent.kv_rank)}


def shared_gate_name(layer: int) -> str:
    """What weighs the shared expert of a sparse layer, [1, hidden]."""
    return f"model.layers.{layer}.mlp.shared_expert_gate.weight"


def sinks_name(layer: int) -> str:
    """Attention sinks, one logit a head."""
    return f"model.layers.{layer}.self_attn.sinks"


def vectors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every float tensor of the checkpoint that is never compressed, with its shape: gains, biases, routers."""
    for layer in range(config.num_layers):
        for name in layer_norms(layer):
            yield name, (config.hidden_size,)
        spec = config.layers[layer]
        if spec.sinks:
            yield sinks_name(layer), (config.num_heads,)
        for name, size in latent_norms(config, layer).values():
            yield name, (size,)
        if spec.qk_norm in ("head", "row"):
            for name, size in zip(qk_norms(layer), qk_norm_sizes(config, layer), strict=True):
                yield name, (size,)
        if spec.experts is not None:
            yield router_name(config, layer), (spec.experts.num_experts, config.hidden_size)
            for name in router_vectors(config, layer).values():
                yield name, (spec.experts.num_experts,)
            if spec.experts.shared_size and spec.experts.shared_gate:
                yield shared_gate_name(layer), (1, config.hidden_size)
    yield FINAL_NORM, (config.hidden_size,)
    for module in modules(config):
        if module.bias:
            yield f"{module.name}.bias", (module.shape[0],)


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model; a tied table counts once."""
    return sum(math.prod(m.shape) for m in modules(config)) + sum(math.prod(shape) for _, shape in vectors(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token runs through: of each sparse layer's experts `top_k`."""
    idle = 0
    for layer in config.layers:
        if (experts := layer.experts) is not None:
            width, hidden = experts.intermediate_size, config.hidden_size
            one = 3 * width * hidden + (2 * width + hidden if experts.bias else 0)
            idle += (experts.num_experts - experts.top_k) * one
    return num_parameters(config) - idle
