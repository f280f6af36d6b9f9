"""The engine: requests in, tokens out. A step is schedule, run, sample. One thread at a time.

Whatever ends a request, its blocks are back in the pool when the step or the call that ended it returns.
"""

import secrets
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from halve.core.errors import ConfigError, HalveError, RequestError
from halve.engine.block_pool import BlockPool
from halve.engine.request import Completion, FinishReason, Request, StepOutput
from halve.engine.runner import Runner
from halve.engine.scheduler import Chunk, RequestState, Scheduler, flat_batch
from halve.engine.stop import StopText
from halve.kernels.ops import Array
from halve.kernels.sampling import SamplingBatch, sample
from halve.text import Tokenizer

# Settings beyond the range of float32 act as its ends do.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much runs at once.

    max_num_seqs: requests that share a step. max_tokens_per_step: tokens of a step, prompts and decodes together; at
    least max_num_seqs, so that every running request can get its token. Raises ConfigError.
    """

    max_num_seqs: int = 32
    max_tokens_per_step: int = 512

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"engine.max_num_seqs: {self.max_num_seqs} must be 1 or more")
        if self.max_tokens_per_step < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_tokens_per_step: {self.max_tokens_per_step} must be at least max_num_seqs "
                f"({self.max_num_seqs}), one token for each running request"
            )


class _Answer:
    """What the engine keeps for an unfinished request beside its place in the schedule: its seed and its text."""

    def __init__(self, state: RequestState, tokenizer: Tokenizer | None) -> None:
        params = state.request.sampling
        self.state = state
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self._stream = tokenizer.decode_stream() if tokenizer else None
        self._stop = StopText(params.stop)

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that is certain after this token, and whether a stop string ended it."""
        return self._stop.push(self._stream.push(token_id)) if self._stream else ("", False)

    def end(self) -> tuple[str, bool]:
        """The text held back, when no token follows, and whether it holds a stop string."""
        if self._stream is None:
            return "", False
        text, stopped = self._stop.push(self._stream.flush())
        return text + self._stop.flush(), stopped


