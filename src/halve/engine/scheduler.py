"""Which tokens run in the next step. It works on counts alone, so step n + 1 can be planned before step n's tokens are
on the host: `schedule` counts a sampled token as soon as it is planned, `commit` brings its id.

A step holds one token of every sequence that decodes, then chunks of prompts, up to max_tokens_per_step; beside
decodes at most max_prefill_beside_decode tokens of prompts, since every running answer waits for them.

**Order.** Requests are served by rank: arrival number + priority * overtakes_per_priority, the least first. So a
request of priority p is overtaken by fewer than (p - q) * overtakes_per_priority later requests of priority q < p,
however many come: none starves, and a rank never changes, so the queue is a heap. The first in the queue is never
passed over for one that would fit; what runs ends or is preempted, so its turn comes.

**Memory.** A sequence gets the blocks of its prompt when it is admitted and one more whenever it fills the last. It is
admitted when those are there and one block is left for each running sequence to grow by. When a sequence needs a block
and there is none, the running sequence of the highest rank gives up its blocks (itself, if it is the one) and waits
again, with its tokens kept; they are computed again, but for the full blocks that are still in the prefix cache. The
sequence of the lowest rank is never preempted, and alone it fits, so every step makes progress.

**Guesses.** A sequence that decodes may run tokens that were guessed to follow its last one in the same step
(`engine/speculative.py` sets `Sequence.num_drafts` before and fills `Chunk.draft` after planning). Each is a row of its
own; `commit` keeps those that the model chose too, and one more. The step is counted as if none were kept, and `commit`
adds those that are, so what comes to nothing is simply written over. Guesses take blocks and room that nobody else
needs: they never preempt, and no sequence loses its token for one.

**Samples.** The n answers of a request share the blocks of its prompt. They split off when it is computed; whoever
writes into a block that others hold gets a copy first.

Sources: Orca (OSDI 2022) for batching by iteration, arXiv:2403.02310 for chunked prefill, arXiv:2309.06180.
"""

from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import NamedTuple, Self

from halve.core.errors import RequestError
from halve.engine.block_pool import BlockPool
from halve.engine.config import EngineConfig
from halve.engine.request import Request
from halve.engine.sequence import Key, Sequence, Status

_KEY = attrgetter("key")
_NO_DRAFT = array("i")  # never filled


