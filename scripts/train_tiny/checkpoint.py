"""Checkpoints: the Hugging Face folder that a run leaves, and the state from which it can go on."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from halve.core.errors import CheckpointError, ConfigError
from train_tiny.files import make_folder, write_json
from train_tiny.model import Llama, ModelConfig
from train_tiny.text import BOS, END, EOS, PAD

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
STATE = "state.pt"
STATE_VERSION = 1


def save_model(model: Llama, folder: Path, tokenizer: Path | None, record: Mapping[str, Any]) -> None:
    """Write a Hugging Face folder in bf16; the weight file is replaced in one rename."""
    make_folder(folder)
    state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").replace(folder / "model.safetensors")
    write_json(folder / "config.json", model.config.to_hf())
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": [EOS, END],
        "pad_token_id": PAD,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 256,
    }
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "training.json", record)
    for name in TOKENIZER_FILES:
        if tokenizer and (tokenizer / name).exists() and tokenizer.resolve() != folder.resolve():
            shutil.copyfile(tokenizer / name, folder / name)


def load_model(folder: Path, num_experts: int = 0, top_k: int = 2, noise: float = 0.0) -> Llama:
    """Load a folder that `save_model` wrote, in float32; a dense one is upcycled when num_experts > 0.

    Raises CheckpointError when files are missing or contradict each other, ConfigError when a sparse one has another
    number of experts than was asked for.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: not a checkpoint ({error}); give a folder that the verb train wrote"
        ) from error
    config = ModelConfig.from_hf(raw)
    if num_experts and config.num_experts not in (0, num_experts):
        raise ConfigError(f"{folder} has {config.num_experts} experts already, not {num_experts}; leave out --experts")
    if num_experts and not config.num_experts:
        config = replace(config, num_experts=num_experts, top_k=top_k)
        state = upcycle(state, num_experts, noise)
    model = Llama(config)
    try:
        model.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: config.json and model.safetensors disagree: {error}") from error
    return model


def upcycle(state: Mapping[str, Tensor], num_experts: int, noise: float) -> dict[str, Tensor]:
    """Turn a dense state dict into Mixtral's: every expert a copy of the feed-forward, a small random router.

    noise: of each copy, as a share of its matrix's standard deviation, so that experts part ways. Renormalised top-k
    weights sum to one, so with noise 0 the new model computes what the dense one did. Source: arXiv:2212.05055.
    """
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".mlp." not in key:
            out[key] = value
            continue
        layer, projection = key.removesuffix(".weight").split(".mlp.")
        for expert in range(num_experts):
            extra = noise * value.float().std() * torch.randn_like(value, dtype=torch.float32)
            out[f"{layer}.block_sparse_moe.experts.{expert}.{names[projection]}.weight"] = value.float() + extra
        if projection == "gate_proj":
            out[f"{layer}.block_sparse_moe.gate.weight"] = 0.02 * torch.randn(num_experts, value.shape[1])
    return out


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of an unfinished run, in one rename."""
    make_folder(folder)
    torch.save({**state, "version": STATE_VERSION}, folder / "state.tmp")
    (folder / "state.tmp").replace(folder / STATE)


def load_state(folder: Path, device: str) -> dict[str, Any]:
    """Read the state of an unfinished run. Raises CheckpointError when there is none, or it cannot be read."""
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: there is no unfinished run to --resume in {folder}")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise CheckpointError(f"{path} cannot be read ({error}); start the run again") from error
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(f"{path}: version {state.get('version')!r} is not {STATE_VERSION}; start the run again")
    return state
