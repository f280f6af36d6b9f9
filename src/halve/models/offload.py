"""A sparse model whose experts stay on disk: weights that every token meets in memory, experts through a cache.

Experts are read from the file of packed weights (`models/ready.py`), so that nothing is computed between disk and
product. A layer's products run in portions, those experts first that lie in memory (`models/expert_cache.py`); a row's
result is the same to the bit. Which experts the next sparse layer will ask for is guessed by its router on the stream
before this layer's feed-forward (arXiv:2312.17238, 3.2).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from halve.checkpoint import Checkpoint
from halve.checkpoint.packed import Blobs, read_index
from halve.core.errors import CheckpointError, ConfigError
from halve.core.units import format_bytes
from halve.formats import FORMATS
from halve.kernels.arena import ALIGNMENT, Arena
from halve.kernels.grouped import GroupedLinears, ungrouped
from halve.kernels.native import NativeOps
from halve.kernels.native_rows import Linear, as_vector
from halve.kernels.ops import Array, Buffer, Packed
from halve.kernels.packed import aligned_bytes, packed_bytes
from halve.models.config import ModelConfig
from halve.models.expert_cache import ExpertCache, Key
from halve.models.load import stored_formats
from halve.models.moe import ROUTED, ExpertProjection
from halve.models.names import FusedGroup, Kind, Module, layer_groups, modules
from halve.models.ready import kept_file

log = logging.getLogger("halve.models")

Products = dict[Kind, list[Linear]]  # of one expert
Members = Mapping[Key, Sequence[tuple[Kind, Module]]]  # the matrices of each expert


class OffloadSource:
    """`WeightSource` of a model whose experts are read as they are asked for, through a cache of `cache_bytes`.

    The file of packed weights is made where there is none, matrix by matrix. version: as for `ReadySource`.
    progress: matrices packed, matrices in all. Raises ConfigError for a dense model, and for a cache that is smaller
    than the experts of one token in one layer; what `kept_file` raises.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        ops: NativeOps,
        *,
        cache_bytes: int,
        version: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if not config.sparse:
            raise ConfigError(
                f"expert_cache: a {config.architecture} without experts reads all of its weights for every token; "
                "leave the expert cache out"
            )
        self.checkpoint, self.ops = checkpoint, ops
        members = _members(config)
        formats = stored_formats(checkpoint, config)
        _check_room(
            config, members, cache_bytes, lambda module: _aligned(packed_bytes(formats[module.name], module.shape))
        )
        weights = {m.name: (m.shape, formats[m.name]) for m in modules(config)}
        path = kept_file(checkpoint, ops, weights, version=version, progress=progress)
        index = read_index(path)
        for name, (shape, fmt) in weights.items():
            blob = index.blobs.get(name)
            if blob is None or (blob.shape, blob.format) != (shape, fmt.name):
                raise CheckpointError(f"{path}: holds no {name} {shape} in {fmt.name}; remove it and start again")
        sizes = {
            module.name: _aligned(index.blobs[module.name].size) for parts in members.values() for _, module in parts
        }
        _check_room(config, members, cache_bytes, lambda module: sizes[module.name])
        self._layers: dict[int, OffloadedLayer] = {}
        self._arena = Arena()
        self._packed = _PackedFile(checkpoint, ops, Blobs(path, index))
        read = _ExpertReader(self._packed, members)
        self.experts = ExpertCache(
            {key: sum(sizes[module.name] for _, module in parts) for key, parts in members.items()}, cache_bytes, read
        )

    def weight(self, module: str, shape: tuple[int, int]) -> Packed:
        """A packed matrix that every token meets, in memory."""
        return self._packed.read(module, shape, self._arena.take(self._packed.size(module)))

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """The stored vector as float32; CheckpointError as `CheckpointSource.vector`."""
        return self.checkpoint.read_vector(name, shape)

    def forget(self) -> None:
        """Give the checkpoint's mapped pages back to the system."""
        self.checkpoint.reader.forget()

    def projection(self, group: FusedGroup) -> "OffloadedProjection":
        """The products of all experts of a layer, of one kind."""
        assert group.layer is not None
        held = self._layers.setdefault(group.layer, OffloadedLayer(self.experts, group.layer))
        return OffloadedProjection(group, self.ops, held)


