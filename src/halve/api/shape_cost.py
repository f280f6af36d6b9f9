"""What a plan would cost in a model of another shape: a few of its layers with random weights, timed here and now.

A tiny model is all overhead, so that its speed says little of what a plan saves. Speed does not depend on what weights
are, only on how they are stored: decoders of two and of four layers of the other shape, each group stored as the plan
stores the same part of the small model, tell what a layer takes, and what all else takes; so many layers as that shape
has are added up. Nothing is said of quality, which only real weights have.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from halve.api.progress import Progress
from halve.core.certificate import Measured
from halve.formats import FORMATS, Format, Weight
from halve.kernels import native, native_library
from halve.kernels.ops import TokenBatch
from halve.kernels.sampling import SamplingBatch
from halve.models import Decoder, ModelConfig
from halve.models.config import LayerSpec, Rope
from halve.models.names import EMBEDDING, groups
from halve.search.timing import random_weight

FEW, MANY = 2, 4  # layers that are built
BATCHES = (1, 8)
CONTEXT = 512
BLOCK = 16
ROUNDS = 9

# Llama-3.2-1B's, whose table is its head (its config.json on the hub; arXiv:2407.21783 is the family's paper).
LLAMA_1B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    context=4096,
    rms_norm_eps=1e-5,
    tied=True,
    attention_bias=False,
    mlp_bias=False,
    layers=(LayerSpec(rope=Rope(theta=500000.0)),) * 16,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Seconds of a decode step with so many sequences: the original's in bf16, the plan's; ratio within rounds."""

    batch: int
    original_s: float
    smaller_s: float
    ratio: Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeCost:
    """Of a shape by its name. layers_built: of `layers`, the rest is added by the time that one of them takes."""

    shape: str
    layers: int
    layers_built: int
    context: int
    steps: tuple[StepCost, ...]


def shape_cost(
    formats: Mapping[str, Format], small: ModelConfig, activations: str, progress: Progress
) -> ShapeCost | None:
    """Time a plan on layers of Llama-3.2-1B's shape; None where our C++ does not run.

    formats: of the small model's modules by name, as a bundle stores them; activations: what its products take.
    """
    if native_library.available():
        return None
    decoders: dict[tuple[bool, int], Decoder] = {}
    with progress.task("Layers of the 1B shape", "decoders") as advance:
        for is_plan in (False, True):
            for count in (FEW, MANY):
                config = replace(LLAMA_1B, layers=LLAMA_1B.layers[:count]).with_kv_format("bf16")
                ops = native.NativeOps(activations=activations if is_plan else "bf16")
                stored = mapped(formats, small, config) if is_plan else None
                decoders[is_plan, count] = Decoder(config, ops, _Random(stored))
                advance(len(decoders), 4)
    with progress.task("Timing them", "batches") as advance:
        steps = []
        for done, batch in enumerate(BATCHES):
            steps.append(_step_cost(decoders, batch))
            advance(done + 1, len(BATCHES))
    return ShapeCost(
        shape="Llama-3.2-1B", layers=LLAMA_1B.num_layers, layers_built=MANY, context=CONTEXT, steps=tuple(steps)
    )


def mapped(formats: Mapping[str, Format], small: ModelConfig, large: ModelConfig) -> dict[str, Format]:
    """The formats of a small model's parts for the same parts of a large one, at the same depth.

    Where a format does not fit a width of the large model, int8 stands in.
    """
    of_part: dict[tuple[str, int | None], Format] = {}
    for group in groups(small):
        of_part[group.kind, group.layer] = formats[group.members[0].name]
    found = {EMBEDDING: formats[EMBEDDING]}
    for group in groups(large):
        layer = None if group.layer is None else group.layer * small.num_layers // large.num_layers
        # A tied head is the table itself, and no group of its own.
        fmt = of_part.get((group.kind, layer), formats[EMBEDDING])
        for member in group.members:
            found[member.name] = FORMATS["int8"] if fmt.scaled and fmt.refusal(member.shape[1]) else fmt
    return found


class _Random:
    """Weights that nobody trained. formats: by module; None is bf16 for all."""

    def __init__(self, formats: Mapping[str, Format] | None) -> None:
        self._formats = formats
        self._made: dict[tuple[str, tuple[int, int]], Weight] = {}

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """A matrix of a module; each of its shape and format is the same."""
        fmt = FORMATS["bf16"] if self._formats is None else self._formats[module]
        key = fmt.name, shape
        if key not in self._made:
            self._made[key] = random_weight(fmt, shape)
        return self._made[key]

    def vector(self, name: str, shape: tuple[int, ...]) -> Any:
        """Ones."""
        return np.ones(shape, np.float32)

    def forget(self) -> None:
        """Nothing is read."""


def _step_cost(decoders: Mapping[tuple[bool, int], Decoder], batch: int) -> StepCost:
    tokens, rows = _tokens(batch), np.arange(batch, dtype=np.int32)
    per = CONTEXT // BLOCK
    caches = {key: decoder.new_cache(batch * per, BLOCK) for key, decoder in decoders.items()}
    taken: dict[tuple[bool, int], list[float]] = {key: [] for key in decoders}
    for _ in range(ROUNDS + 2):
        for key, decoder in decoders.items():
            began = time.perf_counter()
            decoder.sample(tokens, caches[key], rows, SamplingBatch.greedy(batch))
            taken[key].append(time.perf_counter() - began)

    def whole(is_plan: bool, few: float, many: float) -> float:
        layer = max(0.0, many - few) / (MANY - FEW)
        return many + (LLAMA_1B.num_layers - MANY) * layer

    rounds = [
        [whole(p, few, many) for few, many in zip(taken[p, FEW][2:], taken[p, MANY][2:], strict=True)]
        for p in (False, True)
    ]
    each = [after / before for before, after in zip(*rounds, strict=True)]
    medians = [whole(p, median(taken[p, FEW][2:]), median(taken[p, MANY][2:])) for p in (False, True)]
    low, high = np.quantile(each, [0.1, 0.9])
    return StepCost(
        batch=batch,
        original_s=medians[0],
        smaller_s=medians[1],
        ratio=Measured(value=medians[1] / medians[0], low=float(low), high=float(high), n=ROUNDS),
    )


def _tokens(batch: int) -> TokenBatch:
    """Each of `batch` sequences runs its last token of `CONTEXT`."""
    per = CONTEXT // BLOCK
    tables = np.arange(batch * per, dtype=np.int32).reshape(batch, per)
    return TokenBatch(
        token_ids=np.random.default_rng(1).integers(0, LLAMA_1B.vocab_size, batch).astype(np.int32),
        positions=np.full(batch, CONTEXT - 1, np.int32),
        cu_seqlens=np.arange(batch + 1, dtype=np.int32),
        slot_mapping=tables[:, -1] * BLOCK + BLOCK - 1,
        block_tables=tables,
    )
