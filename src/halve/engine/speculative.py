"""Several tokens a step: guesses run behind a sequence's last token, and those that the model chooses too are kept.

**Why the text is the same.** The engine draws the token at a position with the random number of (seed, position) alone
(`kernels/sampling.py`), and a row's logits depend on the tokens up to it alone. So the row of a position gives,
whatever was guessed, the very token that a step of its own would have given, as long as the tokens before it are those
that were chosen. A guess is kept when it is that token, and the first that is not ends the run (`Scheduler.commit`).
With and without guesses, greedy or sampled, with whatever cuts and penalties, the answer is the same token for token on
kernels whose rows do not depend on their neighbours, and exactly distributed as the model says on any.

**Why it accepts enough.** For a guess x that is certain (an n-gram, the likeliest token of a draft model) the rule of
arXiv:2211.17192 accepts with probability min(1, p(x) / 1) = p(x) and else draws from p without x. Here token t is drawn
from p and x kept when t = x, with probability p(x), and else t is distributed as p without x: the same thing. For a
draft model that samples from q, that rule accepts 1 - TV(p, q) of the guesses, the most that any does, but the token of
a position then depends on whether it was guessed, and so on how long steps took: a seed would no longer give one text.
Here the draft model draws with the random number of the target's row. Both look up the same u in their running sums
over the ids and agree where these overlap: less often than the most (docs/LOG.md, "Guesses that are sampled"), and the
text of a seed stays what it is.

**When it pays** is decided for each step and sequence by `engine/draft_lengths.py` from measured times and rates. What
does not pay is switched off, and tried again now and then within PROBE_SHARE of the time.
"""

import logging
import weakref
from array import array
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from types import MappingProxyType
from typing import NamedTuple, Protocol

from halve.engine.draft_lengths import BEGIN, GO_ON, Candidate, Rates, StepCosts, allot
from halve.engine.ngram import NgramIndex
from halve.engine.scheduler import Chunk, Step
from halve.engine.sequence import Sequence

log = logging.getLogger("halve.engine")

PROBE = 4  # guesses of a sequence that is switched off, at most, to see whether they would be right and what they cost
PROBE_AFTER = 16  # tokens until the first probe; twice as many after each that was wrong
PROBE_SHARE = 0.005  # of the engine's time, that probes may take
OFF_AFTER = 8  # times in a row that a guess was there and did not pay, until a sequence counts as switched off
FIRST_PLAIN = 3  # steps without guesses before the first ones, so that their cost is known
PLAIN_EVERY = 64  # and one in so many later, so that it stays known
SURE = 0.98  # a rate that no guesses beat: where they would not pay, none are looked for
EXPECTED_TOKENS = 128  # of an answer still to come, at most, that the reading of its prompt must pay for


class Guess(NamedTuple):
    """What a proposer could offer: a kind that rates are counted by, how many tokens, and at what cost before."""

    kind: int
    most: int
    setup_s: float = 0.0


class Proposer(Protocol):
    """Where guesses come from. first_rates: of each kind of guess, how often it is right, before that is known."""

    name: str
    first_rates: Mapping[int, float]

    def look(self, sequence: Sequence, most: int) -> Guess | None:
        """What it could offer behind the last token of a sequence, whose tokens are all known; at most so many."""

    def fill(self, chunks: SequenceOf[Chunk]) -> None:
        """Put at most `num_drafts` tokens into the draft of each of these chunks."""

    def accepted(self, chunk: Chunk) -> None:
        """A step was committed: the draft holds what was kept."""

    def draft_cost(self, num_sequences: int) -> float:
        """Seconds to make one more guess for each of so many sequences."""


