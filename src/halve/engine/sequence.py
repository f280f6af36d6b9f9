"""One answer on its way through the engine: its tokens, how far they are computed, and the blocks it holds."""

import secrets
from array import array
from enum import Enum
from functools import cached_property

from halve.engine.block_pool import BlockHash, block_hash, root_hash
from halve.engine.request import Request

# Orders sequences by urgency, least first: rank, then arrival, then which answer of its request.
Key = tuple[int, int, int]

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: seeds of one request's answers lie far apart


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Prompt and answer of one of a request's n samples. The scheduler owns and changes it.

    Tokens are counted before they are known: num_tokens includes the one that a step in flight will sample,
    token_ids holds those that are here. num_computed: tokens whose keys and values are in the cache, or will be when
    the steps scheduled so far have run. max_tokens: of prompt and answer. num_forks: samples that will split off when
    the prompt is computed. seed: of the sampler. num_cached_tokens: prompt tokens that were in the cache. num_drafts:
    guesses that it asks to run in the next step; is_guessing: a step in flight holds some. num_draft_tokens,
    num_accepted_tokens: guesses that ran, and of them those that the model chose too. prefill_s, decode_s: its share of
    the seconds that steps took.
    """

    def __init__(self, request: Request, key: Key, max_tokens: int) -> None:
        self.request, self.key, self.max_tokens = request, key, max_tokens
        self.status = Status.WAITING
        self.token_ids = array("i", request.prompt_token_ids)
        self.num_tokens = len(self.token_ids)
        self.num_computed = 0
        self.blocks = array("i")
        self.num_published = 0  # of its blocks, those that the pool may give to others
        self.num_forks = request.sampling.n - 1
        self.num_cached_tokens = 0
        self.num_admissions = 0
        self.flight_row = -1  # where the latest step that samples it has its token
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.is_guessing = False
        self.prefill_s = self.decode_s = 0.0
        given = request.sampling.seed
        self.seed = secrets.randbits(64) if given is None else given
        self._hashes: list[BlockHash] = []

    @property
    def index(self) -> int:
        """Which of the request's n answers."""
        return self.key[2]

    @cached_property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @cached_property
    def sampler_row(self) -> tuple[float, ...]:
        """Its numbers in a `SamplingBatch`, in the order that `engine/batch.py` reads."""
        p = self.request.sampling
        cuts = (p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p)
        penalties = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty)
        return (*cuts, *penalties, -1 if p.logprobs is None else p.logprobs)

    @cached_property
    def is_penalized(self) -> bool:
        """Whether the sampler needs to know the tokens so far."""
        p = self.request.sampling
        return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)

    @cached_property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken as the model says it, and nothing is told about it."""
        p = self.request.sampling
        plain = not (p.temperature or p.logit_bias or self.is_penalized or p.grammar)
        return plain and p.logprobs is None

    @property
    def waits_for_tokens(self) -> bool:
        """Whether a token can be chosen only when those before it are known."""
        return self.is_penalized or self.request.sampling.grammar is not None

    @property
    def num_generated(self) -> int:
        """Generated tokens that are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that no step has computed yet: 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def num_slots(self) -> int:
        """Sequences that it is or will be."""
        return 1 + self.num_forks

    def hashes(self, num_blocks: int, block_size: int) -> list[BlockHash]:
        """Names of its first num_blocks blocks, all of whose tokens are known."""
        for i in range(len(self._hashes), num_blocks):
            parent = self._hashes[-1] if i else root_hash(self.request.cache_salt)
            self._hashes.append(block_hash(parent, self.token_ids[i * block_size : (i + 1) * block_size]))
        return self._hashes[:num_blocks]

    def fork(self, index: int) -> "Sequence":
        """Another sample, at the same point, over the same blocks; the caller counts their references."""
        twin = Sequence(self.request, (*self.key[:2], index), self.max_tokens)
        twin.status, twin.num_admissions, twin.num_forks = self.status, self.num_admissions, 0
        twin.num_tokens, twin.num_computed = self.num_tokens, self.num_computed
        twin.blocks, twin.num_published = self.blocks[:], self.num_published
        twin.num_cached_tokens = self.num_cached_tokens
        twin.seed = (self.seed + index * _GOLDEN) % 2**64
        twin._hashes = self._hashes[:]
        return twin
