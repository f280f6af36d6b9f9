"""The engine in one thread: requests in, tokens out. A step is schedule, run, commit.

Whatever ends a request, its blocks are back in the pool when the call that ended it returns. `halve.engine.Engine` puts
a thread around it.

Over an `AheadRunner` step n + 1 is planned and submitted before the tokens of step n are asked for, so that the device
never waits for the host; each call of `step` tells what the step before it made. What ends at step n is still in step
n + 1: that token is dropped. The blocks are free at once all the same, because a device runs its steps in order: who
gets them writes after the last that still wrote there.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from halve.core.errors import ConfigError, EngineError, HalveError, RequestError
from halve.engine.batch import block_copies, sampling_batch, token_batch
from halve.engine.block_pool import BlockPool
from halve.engine.config import EngineConfig, EngineMetrics
from halve.engine.constrain import Constrainer, Matcher
from halve.engine.draft_model import DraftModel
from halve.engine.request import Candidate, FinishReason, Request, SamplingParams, StepOutput, TokenLogprobs
from halve.engine.runner import AheadRunner, Handle, Runner, expert_metrics
from halve.engine.scheduler import Scheduler, Step, Told
from halve.engine.sequence import Sequence, Status
from halve.engine.speculative import NgramProposer, Speculator
from halve.engine.stop import StopText
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.text import Tokenizer


class StepError(EngineError):
    """A step that failed; its cause is what the runner raised. request_ids: the requests that ended with it."""

    def __init__(self, message: str, request_ids: Collection[str]) -> None:
        super().__init__(message)
        self.request_ids = frozenset(request_ids)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that the runner was given and whose tokens are still to come."""

    step: Step
    handle: Handle
    num_rows: int
    submitted_at: float