class _PackedFile:
    """Matrices from the file of packed weights; what is damaged there is packed again from the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, ops: NativeOps, blobs: Blobs) -> None:
        self.checkpoint, self.ops, self.blobs = checkpoint, ops, blobs
        self._damaged: set[str] = set()

    def size(self, module: str) -> int:
        """Bytes of a matrix."""
        return self.blobs.index.blobs[module].size

    def read(self, module: str, shape: tuple[int, int], memory: Array) -> Packed:
        """A matrix in memory, uint8 of its size. Raises CheckpointError when the checkpoint is damaged too."""
        blob = self.blobs.index.blobs[module]
        if module not in self._damaged:
            try:
                self.blobs.read(module, memory)
                return Packed(format=FORMATS[blob.format], shape=shape, record=blob.record, blob=memory)
            except CheckpointError as error:
                log.warning(
                    "%s; %s is packed again each time, and the file is made anew at the next start", error, module
                )
                self._damaged.add(module)
                with suppress(OSError):
                    self.blobs.path.unlink()
        packed = self.ops.pack(self.checkpoint.read_weight(module, shape))
        if dict(packed.record) != dict(blob.record) or packed.blob.size != memory.size:
            raise CheckpointError(f"{module}: not what it was when the model was loaded; load it again")
        memory[:] = packed.blob
        return Packed(format=packed.format, shape=shape, record=packed.record, blob=memory)


class _ExpertReader:
    """Reads an expert's matrices side by side into memory: what the cache's threads call."""

    def __init__(self, packed: _PackedFile, members: Members) -> None:
        self.packed, self.members = packed, members
        self._linears: dict[str, Linear] = {}  # one of each layout: matrices that are alike run alike
        self._biases: dict[str, Array] = {}
        alike: dict[tuple[Any, ...], Linear] = {}
        for parts in members.values():
            for _, module in parts:
                blob = packed.blobs.index.blobs[module.name]
                layout = (blob.format, blob.shape, tuple(sorted(blob.record.items())), blob.size)
                if layout not in alike:
                    alike[layout] = self._checked(module)
                self._linears[module.name] = alike[layout]
                if module.bias:
                    bias = packed.checkpoint.read_vector(f"{module.name}.bias", module.shape[:1])
                    self._biases[module.name] = as_vector(bias)

    def _checked(self, module: Module) -> Linear:
        """A product whose record and size were checked, and whose kernel is chosen."""
        memory = aligned_bytes(self.packed.size(module.name))
        packed = self.packed.read(module.name, module.shape, memory)
        if reason := self.packed.ops.refusal(packed):
            raise CheckpointError(f"{self.packed.blobs.path}: {module.name}: {reason}; remove it and start again")
        return self.packed.ops.linear(packed)

    def __call__(self, key: Key, memory: Array) -> Products:
        """An expert's products by kind, over the memory that it was read into."""
        found: Products = {}
        at = 0
        for kind, module in self.members[key]:
            size = self.packed.size(module.name)
            part = memory[at : at + size]
            self.packed.read(module.name, module.shape, part)
            found.setdefault(kind, []).append(self._linears[module.name].over(part, self._biases.get(module.name)))
            at += _aligned(size)
        return found


class OffloadedLayer:
    """Experts of one layer, those in `here` in memory."""

    def __init__(self, cache: ExpertCache, layer: int) -> None:
        self.cache, self.layer = cache, layer
        self.here: dict[int, Products] = {}

    def portions(self, experts: Sequence[int], ahead: Callable[[], None] | None) -> Iterator[list[int]]:
        """As `moe.Held.portions`."""
        for here in self.cache.portions(self.layer, experts, None if self.cache.holds_all else ahead):
            self.here = here
            yield sorted(here)

    def expect(self, experts: Sequence[int]) -> None:
        """As `moe.Held.expect`."""
        self.cache.expect(self.layer, experts)


class OffloadedProjection(ExpertProjection):
    """`ExpertProjection` of experts that have rows only while they are in memory."""

    def __init__(self, group: FusedGroup, ops: NativeOps, held: OffloadedLayer) -> None:
        self.group, self.ops, self.native = group, ops, ops
        self.held = self.layer = held
        self.hook = self.after = self.grouped = None
        self.groups = [group.of_expert(e) for e in sorted({m.expert for m in group.members if m.expert is not None})]

    def of_expert(self, expert: int, x: Buffer) -> list[Buffer]:
        """One expert's products, which must be in memory."""
        outputs = [self.ops.project(linear, x) for linear in self.layer.here[expert][self.group.kind]]
        return self.hook(self.groups[expert], x, outputs) if self.hook else outputs

    def __call__(self, x: Buffer, offsets: Array) -> list[Buffer]:
        """Rows [N, in] sorted by expert -> one [N, out] for each matrix of an expert."""
        counts = np.diff(offsets)
        parts = [self.layer.here[e][self.group.kind] for e in np.flatnonzero(counts).tolist()]
        if self.hook or ungrouped(parts):
            return super().__call__(x, offsets)
        return GroupedLinears(self.native, parts)(
            x, np.concatenate([[0], np.cumsum(counts[counts > 0])]).astype(np.int32)
        )


def _members(config: ModelConfig) -> dict[Key, list[tuple[Kind, Module]]]:
    """The matrices of each expert, in the order they run."""
    found: dict[Key, list[tuple[Kind, Module]]] = {}
    for layer, spec in enumerate(config.layers):
        if spec.experts is None:
            continue
        groups = layer_groups(config, layer)
        for kind in ROUTED:
            for module in groups[kind].members:
                assert module.expert is not None
                found.setdefault((layer, module.expert), []).append((kind, module))
    return found


def _check_room(config: ModelConfig, members: Members, cache_bytes: int, size_of: Callable[[Module], int]) -> None:
    """Refuse a cache that does not hold the experts of one token in the layer where they are largest."""
    largest: dict[int, int] = {}
    for (layer, _), parts in members.items():
        largest[layer] = max(largest.get(layer, 0), sum(size_of(module) for _, module in parts))
    top_k = {layer: spec.experts.top_k for layer, spec in enumerate(config.layers) if spec.experts}
    layer = max(largest, key=lambda one: top_k[one] * largest[one])
    needed = top_k[layer] * largest[layer]
    if cache_bytes < needed:
        everything = sum(size_of(module) for parts in members.values() for _, module in parts)
        raise ConfigError(
            f"expert_cache: {cache_bytes:,} bytes hold fewer than the {top_k[layer]} experts of "
            f"{largest[layer]:,} bytes that one token runs through in layer {layer}; give {needed:,} bytes or more "
            f"({format_bytes(everything)} holds all experts)"
        )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
