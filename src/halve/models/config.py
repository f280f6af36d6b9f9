"""What a model computes, as data: `ModelConfig` from a Hugging Face config.json, strict about what it does not know.

A key that this reader does not know is an error that names it, since a newer model run by an older formula gives
wrong text without a sign. Sources: arXiv:2307.09288 (Llama 2), arXiv:2407.21783 (Llama 3), arXiv:2401.04088 (Mixtral),
arXiv:2407.10671 (Qwen2), arXiv:2505.09388 (Qwen3), arXiv:2409.02060 (OLMoE), and transformers' configurations of them.
Families that compute more are in `families.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from halve.core.errors import ConfigError
from halve.models import families
from halve.models.fields import count, flag, number, read_rope, routed
from halve.models.spec import Experts, Latent, LayerSpec, ModelConfig, Rope

__all__ = ["ARCHITECTURES", "Experts", "Latent", "LayerSpec", "ModelConfig", "Rope", "read_config"]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a family's config.json has beside the keys of all.

    keys: that are read. ignored: that say nothing here. attention_bias: the key of the bias of queries, keys and
    values and its default; output_bias: whether the output has it, too. experts: of a layer. fixed: keys that are
    computed with one value only. finish: what a family computes beside what all do.
    """

    keys: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    attention_bias: tuple[str, bool] = ("attention_bias", False)
    output_bias: bool = True
    qk_norm: Literal["head", "row"] | None = None
    experts: Callable[[Mapping[str, Any], int], Experts | None] = lambda raw, index: None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Mapping[str, Any], ModelConfig], ModelConfig] = lambda raw, config: config


def _mixtral(raw: Mapping[str, Any], index: int) -> Experts:
    return Experts(
        **routed(raw, ("num_local_experts",)),
        intermediate_size=count(raw, "intermediate_size"),
        renormalize=True,
        names="block_sparse_moe",
    )


def _olmoe(raw: Mapping[str, Any], index: int) -> Experts:
    return Experts(
        **routed(raw, ("num_experts", "num_local_experts")),
        intermediate_size=count(raw, "intermediate_size"),
        renormalize=flag(raw, "norm_topk_prob"),
    )


def _qwen(raw: Mapping[str, Any], index: int) -> Experts | None:
    """Every decoder_sparse_step-th layer that is not in mlp_only_layers."""
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in dense):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}; expected a list of whole numbers")
    if index in dense or (index + 1) % count(raw, "decoder_sparse_step", 1):
        return None
    return Experts(
        **routed(raw, ("num_experts", "num_local_experts")),
        intermediate_size=count(raw, "moe_intermediate_size"),
        renormalize=flag(raw, "norm_topk_prob"),
        shared_size=count(raw, "shared_expert_intermediate_size") if "shared_expert_intermediate_size" in raw else 0,
    )


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
    "GptOssForCausalLM": Family(
        keys=families.GPT_OSS_KEYS,
        ignored=ROUTER_HARMLESS | {"experts_per_token", "initial_context_length"},
        attention_bias=("attention_bias", True),
        finish=families.gpt_oss,
    ),
    "DeepseekV2ForCausalLM": Family(
        keys=families.DEEPSEEK_KEYS,
        ignored=ROUTER_HARMLESS | families.DEEPSEEK_IGNORED,
        fixed=families.DEEPSEEK_V2_FIXED,
        finish=families.deepseek_v2,
    ),
    "DeepseekV3ForCausalLM": Family(
        keys=families.DEEPSEEK_KEYS | {"num_nextn_predict_layers", "rope_interleave"},
        ignored=ROUTER_HARMLESS | families.DEEPSEEK_IGNORED,
        fixed=families.DEEPSEEK_V3_FIXED,
        finish=families.deepseek_v3,
    ),
    "Llama4ForCausalLM": Family(
        keys=families.LLAMA4_KEYS,
        ignored=ROUTER_HARMLESS | {"for_llm_compression"},
        finish=families.llama4,
    ),
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
    known = READ_KEYS | HARMLESS_KEYS | FIXED_KEYS.keys() | family.keys | family.ignored | family.fixed.keys()
    unknown = sorted(k for k, v in raw.items() if k not in known and v is not None and not k.startswith("_"))
    if unknown:
        raise ConfigError(
            f"config.json: unknown keys {unknown}: they may change what the model computes, so it is not run. "
            "If you know that they do not, remove them from a copy of config.json"
        )
    for key, value in {**FIXED_KEYS, **family.fixed}.items():
        if key in family.keys:
            continue
        if key == "sliding_window" and raw.get("use_sliding_window") is False:
            continue  # a size that is not used
        if raw.get(key) not in (None, value):
            raise ConfigError(f"config.json: {key} is {raw[key]!r}; only {value!r} is computed here")
    layer_types = raw.get("layer_types")
    if (
        "layer_types" not in family.keys
        and layer_types is not None
        and any(kind != "full_attention" for kind in layer_types)
    ):
        raise ConfigError(f"config.json: layer_types {layer_types!r:.80}; only 'full_attention' is computed here")
    sizes = _read_sizes(raw)
    rope = read_rope(raw)
    bias, default = family.attention_bias
    attention_bias = flag(raw, bias) if raw.get(bias) is not None else default
    config = ModelConfig(
        architecture=architectures[0],
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tied=flag(raw, "tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=None if family.output_bias else False,
        mlp_bias=flag(raw, "mlp_bias"),
        layers=tuple(
            LayerSpec(rope=rope, experts=family.experts(raw, index), qk_norm=family.qk_norm)
            for index in range(_read_num_layers(raw))
        ),
        **sizes,
    )
    return family.finish(raw, config)


def _read_num_layers(raw: Mapping[str, Any]) -> int:
    num_layers = count(raw, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers is {num_layers}; at most {MAX_LAYERS} can be run")
    return num_layers


def _read_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = count(raw, "hidden_size"), count(raw, "num_attention_heads")
    kv_heads = count(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} does not divide hidden_size {hidden}; give head_dim"
        )
    head_dim = count(raw, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary positions need pairs")
    return {
        "hidden_size": hidden,
        "intermediate_size": count(raw, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": count(raw, "vocab_size"),
        "context": count(raw, "max_position_embeddings"),
    }
