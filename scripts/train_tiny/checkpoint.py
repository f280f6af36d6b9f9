"""Checkpoints: the Hugging Face folder that a run leaves, and the state from which it can go on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from halve.core.errors import CheckpointError
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


def load_model(folder: Path) -> Llama:
    """Load a folder that `save_model` or `halve upcycle` wrote, in float32.

    Raises CheckpointError when files are missing or contradict each other.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: not a checkpoint ({error}); give a folder that the verb train wrote"
        ) from error
    config = ModelConfig.from_hf(raw)
    model = Llama(config)
    try:
        model.load_state_dict({name: value.float() for name, value in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: config.json and model.safetensors disagree: {error}") from error
    return model


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
