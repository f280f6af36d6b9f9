"""A GGUF file as a model: its metadata as a configuration, its tensors under our names.

llama.cpp rotates neighbouring channels of a head where Hugging Face's models rotate the two halves, so its converter
reorders the rows of queries and keys; they are put back here. Of architectures that is `llama`, dense: the others that
we run are converted in ways of their own. Source: llama.cpp, conversion of LlamaModel (`permute`, `rope_freqs`).
"""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from halve.checkpoint.gguf import GGUFFile
from halve.core.errors import CheckpointError, ConfigError
from halve.formats import Weight
from halve.kernels.ops import Array
from halve.models.config import ModelConfig, Rope, read_config
from halve.models.names import EMBEDDING, FINAL_NORM, LM_HEAD, modules, vectors
from halve.models.rope import inverse_frequencies

ARCHITECTURE = "llama"
FACTORS = "rope_freqs.weight"  # what each frequency is divided by
# The part of a name behind the layer, ours and llama.cpp's.
PARTS = {
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
WHOLE = {EMBEDDING: "token_embd", LM_HEAD: "output", FINAL_NORM.removesuffix(".weight"): "output_norm"}
# Metadata that describes the file, the tokenizer or training, or that is read elsewhere.
OTHER_KEYS = (
    *("GGUF.*", "general.*", "tokenizer.*", "quantize.*", "split.*"),
    *("llama.vocab_size", "llama.tensor_data_layout", "llama.attention.causal"),
)
READ_KEYS = frozenset(
    """
    block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.freq_base rope.scaling.type
    rope.dimension_count rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned
    expert_count expert_used_count
    """.split()
)
# Llama 3.1 and 3.2, which the file keeps as factors alone.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of ours: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration, its cache in float32. Raises CheckpointError, ConfigError naming what is not run here."""
    raw = file.metadata
    found = raw.get("general.architecture")
    if found != ARCHITECTURE:
        raise ConfigError(f"{file.path}: architecture {found!r}; of GGUF files only {ARCHITECTURE!r} is read")
    if (parts := raw.get("split.count", 1)) > 1:
        raise ConfigError(
            f"{file.path}: one of {parts} parts of a model; join them by llama.cpp's `llama-gguf-split --merge`"
        )
    if raw.get("llama.expert_count"):
        raise ConfigError(
            f"{file.path}: a sparse model ({raw['llama.expert_count']} experts); only dense ones are read"
        )
    own = {key.removeprefix("llama."): value for key, value in raw.items() if key.startswith("llama.")}
    unknown = [
        k for k in raw if not any(fnmatchcase(k, p) for p in OTHER_KEYS) and k.removeprefix("llama.") not in READ_KEYS
    ]
    if unknown:
        raise ConfigError(
            f"{file.path}: unknown metadata {sorted(unknown)}: it may change what the model computes, so it is not run"
        )
    heads, head_dim = own.get("attention.head_count"), own.get("attention.key_length")
    if own.get("attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"{file.path}: values of another length than keys are not run")
    names = file.names
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": own.get("embedding_length"),
        "intermediate_size": own.get("feed_forward_length"),
        "num_hidden_layers": own.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": file.shape(gguf_name(f"{EMBEDDING}.weight"))[0],
        "max_position_embeddings": own.get("context_length"),
        "rms_norm_eps": own.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": own.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": gguf_name(f"{LM_HEAD}.weight") not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        **_scaling(own),
    }
    try:
        read = read_config(config)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: as {error}") from error
    if FACTORS in names:
        rope = _llama3(file, read)
        read = replace(read, layers=tuple(replace(layer, rope=rope) for layer in read.layers))
    if own.get("rope.dimension_count", read.head_dim) != read.head_dim:
        raise ConfigError(
            f"{file.path}: positions in {own['rope.dimension_count']} of {read.head_dim} channels are not run"
        )
    if "blk.0.attn_q.bias" in names and "blk.0.attn_output.bias" not in names:
        read = replace(read, output_bias=False)
    _check_names(file, read)
    return read.with_kv_format("fp32")


def _scaling(own: Mapping[str, Any]) -> dict[str, Any]:
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    return {"rope_scaling": {"rope_type": kind, "factor": own.get("rope.scaling.factor")}}


def _llama3(file: GGUFFile, config: ModelConfig) -> Rope:
    """The positions whose factors the file has. Raises ConfigError for factors of another kind."""
    plain = config.layers[0].rope
    assert plain is not None
    half = config.head_dim // 2
    stored = file.values(FACTORS, (half,))
    rope = Rope(theta=plain.theta, kind="llama3", factor=float(stored.max()), **LLAMA3)  # type: ignore[arg-type]
    expected = inverse_frequencies(plain, config.head_dim) / inverse_frequencies(rope, config.head_dim)
    if plain.kind != "default" or not np.allclose(stored, expected, rtol=1e-3):
        raise ConfigError(f"{file.path}: {FACTORS}: not the factors of Llama 3.1 or 3.2; other positions are not run")
    return rope


def _check_names(file: GGUFFile, config: ModelConfig) -> None:
    expected = {gguf_name(name) for name, _ in vectors(config)}
    expected |= {gguf_name(f"{module.name}.weight") for module in modules(config)}
    if missing := sorted(expected - file.names):
        raise CheckpointError(
            f"{file.path}: {len(missing)} tensors are missing, such as {missing[0]}; convert it again"
        )
    if surplus := sorted(file.names - expected - {FACTORS}):
        raise CheckpointError(
            f"{file.path}: {len(surplus)} tensors are not part of a dense llama, such as {surplus[0]}"
        )


class GGUFSource:
    """`WeightSource` over a GGUF file."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config = file, config

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """The stored matrix, its rows in our order; CheckpointError when it is missing, misshapen, or has NaN."""
        found = self.file.weight(gguf_name(f"{module}.weight"), shape)
        order = self._order(module)
        if order is None:
            return found
        scale = None if found.scale is None else np.ascontiguousarray(found.scale[order])
        return replace(found, codes=np.ascontiguousarray(found.codes[order]), scale=scale)

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A gain or a bias as float32; CheckpointError as above."""
        values = self.file.values(gguf_name(name), shape)
        order = self._order(name.removesuffix(".bias")) if name.endswith(".bias") else None
        return values if order is None else np.ascontiguousarray(values[order])

    def forget(self) -> None:
        """The file stays mapped; the system drops its pages when it needs them."""

    def _order(self, module: str) -> Array | None:
        """For each of our rows of queries or keys the file's row; None for other matrices."""
        part = module.rpartition(".")[2]
        if part not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_heads if part == "q_proj" else self.config.num_kv_heads
        # Theirs holds pair after pair (x, y); ours all x of a head, then all y.
        rows = np.arange(heads * self.config.head_dim).reshape(heads, self.config.head_dim // 2, 2)
        ordered: Array = rows.swapaxes(1, 2).reshape(-1)
        return ordered
