"""Texts through the engine's own steps: what a model says behind every token, as it is served.

The real `Scheduler` plans, over the real paged cache in the plan's format, with as many sequences side by side as are
served; only the tokens are not chosen but taken from the text. Prefixes are not reused, so that every position is
computed. The first part of a text is a prompt and runs in chunks; the rest is an answer, every token of it a decoding
step of its own beside the prompts and answers of others, as when users are served.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from halve.core.errors import RequestError
from halve.engine.batch import block_copies, token_batch
from halve.engine.block_pool import BlockPool
from halve.engine.config import EngineConfig
from halve.engine.request import Request, SamplingParams
from halve.engine.runner import blocks_for
from halve.engine.scheduler import Scheduler
from halve.kernels.ops import Array, TokenBatch

PROMPT_SHARE = 0.5  # of a text; the rest is decoded token by token
STEP_LOGITS = 1 << 25  # of a step: 128 MiB of float32; a step takes fewer tokens where the vocabulary is large


class LogitDecoder(Protocol):
    """A model over a paged cache that tells its logits: what `halve.models.Decoder` offers."""

    @property
    def config(self) -> Any:
        """Its sizes: `vocab_size`."""

    def new_cache(self, num_blocks: int, block_size: int) -> Any:
        """An empty paged cache."""

    def step(self, batch: TokenBatch, cache: Any, rows: Array) -> Array:
        """Run a step and return float32 logits of those rows."""

    def copy_blocks(self, cache: Any, pairs: Array) -> None:
        """Copy blocks of the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Logits float32 [t, vocab] behind the tokens of text `index` from `start` on."""

    index: int
    start: int
    logits: Array


class _Unshared(BlockPool):
    """A pool that finds no prefix again, so that every token is computed."""

    def find(self, names: Any) -> list[int]:
        del names
        return []


def step_tokens_of(config: EngineConfig, vocab_size: int) -> int:
    """Tokens of a step at most: the engine's, or fewer where their logits would take too much memory."""
    return max(config.max_num_seqs, min(config.max_tokens_per_step, STEP_LOGITS // vocab_size))


def forced(
    decoder: LogitDecoder,
    texts: Sequence[Array],
    config: EngineConfig,
    *,
    num_blocks: int | None = None,
    block_size: int = 16,
    prompt_share: float = PROMPT_SHARE,
) -> Iterator[list[Piece]]:
    """Run texts (int32 [tokens], one token at least) and tell the logits of each step, by text and position.

    num_blocks: of the cache, None for as many as `max_num_seqs` of the longest text fill. prompt_share: of each text
    that is a prompt, at least one token. A piece may come again where a sequence had to give up its blocks.
    Raises RequestError for a text that the cache can't hold.
    """
    if not texts:
        return
    longest = max(len(text) for text in texts) + 2
    wanted = blocks_for(max_num_seqs=min(config.max_num_seqs, len(texts)), context=longest, block_size=block_size) + 1
    pool = _Unshared(wanted if num_blocks is None else min(wanted, num_blocks), block_size)
    config = replace(config, max_tokens_per_step=step_tokens_of(config, decoder.config.vocab_size))
    scheduler = Scheduler.configured(config, pool, context=longest)
    cache = decoder.new_cache(pool.num_blocks, block_size)
    for index, text in enumerate(texts):
        if not len(text):
            raise RequestError(f"text {index + 1}: holds no token")
        prompt = text[: max(1, round(len(text) * prompt_share))]
        params = SamplingParams(max_tokens=len(text) - len(prompt) + 1, seed=0)
        request = Request(request_id=str(index), prompt_token_ids=tuple(prompt.tolist()), sampling=params)
        scheduler.check(request)
        scheduler.add(request)
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        batch, _ = token_batch(step, block_size)
        for pairs in block_copies(step):
            decoder.copy_blocks(cache, pairs)
        logits = decoder.step(batch, cache, np.arange(batch.num_tokens, dtype=np.int32))
        pieces, tokens, row = [], [], 0
        for chunk in step.chunks:
            index = int(chunk.sequence.request.request_id)
            pieces.append(Piece(index, chunk.start, logits[row : row + chunk.num_tokens]))
            row += chunk.num_tokens
            if chunk.sampled:  # the token behind it, or any where the text ends
                text = texts[index]
                tokens.append(int(text[chunk.end]) if chunk.end < len(text) else 0)
        yield pieces
        for sequence, _, num_generated in scheduler.commit(step, tokens):
            if sequence.num_prompt_tokens + num_generated >= sequence.max_tokens:
                scheduler.remove(sequence)
