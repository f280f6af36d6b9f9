"""Our checkpoints as llama.cpp's files, by gguf's own writer and the order of rows that llama.cpp's converter makes."""

import json

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permuted(values, heads):
    """As convert_hf_to_gguf's `LlamaModel.permute` does it."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def write_gguf(model, path, kind="F32", *, tokens=None, keys=None, extra=None):
    """Matrices in `kind`, vectors in F32. tokens: not the tokenizer's; keys: more metadata, extra: more tensors."""
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for key, value in (keys or {}).items():
        add = {float: writer.add_float32, int: writer.add_uint16, str: writer.add_string}[type(value)]
        add(key, value)
    writer.add_tokenizer_model("gpt2")
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    named = {i: token for token, i in vocab.items()}
    writer.add_token_list(tokens or [named.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])])
    quantized = GGMLQuantizationType[kind]
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            stem = name.removesuffix(".weight")
            if stem in WHOLE:
                theirs = WHOLE[stem]
            else:
                _, _, layer, part = stem.split(".", 3)
                theirs = f"blk.{layer}.{NAMES[part]}"
            values = file.get_tensor(name).float().numpy()
            if "q_proj" in name or "k_proj" in name:
                values = permuted(values, heads if "q_proj" in name else kv_heads)
            if values.ndim == 1 or kind == "F32":
                writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(values))
            else:
                data = gguf.quants.quantize(np.ascontiguousarray(values), quantized)
                writer.add_tensor(f"{theirs}.weight", data, raw_dtype=quantized)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