class Engine:
    """Runs many requests over one model.

    tokenizer: makes text of the tokens; without one outputs hold token ids only, and stop strings are refused.
    eos_token_ids: tokens that end a text, of the model's generation config.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.config = config or EngineConfig()
        self.eos_token_ids = frozenset(eos_token_ids)
        self.pool = BlockPool(runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(
            self.pool,
            context=runner.context,
            max_num_seqs=self.config.max_num_seqs,
            max_tokens_per_step=self.config.max_tokens_per_step,
        )
        self._answers: dict[str, _Answer] = {}
        self._aborted: list[StepOutput] = []

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._answers or self._aborted)

    def add(self, request: Request) -> None:
        """Queue a request.

        Prompt and max_tokens may exceed the context together: the text then ends at the context with reason
        "length". Raises RequestError for what can never be served: a prompt that leaves no room in the context, more
        cache than there is, ids outside the vocabulary, stop strings without a tokenizer, an id that is in use.
        """
        request_id, params = request.request_id, request.sampling
        if request_id in self._answers or any(output.request_id == request_id for output in self._aborted):
            raise RequestError(f"request {request_id!r}: a request whose end is not told yet has this id; take another")
        for name, ids in (("prompt_token_ids", request.prompt_token_ids), ("stop_token_ids", params.stop_token_ids)):
            if ids and max(ids) >= self.runner.vocab_size:
                raise RequestError(
                    f"request {request_id!r}: {name} holds {max(ids)}, the vocabulary ends at "
                    f"{self.runner.vocab_size - 1}; use the model's own tokenizer"
                )
        if params.stop and self.tokenizer is None:
            raise RequestError(f"request {request_id!r}: stop strings need a tokenizer; use stop_token_ids")
        self._answers[request_id] = _Answer(self._scheduler.add(request), self.tokenizer)

    def abort(self, request_id: str) -> bool:
        """End a request now and free its blocks; the next step tells its last output, with reason "abort".

        Returns whether there was such a request: False when it has just finished, or never was.
        """
        answer = self._answers.get(request_id)
        if answer is None:
            return False
        self._remove(request_id)
        self._aborted.append(self._output(answer, None, answer.end()[0], "abort"))
        return True

    def step(self) -> list[StepOutput]:
        """Run one batch. Returns an output for every request that got a token or ended.

        Whatever the runner or the sampler raises passes through, after all unfinished requests were dropped and
        their blocks freed; the engine can be used again.
        """
        outputs: list[StepOutput] = []
        try:
            if chunks := self._scheduler.schedule():
                logits = self._run(chunks)
                sampled = [chunk.state for chunk in chunks if chunk.ends_pending]
                for chunk in chunks:
                    chunk.state.num_computed += chunk.num_tokens
                tokens = [self._choose(state, row) for state, row in zip(sampled, logits, strict=True)]
                outputs = [self._extend(state, token) for state, token in zip(sampled, tokens, strict=True)]
        except BaseException:
            for request_id in list(self._answers):
                self._remove(request_id)
            raise
        aborted, self._aborted = self._aborted, []
        return aborted + outputs

    def generate(self, requests: Iterable[Request]) -> Iterator[StepOutput]:
        """Add requests and step until they have ended; outputs come as they arise, in no fixed order of requests.

        Requests added elsewhere run along, and their outputs come too. Leaving the iterator early, or an error,
        ends the requests that it added. Raises as `add` and `step` do.
        """
        mine: set[str] = set()
        try:
            for request in requests:
                self.add(request)
                mine.add(request.request_id)
            while mine and self.has_unfinished:
                for output in self.step():
                    if output.finish_reason is not None:
                        mine.discard(output.request_id)
                    yield output
        finally:
            for request_id in mine & self._answers.keys():
                self._remove(request_id)
            self._aborted = [output for output in self._aborted if output.request_id not in mine]

    def complete(self, requests: Iterable[Request]) -> list[Completion]:
        """Generate to the end; the completions in the order of the requests."""
        outputs: dict[str, list[StepOutput]] = {}
        order = list(requests)
        for output in self.generate(order):
            outputs.setdefault(output.request_id, []).append(output)
        return [Completion.from_outputs(outputs[request.request_id]) for request in order]

    def _run(self, chunks: list[Chunk]) -> Array:
        batch, rows = flat_batch(chunks, self.pool.block_size)
        logits = self.runner.run(batch, rows)
        if logits.shape != (len(rows), self.runner.vocab_size):
            expected = (len(rows), self.runner.vocab_size)
            raise HalveError(f"runner: logits have shape {logits.shape}, expected {expected}; its `run` is broken")
        return logits

    def _choose(self, state: RequestState, logits: Array) -> int:
        params = state.request.sampling
        row = SamplingBatch.of(
            1,
            temperature=min(params.temperature, _MOST),
            top_p=max(params.top_p, _LEAST),
            seed=self._answers[state.request.request_id].seed,
            step=state.num_generated,
        )
        return int(sample(logits[None], row).token_ids[0])

    def _extend(self, state: RequestState, token_id: int) -> StepOutput:
        """Give a request its next token, and end it where that ends it."""
        answer = self._answers[state.request.request_id]
        state.token_ids.append(token_id)
        text, reason = "", self._stop_reason(state, token_id)
        if reason != "stop":  # a token that stops has no part in the text
            text, stopped = answer.push(token_id)
            if stopped:
                self._remove(state.request.request_id)
                return self._output(answer, token_id, text, "stop")
        if reason is not None:
            rest, stopped = answer.end()
            text, reason = text + rest, "stop" if stopped else reason
            self._remove(state.request.request_id)
        return self._output(answer, token_id, text, reason)

    def _stop_reason(self, state: RequestState, token_id: int) -> FinishReason | None:
        params = state.request.sampling
        if token_id in params.stop_token_ids or (token_id in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if state.num_generated >= params.max_tokens or len(state.token_ids) >= self.runner.context:
            return "length"
        return None

    def _output(self, answer: _Answer, token_id: int | None, text: str, reason: FinishReason | None) -> StepOutput:
        return StepOutput(
            request_id=answer.state.request.request_id,
            token_id=token_id,
            text=text,
            finish_reason=reason,
            num_prompt_tokens=answer.state.num_prompt_tokens,
        )

    def _remove(self, request_id: str) -> None:
        del self._answers[request_id]
        self._scheduler.remove(request_id)
