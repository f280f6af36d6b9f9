"""Guesses of a smaller model: it runs ahead, token by token, and the larger one judges all of them at once.

Its cache has the blocks of the target's: the same numbers, the same slots, so that a sequence's block table serves both
and nothing is allocated twice. It is filled late: the draft model reads what it has not read of a sequence when that
begins to guess, all but the full blocks that it has read for another sequence with the same beginning, which it knows
by the pool's names of them. What it writes into a shared block is what is there already.

It draws its tokens as the target will draw them, with the same cuts, penalties and random numbers.
"""

import time
import weakref
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from halve.core.errors import ConfigError
from halve.engine.batch import SampledRow, sampled_rows, sampling_of, token_batch
from halve.engine.block_pool import BlockHash
from halve.engine.draft_lengths import StepCosts
from halve.engine.runner import Runner
from halve.engine.scheduler import Chunk, Step
from halve.engine.sequence import Sequence
from halve.engine.speculative import Guess
from halve.kernels.ops import Array, TokenBatch

READ_AT_ONCE = 8  # tokens that are behind and cost no more than one


@dataclass(slots=True)
class _Read:
    """How far the draft model has read a sequence. admission: the stay in the running set whose blocks it wrote."""

    admission: int
    num_tokens: int
    num_named: int = 0


