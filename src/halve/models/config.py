"""What a model computes, as data: `ModelConfig` from a Hugging Face config.json, strict about what it does not know.

A key that this reader does not know is an error that names it, since a newer model run by an older formula gives
wrong text without a sign. Sources: arXiv:2307.09288 (Llama 2), arXiv:2407.21783 (Llama 3), arXiv:2401.04088 (Mixtral),
arXiv:2407.10671 (Qwen2), arXiv:2505.09388 (Qwen3), arXiv:2409.02060 (OLMoE), and transformers' configurations of them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from halve.core.errors import ConfigError

# Keys that describe training, generation, files or bookkeeping, and change nothing in a forward pass.
HARMLESS_KEYS = frozenset(
    """
    _name_or_path architectures attention_dropout bos_token_id eos_token_id pad_token_id unk_token_id
    sep_token_id cls_token_id mask_token_id decoder_start_token_id dtype torch_dtype initializer_range
    model_type pretraining_tp quantization_config transformers_version use_cache id2label label2id
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate problem_type
    finetuning_task task_specific_params prefix tokenizer_class torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward license max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values suppress_tokens begin_suppress_tokens exponential_decay_length_penalty max_new_tokens
    auto_map unsloth_fixed unsloth_version
    """.split()
)
# Of routers: what training alone reads.
ROUTER_HARMLESS = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
# Keys that change the computation, with the only value that is computed here.
FIXED_KEYS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "sliding_window": None,
    "use_sliding_window": False,
    "clip_qkv": None,
}
MAX_LAYERS = 10_000  # far above any model, so that a damaged count takes no memory
READ_KEYS = frozenset(
    """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings
    attention_bias mlp_bias
    """.split()
)
ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions. Sources: arXiv:2104.09864; linear: arXiv:2306.15595; llama3: arXiv:2407.21783."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A sparse feed-forward: each token runs through `top_k` of `num_experts`, gated units of `intermediate_size`.

    Weights of a token's experts are the softmax over all experts' logits at the largest top_k of them, divided by their
    sum where `renormalize` says so. shared_size: inner width of an expert that every token runs through, 0 for none;
    its output is multiplied by the sigmoid of a logit of its own. names: how the checkpoint calls the parts,
    `names.EXPERT_NAMES`.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    shared_size: int = 0
    names: Literal["mlp", "block_sparse_moe"] = "mlp"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """What one layer computes; a family differs from another in these values, not in code.

    window: sliding-window attention over that many tokens, None for full. rope None: no positions in this layer.
    sinks: one more softmax logit a head. experts None: a dense feed-forward. qk_norm: an RMS norm of queries and of
    keys before positions, of each head or of all heads of a token together; None for none.
    """

    window: int | None = None
    rope: Rope | None = None
    sinks: bool = False
    experts: Experts | None = None
    qk_norm: Literal["head", "row"] | None = None
    kv_format: str = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder: sizes, and one LayerSpec a layer.

    attention_bias: of queries, keys and values; output_bias: of what attention gives, None for the same.
    intermediate_size: of dense feed-forwards.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int  # tokens; the most positions the model was made for
    rms_norm_eps: float
    tied: bool  # the embedding table is also the lm_head
    attention_bias: bool
    mlp_bias: bool
    layers: tuple[LayerSpec, ...]
    output_bias: bool | None = None
    version: int = 1

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.layers)

    @property
    def sparse(self) -> bool:
        """Whether any layer sends its tokens to experts."""
        return any(layer.experts is not None for layer in self.layers)

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers; int8 has scales of 2 bytes."""
        widths = {"fp32": 4 * self.head_dim, "bf16": 2 * self.head_dim, "int8": self.head_dim + 2, "fp8": self.head_dim}
        return sum(2 * self.num_kv_heads * widths[layer.kv_format] for layer in self.layers)

    def with_kv_format(self, kv_format: str) -> "ModelConfig":
        """The same model with every layer's cache in `kv_format`."""
        return replace(self, layers=tuple(replace(layer, kv_format=kv_format) for layer in self.layers))


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a family's config.json has beside the keys of all.

    keys: that are read. ignored: that say nothing here. attention_bias: the key of the bias of queries, keys and
    values and its default; output_bias: whether the output has it, too. sparse: which layers have experts.
    """

    keys: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    attention_bias: tuple[str, bool] = ("attention_bias", False)
    output_bias: bool = True
    qk_norm: Literal["head", "row"] | None = None
    experts: Callable[[Mapping[str, Any], int], Experts | None] = lambda raw, index: None


def _mixtral(raw: Mapping[str, Any], index: int) -> Experts:
    return Experts(
        **_routed(raw, ("num_local_experts",)),
        intermediate_size=_count(raw, "intermediate_size"),
        renormalize=True,
        names="block_sparse_moe",
    )


def _olmoe(raw: Mapping[str, Any], index: int) -> Experts:
    return Experts(
        **_routed(raw, ("num_experts", "num_local_experts")),
        intermediate_size=_count(raw, "intermediate_size"),
        renormalize=_flag(raw, "norm_topk_prob"),
    )


def _qwen(raw: Mapping[str, Any], index: int) -> Experts | None:
    """Every decoder_sparse_step-th layer that is not in mlp_only_layers."""
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in dense):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}; expected a list of whole numbers")
    if index in dense or (index + 1) % _count(raw, "decoder_sparse_step", 1):
        return None
    return Experts(
        **_routed(raw, ("num_experts", "num_local_experts")),
        intermediate_size=_count(raw, "moe_intermediate_size"),
        renormalize=_flag(raw, "norm_topk_prob"),
        shared_size=_count(raw, "shared_expert_intermediate_size") if "shared_expert_intermediate_size" in raw else 0,
    )


def _routed(raw: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    found = [name for name in names if raw.get(name) is not None]
    if not found:
        raise ConfigError(f"config.json: {' or '.join(names)} is missing")
    experts, top_k = _count(raw, found[0]), _count(raw, "num_experts_per_tok")
    if top_k > experts:
        raise ConfigError(
            f"config.json: num_experts_per_tok {top_k} is above {found[0]} {experts}; a token can't go to more experts "
            "than there are"
        )
    return {"num_experts": experts, "top_k": top_k}


_EXPERT_KEYS = frozenset({"num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob"})
_QWEN_KEYS = _EXPERT_KEYS | {"moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"}
_QWEN_IGNORED = ROUTER_HARMLESS | {"max_window_layers", "layer_types"}
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MixtralForCausalLM": Family(keys=_EXPERT_KEYS, ignored=ROUTER_HARMLESS, experts=_mixtral),
    "OlmoeForCausalLM": Family(keys=_EXPERT_KEYS, ignored=ROUTER_HARMLESS, qk_norm="row", experts=_olmoe),
    "Qwen2MoeForCausalLM": Family(
        keys=_QWEN_KEYS | {"shared_expert_intermediate_size", "qkv_bias"},
        ignored=_QWEN_IGNORED,
        attention_bias=("qkv_bias", True),
        output_bias=False,
        experts=_qwen,
    ),
    "Qwen3MoeForCausalLM": Family(keys=_QWEN_KEYS, ignored=_QWEN_IGNORED, qk_norm="head", experts=_qwen),
    # Ours alone: a Llama with biases in its attention, cut into experts by `halve sparsify`.
    "HalveMoeForCausalLM": Family(
        keys=_QWEN_KEYS | {"shared_expert_intermediate_size"}, ignored=_QWEN_IGNORED, experts=_qwen
    ),
}
ARCHITECTURES = tuple(FAMILIES)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face config.json. Raises ConfigError naming what is unknown, missing, of a wrong type or value."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise ConfigError(
            f"config.json: architectures {architectures!r} can't be run; this Halve runs {', '.join(ARCHITECTURES)}"
        )
    family = FAMILIES[architectures[0]]
    known = READ_KEYS | HARMLESS_KEYS | FIXED_KEYS.keys() | family.keys | family.ignored
    unknown = sorted(k for k, v in raw.items() if k not in known and v is not None and not k.startswith("_"))
    if unknown:
        raise ConfigError(
            f"config.json: unknown keys {unknown}: they may change what the model computes, so it is not run. "
            "If you know that they do not, remove them from a copy of config.json"
        )
    for key, value in FIXED_KEYS.items():
        if key == "sliding_window" and raw.get("use_sliding_window") is False:
            continue  # a size that is not used
        if raw.get(key) not in (None, value):
            raise ConfigError(f"config.json: {key} is {raw[key]!r}; only {value!r} is computed here")
    layer_types = raw.get("layer_types")
    if layer_types is not None and any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"config.json: layer_types {layer_types!r:.80}; only 'full_attention' is computed here")
    sizes = _read_sizes(raw)
    rope = _read_rope(raw)
    bias, default = family.attention_bias
    attention_bias = _flag(raw, bias) if raw.get(bias) is not None else default
    return ModelConfig(
        architecture=architectures[0],
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        tied=_flag(raw, "tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=None if family.output_bias else False,
        mlp_bias=_flag(raw, "mlp_bias"),
        layers=tuple(
            LayerSpec(rope=rope, experts=family.experts(raw, index), qk_norm=family.qk_norm)
            for index in range(_read_num_layers(raw))
        ),
        **sizes,
    )


def _read_num_layers(raw: Mapping[str, Any]) -> int:
    num_layers = _count(raw, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers is {num_layers}; at most {MAX_LAYERS} can be run")
    return num_layers


def _read_sizes(raw: Mapping[str, Any]) -> dict[str, int]:
    hidden, heads = _count(raw, "hidden_size"), _count(raw, "num_attention_heads")
    kv_heads = _count(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} does not divide hidden_size {hidden}; give head_dim"
        )
    head_dim = _count(raw, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary positions need pairs")
    return {
        "hidden_size": hidden,
        "intermediate_size": _count(raw, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": _count(raw, "vocab_size"),
        "context": _count(raw, "max_position_embeddings"),
    }


def _read_rope(raw: Mapping[str, Any]) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    if name == "rope_parameters" and raw.get("rope_scaling") not in (None, raw[name]):
        raise ConfigError(
            "config.json: rope_parameters and rope_scaling differ; remove the one that is not the model's"
        )
    scaling = raw.get(name)
    if scaling is None:
        scaling = {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: {name} is {scaling!r}; expected an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("type", kind) != kind:
        raise ConfigError(f"config.json: {name} has rope_type {kind!r} and type {scaling['type']!r}; keep one of them")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ConfigError(f"config.json: {name} type {kind!r} can't be run; known types are {', '.join(ROPE_KEYS)}")
    known = ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta"}
    if unknown := sorted(scaling.keys() - known):
        raise ConfigError(
            f"config.json: {name} has unknown keys {unknown} for type {kind!r}; known are {sorted(known)}"
        )
    if missing := sorted(ROPE_KEYS[kind] - scaling.keys()):
        raise ConfigError(f"config.json: {name} of type {kind!r} misses {missing}")
    theta = _number(scaling if scaling.get("rope_theta") is not None else raw, "rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta=theta)
    factor = _number(scaling, "factor", None)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=factor)
    low, high = _number(scaling, "low_freq_factor", None), _number(scaling, "high_freq_factor", None)
    if high <= low:
        raise ConfigError(f"config.json: {name}.high_freq_factor {high} must be above low_freq_factor {low}")
    original = _count(scaling, "original_max_position_embeddings")
    return Rope(
        theta=theta, kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=original
    )


def _count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ConfigError(f"config.json: {key} is {value!r}; expected a whole number above zero")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.json: {key} is {value!r}; expected a finite number above zero")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}; expected true or false")
    return bool(value)