class NgramProposer:
    """What followed when the same tokens came before (`engine/ngram.py`)."""

    name = "n-grams"
    first_rates: Mapping[int, float] = MappingProxyType({2: 0.3, 3: 0.4, 4: 0.6, 8: 0.8})

    def __init__(self) -> None:
        self._indices: weakref.WeakKeyDictionary[Sequence, NgramIndex] = weakref.WeakKeyDictionary()
        self._found: weakref.WeakKeyDictionary[Sequence, array[int]] = weakref.WeakKeyDictionary()

    def look(self, sequence: Sequence, most: int) -> Guess | None:
        """The kind says how long a context agrees: 2, 3, up to 7, more."""
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = NgramIndex()
        length, draft = index.guess(sequence.token_ids, most)
        if not length:
            return None
        self._found[sequence] = draft
        return Guess(2 if length < 3 else 3 if length < 4 else 4 if length < 8 else 8, len(draft))

    def fill(self, chunks: SequenceOf[Chunk]) -> None:
        """As `Proposer.fill`: from what `look` found for this step."""
        for chunk in chunks:
            chunk.draft.extend(self._found[chunk.sequence][: chunk.num_drafts])

    def accepted(self, chunk: Chunk) -> None:
        """Nothing to keep."""

    def draft_cost(self, num_sequences: int) -> float:
        """Microseconds, which are not counted."""
        return 0.0


