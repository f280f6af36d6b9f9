"""Families whose layers are more than attention with rotary positions and experts under a softmax, from config.json.

Each function takes what `config.read_config` made of the keys that all families share and returns what the family
computes. Sources: arXiv:2508.10925 (gpt-oss), arXiv:2405.04434 (DeepSeek-V2), arXiv:2412.19437 (DeepSeek-V3), and
transformers' models of these and of Llama 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from halve.core.errors import ConfigError
from halve.models.fields import count, flag, number, rope_object, routed, yarn_mscale
from halve.models.spec import Experts, Latent, LayerSpec, ModelConfig

GPT_OSS_KEYS = frozenset(
    "num_local_experts num_experts num_experts_per_tok sliding_window layer_types swiglu_alpha swiglu_limit".split()
)
DEEPSEEK_KEYS = frozenset(
    """
    n_routed_experts num_local_experts num_experts num_experts_per_tok n_shared_experts moe_intermediate_size
    first_k_dense_replace norm_topk_prob routed_scaling_factor n_group topk_group topk_method kv_lora_rank q_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim
    """.split()
)
DEEPSEEK_IGNORED = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "layer_types"})
DEEPSEEK_V2_FIXED: Mapping[str, Any] = {
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "rope_interleave": True,
    "mlp_bias": False,
}
DEEPSEEK_V3_FIXED: Mapping[str, Any] = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "mlp_bias": False}
LLAMA4_KEYS = frozenset(
    """
    intermediate_size_mlp moe_layers interleave_moe_layer_step use_qk_norm no_rope_layers no_rope_layer_interval
    attention_chunk_size layer_types attn_temperature_tuning floor_scale attn_scale num_local_experts num_experts
    num_experts_per_tok
    """.split()
)


def gpt_oss(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Sinks, a sliding window in every other layer, experts with biases and clamped gates, a router with a bias."""
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(config.num_layers)]
    kinds = _per_layer(raw, "layer_types", default, ("sliding_attention", "full_attention"))
    experts = Experts(
        **routed(raw, ("num_local_experts", "num_experts")),
        intermediate_size=config.intermediate_size,
        renormalize=True,  # of a softmax over all, which is the softmax over the chosen
        router_bias=True,
        bias=True,
        clamp=(number(raw, "swiglu_alpha", 1.702), number(raw, "swiglu_limit", 7.0)),
        router_name="router",
        stacked=True,
    )
    window = count(raw, "sliding_window", 128)
    layers = tuple(
        replace(layer, sinks=True, experts=experts, window=window if kind == "sliding_attention" else None)
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    return replace(config, layers=layers)


def deepseek_v2(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Latent attention, shared experts, softmax scores, of the best groups of experts where topk_method says so."""
    method = raw.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"config.json: topk_method is {method!r}; only greedy and group_limited_greedy are computed")
    if flag(raw, "norm_topk_prob"):
        raise ConfigError("config.json: norm_topk_prob is True; of DeepSeek-V2 only False is computed here")
    experts = _deepseek_experts(raw, grouped=method == "group_limited_greedy")
    return _deepseek(raw, config, experts, interleaved=True)


def deepseek_v3(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Latent attention, shared experts, sigmoid scores, corrected by a stored bias and limited to the best groups."""
    if raw.get("topk_method") not in (None, "noaux_tc"):
        raise ConfigError(
            f"config.json: topk_method is {raw['topk_method']!r}; of DeepSeek-V3 only noaux_tc is computed"
        )
    experts = replace(
        _deepseek_experts(raw, grouped=True),
        scores="sigmoid",
        correction=True,
        group_score="two",
        renormalize=flag(raw, "norm_topk_prob", default=True),
    )
    if experts.num_experts // experts.num_groups < 2:
        raise ConfigError(
            f"config.json: n_group {experts.num_groups} leaves one of {experts.num_experts} experts to a group; a "
            "group is chosen by its best two"
        )
    found = _deepseek(raw, config, experts, interleaved=flag(raw, "rope_interleave", default=True))
    return replace(found, surplus_layers=_whole(raw, "num_nextn_predict_layers", 0))


def _deepseek_experts(raw: Mapping[str, Any], *, grouped: bool) -> Experts:
    found = routed(raw, ("n_routed_experts", "num_local_experts", "num_experts"))
    num_groups, top_groups = (count(raw, "n_group"), count(raw, "topk_group")) if grouped else (1, 1)
    experts, top_k = found["num_experts"], found["top_k"]
    if experts % num_groups or top_groups > num_groups:
        raise ConfigError(
            f"config.json: n_group {num_groups} must divide n_routed_experts {experts}, and topk_group {top_groups} be "
            "no more than n_group"
        )
    if top_k > experts // num_groups * top_groups:
        raise ConfigError(
            f"config.json: num_experts_per_tok {top_k} is above the {experts // num_groups * top_groups} experts of "
            f"topk_group {top_groups} of n_group {num_groups} groups"
        )
    width = count(raw, "moe_intermediate_size")
    return Experts(
        **found,
        intermediate_size=width,
        renormalize=False,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=number(raw, "routed_scaling_factor", 1.0),
        shared_size=width * _whole(raw, "n_shared_experts", 0),
        shared_gate=False,
        shared_name="shared_experts",
    )


def _deepseek(raw: Mapping[str, Any], config: ModelConfig, experts: Experts, *, interleaved: bool) -> ModelConfig:
    latent = Latent(
        query_rank=None if raw.get("q_lora_rank") is None else count(raw, "q_lora_rank"),
        kv_rank=count(raw, "kv_lora_rank"),
        plain_dim=count(raw, "qk_nope_head_dim"),
        rope_dim=count(raw, "qk_rope_head_dim"),
        value_dim=count(raw, "v_head_dim"),
    )
    head_dim = latent.plain_dim + latent.rope_dim
    if latent.rope_dim % 2:
        raise ConfigError(f"config.json: qk_rope_head_dim {latent.rope_dim} is odd; rotary positions need pairs")
    if latent.value_dim > head_dim:
        raise ConfigError(
            f"config.json: v_head_dim {latent.value_dim} is above the {head_dim} of qk_nope_head_dim and "
            "qk_rope_head_dim; values are kept in rows as wide as keys"
        )
    if config.num_kv_heads != config.num_heads:
        raise ConfigError(
            f"config.json: num_key_value_heads {config.num_kv_heads} differs from num_attention_heads "
            f"{config.num_heads}; every head has keys and values of its own here"
        )
    if config.attention_bias and latent.query_rank is None:
        raise ConfigError("config.json: attention_bias is True without q_lora_rank; only False is computed there")
    dense = _whole(raw, "first_k_dense_replace", 0)
    if dense >= config.num_layers:
        raise ConfigError(
            f"config.json: first_k_dense_replace {dense} leaves none of {config.num_layers} layers to experts"
        )
    name, scaling = rope_object(raw)
    query_scale = 1.0
    if scaling.get("rope_type", scaling.get("type", "default")) != "default" and scaling.get("mscale_all_dim"):
        query_scale = yarn_mscale(number(scaling, "factor", None), number(scaling, "mscale_all_dim", None)) ** 2

    def finished(layer: LayerSpec, index: int) -> LayerSpec:
        assert layer.rope is not None, name
        return replace(
            layer,
            rope=replace(layer.rope, interleaved=interleaved),
            query_scale=query_scale,
            experts=experts if index >= dense else None,
        )

    layers = tuple(finished(layer, i) for i, layer in enumerate(config.layers))
    return replace(config, layers=layers, latent=latent, head_dim=head_dim, output_bias=config.attention_bias)


def llama4(raw: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Positions in most layers and attention in chunks there, one expert a token weighed by a sigmoid, one shared."""
    num_layers = config.num_layers
    interval, step = count(raw, "no_rope_layer_interval", 4), count(raw, "interleave_moe_layer_step", 1)
    default = [int((i + 1) % interval != 0) for i in range(num_layers)]
    rotated = _per_layer(
        {**raw, "no_rope_layers": raw.get("no_rope_layers") or None}, "no_rope_layers", default, (0, 1)
    )
    default_kinds = ["chunked_attention" if r else "full_attention" for r in rotated]
    kinds = _per_layer(raw, "layer_types", default_kinds, ("chunked_attention", "full_attention"))
    sparse = raw.get("moe_layers")
    sparse = list(range(step - 1, num_layers, step)) if sparse is None else sparse
    if not isinstance(sparse, list) or not sparse or any(i not in range(num_layers) for i in sparse):
        raise ConfigError(f"config.json: moe_layers is {sparse!r:.80}; expected some of layers 0 to {num_layers - 1}")
    experts = Experts(
        **routed(raw, ("num_local_experts", "num_experts")),
        intermediate_size=count(raw, "intermediate_size"),
        renormalize=False,
        scores="sigmoid",
        weigh="input",
        shared_size=count(raw, "intermediate_size"),
        shared_gate=False,
        names="feed_forward",
        router_name="router",
        stacked=True,
    )
    chunk = count(raw, "attention_chunk_size") if "chunked_attention" in kinds else None
    normed = flag(raw, "use_qk_norm", default=True)
    tuned = flag(raw, "attn_temperature_tuning", default=True)
    temperature = (float(count(raw, "floor_scale", 8192)), number(raw, "attn_scale", 0.1)) if tuned else None

    def finished(layer: LayerSpec, index: int) -> LayerSpec:
        assert layer.rope is not None
        return replace(
            layer,
            rope=replace(layer.rope, interleaved=True) if rotated[index] else None,
            chunk=chunk if kinds[index] == "chunked_attention" else None,
            qk_norm="after" if normed and rotated[index] else None,
            temperature=None if rotated[index] else temperature,
            experts=experts if index in sparse else None,
        )

    layers = tuple(finished(layer, i) for i, layer in enumerate(config.layers))
    width = count(raw, "intermediate_size_mlp", 16384)
    return replace(config, layers=layers, intermediate_size=width, dense_name="feed_forward")


def _per_layer(raw: Mapping[str, Any], key: str, default: list[Any], allowed: Sequence[Any]) -> list[Any]:
    """One of `allowed` for each layer. Raises ConfigError."""
    found = raw.get(key)
    if found is None:
        return default
    if not isinstance(found, list) or len(found) != len(default) or any(one not in allowed for one in found):
        raise ConfigError(
            f"config.json: {key} is {found!r:.80}; expected one of {', '.join(map(str, allowed))} for each of "
            f"{len(default)} layers"
        )
    return found


def _whole(raw: Mapping[str, Any], key: str, default: int) -> int:
    """A count that may be zero."""
    return (
        0 if raw.get(key) == 0 and not isinstance(raw.get(key), bool) else count(raw, key) if raw.get(key) else default
    )
