"""Sparse upcycling: a dense model's feed-forwards become experts behind routers that are yet to be trained.

The result is a Mixtral. With a width divisor of 1 each expert is a copy of the whole feed-forward (arXiv:2212.05055): a
token's weights sum to one and its experts are alike, so that at first it computes what the dense model computes.

With a divisor of G each expert is one of G slices of it, and experts / G copies of every slice are made
(arXiv:2410.07524, "virtual groups"). The experts of one copy share a router row, so that the likeliest ones of a token
are whole copies, each expert with 1 / G of its copy's weight; down projections are multiplied by G, and the sum is the
dense model's again. Active / G copies cost a token what as many dense feed-forwards cost.

Routers are random, or told by clusters of text (`compress/clusters.py`), so that loads are even from the start.
Training on makes the copies differ. Re-initialising a share of each expert's neurons (arXiv:2502.19261, drop-upcycling)
makes them differ at once, and the model is then no longer the dense one.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from halve.checkpoint import Checkpoint, TensorWriter
from halve.compress.apply import carry_files, write_text
from halve.core.errors import ConfigError
from halve.kernels.ops import Array
from halve.models.config import ModelConfig, read_config
from halve.models.names import EXPERT_NAMES, layer_groups

ROUTER_STD = 0.02  # of its weights at first, as Mixtral's configuration has it
MOST_EXPERTS = 1024
DENSE = dict(zip(("gate_proj", "up_proj", "down_proj"), EXPERT_NAMES["block_sparse_moe"], strict=True))
DOWN = DENSE["down_proj"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycling:
    """What feed-forwards become: how many experts, how many of them for a token, of which share of the width.

    width_divisor: an expert is the 1 / width_divisor of a feed-forward. reinit: the share of each expert's neurons that
    is drawn anew. seed: of that and of routers, normal with `ROUTER_STD` where no rows are given.
    """

    num_experts: int
    active: int
    width_divisor: int = 1
    reinit: float = 0.0
    seed: int = 0

    @property
    def copies(self) -> int:
        """Of every slice."""
        return self.num_experts // self.width_divisor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A tensor of the dense model, or what one expert has of it."""

    source: str
    layer: int = 0
    expert: int | None = None
    name: str = ""


def upcycle_refusal(checkpoint: Checkpoint, config: ModelConfig, experts: Upcycling) -> str | None:
    """Why a model can't be upcycled so, and the way out; or None."""
    divisor = experts.width_divisor
    if not 2 <= experts.num_experts <= MOST_EXPERTS:
        return f"--experts {experts.num_experts}: must be from 2 to {MOST_EXPERTS}"
    if not 1 <= experts.active <= experts.num_experts:
        return f"--active {experts.active}: must be from 1 to the {experts.num_experts} experts"
    if divisor < 1:
        return f"--width-divisor {divisor}: must be 1 or more"
    if experts.num_experts % divisor or experts.active % divisor:
        return (
            f"--width-divisor {divisor}: --experts {experts.num_experts} and --active {experts.active} must be "
            "multiples of it, since a copy of the feed-forward is that many experts"
        )
    if not 0 <= experts.reinit < 1:
        return f"--reinit {experts.reinit:g}: must be a share, from 0 to less than 1"
    if config.architecture != "LlamaForCausalLM":
        return f"{config.architecture}: only dense Llama models become a Mixtral"
    if config.attention_bias or config.mlp_bias:
        return "the model has biases, which a Mixtral has not; take a model without"
    if checkpoint.config.get("quantization_config") is not None:
        return "the model is compressed; upcycle the original, train it, then compress the result"
    if config.intermediate_size % divisor:
        return f"--width-divisor {divisor}: does not divide the feed-forwards' width, {config.intermediate_size}"
    return None


