"""config.json to what is computed: what can't be run as it says is refused by key, value and rule."""

import json

import pytest
from transformers import LlamaConfig

from halve.core.errors import ConfigError
from halve.models import ModelConfig, read_config
from halve.models.config import MAX_LAYERS, Experts, LayerSpec, Rope

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# config.json of the Hub, word for word as published.
LLAMA_2_7B = """{
  "_name_or_path": "meta-llama/Llama-2-7b-hf",
  "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
  "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
  "use_cache": true, "vocab_size": 32000
}"""
LLAMA_3_8B = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.40.0.dev0", "use_cache": true, "vocab_size": 128256
}"""
LLAMA_31_8B = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256
}"""
LLAMA_32_1B = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256
}"""
TINY_LLAMA = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
  "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
  "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.35.0", "use_cache": true, "vocab_size": 32000
}"""
PLAIN_ROPE = Rope(theta=10000.0)
ROPE_8 = Rope(
    theta=500000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
)
ROPE_32 = Rope(
    theta=500000.0, kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
)


def model(hidden, inner, layers, heads, kv_heads, head_dim, vocab, context, rope, *, tied=False):
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        context=context,
        rms_norm_eps=1e-5,
        tied=tied,
        attention_bias=False,
        mlp_bias=False,
        layers=(LayerSpec(rope=rope),) * layers,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LLAMA_2_7B, model(4096, 11008, 32, 32, 32, 128, 32000, 4096, PLAIN_ROPE)),
        (LLAMA_3_8B, model(4096, 14336, 32, 32, 8, 128, 128256, 8192, Rope(theta=500000.0))),
        (LLAMA_31_8B, model(4096, 14336, 32, 32, 8, 128, 128256, 131072, ROPE_8)),
        (LLAMA_32_1B, model(2048, 8192, 16, 32, 8, 64, 128256, 131072, ROPE_32, tied=True)),
        (TINY_LLAMA, model(2048, 5632, 22, 32, 4, 64, 32000, 2048, PLAIN_ROPE)),
    ],
    ids=["Llama-2-7B", "Llama-3-8B", "Llama-3.1-8B", "Llama-3.2-1B", "TinyLlama"],
)
def test_published_configurations_are_read_to_their_sizes(text, expected):
    config = read_config(json.loads(text))
    assert config == expected
    assert config.num_layers == len(expected.layers)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
        {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_what_transformers_writes_today_is_read(rope):
    written = LlamaConfig(rope_parameters=dict(rope), architectures=["LlamaForCausalLM"], head_dim=128).to_dict()
    read = read_config(written).layers[0].rope
    assert (read.kind, read.theta) == (rope["rope_type"], rope["rope_theta"])
    assert read.factor == rope.get("factor", 1.0)


def test_what_is_left_out_takes_transformers_defaults():
    config = read_config({k: v for k, v in SMALL.items() if k != "rms_norm_eps"})
    theirs = LlamaConfig()
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert (config.tied, config.attention_bias, config.mlp_bias) == (
        theirs.tie_word_embeddings,
        theirs.attention_bias,
        theirs.mlp_bias,
    )
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.layers[0].rope == Rope(theta=theirs.rope_parameters["rope_theta"])


def test_flags_and_head_dim_are_read():
    config = read_config(
        {
            **SMALL,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        }
    )
    assert (config.tied, config.attention_bias, config.mlp_bias) == (True, True, True)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (3, 1, 10)


@pytest.mark.parametrize(
    "architectures", [["MistralForCausalLM"], [], None, "LlamaForCausalLM", ["LlamaForCausalLM"] * 2, [["x"]]]
)
def test_another_architecture_is_named_with_what_works(architectures):
    with pytest.raises(ConfigError, match=r"architectures .* can't be run; this Halve runs LlamaForCausalLM") as caught:
        read_config({**SMALL, "architectures": architectures})
    assert repr(architectures) in str(caught.value)


@pytest.mark.parametrize("key", ["partial_rotary_factor", "logit_scale", "attn_logit_softcapping", "Hidden_size", ""])
def test_a_key_that_may_change_the_computation_is_named(key):
    with pytest.raises(ConfigError, match=rf"unknown keys \['{key}'\]: they may change what the model computes"):
        read_config({**SMALL, key: 0.5})


def test_every_unknown_key_is_named_at_once():
    with pytest.raises(ConfigError, match=r"unknown keys \['a', 'b'\]"):
        read_config({**SMALL, "b": 1, "a": False})


def test_keys_of_no_value_and_private_keys_pass():
    assert read_config({**SMALL, "logit_scale": None, "_attn_implementation": "eager", "_": 1}) == read_config(SMALL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("pruned_heads", {"0": [1]}),
        ("tie_encoder_decoder", True),
    ],
)
def test_a_value_that_is_not_computed_here_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} is .*; only .* is computed here") as caught:
        read_config({**SMALL, key: value})
    assert repr(value) in str(caught.value)


