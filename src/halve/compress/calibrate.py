"""The energy of every projection's input, E[x_j^2], and its second moments E[x x^T], from one pass of text.

Of a sparse layer each expert's inputs are measured over the tokens that come to it; one that gets few is shown those
that it would like best, too (`models.moe.show_experts`), and is told of.

Streamed: all calibration tokens go through one layer of the original at a time, whose weights and moments are the only
ones in memory; moments are written as the layer ends.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halve.core.errors import CheckpointError, DataError
from halve.kernels.ops import Array, Buffer, TokenBatch
from halve.kernels.reference import TorchOps
from halve.kernels.rough import rough_ops
from halve.models.config import ModelConfig
from halve.models.decoder import DecoderLayer, WeightSource
from halve.models.names import EMBEDDING, FINAL_NORM, FusedGroup, groups, num_parameters
from halve.models.rope import RopeTable

log = logging.getLogger("halve")

# A mean of squares needs two digits, and small models take no time anyway.
FORCED_ROWS = 32  # tokens of each batch that every expert sees at least
FEW_TOKENS = 64  # routed to an expert in all: fewer, and its statistics are of tokens that were not its own
ROUGH_PARAMETERS = 200_000_000
BATCH_TOKENS = 2048  # tokens of one flat batch
ROUTED = "__routed__"  # before the number of a layer, in files


@dataclass(frozen=True, kw_only=True, eq=False)
class Energies:
    """E[x^2] of each input, by fused group: float64 [in]. num_tokens: that each was averaged over. routed: of each
    sparse layer int64 [experts], tokens that its router sent to each.
    """

    by_group: Mapping[str, Array]
    num_tokens: int
    routed: Mapping[int, Array] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to a .npz file."""
        routed = {f"{ROUTED}{layer}": tokens for layer, tokens in self.routed.items()}
        arrays: dict[str, Any] = {"__num_tokens__": self.num_tokens, **self.by_group, **routed}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Energies":
        """Read what `save` wrote."""
        with np.load(path) as stored:
            routed = {int(n.removeprefix(ROUTED)): stored[n] for n in stored.files if n.startswith(ROUTED)}
            by_group = {name: stored[name] for name in stored.files if not name.startswith("__")}
            return cls(by_group=by_group, num_tokens=int(stored["__num_tokens__"]), routed=routed)


@dataclass(frozen=True, kw_only=True)
class Hessians:
    """E[x x^T] of each input, by fused group: float32 [in, in], a file each in `folder`, read when asked for."""

    folder: Path

    def of(self, group: str) -> Array:
        """Of one group. Raises CheckpointError where it was not measured."""
        try:
            return np.load(self._file(group), mmap_mode="r")  # type: ignore[no-any-return]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._file(group)}: holds no second moments ({error}); calibrate again") from error

    def write(self, group: str, moments: Array) -> None:
        """Keep those of one group, whole or not at all."""
        temporary = self.folder / f"{group}.new.npy"
        np.save(temporary, moments)
        temporary.replace(self._file(group))

    def _file(self, group: str) -> Path:
        return self.folder / f"{group}.npy"

    @staticmethod
    def size_bytes(config: ModelConfig) -> int:
        """What they take on disk."""
        return sum(4 * group.members[0].shape[1] ** 2 for group in groups(config))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What methods know of a model's inputs: None where it was not measured."""

    energies: Energies | None = None
    hessians: Hessians | None = None


