"""The verb `evaluate`: loss, perplexity and bits per byte of a checkpoint, and what rounding its weights costs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halve.core.errors import ConfigError, TextError
from train_tiny.checkpoint import load_model
from train_tiny.loss import Compute, stream_loss
from train_tiny.model import Llama
from train_tiny.pack import encode
from train_tiny.text import documents
from train_tiny.tokenizer import open_tokenizer

BITS = (8, 4, 3)
GROUPS = (0, 32)  # inputs that share a scale; 0: the whole row


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings:
    """rtn: also round the first text's weights; rtn_tokens: of that text, for each rounding."""

    compute: Compute
    model: Path
    text: tuple[Path, ...]
    rtn: bool
    rtn_tokens: int

    def __post_init__(self) -> None:
        if self.rtn_tokens < 1:
            raise ConfigError(f"--rtn-tokens {self.rtn_tokens}: must be 1 or more")
        if doubles := sorted({path.name for path in self.text if [p.name for p in self.text].count(path.name) > 1}):
            raise ConfigError(f"--text: {doubles} are named twice; results are told apart by file name")


def run_evaluate(settings: EvaluateSettings) -> None:
    """Print one JSON object: per text loss, perplexity and bits per byte; perplexity after rounding with rtn."""
    tokenizer = open_tokenizer(settings.model)
    model = load_model(settings.model).to(settings.compute.device).eval()
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise TextError(
            f"{settings.model}: the tokenizer has {tokenizer.get_vocab_size()} entries, the model "
            f"{model.config.vocab_size}; give a folder whose files belong together"
        )
    if settings.rtn:
        check_groups(model)
    result: dict[str, Any] = {"params": model.num_parameters}
    streams = {}
    for path in settings.text:
        found = documents(path)
        streams[path.name] = ids = encode(tokenizer, found)
        total, count = stream_loss(model, ids, settings.compute)
        size = sum(len(document.encode()) for document in found)
        result[path.name] = {
            "loss": total / count,
            "ppl": math.exp(total / count),
            "bits_per_byte": total / math.log(2) / size,
            "tokens": count,
            "bytes": size,
        }
    if settings.rtn:
        result["rtn_ppl"] = rounded_perplexities(model, streams[settings.text[0].name], settings)
    print(json.dumps(result))


@torch.no_grad()
def rounded_perplexities(model: Llama, ids: NDArray[np.uint16], settings: EvaluateSettings) -> dict[str, float]:
    """Perplexity with the block matrices rounded at every width and grouping; the model is left as it was."""

    def perplexity() -> float:
        total, count = stream_loss(model, ids, settings.compute, settings.rtn_tokens)
        return math.exp(total / count)

    original = {name: value.clone() for name, value in model.state_dict().items()}
    out = {"none": perplexity()}
    for bits in BITS:
        for group in GROUPS:
            for name, parameter in model.named_parameters():
                if is_block_matrix(name, parameter):
                    parameter.copy_(round_to_nearest(original[name], bits, group))
            out[f"w{bits}_" + (f"group{group}" if group else "row")] = perplexity()
    model.load_state_dict(original)
    return out


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """True for what is rounded: projections and experts, neither embeddings nor routers."""
    return parameter.ndim == 2 and "embed" not in name and not name.endswith("gate.weight")


def check_groups(model: Llama) -> None:
    """Raises ConfigError when a scale group would cross from one row into the next."""
    for name, parameter in model.named_parameters():
        for group in GROUPS[1:]:
            if is_block_matrix(name, parameter) and parameter.shape[1] % group:
                raise ConfigError(
                    f"--rtn: {name} has {parameter.shape[1]} inputs, no multiple of {group}; leave out --rtn"
                )


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Symmetric rounding and back; one scale per `group` inputs, or per row when group is 0.

    weight: [out, in], in a multiple of group. Error per element: at most half a scale.
    """
    w = weight.float()
    w = w.view(-1, group) if group else w
    top = 2 ** (bits - 1) - 1
    scale = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / top
    rounded: Tensor = (w / scale).round().clamp(-top - 1, top) * scale
    return rounded.view(weight.shape)