COUNTS = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
]


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2**31, 10**400, 4.0, "4", True, [4], {}])
def test_a_count_that_is_no_whole_number_above_zero_is_named(key, value):
    with pytest.raises(ConfigError, match=f"{key} is .*; expected a whole number above zero"):
        read_config({**SMALL, key: value})


@pytest.mark.parametrize("key", [k for k in COUNTS if k not in ("num_key_value_heads", "head_dim")])
def test_a_missing_size_is_named(key):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        read_config({k: v for k, v in SMALL.items() if k != key})


def test_a_damaged_number_of_layers_takes_no_memory():
    with pytest.raises(ConfigError, match=f"num_hidden_layers is 2147483647; at most {MAX_LAYERS} can be run"):
        read_config({**SMALL, "num_hidden_layers": 2**31 - 1})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 10**400, "1e-5", True, []])
def test_a_number_that_is_not_finite_and_above_zero_is_named(key, value):
    with pytest.raises(ConfigError, match=f"{key} is .*; expected a finite number above zero"):
        read_config({**SMALL, key: value})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_a_flag_that_is_neither_true_nor_false_is_named(key, value):
    with pytest.raises(ConfigError, match=f"{key} is .*; expected true or false"):
        read_config({**SMALL, key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8 does not divide num_attention_heads 4"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 64; give head_dim"),
        ({"num_attention_heads": 128}, "num_attention_heads 128 does not divide hidden_size 64; give head_dim"),
        ({"head_dim": 15}, "head_dim 15 is odd; rotary positions need pairs"),
        ({"hidden_size": 60}, "head_dim 15 is odd"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**SMALL, **change})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_rope_is_read_in_every_spelling(key, word):
    def rope(**scaling):
        return read_config({**SMALL, "rope_theta": 5e5, key: scaling}).layers[0].rope

    assert rope(**{word: "default"}) == Rope(theta=5e5)
    assert rope(**{word: "linear", "factor": 2}) == Rope(theta=5e5, kind="linear", factor=2.0)
    assert rope(**{word: "llama3"}, **LLAMA3) == ROPE_8
    assert rope(**{word: "default", "rope_theta": 7}) == Rope(theta=7.0)
    assert rope(**{word: "default", "rope_theta": None}) == Rope(theta=5e5)
    assert rope() == Rope(theta=5e5)


def test_both_spellings_of_rope_may_stand_side_by_side_when_they_agree():
    linear = {"rope_type": "linear", "factor": 2.0}
    both = {**SMALL, "rope_scaling": linear, "rope_parameters": dict(linear)}
    assert read_config(both).layers[0].rope.factor == 2.0
    assert read_config({**SMALL, "rope_scaling": {"type": "linear", **linear}}).layers[0].rope.factor == 2.0


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic"}, "type 'dynamic' can't be run; known types are default, linear, llama3, yarn"),
        ({"rope_type": "yarn", "factor": 4.0}, r"of type 'yarn' misses \['original_max_position_embeddings'\]"),
        ({"rope_type": None}, "type None can't be run"),
        ({"type": ["linear"]}, r"type \['linear'\] can't be run"),
        ({"rope_type": "linear", "type": "default"}, "has rope_type 'linear' and type 'default'; keep one of them"),
        ({"rope_type": "linear", "factor": 2, "beta": 1}, r"unknown keys \['beta'\] for type 'linear'; known are \['f"),
        ({"rope_type": "default", "factor": 2}, r"unknown keys \['factor'\] for type 'default'"),
        ({"rope_type": "linear"}, r"of type 'linear' misses \['factor'\]"),
        ({"rope_type": "llama3", "factor": 8}, r"misses \['high_freq_factor', 'low_freq_factor', 'original_max_posi"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, r"high_freq_factor 1\.0 must be above low"),
        ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192.0}, "expected a whole number"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'; expected a finite number above zero"),
        ({"rope_type": "linear", "factor": None}, "factor is None; expected a finite number above zero"),
        ("linear", "rope_scaling is 'linear'; expected an object"),
        ([], r"rope_scaling is \[\]; expected an object"),
    ],
)
def test_rope_that_can_not_be_run_as_it_says_is_refused(scaling, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**SMALL, "rope_scaling": scaling})


def test_two_ropes_that_differ_are_refused():
    with pytest.raises(ConfigError, match="rope_parameters and rope_scaling differ; remove the one"):
        read_config(
            {
                **SMALL,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            }
        )


def test_a_cache_format_is_set_in_every_layer():
    config = read_config(SMALL)
    assert {layer.kv_format for layer in config.layers} == {"bf16"}
    assert {layer.kv_format for layer in config.with_kv_format("fp32").layers} == {"fp32"}


def test_layers_are_values_that_can_be_compared():
    assert LayerSpec(experts=Experts(num_experts=8, top_k=2, intermediate_size=64, renormalize=True)) != LayerSpec()
    assert LayerSpec(window=4) == LayerSpec(window=4)
