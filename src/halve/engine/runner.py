"""The model as the engine sees it: a flat batch in, logits of some rows out. It owns the paged cache."""

from typing import Any, Protocol

import numpy as np

from halve.core.errors import RequestError
from halve.kernels.ops import Array, AttentionSpec, TokenBatch, kv_block_bytes


class Runner(Protocol):
    """What runs the batches of an engine, over a paged cache of its own."""

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""

    @property
    def context(self) -> int:
        """The most tokens of a sequence, prompt and answer together."""

    @property
    def num_blocks(self) -> int:
        """Blocks of its paged cache."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""

    def run(self, batch: TokenBatch, rows: Array) -> Array:
        """Write the batch's keys and values into the cache; return float32 logits [R, vocab] of rows int32 [R].

        R may be 0, when a step holds nothing but prompts that it does not finish.
        """


class DecoderConfig(Protocol):
    """The sizes of a decoder that the engine needs."""

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""

    @property
    def context(self) -> int:
        """The most tokens of a sequence, prompt and answer together."""


class Decoder(Protocol):
    """A model over a paged cache: what `halve.models.Decoder` offers."""

    @property
    def config(self) -> DecoderConfig:
        """Its sizes."""

    def new_cache(self, num_blocks: int, block_size: int) -> Any:
        """An empty paged cache."""

    def step(self, batch: TokenBatch, cache: Any, rows: Array) -> Array:
        """Run a batch; return float32 logits [R, vocab] of those rows."""


class ModelRunner:
    """A `Runner` over a decoder, with a cache of its own."""

    def __init__(self, decoder: Decoder, *, num_blocks: int, block_size: int = 16) -> None:
        self.decoder = decoder
        self.vocab_size, self.context = decoder.config.vocab_size, decoder.config.context
        self.num_blocks, self.block_size = num_blocks, block_size
        self._cache = decoder.new_cache(num_blocks, block_size)

    def run(self, batch: TokenBatch, rows: Array) -> Array:
        """As `Runner.run`."""
        return np.asarray(self.decoder.step(batch, self._cache, rows), np.float32)


def block_bytes(*, num_layers: int, num_kv_heads: int, head_dim: int, kv_format: str, block_size: int) -> int:
    """Bytes of one block of the cache: keys and values of block_size tokens in every layer, and their scales."""
    layer = AttentionSpec(num_heads=num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, kv_format=kv_format)
    return num_layers * kv_block_bytes(layer, block_size)


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