def upcycle(
    checkpoint: Checkpoint,
    config: ModelConfig,
    directory: Path,
    experts: Upcycling,
    *,
    rows: Iterable[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write a Mixtral whose experts are copies of each feed-forward, or of its slices, into `directory`.

    rows: of each layer's router, [copies, hidden size]; without them at random. Returns its configuration.
    Raises ConfigError for a model or numbers that do not allow it (`upcycle_refusal`), OutputError when the disk is
    full.
    """
    if reason := upcycle_refusal(checkpoint, config, experts):
        raise ConfigError(reason)
    parts = _parts(checkpoint, config, experts.num_experts)
    reader = checkpoint.reader
    specs = {
        name: (reader.info(part.source).dtype, _shape(reader.info(part.source).shape, part, experts.width_divisor))
        for name, part in parts.items()
    }
    routers = {f"model.layers.{i}.block_sparse_moe.gate.weight": i for i in range(config.num_layers)}
    for name, layer in routers.items():
        dtype = reader.info(f"model.layers.{layer}.mlp.gate_proj.weight").dtype
        specs[name] = (dtype, (experts.num_experts, config.hidden_size))
    raw = _mixtral_config(checkpoint.config, config, experts)
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(experts.seed)
    with TensorWriter(directory, specs) as writer:
        for done, (name, part) in enumerate(parts.items()):
            writer.write(name, _values(reader.read(part.source), part, experts))
            reader.forget()
            if progress:
                progress(done + 1, len(parts))
        given = None if rows is None else iter(rows)
        for name, layer in routers.items():
            like = reader.read(f"model.layers.{layer}.mlp.gate_proj.weight").dtype
            drawn = random.standard_normal((experts.copies, config.hidden_size), np.float32) * ROUTER_STD
            router = drawn if given is None else next(given).numpy()
            writer.write(name, router.repeat(experts.width_divisor, axis=0).astype(like))
    write_text(directory / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    carry_files(checkpoint, directory)
    return read_config(raw)


def _parts(checkpoint: Checkpoint, config: ModelConfig, num_experts: int) -> dict[str, _Part]:
    """Each tensor of the Mixtral but its routers, and what of the dense model it is."""
    found: dict[str, _Part] = {}
    feed_forward: dict[str, tuple[int, str]] = {}
    for layer in range(config.num_layers):
        for kind in ("gate_up", "down"):
            for module in layer_groups(config, layer)[kind].members:
                feed_forward[f"{module.name}.weight"] = layer, DENSE[module.name.rpartition(".")[2]]
    for source in checkpoint.reader.names:
        if source in feed_forward:
            layer, name = feed_forward[source]
            for e in range(num_experts):
                part = _Part(source=source, layer=layer, expert=e, name=name)
                found[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{name}.weight"] = part
        elif "rotary_emb" not in source:
            found[source] = _Part(source=source)
    return found


def _shape(dense: tuple[int, ...], part: _Part, divisor: int) -> tuple[int, ...]:
    if part.expert is None:
        return dense
    rows, columns = dense
    return (rows, columns // divisor) if part.name == DOWN else (rows // divisor, columns)


def _values(dense: Array, part: _Part, experts: Upcycling) -> Array:
    """What a part holds: neurons are rows of gate and up, columns of down."""
    if part.expert is None:
        return dense
    neurons = dense.T if part.name == DOWN else dense
    width = neurons.shape[0] // experts.width_divisor
    at = part.expert % experts.width_divisor * width
    values = neurons[at : at + width].astype(np.float32)
    if part.name == DOWN:
        values *= experts.width_divisor
    if fresh := round(experts.reinit * width):
        # The three matrices of an expert have to draw the same neurons, each in its own values.
        which = np.random.default_rng((experts.seed, part.layer, part.expert)).choice(width, fresh, replace=False)
        matrix = EXPERT_NAMES["block_sparse_moe"].index(part.name)
        random = np.random.default_rng((experts.seed, part.layer, part.expert, matrix))
        old = values[which]
        values[which] = random.normal(old.mean(), old.std(), old.shape)
    return np.ascontiguousarray((values.T if part.name == DOWN else values).astype(dense.dtype))


def _mixtral_config(raw: dict[str, Any], config: ModelConfig, experts: Upcycling) -> dict[str, Any]:
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp", "model_type", "architectures")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{key: value for key, value in raw.items() if key not in dropped},
        "intermediate_size": config.intermediate_size // experts.width_divisor,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.active,
        "sliding_window": None,
    }