class _State:
    """What is known of one sequence."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.kind = 0
        self.interval = PROBE_AFTER
        self.probe_at = 0  # tokens generated
        self.num_unpaid = 0
        self.was_switched_off = False


class Speculator:
    """Decides which sequences guess how much, and learns from what came of it.

    max_tokens: guesses behind a token, at most.
    """

    def __init__(self, proposer: Proposer, *, max_tokens: int = 8) -> None:
        self.proposer, self.max_tokens = proposer, max_tokens
        self.costs, self.rates = StepCosts(), Rates(proposer.first_rates)
        self.num_switched_off = 0
        self._states: weakref.WeakKeyDictionary[Sequence, _State] = weakref.WeakKeyDictionary()
        self._proposed: list[tuple[Chunk, int]] = []
        self._is_on = False
        self._busy_s = self._probe_s = 0.0
        self._worth: dict[int, tuple[int, bool]] = {}  # rows -> step at which it was found out, and the answer
        self._num_steps = self._num_plain = self._num_probes = 0

    def plan(self, sequences: Iterable[Sequence]) -> None:
        """Before a step is planned: set how many guesses each of the running sequences asks for."""
        ready = [
            one for one in sequences if one.num_pending == 1 and len(one.token_ids) == one.num_tokens < one.max_tokens
        ]
        self._num_steps += 1
        rows = len(ready)
        plain = self._num_plain < FIRST_PLAIN or self._num_steps % PLAIN_EVERY == 0
        if not rows or plain:
            return
        if not self._could_pay(rows):
            for one in ready:
                if one.num_draft_tokens:
                    self._note(one, self._state(one), pays=False)
            if self._probe_s < PROBE_SHARE * self._busy_s:  # costs may have been mistaken: one of them tries
                self._ask([ready[self._num_steps % rows]], rows, BEGIN)
            return
        numbers = self._ask(ready, rows, GO_ON if self._is_on else BEGIN)
        self._is_on = any(numbers)

    def _ask(self, ready: list[Sequence], rows: int, pays: float) -> list[int]:
        """Look for guesses of these sequences and set how many each asks for; of those that pay, how many."""
        looked = [(one, guess) for one in ready if (guess := self._look(one, rows)) is not None]
        candidates = [Candidate(self._state(one).rates.of(guess.kind), guess.most) for one, guess in looked]
        numbers, _ = self._allot(candidates, rows, pays)
        for (one, guess), number in zip(looked, numbers, strict=True):
            state = self._state(one)
            state.kind = guess.kind
            one.num_drafts = number or self._probe(one, state, guess, rows)
            self._note(one, state, pays=number > 0)
        return numbers

    def fill(self, step: Step) -> None:
        """After it was planned: put the guesses into it."""
        chunks = [chunk for chunk in step.chunks if chunk.num_drafts]
        self._proposed = []  # of a step that failed, too
        if chunks:
            self.proposer.fill(chunks)
            self._proposed = [(chunk, len(chunk.draft)) for chunk in chunks]
            step.number_rows()

    def learn(self, step: Step, seconds: float) -> None:
        """After it was committed. seconds: that the model took for it."""
        for chunk, num_proposed in self._proposed:
            self.proposer.accepted(chunk)
            if num_proposed:
                state = self._state(chunk.sequence)
                state.rates.observe(state.kind, len(chunk.draft), num_proposed)
                if chunk.draft:
                    state.interval = PROBE_AFTER
        if all(chunk.num_tokens == 1 for chunk in step.chunks):
            num_drafts = sum(num_proposed for _, num_proposed in self._proposed)
            self.costs.observe(len(step.chunks) + num_drafts, seconds)
            self._num_plain += not num_drafts
            self._busy_s += seconds
        self._proposed = []

    def _state(self, sequence: Sequence) -> _State:
        state = self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = _State(Rates(self.proposer.first_rates, self.rates))
        return state

    def _allot(self, candidates: list[Candidate], rows: int, pays: float) -> tuple[list[int], float]:
        return allot(candidates, rows, self.costs.of, draft_cost=self.proposer.draft_cost, pays=pays)

    def _could_pay(self, rows: int) -> bool:
        """Whether guesses that are nearly always right would pay; looked at again every few steps."""
        at, answer = self._worth.get(rows, (-64, False))
        if self._num_steps - at >= 64:
            answer = any(self._allot([Candidate(SURE, self.max_tokens)] * rows, rows, 1.0)[0])
            self._worth[rows] = self._num_steps, answer
        return answer

    def _look(self, sequence: Sequence, rows: int) -> Guess | None:
        """A guess whose preparation would pay, too."""
        most = min(self.max_tokens, sequence.max_tokens - sequence.num_tokens - 1)
        guess = self.proposer.look(sequence, most) if most > 0 else None
        if guess is None or not guess.setup_s:
            return guess
        rate = self._state(sequence).rates.of(guess.kind)
        _, speedup = self._allot([Candidate(rate, guess.most)], rows, 1.0)
        tokens = min(EXPECTED_TOKENS, sequence.max_tokens - sequence.num_tokens)
        saved_s = tokens * self.costs.of(rows) * (1 - 1 / speedup)
        return guess if saved_s > 2 * guess.setup_s else None

    def _probe(self, sequence: Sequence, state: _State, guess: Guess, rows: int) -> int:
        """Guesses of a sequence for which they do not pay as far as is known."""
        number = min(1 + self._num_probes % PROBE, guess.most)
        if guess.setup_s or sequence.num_generated < state.probe_at:
            return 0
        cost = self.costs.of(rows + number) - self.costs.of(rows) + number * self.proposer.draft_cost(1)
        if self._probe_s + cost > PROBE_SHARE * self._busy_s:
            return 0
        self._probe_s += cost
        self._num_probes += 1
        state.probe_at = sequence.num_generated + state.interval
        state.interval *= 2
        return number

    def _note(self, sequence: Sequence, state: _State, *, pays: bool) -> None:
        """Count a sequence that has guessed and is switched off now."""
        state.num_unpaid = 0 if pays else state.num_unpaid + 1
        if state.num_unpaid == OFF_AFTER and sequence.num_draft_tokens and not state.was_switched_off:
            state.was_switched_off = True
            if not self.num_switched_off:
                log.info(
                    "speculation by %s does not pay for request %r: %d of %d guesses were right, one more takes %.1f "
                    "ms beside a step of %.1f ms; switched off there",
                    self.proposer.name,
                    sequence.request.request_id,
                    sequence.num_accepted_tokens,
                    sequence.num_draft_tokens,
                    1e3 * (self.costs.of(2) - self.costs.of(1) + self.proposer.draft_cost(1)),
                    1e3 * self.costs.of(1),
                )
            self.num_switched_off += 1