def calibrate(
    config: ModelConfig,
    source: WeightSource,
    documents: Sequence[Array],
    *,
    window_tokens: int,
    device: str = "cpu",
    hessians: Hessians | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Energies:
    """Run documents (int32 token ids each) through the original model and average each input's square.

    hessians: where second moments go too; they take twice a layer's products, and [in, in] floats of one layer in
    memory. A document longer than window_tokens is cut into windows. Raises CheckpointError naming the layer when the
    original model itself makes NaN or infinity, DataError when there are no tokens. progress: layers done, in all.
    """
    ops = rough_ops(device) if num_parameters(config) >= ROUGH_PARAMETERS else TorchOps(device)
    batches = [TokenBatch.whole(b) for b in flat_batches(documents, window_tokens)]
    num_tokens = sum(batch.num_tokens for batch in batches)
    if num_tokens == 0:
        raise DataError("the calibration text holds no tokens; give documents that are not empty")
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()
    moments: dict[str, torch.Tensor] = {}
    routed: dict[int, Array] = {}

    def look(name: str, x: Buffer, *, of_all: bool = True) -> None:
        squares = x.square().sum(0).double()  # float32 over one batch, float64 over all
        sums[name] = sums.get(name, 0) + squares
        counts[name] += len(x)
        if hessians is not None and of_all:
            if name not in moments:
                moments[name] = torch.zeros((x.shape[1], x.shape[1]), device=x.device)
            moments[name].addmm_(x.t(), x)

    def tap(group: FusedGroup, x: Buffer, outputs: list[Buffer]) -> list[Buffer]:
        look(group.name, x, of_all=group.members[0].expert is None)
        return outputs

    def write_moments() -> None:
        while moments:
            name, total = moments.popitem()
            assert hessians is not None
            hessians.write(name, total.div_(num_tokens).cpu().numpy())

    with torch.inference_mode():
        table = ops.table(source.weight(EMBEDDING, (config.vocab_size, config.hidden_size)))
        streams = [ops.embed(table, batch.token_ids) for batch in batches]
        del table  # as large as several layers
        source.forget()
        rope = RopeTable(config.rotary_dim)
        for index in range(config.num_layers):
            layer = DecoderLayer(config, index, ops, source, rope)
            for projection in layer.projections.values():
                projection.hook = tap
            layer.forced_rows = FORCED_ROWS
            for i, batch in enumerate(batches):
                streams[i] = layer(streams[i], batch)
            _require_finite(streams, f"layer {index}")
            if layer.router is not None:
                routed[index] = layer.router.counts.tokens
                _tell_coverage(index, routed[index])
            source.forget()
            write_moments()
            if progress:
                progress(index + 1, config.num_layers)
        gain = ops.vector(source.vector(FINAL_NORM, (config.hidden_size,)))
        for stream in streams:
            look("lm_head", ops.rms_norm(stream, gain, config.rms_norm_eps))
        write_moments()
    return Energies(
        by_group={name: (total / counts[name]).cpu().numpy() for name, total in sums.items()},
        num_tokens=num_tokens,
        routed=routed,
    )


def _tell_coverage(index: int, tokens: Array) -> None:
    """Name experts that the text hardly reaches."""
    few = np.flatnonzero(tokens < FEW_TOKENS)
    if len(few):
        named = ", ".join(f"{e} ({tokens[e]})" for e in few[:8]) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
        log.warning(
            "layer %d: %d of %d experts got fewer than %d tokens of the calibration text, by number (tokens): %s; they "
            "are rounded by tokens that they would like best", index, len(few), len(tokens), FEW_TOKENS, named
        )  # fmt: skip


def _require_finite(streams: list[Buffer], where: str) -> None:
    if not all(bool(torch.isfinite(stream).all()) for stream in streams):
        raise CheckpointError(f"{where}: the original model computes NaN or infinity on the calibration text")


def flat_batches(documents: Sequence[Array], window_tokens: int) -> list[list[Array]]:
    """Windows of documents, packed into batches of about BATCH_TOKENS tokens."""
    batches: list[list[Array]] = []
    room = 0
    for document in documents:
        for start in range(0, len(document), window_tokens):
            window = document[start : start + window_tokens]
            if not batches or room < len(window):
                batches.append([])
                room = max(BATCH_TOKENS, window_tokens)
            batches[-1].append(window)
            room -= len(window)
    return batches