class Chunk(NamedTuple):
    """`num_tokens` tokens of a sequence from `start` on, to run in one step.

    sampled: the sequences whose next token comes from its last row: none while tokens are still pending, more than one
    where a request's samples split off. source: the row of the step before that samples its last token, if that token
    is still in flight. admission: which stay in the running set it belongs to. draft: tokens guessed to follow its last
    one, at most num_drafts; they run behind it, and each has a row that is sampled. `commit` leaves those it kept.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    sampled: tuple[Sequence, ...]
    source: int
    admission: int
    num_drafts: int = 0
    draft: "array[int]" = _NO_DRAFT

    @property
    def num_rows(self) -> int:
        """Rows that are sampled."""
        return len(self.sampled) + len(self.draft)

    @property
    def end(self) -> int:
        """Tokens of the sequence that are computed after it."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class Step:
    """What runs at once. copies: block pairs (from, to) to copy before anything is written."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_sampled: int = 0

    @property
    def sampled(self) -> list[Sequence]:
        """The sequence of each row; one that has guesses behind its token comes once for each of them too."""
        return [
            sequence
            for chunk in self.chunks
            for sequence in (chunk.sampled * chunk.num_rows if chunk.draft else chunk.sampled)
        ]

    def number_rows(self) -> None:
        """Count the rows again, after the drafts were filled."""
        self.num_sampled = 0
        for chunk in self.chunks:
            for row, sequence in enumerate(chunk.sampled, start=self.num_sampled):
                sequence.flight_row = row
            self.num_sampled += chunk.num_rows


class Told(NamedTuple):
    """A token that a sequence has got: from which row, and how many it has generated with it."""

    sequence: Sequence
    row: int
    num_generated: int


@dataclass(slots=True)
class Counts:
    """What has happened so far. num_hit_tokens: tokens found in the prefix cache instead of computed.

    num_draft_tokens: tokens that were guessed and ran. num_accepted_tokens: of them, those that the model chose too.
    """

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_sampled_tokens: int = 0
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Scheduler:
    """Sequences that wait and sequences that run. Owns no model: a simulator can drive it."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        context: int,
        max_num_seqs: int,
        max_tokens_per_step: int,
        max_prefill_beside_decode: int | None = None,
        overtakes_per_priority: int = 100,
    ) -> None:
        self.pool, self.context = pool, context
        self.max_num_seqs, self.max_tokens_per_step = max_num_seqs, max_tokens_per_step
        self.max_prefill_beside_decode = max_prefill_beside_decode or max_tokens_per_step
        self.overtakes_per_priority = overtakes_per_priority
        self.counts = Counts()
        self._arrivals = 0
        self._requests: dict[str, list[Sequence]] = {}  # the unfinished sequences of each
        self._waiting: list[tuple[Key, Sequence]] = []  # a heap; finished ones are dropped when they come up
        self._num_dead = 0
        self._running: list[Sequence] = []  # by key
        self._num_slots = 0
        self._forks: list[Sequence] = []  # split off in the step that is being planned
        self._num_in_flight = 0

    @classmethod
    def configured(cls, config: EngineConfig, pool: BlockPool, *, context: int) -> Self:
        """The scheduler of an engine of this configuration."""
        return cls(
            pool,
            context=context,
            max_num_seqs=config.max_num_seqs,
            max_tokens_per_step=config.max_tokens_per_step,
            max_prefill_beside_decode=config.max_prefill_beside_decode,
            overtakes_per_priority=config.overtakes_per_priority,
        )

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting) - self._num_dead

    @property
    def running(self) -> SequenceOf[Sequence]:
        """The sequences that hold blocks, the most urgent first."""
        return self._running

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    def of_request(self, request_id: str) -> tuple[Sequence, ...]:
        """The unfinished sequences of a request, none for one that is unknown."""
        return tuple(self._requests.get(request_id, ()))

    def check(self, request: Request) -> None:
        """Raise RequestError for a request that could never run: too long for the context or the cache, too wide."""
        name, num_prompt_tokens = f"request {request.request_id!r}", len(request.prompt_token_ids)
        if num_prompt_tokens >= self.context:
            raise RequestError(
                f"{name}: the prompt has {num_prompt_tokens} tokens, the context holds {self.context} for prompt and "
                "answer together; shorten the prompt"
            )
        if request.sampling.n > self.max_num_seqs:
            raise RequestError(
                f"{name}: n is {request.sampling.n}, the engine runs {self.max_num_seqs} sequences at once "
                "(max_num_seqs); ask for fewer, or in several requests"
            )
        needed = self._max_tokens(request) - 1  # nothing reads the keys and values of the last token
        if self.pool.blocks_for(needed) > self.pool.num_blocks:
            there = self.pool.num_blocks * self.pool.block_size
            raise RequestError(
                f"{name}: prompt and max_tokens need {needed} tokens of cache, there are {there} in all; lower "
                "max_tokens, shorten the prompt or give the cache more memory"
            )

    def add(self, request: Request) -> Sequence:
        """Queue a request that `check` lets pass."""
        assert request.request_id not in self._requests
        self._arrivals += 1
        rank = self._arrivals + request.priority * self.overtakes_per_priority
        sequence = Sequence(request, (rank, self._arrivals, 0), self._max_tokens(request))
        self._requests[request.request_id] = [sequence]
        heappush(self._waiting, (sequence.key, sequence))
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget an unfinished sequence, waiting or running, and free its blocks."""
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
        if sequence.status is Status.RUNNING:
            del self._running[bisect_left(self._running, sequence.key, key=_KEY)]
            self._let_go(sequence)
        else:
            self._num_dead += 1
        sequence.status = Status.FINISHED
        if self._num_dead > 16 + len(self._waiting) // 2:
            self._waiting = [entry for entry in self._waiting if entry[1].status is Status.WAITING]
            heapify(self._waiting)
            self._num_dead = 0

    def schedule(self) -> Step:
        """Plan the next step. One step before it may still be in flight: `commit` has not told its tokens.

        A step is empty when nothing waits or runs, or when all that could run waits for tokens in flight.
        """
        assert self._num_in_flight <= 1, "more than one step is in flight"
        step, preemptions = Step(), self.counts.num_preemptions
        self._schedule_decodes(step)
        room = self.max_tokens_per_step - sum(1 + chunk.num_drafts for chunk in step.chunks)
        if step.chunks:
            room = min(room, self.max_prefill_beside_decode)
        for sequence in self._running:
            if room and sequence.num_pending > 1:
                room -= self._append(step, sequence, min(sequence.num_pending, room))
        if self.counts.num_preemptions == preemptions:
            self._admit(step, room)
        for fork in self._forks:
            insort(self._running, fork, key=_KEY)
        self._forks.clear()
        if step.chunks:
            self._num_in_flight += 1
            self.counts.num_steps += 1
        return step

    def commit(self, step: Step, token_ids: SequenceOf[int]) -> list[Told]:
        """Take the tokens of a step that has run, one for each row of `step.sampled`.

        Returns what each sequence has got; those that were removed meanwhile (status FINISHED) have got nothing. Full
        blocks go into the prefix cache now that they hold something.
        """
        told: list[Told] = []
        row = 0
        for chunk in step.chunks:
            num_rows = chunk.num_rows
            for i, sequence in enumerate(chunk.sampled, start=row):
                if sequence.status is not Status.FINISHED:
                    sequence.token_ids.append(token_ids[i])
                    told.append(Told(sequence, i, sequence.num_generated))
            if chunk.num_drafts:
                self._keep(chunk, token_ids, row, told)
            if self._is_current(chunk):
                self._publish(chunk.sequence, chunk.end + len(chunk.draft))
            row += num_rows
        assert row == len(token_ids), "a token for each row"
        self._num_in_flight -= 1
        self.counts.num_sampled_tokens += len(told)
        return told

    def _keep(self, chunk: Chunk, token_ids: SequenceOf[int], row: int, told: list[Told]) -> None:
        """Take the tokens of the guesses that the model chose too; `row` is that of the token before them."""
        sequence, draft = chunk.sequence, chunk.draft
        num_kept = 0
        while num_kept < len(draft) and draft[num_kept] == token_ids[row + num_kept]:
            num_kept += 1
        self.counts.num_draft_tokens += len(draft)
        self.counts.num_computed_tokens += len(draft)
        self.counts.num_accepted_tokens += num_kept
        sequence.num_draft_tokens += len(draft)
        sequence.num_accepted_tokens += num_kept
        sequence.is_guessing = False
        del draft[num_kept:]
        if sequence.status is Status.FINISHED:
            return
        for i in range(row + 1, row + 1 + num_kept):
            sequence.token_ids.append(token_ids[i])
            told.append(Told(sequence, i, sequence.num_generated))
        sequence.num_tokens += num_kept
        if self._is_current(chunk):
            sequence.num_computed += num_kept

    def _publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Put the full blocks of its first tokens into the prefix cache."""
        full = num_tokens // self.pool.block_size
        if full > sequence.num_published:
            names = sequence.hashes(full, self.pool.block_size)
            for i in range(sequence.num_published, full):
                self.pool.publish(sequence.blocks[i], names[i])
            sequence.num_published = full

    def discard(self, step: Step) -> set[str]:
        """End every request that a failed step held; what it has written is not used. Returns their ids."""
        self._num_in_flight -= 1
        held = [sequence for chunk in step.chunks for sequence in (chunk.sequence, *chunk.sampled)]
        failed = {sequence.request.request_id for sequence in held if sequence.status is not Status.FINISHED}
        for request_id in failed:
            for sequence in self.of_request(request_id):
                self.remove(sequence)
        return failed

    def check_invariants(self) -> None:
        """Assert that no block is lost and that every count is what it counts."""
        self.pool.check()
        held = Counter(block for sequence in self._running for block in sequence.blocks)
        assert all(self.pool.num_references(block) == held[block] for block in range(self.pool.num_blocks))
        assert self._running == sorted(self._running, key=_KEY)
        assert self._num_slots == sum(sequence.num_slots for sequence in self._running) <= self.max_num_seqs
        waiting = [sequence for _, sequence in self._waiting if sequence.status is Status.WAITING]
        assert self.num_waiting == len(waiting)
        assert not any(sequence.blocks for sequence in waiting)
        unfinished = {id(sequence) for sequences in self._requests.values() for sequence in sequences}
        assert unfinished == {id(sequence) for sequence in [*waiting, *self._running]}

    def _schedule_decodes(self, step: Step) -> None:
        """One token of each sequence that decodes, in order of rank; a sequence after it may be preempted for it."""
        position = 0
        spare = self.max_tokens_per_step - len(self._running)  # tokens that may be guesses
        while position < len(self._running):
            sequence = self._running[position]
            position += 1
            wants = sequence.num_pending == 1 and sequence.num_tokens < sequence.max_tokens and not sequence.is_guessing
            if wants and self._make_room(step, sequence):
                num_drafts = self._room_for_drafts(sequence, spare) if sequence.num_drafts else 0
                spare -= num_drafts
                self._append(step, sequence, 1, num_drafts)

    def _room_for_drafts(self, sequence: Sequence, spare: int) -> int:
        """How many of the guesses that a sequence asks for it may have, with blocks for them."""
        known = len(sequence.token_ids)
        wanted, sequence.num_drafts = sequence.num_drafts, 0
        if known < sequence.num_tokens:
            return 0
        free = max(0, self.pool.num_available - len(self._running))
        within = (len(sequence.blocks) + free) * self.pool.block_size - known
        granted = max(0, min(wanted, spare, sequence.max_tokens - known - 1, within))
        while len(sequence.blocks) < self.pool.blocks_for(known + granted):
            sequence.blocks.append(self.pool.allocate())
        return granted

    def _make_room(self, step: Step, sequence: Sequence) -> bool:
        """See that the next token's slot is there and is the sequence's own. False: it was preempted itself."""
        while True:
            place = sequence.num_computed // self.pool.block_size
            grows = place == len(sequence.blocks)
            if not grows and self.pool.num_references(sequence.blocks[place]) == 1:
                return True
            if self.pool.num_available:
                break
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        block = self.pool.allocate()
        if grows:
            sequence.blocks.append(block)
        else:
            shared = sequence.blocks[place]
            step.copies.append((shared, block))
            sequence.blocks[place] = block
            self.pool.release([shared])
        return True

    def _admit(self, step: Step, room: int) -> None:
        while room > 0 and (sequence := self._first_waiting()):
            if self._num_slots + sequence.num_slots > self.max_num_seqs or not self._take_blocks(sequence):
                return
            heappop(self._waiting)
            sequence.status = Status.RUNNING
            sequence.num_admissions += 1
            self._num_slots += sequence.num_slots
            insort(self._running, sequence, key=_KEY)
            room -= self._append(step, sequence, min(sequence.num_pending, room))

    def _first_waiting(self) -> Sequence | None:
        while self._waiting:
            sequence = self._waiting[0][1]
            if sequence.status is Status.WAITING:
                in_flight = sequence.num_tokens > len(sequence.token_ids)  # preempted before its token was here
                return None if in_flight else sequence
            heappop(self._waiting)
            self._num_dead -= 1
        return None

    def _take_blocks(self, sequence: Sequence) -> bool:
        """The blocks of all its tokens: those of a known prefix, and new ones. False, and none, if too few are there.

        At least one token is left to compute, since its logits are needed.
        """
        pool = self.pool
        most = (sequence.num_tokens - 1) // pool.block_size
        found = pool.find(sequence.hashes(most, pool.block_size))
        new = pool.blocks_for(sequence.num_tokens) - len(found)
        if new + len(self._running) > pool.num_available - pool.num_unused(found):
            return False
        for block in found:
            pool.share(block)
        sequence.blocks.extend(found)
        sequence.blocks.extend(pool.allocate() for _ in range(new))
        sequence.num_published = len(found)
        sequence.num_computed = len(found) * pool.block_size
        if not sequence.num_admissions:
            sequence.num_cached_tokens = sequence.num_computed
        self.counts.num_hit_tokens += sequence.num_computed
        return True

    def _append(self, step: Step, sequence: Sequence, num_tokens: int, num_drafts: int = 0) -> int:
        """Put the next tokens of a sequence into the step; its next token counts from now on."""
        start, source = sequence.num_computed, sequence.flight_row
        sequence.num_computed += num_tokens
        sampled: tuple[Sequence, ...] = ()
        if sequence.num_computed == sequence.num_tokens:
            sequence.num_tokens += 1
            sampled = (sequence, *self._fork(sequence)) if sequence.num_forks else (sequence,)
            for row, one in enumerate(sampled, start=step.num_sampled):
                one.flight_row = row
            step.num_sampled += len(sampled)
        if num_drafts:
            sequence.is_guessing = True
            draft = array("i")
            chunk = Chunk(sequence, start, num_tokens, sampled, source, sequence.num_admissions, num_drafts, draft)
        else:
            chunk = Chunk(sequence, start, num_tokens, sampled, source, sequence.num_admissions)
        step.chunks.append(chunk)
        self.counts.num_computed_tokens += num_tokens
        return num_tokens

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        forks = [sequence.fork(index) for index in range(1, sequence.num_slots)]
        sequence.num_forks = 0
        for fork in forks:
            for block in fork.blocks:
                self.pool.share(block)
        self._requests[sequence.request.request_id].extend(forks)
        self._forks.extend(forks)
        return forks

    def _preempt(self, sequence: Sequence) -> None:
        """Send a sequence that has just left the running ones back to the queue."""
        self._let_go(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed = sequence.num_published = sequence.num_drafts = 0
        heappush(self._waiting, (sequence.key, sequence))
        self.counts.num_preemptions += 1

    def _let_go(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = array("i")
        self._num_slots -= sequence.num_slots

    def _is_current(self, chunk: Chunk) -> bool:
        """Whether the sequence still holds the blocks that the chunk was computed into."""
        sequence = chunk.sequence
        return sequence.status is Status.RUNNING and sequence.num_admissions == chunk.admission

    def _max_tokens(self, request: Request) -> int:
        """Prompt and answer at their longest; the context ends an answer earlier than max_tokens."""
        return min(len(request.prompt_token_ids) + request.sampling.max_tokens, self.context)
