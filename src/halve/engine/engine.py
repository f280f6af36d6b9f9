"""The engine that others call: prompts in, text out, from any thread and any event loop."""

import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar

from halve.core.errors import RequestError
from halve.engine.config import EngineConfig, EngineMetrics
from halve.engine.constrain import Constrainer
from halve.engine.core import EngineCore
from halve.engine.request import Completion, Request, SamplingParams, StepOutput
from halve.engine.runner import Runner
from halve.engine.worker import Mailbox, Worker
from halve.text import Tokenizer

Prompt = str | Sequence[int]
T = TypeVar("T")


class Stream:
    """The outputs of one request as they come, by `for` in a thread or `async for` in an event loop.

    Whoever leaves early ends the request: by `close`, by leaving its `with` or `async with` block, when its task is
    cancelled while it waits, or when the stream is no longer referred to.
    Iterating raises EngineError when the request's step failed or the engine has stopped.
    """

    def __init__(self, engine: "Engine", request: Request) -> None:
        self.request_id = request.request_id
        self._engine, self._mailbox = engine, Mailbox()  # which lives as long as its streams
        self._num_unfinished = 0  # what `close` reads, should `submit` raise
        engine._worker.submit(request, self._mailbox)
        self._num_unfinished = request.sampling.n

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepOutput:
        if not self._num_unfinished:
            raise StopIteration
        try:
            output = self._mailbox.get()
        except BaseException:
            self.close()
            raise
        return self._counted(output)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StepOutput:
        if not self._num_unfinished:
            raise StopAsyncIteration
        try:
            output = await self._mailbox.get_async()
        except BaseException:  # asyncio.CancelledError too
            self.close()
            raise
        return self._counted(output)

    def close(self) -> None:
        """End the request, if it has not ended; nothing more comes."""
        if self._num_unfinished:
            self._num_unfinished = 0
            self._engine.abort(self.request_id)

    async def aclose(self) -> None:
        """As `close`, which does not block."""
        self.close()

    def _counted(self, output: StepOutput) -> StepOutput:
        self._num_unfinished -= output.finish_reason is not None
        return output

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Engine:
    """Runs many requests over one model; every method may be called from any thread.

    A thread of the engine's own computes; it starts with the first request and ends with `close`, with the `with`
    block, or when the engine is no longer referred to. What is unfinished then ends with reason "abort".
    runner: the model; no one else may use it. tokenizer: makes text of tokens; without one, prompts are token ids,
    outputs hold ids only, and stop strings are refused. eos_token_ids: tokens that end a text, of the model's
    generation config. draft, constrainer: as for `EngineCore`. Raises ConfigError when the configuration asks for what
    the runner does not do.
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
        core = EngineCore(runner, tokenizer, config, eos_token_ids=eos_token_ids, draft=draft, constrainer=constrainer)
        self.config, self.tokenizer = core.config, tokenizer
        self._worker = Worker(core)
        self._numbers = itertools.count()
        self._close = weakref.finalize(self, self._worker.close)

    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids) to its end.

        sampling: of all prompts, or one for each. Returns completions in the order of the prompts, the n answers of
        one prompt side by side. Raises RequestError for the first prompt that can't be served, EngineError when a step
        failed; whatever else was begun is then aborted.
        """
        if isinstance(prompts, str):
            raise RequestError(f"prompts: {prompts!r:.80} is one prompt; give a list of them")
        prompts = list(prompts)
        each = [sampling or SamplingParams()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(each) != len(prompts):
            raise RequestError(f"sampling: {len(each)} for {len(prompts)} prompts; give one, or one for each")
        requests = (self.request(p, s, priority=priority) for p, s in zip(prompts, each, strict=True))
        done = {group[0].request_id: group for group in self.complete(requests)}
        return [completion for _, group in sorted(done.items(), key=_number) for completion in group]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> Stream:
        """Continue a prompt step by step: `for output in engine.stream(...)`, or `async for`.

        request_id: for `abort`; None makes one. cache_salt: as `Request` has it. Raises RequestError at once for
        what can't be served, EngineError when the engine is closed or has stopped.
        """
        return Stream(
            self, self.request(prompt, sampling, priority=priority, request_id=request_id, cache_salt=cache_salt)
        )

    def complete(self, requests: Iterable[Request], *, max_in_flight: int | None = None) -> Iterator[list[Completion]]:
        """The answers of each request, as requests end; requests are taken up as there is room for them.

        max_in_flight: requests begun and not ended; None is four times max_num_seqs. So any number of requests takes
        bounded memory, and a stream that comes in between waits for those in flight at most. Raises as `generate` does;
        leaving the iterator aborts what is in flight.
        """
        limit = 4 * self.config.max_num_seqs if max_in_flight is None else max_in_flight
        if limit < 1:
            raise RequestError(f"max_in_flight: {limit} must be 1 or more")
        mailbox, source = Mailbox(), iter(requests)
        outputs: dict[str, list[list[StepOutput]]] = {}
        try:
            while True:
                for request in itertools.islice(source, limit - len(outputs)):
                    self._worker.submit(request, mailbox)
                    outputs[request.request_id] = [[] for _ in range(request.sampling.n)]
                if not outputs:
                    return
                output = mailbox.get()
                answers = outputs[output.request_id]
                answers[output.index].append(output)
                if all(answer and answer[-1].finish_reason for answer in answers):
                    del outputs[output.request_id]
                    yield [Completion.from_outputs(answer) for answer in answers]
        finally:
            for request_id in outputs:
                self._worker.abort(request_id)

    def check(self, request: Request) -> None:
        """Raise RequestError for a request that can never be served."""
        self._worker.core.check(request)

    def abort(self, request_id: str) -> bool:
        """End a request soon; its reader gets last outputs with reason "abort". False when there is none."""
        return self._worker.abort(request_id)

    def metrics(self) -> EngineMetrics:
        """Its state after the latest step, and what it has done so far."""
        return self._worker.metrics

    def between_steps(self, job: Callable[[], T]) -> "Future[T]":
        """Run something on the engine's thread between two steps, when no one else uses the model.

        Raises EngineError when the engine is closed or has stopped.
        """
        return self._worker.between_steps(job)

    def close(self) -> None:
        """Abort what is unfinished and end the engine's thread; later requests are refused."""
        self._close()

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> Request:
        """A request of the model's tokens, not yet begun. Raises RequestError for a prompt without tokens."""
        if isinstance(prompt, str) and self.tokenizer is None:
            raise RequestError("prompt: this engine has no tokenizer; give token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) and self.tokenizer else prompt
        if not len(ids):
            raise RequestError(
                "prompt: it is empty, and this model's tokenizer puts no token in front; give at least one character"
            )
        return Request(
            request_id=f"#{next(self._numbers)}" if request_id is None else request_id,
            prompt_token_ids=tuple(ids),  # type: ignore[arg-type]  # Request checks it
            sampling=sampling or SamplingParams(),
            priority=priority,
            cache_salt=cache_salt,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _number(numbered: tuple[str, list[Completion]]) -> int:
    return int(numbered[0].removeprefix("#"))
