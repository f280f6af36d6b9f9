"""Which tokens run in the next step: first come, first served, prefill chunks and decodes in one flat batch.

A request is admitted when the blocks for its prompt and all of its max_tokens are free, so that memory never runs
out midway; the requests behind it wait, so that none starves. A step runs one token of every request that decodes,
then fills up to max_tokens_per_step with prompts in order of arrival, the last of them cut into chunks.
Sources: Orca (OSDI 2022) for batching by iteration, arXiv:2403.02310 for chunked prefill.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halve.core.errors import RequestError
from halve.engine.block_pool import BlockPool
from halve.engine.request import Request
from halve.kernels.ops import Array, TokenBatch


class RequestState:
    """A request on its way. num_computed: how many of its tokens have keys and values in the cache."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.token_ids = list(request.prompt_token_ids)  # the prompt, then what was generated
        self.num_computed = 0
        self.blocks: tuple[int, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that have not run yet: 1 while decoding."""
        return len(self.token_ids) - self.num_computed


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The next `num_tokens` pending tokens of a request, to run in this step."""

    state: RequestState
    num_tokens: int

    @property
    def ends_pending(self) -> bool:
        """Whether nothing is pending after it, so that the next token is sampled from its last row."""
        return self.num_tokens == self.state.num_pending


class Scheduler:
    """Requests that wait and requests that run. Owns no model: a simulator can drive it."""

    def __init__(self, pool: BlockPool, *, context: int, max_num_seqs: int, max_tokens_per_step: int) -> None:
        self.pool, self.context = pool, context
        self.max_num_seqs, self.max_tokens_per_step = max_num_seqs, max_tokens_per_step
        self.waiting: deque[RequestState] = deque()
        self.running: dict[str, RequestState] = {}  # in order of admission

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> RequestState:
        """Queue a request. Raises RequestError for one that could never run: too long for the context or the cache."""
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens >= self.context:
            raise RequestError(
                f"request {request.request_id!r}: the prompt has {num_prompt_tokens} tokens, the context holds "
                f"{self.context} for prompt and answer together; shorten the prompt"
            )
        needed = self._most_tokens(request)
        if self.pool.blocks_for(needed) > self.pool.num_blocks:
            there = self.pool.num_blocks * self.pool.block_size
            raise RequestError(
                f"request {request.request_id!r}: prompt and max_tokens need {needed} tokens of cache, there are "
                f"{there} in all; lower max_tokens, shorten the prompt or give the cache more blocks"
            )
        state = RequestState(request)
        self.waiting.append(state)
        return state

    def remove(self, request_id: str) -> None:
        """Forget a request, waiting or running, and free its blocks."""
        if request_id in self.running:
            del self.running[request_id]
            self.pool.free(request_id)
            return
        self.waiting = deque(state for state in self.waiting if state.request.request_id != request_id)

    def schedule(self) -> list[Chunk]:
        """What runs next; empty only when no request is unfinished. Admits waiting requests that fit."""
        budget = self.max_tokens_per_step
        chunks = [Chunk(state=s, num_tokens=1) for s in self.running.values() if s.num_pending == 1]
        budget -= len(chunks)
        for state in [s for s in self.running.values() if s.num_pending > 1]:
            budget -= self._prefill(state, budget, chunks)
        while budget > 0 and self._can_admit():
            state = self.waiting.popleft()
            request_id = state.request.request_id
            state.blocks = self.pool.allocate(request_id, self.pool.blocks_for(self._most_tokens(state.request)))
            self.running[request_id] = state
            budget -= self._prefill(state, budget, chunks)
        return chunks

    def _prefill(self, state: RequestState, budget: int, chunks: list[Chunk]) -> int:
        num_tokens = min(state.num_pending, budget)
        if num_tokens:
            chunks.append(Chunk(state=state, num_tokens=num_tokens))
        return num_tokens

    def _can_admit(self) -> bool:
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        return self.pool.blocks_for(self._most_tokens(self.waiting[0].request)) <= self.pool.num_free

    def _most_tokens(self, request: Request) -> int:
        """Prompt and answer at their longest; the context ends an answer earlier than max_tokens."""
        return min(len(request.prompt_token_ids) + request.sampling.max_tokens, self.context)


def flat_batch(chunks: Sequence[Chunk], block_size: int) -> tuple[TokenBatch, Array]:
    """The chunks as one flat batch over the paged cache, and the rows int32 [R] whose logits are wanted.

    Rows are the last token of each chunk that leaves nothing pending, in the order of the chunks.
    """
    counts = np.array([chunk.num_tokens for chunk in chunks], np.int32)
    cu_seqlens = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    ends = [chunk.state.num_computed + chunk.num_tokens for chunk in chunks]
    block_tables = np.full((len(chunks), -(-max(ends) // block_size)), -1, np.int32)
    token_ids, positions, slots = [], [], []
    for i, (chunk, end) in enumerate(zip(chunks, ends, strict=True)):
        start = chunk.state.num_computed
        blocks = np.array(chunk.state.blocks[: -(-end // block_size)], np.int32)
        block_tables[i, : len(blocks)] = blocks
        position = np.arange(start, end, dtype=np.int32)
        token_ids.append(np.array(chunk.state.token_ids[start:end], np.int32))
        positions.append(position)
        slots.append(blocks[position // block_size] * np.int32(block_size) + position % np.int32(block_size))
    batch = TokenBatch(
        token_ids=np.concatenate(token_ids),
        positions=np.concatenate(positions),
        cu_seqlens=cu_seqlens,
        slot_mapping=np.concatenate(slots),
        block_tables=block_tables,
    )
    rows = np.array([cu_seqlens[i + 1] - 1 for i, chunk in enumerate(chunks) if chunk.ends_pending], np.int32)
    return batch, rows