class DraftModel:
    """Proposes what a smaller model says.

    runner: of the draft model, with the blocks of the target's. eos_token_ids: as for the engine. tokens_per_step: of a
    sequence's beginning that are read at once. Raises ConfigError when the two do not fit together.
    """

    name = "the draft model"
    first_rates: Mapping[int, float] = MappingProxyType({0: 0.7})

    def __init__(
        self,
        runner: Runner,
        target: Runner,
        *,
        eos_token_ids: Collection[int] = (),
        tokens_per_step: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if runner.vocab_size != target.vocab_size:
            raise ConfigError(
                f"speculation: the draft model has a vocabulary of {runner.vocab_size} tokens, the model one of "
                f"{target.vocab_size}; take a draft with the same tokenizer"
            )
        if (runner.num_blocks, runner.block_size) != (target.num_blocks, target.block_size):
            raise ConfigError(
                f"speculation: the draft model's cache has {runner.num_blocks} blocks of {runner.block_size} tokens, "
                f"the model's {target.num_blocks} of {target.block_size}; make them equal"
            )
        self.runner, self.eos_token_ids = runner, frozenset(eos_token_ids)
        self.tokens_per_step, self.clock = tokens_per_step, clock
        self.costs = StepCosts()
        self._token_s = 0.0  # of a token that is read, while many are
        self._read: weakref.WeakKeyDictionary[Sequence, _Read] = weakref.WeakKeyDictionary()
        self._names: dict[int, BlockHash] = {}  # what full blocks hold

    def look(self, sequence: Sequence, most: int) -> Guess | None:
        """As `Proposer.look`; None where its context ends."""
        most = min(most, self.runner.context - sequence.num_tokens)
        if most < 1:
            return None
        unread = sequence.num_tokens - self._state(sequence).num_tokens
        token_s = self._token_s or self.costs.of(1)
        return Guess(0, most, unread * token_s if unread > READ_AT_ONCE else 0.0)

    def draft_cost(self, num_sequences: int) -> float:
        """As `Proposer.draft_cost`; as it was measured, 0 before."""
        return self.costs.of(num_sequences)

    def fill(self, chunks: SequenceOf[Chunk]) -> None:
        """As `Proposer.fill`. A sequence whose beginning is too long to be read in one step gets none in this one."""
        going = self._read_up(chunks)
        depth = 1
        while going := [chunk for chunk in going if chunk.num_drafts > depth]:
            self._go_on(going, depth)
            depth += 1

    def accepted(self, chunk: Chunk) -> None:
        """Behind the first guess that was wrong, nothing counts as read."""
        read = self._read.get(chunk.sequence)
        if read is not None:
            read.num_tokens = min(read.num_tokens, chunk.end + len(chunk.draft))

    def _state(self, sequence: Sequence) -> _Read:
        read = self._read.get(sequence)
        if read is None or read.admission != sequence.num_admissions:
            read = self._read[sequence] = _Read(sequence.num_admissions, 0)
            size = self.runner.block_size
            full = (sequence.num_tokens - 1) // size
            for block, name in zip(sequence.blocks, sequence.hashes(full, size), strict=False):
                if self._names.get(block) != name:
                    break
                read.num_named += 1
            read.num_tokens = read.num_named * size
        return read

    def _read_up(self, chunks: SequenceOf[Chunk]) -> list[Chunk]:
        """Read what is unread, up to each sequence's last token, whose row gives the first guess. Those that got it."""
        step, got, room, size = Step(), [], self.tokens_per_step, self.runner.block_size
        written: set[int] = set()
        for chunk in chunks:
            sequence, read = chunk.sequence, self._state(chunk.sequence)
            number = min(chunk.end - read.num_tokens, room)
            blocks = sequence.blocks[read.num_tokens // size : (read.num_tokens + number - 1) // size + 1]
            if number < 1:
                continue
            if not written.isdisjoint(
                blocks
            ):  # another sequence reads the same beginning: take it from there next time
                del self._read[sequence]
                continue
            written.update(blocks)
            room -= number
            ended = read.num_tokens + number == chunk.end
            sampled = (sequence,) if ended else ()
            step.chunks.append(Chunk(sequence, read.num_tokens, number, sampled, -1, read.admission))
            if ended:
                got.append(chunk)
        if not step.chunks:
            return []
        batch, rows = token_batch(step, self.runner.block_size)
        seconds = self._run(batch, rows, sampled_rows(step), got)
        if batch.num_tokens <= 2 * len(step.chunks):
            self.costs.observe(len(step.chunks), seconds)
        elif batch.num_tokens > READ_AT_ONCE * len(step.chunks):
            self._token_s = seconds / batch.num_tokens
        for one in step.chunks:
            self._note(one.sequence, one.end)
        return got

    def _go_on(self, chunks: SequenceOf[Chunk], depth: int) -> None:
        """One more guess behind the last of each of these chunks, which have so many."""
        size = self.runner.block_size
        positions = np.array([chunk.end - 1 + depth for chunk in chunks], np.int32)
        tables = np.full((len(chunks), int(positions.max()) // size + 1), -1, np.int32)
        for table, chunk, position in zip(tables, chunks, positions.tolist(), strict=True):
            table[: position // size + 1] = chunk.sequence.blocks[: position // size + 1]
        rows = np.arange(len(chunks), dtype=np.int32)
        batch = TokenBatch(
            token_ids=np.array([chunk.draft[-1] for chunk in chunks], np.int32),
            positions=positions,
            cu_seqlens=np.arange(len(chunks) + 1, dtype=np.int32),
            slot_mapping=tables[rows, positions // size] * np.int32(size) + positions % np.int32(size),
            block_tables=tables,
        )
        sampled = [
            SampledRow(chunk.sequence, chunk.end - chunk.sequence.num_prompt_tokens + depth, chunk.draft[:])
            for chunk in chunks
        ]
        self.costs.observe(len(chunks), self._run(batch, rows, sampled, chunks))
        for chunk in chunks:
            self._read[chunk.sequence].num_tokens = chunk.end + depth

    def _run(self, batch: TokenBatch, rows: Array, sampled: list[SampledRow], chunks: SequenceOf[Chunk]) -> float:
        """Add a token to each chunk's draft; the seconds that it took."""
        assert batch.slot_mapping is not None
        for block in set((batch.slot_mapping // self.runner.block_size).tolist()):
            self._names.pop(block, None)
        sampling = sampling_of(sampled, self.eos_token_ids)
        if (sampling.num_logprobs >= 0).any():
            sampling = replace(sampling, num_logprobs=np.full_like(sampling.num_logprobs, -1))
        started = self.clock()
        token_ids = self.runner.run(batch, rows, sampling).token_ids
        seconds = self.clock() - started
        for chunk, token_id in zip(chunks, token_ids.tolist(), strict=True):
            chunk.draft.append(token_id)
        return seconds

    def _note(self, sequence: Sequence, num_tokens: int) -> None:
        """The first so many tokens, all known, are read: name the full blocks among them."""
        read = self._read[sequence]
        read.num_tokens = num_tokens
        full = num_tokens // self.runner.block_size
        if full > read.num_named:
            names = sequence.hashes(full, self.runner.block_size)
            self._names.update(zip(sequence.blocks[read.num_named : full], names[read.num_named :], strict=True))
            read.num_named = full
