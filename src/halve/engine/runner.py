"""The model as the engine sees it: a flat batch in, tokens out. It owns the paged cache."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from halve.core.errors import RequestError
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.models.expert_cache import ExpertCacheUse
from halve.models.moe import ExpertCounts


class Runner(Protocol):
    """What runs the batches of an engine, over a paged cache of its own."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def context(self) -> int:
        """The most tokens of a sequence, prompt and answer together."""

    @property
    def num_blocks(self) -> int:
        """Blocks of its paged cache."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's result is the same to the bit whatever else is in the batch, and however it is cut."""

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """Write the batch's keys and values into the cache and choose a token for each of rows int32 [R].

        R may be 0, when a step holds nothing but prompts that it does not finish. A row may occur more than once.
        """

    def copy_blocks(self, pairs: Array) -> None:
        """Copy blocks of the cache, every layer: pairs int32 [n, 2], (from, to); no block is both."""


@runtime_checkable
class SparseRunner(Protocol):
    """A runner that may have experts to count."""

    def expert_counts(self) -> Sequence[ExpertCounts]:
        """Of each sparse layer; none for a dense model."""

    def expert_cache(self) -> ExpertCacheUse | None:
        """Of experts that are read from disk; None where all lie in memory."""


def expert_metrics(runner: object) -> dict[str, Any]:
    """What `EngineMetrics` says of experts."""
    if not isinstance(runner, SparseRunner):
        return {}
    counts = runner.expert_counts()
    if not counts or not all(one.steps for one in counts):
        return {"expert_cache": runner.expert_cache()}
    return {
        "expert_cache": runner.expert_cache(),
        "expert_tokens": tuple(tuple(int(n) for n in one.tokens) for one in counts),
        "experts_per_step": sum(one.reads for one in counts) / sum(one.steps for one in counts),
        "expert_imbalance": float(np.mean([one.tokens.max() / one.tokens.mean() for one in counts])),
    }


class Handle(Protocol):
    """A batch that was submitted."""

    def result(self) -> Sampled:
        """Its tokens, when they are there. Raises what went wrong; called once."""


@runtime_checkable
class AheadRunner(Runner, Protocol):
    """A runner that can be given a batch before the tokens of the one before are known: a device beside the host."""

    def submit(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Handle:
        """Begin what `run` does and return. Batches and copies of blocks take effect in the order they are given.

        A token id of -1 - r is the token that the batch submitted before chose for its row r. At most one batch is
        outstanding when another is submitted.
        """


class DecoderConfig(Protocol):
    """The sizes of a decoder that the engine needs."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    @property
    def context(self) -> int:
        """The most tokens of a sequence, prompt and answer together."""


class Decoder(Protocol):
    """A model over a paged cache: what `halve.models.Decoder` offers."""

    @property
    def config(self) -> DecoderConfig:
        """Its sizes."""

    @property
    def batch_invariant(self) -> bool:
        """As `Runner.batch_invariant`."""

    def new_cache(self, num_blocks: int, block_size: int) -> Any:
        """An empty paged cache."""

    def sample(self, batch: TokenBatch, cache: Any, rows: Array, sampling: SamplingBatch) -> Sampled:
        """Run a batch and choose a token for each of those rows."""

    def copy_blocks(self, cache: Any, pairs: Array) -> None:
        """Copy blocks of the cache."""


class ModelRunner:
    """A `Runner` over a decoder, with a cache of its own."""

    def __init__(self, decoder: Decoder, *, num_blocks: int, block_size: int = 16) -> None:
        self.decoder = decoder
        self.vocab_size, self.context = decoder.config.vocab_size, decoder.config.context
        self.num_blocks, self.block_size = num_blocks, block_size
        self.batch_invariant = decoder.batch_invariant
        self._cache = decoder.new_cache(num_blocks, block_size)

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """As `Runner.run`."""
        return self.decoder.sample(batch, self._cache, rows, sampling)

    def copy_blocks(self, pairs: Array) -> None:
        """As `Runner.copy_blocks`."""
        self.decoder.copy_blocks(self._cache, pairs)

    def expert_counts(self) -> Sequence[ExpertCounts]:
        """As `SparseRunner.expert_counts`."""
        return getattr(self.decoder, "expert_counts", list)()

    def expert_cache(self) -> ExpertCacheUse | None:
        """As `SparseRunner.expert_cache`."""
        found: ExpertCacheUse | None = getattr(self.decoder, "expert_cache", lambda: None)()
        return found


class AheadDecoder(Decoder, Protocol):
    """A decoder that can begin a step and tell its tokens later."""

    def submit(self, batch: TokenBatch, cache: Any, rows: Array, sampling: SamplingBatch) -> Handle:
        """As `AheadRunner.submit`."""


class AheadModelRunner(ModelRunner):
    """An `AheadRunner` over a decoder, with a cache of its own."""

    decoder: AheadDecoder

    def __init__(self, decoder: AheadDecoder, *, num_blocks: int, block_size: int = 16) -> None:
        super().__init__(decoder, num_blocks=num_blocks, block_size=block_size)

    def submit(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Handle:
        """As `AheadRunner.submit`."""
        return self.decoder.submit(batch, self._cache, rows, sampling)


def blocks_within(memory_bytes: int, bytes_per_block: int) -> int:
    """How many blocks a memory budget holds. Raises RequestError when not one fits."""
    if memory_bytes < bytes_per_block:
        raise RequestError(
            f"cache: {memory_bytes} bytes hold no block of {bytes_per_block} bytes; give the cache more memory"
        )
    return memory_bytes // bytes_per_block


def blocks_for(*, max_num_seqs: int, context: int, block_size: int) -> int:
    """How many blocks let max_num_seqs requests fill the whole context at once."""
    return max_num_seqs * -(-context // block_size)
