"""Sparse upcycling: a dense model's feed-forwards become experts, copies behind a router that is yet to be trained.

The result is a Mixtral. A token's weights sum to one and its experts are alike, so that at first it computes what the
dense model computes; training on makes the copies differ. Source: arXiv:2212.05055.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from halve.checkpoint import Checkpoint, TensorWriter
from halve.compress.apply import carry_files, write_text
from halve.core.errors import ConfigError
from halve.models.config import ModelConfig, read_config
from halve.models.names import EXPERT_NAMES, layer_groups

ROUTER_STD = 0.02  # of its weights at first, as Mixtral's configuration has it
MOST_EXPERTS = 1024
DENSE = dict(zip(("gate_proj", "up_proj", "down_proj"), EXPERT_NAMES["block_sparse_moe"], strict=True))


def upcycle_refusal(checkpoint: Checkpoint, config: ModelConfig, experts: int, active: int) -> str | None:
    """Why a model can't be upcycled so, and the way out; or None."""
    if not 2 <= experts <= MOST_EXPERTS:
        return f"--experts {experts}: must be from 2 to {MOST_EXPERTS}"
    if not 1 <= active <= experts:
        return f"--active {active}: must be from 1 to the {experts} experts"
    if config.architecture != "LlamaForCausalLM":
        return f"{config.architecture}: only dense Llama models become a Mixtral"
    if config.attention_bias or config.mlp_bias:
        return "the model has biases, which a Mixtral has not; take a model without"
    if checkpoint.config.get("quantization_config") is not None:
        return "the model is compressed; upcycle the original, train it, then compress the result"
    return None


def upcycle(
    checkpoint: Checkpoint,
    config: ModelConfig,
    directory: Path,
    *,
    experts: int,
    active: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write a Mixtral of `experts` copies of each feed-forward into `directory`, `active` of them for a token.

    Returns its configuration. seed: of the routers, normal with `ROUTER_STD`. Raises ConfigError for a model or numbers
    that do not allow it (`upcycle_refusal`), OutputError when the disk is full.
    """
    if reason := upcycle_refusal(checkpoint, config, experts, active):
        raise ConfigError(reason)
    sources = _sources(checkpoint, config, experts)
    reader = checkpoint.reader
    specs = {name: (reader.info(source).dtype, reader.info(source).shape) for name, source in sources.items()}
    routers = {f"model.layers.{i}.block_sparse_moe.gate.weight": i for i in range(config.num_layers)}
    for name, layer in routers.items():
        dtype = reader.info(f"model.layers.{layer}.mlp.gate_proj.weight").dtype
        specs[name] = (dtype, (experts, config.hidden_size))
    raw = _mixtral_config(checkpoint.config, experts, active)
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    with TensorWriter(directory, specs) as writer:
        for done, (name, source) in enumerate(sources.items()):
            writer.write(name, reader.read(source))
            reader.forget()
            if progress:
                progress(done + 1, len(sources))
        for name, layer in routers.items():
            like = reader.read(f"model.layers.{layer}.mlp.gate_proj.weight").dtype
            values = random.standard_normal((experts, config.hidden_size), np.float32) * ROUTER_STD
            writer.write(name, values.astype(like))
    write_text(directory / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    carry_files(checkpoint, directory)
    return read_config(raw)


def _sources(checkpoint: Checkpoint, config: ModelConfig, experts: int) -> dict[str, str]:
    """Each tensor of the Mixtral but its routers, and the tensor of the dense model that it is."""
    found: dict[str, str] = {}
    feed_forward: dict[str, tuple[int, str]] = {}
    for layer in range(config.num_layers):
        for kind in ("gate_up", "down"):
            for module in layer_groups(config, layer)[kind].members:
                feed_forward[f"{module.name}.weight"] = layer, DENSE[module.name.rpartition(".")[2]]
    for name in checkpoint.reader.names:
        if name in feed_forward:
            layer, part = feed_forward[name]
            for e in range(experts):
                found[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight"] = name
        elif "rotary_emb" not in name:
            found[name] = name
    return found


def _mixtral_config(raw: dict[str, Any], experts: int, active: int) -> dict[str, Any]:
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp", "model_type", "architectures")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{key: value for key, value in raw.items() if key not in dropped},
        "num_local_experts": experts,
        "num_experts_per_tok": active,
        "sliding_window": None,
    }
