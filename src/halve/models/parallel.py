"""One model over several devices, each with a part of every matrix (tensor parallel). Source: arXiv:1909.08053.

Rank r of N holds the r-th N-th of the heads and of the feed-forward: rows of q, k, v, gate, up (they need all inputs
and make some outputs), columns of o and down (they need some inputs, and their outputs are summed over the ranks), and
rows of the head, whose logits are joined. The embedding table and the norms are whole everywhere. So a layer talks
twice, and keys and values are split with their heads.

Every rank runs the same steps. One has the engine, over `Leader`; the others `follow` it. After each step all ranks
hold the same logits to the bit, and choose the same tokens.

Experts and attention from latents are not spread over ranks; a model that has them is refused.

    torchrun --nproc-per-node 2 serve.py      # where serve.py joins with torch.distributed.init_process_group()
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from halve.core.errors import ConfigError
from halve.formats import Weight
from halve.formats.integer import pack_codes
from halve.kernels.ops import Array, Ops, Packed, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.models.config import ModelConfig
from halve.models.decoder import Decoder, WeightSource
from halve.models.names import EMBEDDING, LM_HEAD

log = logging.getLogger("halve.models")

SUMMED = ("o_proj", "down_proj")  # modules that are split by columns


class Shard:
    """Part `rank` of `size` of a model. Raises ConfigError when a size can't be divided so."""

    def __init__(self, config: ModelConfig, rank: int, size: int) -> None:
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} of {size} ranks; it must be 0 to {size - 1}")
        if size > 1 and (config.sparse or config.latent):
            raise ConfigError(
                f"{config.architecture} over {size} ranks: experts and attention from latents are not spread over "
                "devices; run it on one"
            )
        for what in ("num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(config, what) % size:
                raise ConfigError(f"{what} {getattr(config, what)} can't be divided by {size} ranks; take fewer")
        self.whole, self.rank, self.size = config, rank, size
        self.config = replace(
            config,
            num_heads=config.num_heads // size,
            num_kv_heads=config.num_kv_heads // size,
            intermediate_size=config.intermediate_size // size,
            tied=False,  # the head is cut, the table is not
        )

    def rows(self, count: int) -> slice:
        """Those of `count` rows that this rank has; the last ranks may have fewer."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))


class ShardSource:
    """`WeightSource` of one rank's part of another source, which gives matrices as stored."""

    def __init__(self, source: WeightSource, shard: Shard) -> None:
        self.source, self.shard = source, shard

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """The part of a matrix. shape: of the part, but for the head, which is asked for whole.

        Raises ConfigError where a cut would go through a group of weights under one scale.
        """
        if module == EMBEDDING:
            return self._stored(module, shape)
        if module == LM_HEAD:
            stored = self._stored(EMBEDDING if self.shard.whole.tied else LM_HEAD, shape)
            return cut_rows(stored, self.shard.rows(shape[0]))
        if module.endswith(SUMMED):
            width = shape[1] * self.shard.size
            weight = self._stored(module, (shape[0], width))
            return cut_columns(weight, self.shard.rows(width), module)
        height = shape[0] * self.shard.size
        return cut_rows(self._stored(module, (height, shape[1])), self.shard.rows(height))

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A norm whole; biases and sinks with their rows; the bias of a sum on the first rank alone."""
        module, _, kind = name.rpartition(".")
        if kind == "bias" and module.endswith(SUMMED):
            values = self.source.vector(name, shape)
            return values if self.shard.rank == 0 else np.zeros_like(values)
        if kind in ("bias", "sinks"):
            whole = shape[0] * self.shard.size
            return self.source.vector(name, (whole,))[self.shard.rows(whole)]
        return self.source.vector(name, shape)

    def forget(self) -> None:
        """As the other source's."""
        self.source.forget()

    def _stored(self, module: str, shape: tuple[int, int]) -> Weight:
        weight = self.source.weight(module, shape)
        if isinstance(weight, Packed):
            raise ConfigError(f"{module}: it is packed already and can't be cut; load it from the checkpoint's files")
        return weight


def cut_rows(weight: Weight, rows: slice) -> Weight:
    """Some rows of a matrix as stored."""
    scale = None if weight.scale is None else weight.scale[rows]
    shape = (len(range(*rows.indices(weight.shape[0]))), weight.shape[1])
    return Weight(format=weight.format, shape=shape, codes=weight.codes[rows], scale=scale)


def cut_columns(weight: Weight, columns: slice, name: str) -> Weight:
    """Some columns of a matrix as stored. Raises ConfigError where they begin or end within a group."""
    fmt = weight.format
    width = columns.stop - columns.start
    scale, group = weight.scale, fmt.group_size
    if group:
        if columns.start % group or width % group:
            raise ConfigError(
                f"{name}: columns {columns.start} to {columns.stop} cut a group of {group} ({fmt.name}); take fewer "
                "ranks, or a format with smaller groups"
            )
        assert scale is not None
        scale = scale[:, columns.start // group : columns.stop // group]
    codes = weight.unpacked_codes()[:, columns]
    if fmt.kind == "int" and fmt.bits < 8:
        codes = pack_codes(np.ascontiguousarray(codes), fmt.bits)
    return Weight(format=fmt, shape=(weight.shape[0], width), codes=codes, scale=scale)


def parallel_decoder(
    config: ModelConfig,
    ops: Ops,
    source: WeightSource,
    progress: Callable[[int, int], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Decoder:
    """The part of a decoder that this rank has, which sums and joins over the ranks of a process group (None: all).

    Its `config` is the part's but for the vocabulary. Buffers of `ops` are torch tensors on the group's devices.
    """
    shard = Shard(config, dist.get_rank(group), dist.get_world_size(group))
    decoder = Decoder(shard.config, ops, ShardSource(source, shard), progress)
    for projection in decoder.projections():
        if projection.group.members[0].name.endswith(SUMMED):
            projection.after = partial(_summed, group=group)
    decoder.head.after = partial(_joined, shard=shard, vocab=config.vocab_size, group=group)
    return decoder


def _summed(x: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def _joined(x: Tensor, *, shard: Shard, vocab: int, group: dist.ProcessGroup | None) -> Tensor:
    """Logits of all ranks side by side, [T, vocab]; a last rank with fewer is filled up meanwhile."""
    each = -(-vocab // shard.size)
    own = torch.nn.functional.pad(x, (0, each - x.shape[1])).contiguous()
    parts = [torch.empty_like(own) for _ in range(shard.size)]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts, dim=1)[:, :vocab].contiguous()


class Runs(Protocol):
    """What a leader leads: a runner of `halve.engine`."""

    vocab_size: int
    context: int
    num_blocks: int
    block_size: int
    batch_invariant: bool

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """Run a batch and choose a token for each of rows."""

    def copy_blocks(self, pairs: Array) -> None:
        """Copy blocks of the cache."""


class Leader:
    """The runner of the rank that has the engine: tells the others each call before it makes it."""

    def __init__(self, runner: Runs, group: dist.ProcessGroup | None = None) -> None:
        self._runner, self._group = runner, group
        self.vocab_size, self.context, self.batch_invariant = runner.vocab_size, runner.context, runner.batch_invariant
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """As the runner's, on all ranks."""
        _tell(("run", batch, rows, sampling), self._group)
        return self._runner.run(batch, rows, sampling)

    def copy_blocks(self, pairs: Array) -> None:
        """As the runner's, on all ranks."""
        _tell(("copy_blocks", pairs), self._group)
        self._runner.copy_blocks(pairs)

    def close(self) -> None:
        """Let the followers return."""
        _tell(("close",), self._group)


def follow(runner: Runs, group: dist.ProcessGroup | None = None) -> None:
    """Make the calls that the leader makes, until it closes. A step that fails here fails there as well: both go on."""
    while True:
        message: list[Any] = [None]
        dist.broadcast_object_list(message, src=0, group=group)
        call, *arguments = message[0]
        if call == "close":
            return
        try:
            getattr(runner, call)(*arguments)
        except Exception as error:  # the leader computes the same, raises the same, and tells its engine
            log.error("a step failed on rank %d: %s", dist.get_rank(group), error)


def _tell(message: tuple[Any, ...], group: dist.ProcessGroup | None) -> None:
    dist.broadcast_object_list([message], src=0, group=group)