class _AnswerText:
    """The text of one answer as its tokens come."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self._stream = tokenizer.decode_stream() if tokenizer else None
        self._stop = StopText(params.stop, include=params.include_stop)

    def push(self, token_id: int, *, may_stop: bool) -> tuple[str, bool]:
        """Text that is certain after this token, and whether a stop string ended it."""
        if self._stream is None:
            return "", False
        piece = self._stream.push(token_id)
        return self._stop.push(piece) if may_stop else (piece, False)

    def end(self) -> tuple[str, bool]:
        """The text held back, when no token follows, and whether it holds a stop string."""
        if self._stream is None:
            return "", False
        text, stopped = self._stop.push(self._stream.flush())
        return text + self._stop.flush(), stopped


class EngineCore:
    """Runs many requests over one model, step by step.

    tokenizer: makes text of the tokens; without one outputs hold token ids only, and stop strings are refused.
    eos_token_ids: tokens that end a text, of the model's generation config. draft: of the draft model, where
    `config.speculation` asks for one; its cache has the blocks of `runner`'s. constrainer: makes texts follow a
    grammar where requests ask for it.
    Raises ConfigError when the configuration asks for what the runner does not do.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        eos_token_ids: Collection[int] = (),
        draft: Runner | None = None,
        constrainer: Constrainer | None = None,
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.constrainer = constrainer
        self._matchers: dict[Sequence, Matcher] = {}
        self.config = config or EngineConfig()
        if self.config.deterministic and not runner.batch_invariant:
            raise ConfigError(
                "engine.deterministic: this model runs on kernels whose results depend on what else is in the batch; "
                "load it with device 'cpu' and the C++ kernels, or do without deterministic"
            )
        self.eos_token_ids = frozenset(eos_token_ids)
        self.speculator = self._speculator(draft)
        pool = BlockPool(runner.num_blocks, runner.block_size)
        self.scheduler = Scheduler.configured(self.config, pool, context=runner.context)
        self._texts: dict[Sequence, _AnswerText] = {}
        self._aborted: list[StepOutput] = []
        # Guesses need the tokens of the step before, so with them every step waits for its own.
        self._ahead = runner if isinstance(runner, AheadRunner) and not self.speculator else None
        self._flight: _Flight | None = None
        self._num_finished = self._num_aborted = self._num_failed = 0
        self._clock = time.perf_counter
        self._told_at = 0.0  # when the latest step of an `AheadRunner` was told
        self._busy_s = 0.0
        self._run_s = 0.0  # that the runner took for the latest step

    def _speculator(self, draft: Runner | None) -> Speculator | None:
        given = self.config.speculation
        if (given.method == "draft") != (draft is not None):
            raise ConfigError(
                f"engine.speculation: method {given.method!r} {'with' if draft else 'without'} a draft model; give one "
                "with method 'draft' and with no other (`halve.load` loads it)"
            )
        if given.method == "none":
            return None
        if draft is None:
            return Speculator(NgramProposer(), max_tokens=given.max_tokens)
        tokens = self.config.max_tokens_per_step
        proposer = DraftModel(draft, self.runner, eos_token_ids=self.eos_token_ids, tokens_per_step=tokens)
        return Speculator(proposer, max_tokens=given.max_tokens)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return self.scheduler.has_unfinished or bool(self._aborted) or self._flight is not None

    def check(self, request: Request) -> None:
        """Raise RequestError for what can never be served; reads only what never changes, so any thread may call it.

        That is a prompt that leaves no room in the context, more cache than there is, ids outside the vocabulary, stop
        strings without a tokenizer. Prompt and max_tokens may exceed the context together: the text then ends at the
        context with reason "length".
        """
        name, params = f"request {request.request_id!r}", request.sampling
        for what, ids in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", tuple(params.logit_bias)),
        ):
            if ids and max(ids) >= self.runner.vocab_size:
                raise RequestError(
                    f"{name}: {what} holds {max(ids)}, the vocabulary ends at {self.runner.vocab_size - 1}; use the "
                    "model's own tokenizer"
                )
        if params.stop and self.tokenizer is None:
            raise RequestError(f"{name}: stop strings need a tokenizer; use stop_token_ids")
        if params.grammar is not None:
            if self.constrainer is None:
                raise RequestError(f"{name}: this engine has no constrainer; leave grammar out")
            if params.min_tokens:
                raise RequestError(f"{name}: min_tokens and a grammar exclude each other; it may end the text earlier")
            self.constrainer.check(params.grammar)
        if params.min_tokens and len(self.eos_token_ids.union(params.stop_token_ids)) >= self.runner.vocab_size:
            raise RequestError(f"{name}: min_tokens forbids every token, since all of them end the text; set it to 0")
        self.scheduler.check(request)

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError as `check` does, and for an id that is in use."""
        request_id = request.request_id
        if self.scheduler.of_request(request_id) or any(o.request_id == request_id for o in self._aborted):
            raise RequestError(f"request {request_id!r}: a request whose end is not told yet has this id; take another")
        self.check(request)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request now and free its blocks; the next step tells the last output of each unfinished answer.

        Returns whether there was such a request: False when it has just finished, or never was.
        """
        sequences = self.scheduler.of_request(request_id)
        for sequence in sequences:
            text = self._texts[sequence].end()[0] if sequence in self._texts else ""
            for index in range(sequence.index, sequence.index + sequence.num_slots):
                self._aborted.append(_output(sequence, None, text, "abort", index=index))
                self._num_aborted += 1
            self._remove(sequence)
        return bool(sequences)

    def step(self) -> list[StepOutput]:
        """Run one batch. Returns an output for every answer that got a token or ended; over an `AheadRunner`, of the
        step before, so that the first call tells nothing.

        Raises StepError when the runner fails: the requests of this step have then ended and their blocks are free;
        those that wait are not touched, and the engine can go on.
        """
        outputs = self._step_now() if self._ahead is None else self._step_ahead(self._ahead)
        told, self._aborted = self._aborted, []
        return told + outputs

    def _step_now(self) -> list[StepOutput]:
        if self.speculator:
            self.speculator.plan(one for one in self.scheduler.running if one.request.sampling.grammar is None)
        step = self.scheduler.schedule()
        outputs = []
        if step.chunks:
            try:
                if self.speculator:
                    self.speculator.fill(step)
                sampled = self._run(step)
            except Exception as error:
                self._fail(step, error)
            except BaseException:
                self._discard(step)
                raise
            outputs = self._commit(step, sampled)
        return outputs

    def _step_ahead(self, runner: AheadRunner) -> list[StepOutput]:
        """Submit the next step, then take the tokens of the one before."""
        if self._flight is not None and any(sequence.waits_for_tokens for sequence in self._flight.step.sampled):
            landing, self._flight = self._flight, None  # the next step needs the tokens so far
            return self._land(landing)
        step = self.scheduler.schedule()
        submitted = self._submit(runner, step) if step.chunks else None
        before, self._flight = self._flight, submitted
        return [] if before is None else self._land(before)

    def metrics(self) -> EngineMetrics:
        """What it holds and what it has done."""
        scheduler, pool, counts = self.scheduler, self.scheduler.pool, self.scheduler.counts
        return EngineMetrics(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            blocks_used=pool.num_used,
            num_steps=counts.num_steps,
            num_computed_tokens=counts.num_computed_tokens,
            num_sampled_tokens=counts.num_sampled_tokens,
            num_hit_tokens=counts.num_hit_tokens,
            num_preemptions=counts.num_preemptions,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            num_failed=self._num_failed,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
            num_switched_off=self.speculator.num_switched_off if self.speculator else 0,
            busy_s=self._busy_s,
            **expert_metrics(self.runner),
        )

    def check_invariants(self) -> None:
        """Assert that no block is lost, and that nothing is kept for a request that has ended."""
        self.scheduler.check_invariants()
        assert all(one.status is not Status.FINISHED for kept in (self._texts, self._matchers) for one in kept)

    def _run(self, step: Step) -> Sampled:
        batch, rows, sampling = self._arrays(step)
        started = self._clock()
        sampled = self.runner.run(batch, rows, sampling)
        self._run_s = self._clock() - started
        self._charge(step, self._run_s)
        return self._checked(sampled, len(rows))

    def _submit(self, runner: AheadRunner, step: Step) -> _Flight:
        try:
            batch, rows, sampling = self._arrays(step)
            return _Flight(step, runner.submit(batch, rows, sampling), len(rows), self._clock())
        except Exception as error:
            self._fail(step, error)
        except BaseException:
            self._discard(step)
            raise

    def _land(self, flight: _Flight) -> list[StepOutput]:
        try:
            sampled = self._checked(flight.handle.result(), flight.num_rows)
            now = self._clock()  # the device had it from when the step before was done, or from when it was submitted
            self._charge(flight.step, now - max(flight.submitted_at, self._told_at))
            self._told_at = now
        except Exception as error:
            self._fail(flight.step, error)
        except BaseException:
            self._discard(flight.step)
            raise
        return self._commit(flight.step, sampled)

    def _arrays(self, step: Step) -> tuple[TokenBatch, Array, SamplingBatch]:
        """What the runner is given; blocks that the step copies are copied."""
        batch, rows = token_batch(step, self.runner.block_size)
        for pairs in block_copies(step):
            self.runner.copy_blocks(pairs)
        return batch, rows, sampling_batch(step, self.eos_token_ids, self._allowed(step))

    def _allowed(self, step: Step) -> Array | None:
        """What the grammars of a step's rows allow, a word for 32 tokens; None where there are none."""
        sequences = step.sampled
        if self.constrainer is None or all(one.request.sampling.grammar is None for one in sequences):
            return None
        masks = np.full((len(sequences), -(-self.runner.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for row, sequence in enumerate(sequences):
            if (grammar := sequence.request.sampling.grammar) is not None:
                matcher = self._matchers.get(sequence)
                if matcher is None:
                    matcher = self._matchers[sequence] = self.constrainer.matcher(grammar)
                matcher.fill(masks[row])
        return masks

    def _charge(self, step: Step, seconds: float) -> None:
        """Share the seconds of a step among its sequences by their tokens."""
        self._busy_s += seconds
        counts = [chunk.num_tokens + len(chunk.draft) for chunk in step.chunks]
        each = seconds / max(1, sum(counts))
        for chunk, count in zip(step.chunks, counts, strict=True):
            sequence = chunk.sequence
            prompt = min(count, max(0, sequence.num_prompt_tokens - chunk.start))
            sequence.prefill_s += prompt * each
            sequence.decode_s += (count - prompt) * each

    def _checked(self, sampled: Sampled, num_rows: int) -> Sampled:
        ids = sampled.token_ids
        if ids.shape != (num_rows,) or (len(ids) and not 0 <= ids.min() <= ids.max() < self.runner.vocab_size):
            raise HalveError(
                f"runner: token ids {ids.shape} for {num_rows} rows, or outside the vocabulary; its `run` is broken"
            )
        return sampled

    def _commit(self, step: Step, sampled: Sampled) -> list[StepOutput]:
        """Tell the tokens of a step; one that ended after the step was planned, or by a token before, gets none."""
        all_told = self.scheduler.commit(step, sampled.token_ids.tolist())
        if self.speculator:
            self.speculator.learn(step, self._run_s)
        return [self._extend(told, sampled) for told in all_told if told.sequence.status is not Status.FINISHED]

    def _extend(self, told: Told, sampled: Sampled) -> StepOutput:
        """Tell a token, and end the answer where that ends it."""
        sequence, token_id = told.sequence, int(sampled.token_ids[told.row])
        params = sequence.request.sampling
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = _AnswerText(params, self.tokenizer)
        logprobs = None if params.logprobs is None else _logprobs(sampled, told.row)
        if (matcher := self._matchers.get(sequence)) is not None:
            matcher.advance(token_id)
        reason, piece, stopped = self._stop_reason(told, token_id), "", False
        if reason != "stop" or params.include_stop:  # else a token that stops has no part in the text
            piece, stopped = text.push(token_id, may_stop=told.num_generated > params.min_tokens)
        if reason is not None and not stopped:
            rest, stopped = text.end()
            piece += rest
        if stopped:
            reason = "stop"
        if reason is not None:
            self._num_finished += 1
            self._remove(sequence)
        return _output(sequence, token_id, piece, reason, logprobs=logprobs)

    def _stop_reason(self, told: Told, token_id: int) -> FinishReason | None:
        params = told.sequence.request.sampling
        if token_id in params.stop_token_ids or (token_id in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        num_tokens = told.sequence.num_prompt_tokens + told.num_generated
        return "length" if num_tokens >= told.sequence.max_tokens else None

    def _fail(self, step: Step, error: Exception) -> NoReturn:
        request_ids = self._discard(step)
        what = str(error) or type(error).__name__
        raise StepError(f"a step with {len(request_ids)} requests failed: {what}", request_ids) from error

    def _discard(self, step: Step) -> set[str]:
        request_ids = self.scheduler.discard(step)
        for kept in (self._texts, self._matchers):
            for sequence in [s for s in kept if s.request.request_id in request_ids]:
                del kept[sequence]
        self._num_failed += len(request_ids)
        return request_ids

    def _remove(self, sequence: Sequence) -> None:
        self._texts.pop(sequence, None)
        self._matchers.pop(sequence, None)
        self.scheduler.remove(sequence)


def _output(
    sequence: Sequence,
    token_id: int | None,
    text: str,
    reason: FinishReason | None,
    *,
    index: int | None = None,
    logprobs: TokenLogprobs | None = None,
) -> StepOutput:
    return StepOutput(
        request_id=sequence.request.request_id,
        token_id=token_id,
        text=text,
        finish_reason=reason,
        num_prompt_tokens=sequence.num_prompt_tokens,
        index=sequence.index if index is None else index,
        logprobs=logprobs,
        num_cached_tokens=sequence.num_cached_tokens,
        num_draft_tokens=sequence.num_draft_tokens,
        num_accepted_tokens=sequence.num_accepted_tokens,
        prefill_s=sequence.prefill_s,
        decode_s=sequence.decode_s,
    )


def _logprobs(sampled: Sampled, row: int) -> TokenLogprobs:
    """Of one row; tokens that cannot come (probability 0) are not among the likeliest."""
    top = zip(sampled.top_ids[row].tolist(), sampled.top_logprobs[row].tolist(), strict=True)
    return TokenLogprobs(
        token_id=int(sampled.token_ids[row]),
        logprob=float(sampled.logprobs[row]),
        top=tuple(Candidate(token_id=i, logprob=value) for i, value in top if i >= 0 and value > -np.inf),
    )
