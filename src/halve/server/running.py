"""A request in the engine: its outputs as they come, and what it took."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halve.core.errors import EngineError
from halve.engine import StepOutput, Stream
from halve.server.errors import ApiError
from halve.server.metrics import Metrics
from halve.server.served import Served
from halve.server.store import Key

ABORT_WITHIN = 20.0  # seconds for the last outputs of an aborted request


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a key, or anyone where no keys are needed."""

    key: Key | None

    @property
    def key_id(self) -> str | None:
        """Of the key."""
        return self.key.id if self.key else None

    @property
    def sees_only(self) -> str | None:
        """The key whose spending it may see; None for all, as an admin may, and anyone where no keys are needed."""
        return None if self.key is None or self.key.is_admin else self.key.id


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request took. micro_usd: None where the machine's price is not known."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    micro_usd: int | None

    @classmethod
    def of_nothing(cls, prompt_tokens: int) -> "Usage":
        """Of a prompt that the model did not read."""
        return cls(
            prompt_tokens=prompt_tokens,
            cached_tokens=0,
            completion_tokens=0,
            prefill_s=0.0,
            decode_s=0.0,
            micro_usd=None,
        )

    def wire(self) -> dict[str, Any]:
        """As chat and text completions tell it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
            "halve": self.cost(),
        }

    def cost(self) -> dict[str, Any]:
        """Money and time."""
        return {
            "cost_micro_usd": self.micro_usd,
            "prefill_seconds": round(self.prefill_s, 6),
            "decode_seconds": round(self.decode_s, 6),
        }


class Run:
    """One request in the engine: the outputs of its prompts as they come, `(prompt, output)`, then its usage.

    streams, prompt_tokens: of each prompt. settle: makes the usage of a run that has ended, and bills it; it runs to
    its end whatever becomes of the caller. reservation: what the key's budget has set aside for it, None for nothing.
    """

    def __init__(
        self,
        served: Served,
        principal: Principal,
        request_id: str,
        streams: Sequence[Stream],
        prompt_tokens: Sequence[int],
        *,
        num_sequences: int,
        headers: Mapping[str, str],
        reservation: str | None,
        metrics: Metrics,
        settle: Callable[["Run"], Awaitable[Usage]],
        spawn: Callable[[Coroutine[Any, Any, Usage]], "asyncio.Task[Usage]"],
    ) -> None:
        self.served, self.principal, self.request_id = served, principal, request_id
        self.prompt_tokens, self.num_sequences = list(prompt_tokens), num_sequences
        self.headers, self.reservation = dict(headers), reservation
        self.arrived_at = self.last_at = time.perf_counter()
        self.first_at: float | None = None
        self.num_tokens = 0
        self.is_finished = False
        self._streams, self._metrics, self._settle, self._spawn = streams, metrics, settle, spawn
        self._queue: asyncio.Queue[tuple[int, StepOutput] | Exception | None] = asyncio.Queue()
        self._last: dict[tuple[int, int], StepOutput] = {}
        self._finishing: asyncio.Task[Usage] | None = None
        self._pumps = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(streams)]

    @property
    def last_outputs(self) -> Mapping[tuple[int, int], StepOutput]:
        """The latest output of each answer, by prompt and index."""
        return self._last

    async def _pump(self, prompt: int, stream: Stream) -> None:
        metrics, name = self._metrics, self.served.name
        told_at: dict[int, float] = {}
        try:
            async for output in stream:
                now = time.perf_counter()
                if output.token_id is not None:
                    self.num_tokens += 1
                    if self.first_at is None:
                        self.first_at = now
                        metrics.ttft.labels(name).observe(now - self.arrived_at)
                    if output.index in told_at:
                        metrics.tpot.labels(name).observe(now - told_at[output.index])
                    self.last_at = told_at[output.index] = now
                if output.finish_reason is not None:
                    metrics.requests.labels(name, output.finish_reason).inc()
                self._last[prompt, output.index] = output
                self._queue.put_nowait((prompt, output))
        except EngineError as error:
            self._queue.put_nowait(ApiError(500, f"the engine failed: {error}", code="engine_error"))
        finally:
            self._queue.put_nowait(None)

    async def outputs(self) -> AsyncIterator[tuple[int, StepOutput]]:
        """Every output. Raises ApiError when the engine fails or the server cuts the answer short."""
        left = len(self._streams)
        while left:
            item = await self._queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            elif item[1].finish_reason == "abort":
                raise ApiError(503, "the server is shutting down; the answer was cut short", code="shutdown")
            else:
                yield item

    def cut(self) -> None:
        """End it at the next step; whoever reads it is told."""
        for stream in self._streams:
            self.served.engine.abort(stream.request_id)

    async def finish(self) -> Usage:
        """End it, free its blocks and bill it, whatever becomes of the caller. Idempotent."""
        if self._finishing is None:
            self._finishing = self._spawn(self._finish())
        return await asyncio.shield(self._finishing)

    async def _finish(self) -> Usage:
        if not all(pump.done() for pump in self._pumps):
            self.cut()
            await asyncio.wait(self._pumps, timeout=ABORT_WITHIN)
            for stream in self._streams:
                stream.close()
        self.is_finished = True
        return await self._settle(self)
