"""Where requests are let in, run, and billed.

A request passes: key, rate limit, queue, budget (reserved), engine, ledger (settled). However it ends (done, client
gone, server told to stop) `Run.finish` frees its blocks within a step and writes one line into the ledger.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from halve.core.errors import EngineError, UserError
from halve.economics.ledger import LedgerEntry, Meter
from halve.engine import SamplingParams, StepOutput, Stream
from halve.server.config import ServerConfig
from halve.server.errors import ApiError, of_user_error
from halve.server.metrics import Metrics
from halve.server.served import Registry, Served
from halve.server.store import Key, OverBudgetError, Store, Unit

log = logging.getLogger("halve.server")

T = TypeVar("T")

IDLE_EVERY = 60.0
ABORT_WITHIN = 20.0  # seconds for the last outputs of an aborted request


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a key, or anyone where no keys are needed."""

    key: Key | None

    @property
    def key_id(self) -> str | None:
        """Of the key."""
        return self.key.id if self.key else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request took. micro_usd: None where the machine's price is not known."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    micro_usd: int | None

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


class _Bucket:
    """Requests and tokens of a key in the last minute."""

    def __init__(self) -> None:
        self.events: deque[tuple[float, int]] = deque()
        self.tokens = 0

    def drop_old(self, now: float) -> None:
        while self.events and self.events[0][0] <= now - 60:
            self.tokens -= self.events.popleft()[1]


class RateLimits:
    """Requests and tokens a minute, by key, on this server."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: Key, num_tokens: int) -> dict[str, str]:
        """Count a request. Returns OpenAI's headers; raises ApiError 429 with Retry-After."""
        limits = (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
        if all(limit is None for _, limit in limits):
            return {}
        now = time.monotonic()
        bucket = self._buckets.setdefault(key.id, _Bucket())
        bucket.drop_old(now)
        asked = {"requests": (len(bucket.events), 1), "tokens": (bucket.tokens, num_tokens)}
        headers: dict[str, str] = {}
        for what, limit in limits:
            if limit is None:
                continue
            used, more = asked[what]
            free_at = next((at + 60 for at, _ in bucket.events), now)
            headers |= {
                f"x-ratelimit-limit-{what}": str(limit),
                f"x-ratelimit-remaining-{what}": str(max(0, limit - used - more)),
                f"x-ratelimit-reset-{what}": f"{max(0.0, free_at - now):.0f}s",
            }
            if used + more > limit:
                after = max(1, round(free_at - now))
                raise ApiError(
                    429,
                    f"rate limit: this key may send {limit} {what} a minute, {used} are used and this request asks for "
                    f"{more}; come again in {after} s",
                    code="rate_limit_exceeded",
                    headers={**headers, f"x-ratelimit-remaining-{what}": str(max(0, limit - used)),
                             "retry-after": str(after)},
                )  # fmt: skip
        bucket.events.append((now, num_tokens))
        bucket.tokens += num_tokens
        return headers


class Desk:
    """What all routes share."""

    def __init__(self, config: ServerConfig, registry: Registry, store: Store) -> None:
        self.config, self.registry, self.store = config, registry, store
        self.meter, self.metrics, self.limits = Meter(config.usd_per_hour), Metrics(registry), RateLimits()
        self.started_at, self.is_draining = time.time(), False
        self.recent_errors: deque[dict[str, Any]] = deque(maxlen=50)
        self.recent: deque[tuple[float, float, float, int]] = deque(maxlen=2000)  # at, ttft, s a token, tokens
        self.num_in_flight = 0
        self._runs: set[Run] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.jobs_s = 0.0  # of jobs between steps
        self._seconds_per_token = 0.0  # of recent requests, for what a budget sets aside
        self._idle_since, self._busy_s = time.monotonic(), self._busy_now()
        self._steps: dict[str, tuple[int, float]] = {}
        self._last_live_at = 0.0

    # Tasks

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Run something to its end whatever becomes of its caller."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def tend(self) -> None:
        """Signs of life, idle time, and the watch over engines, for as long as the server runs."""
        beat = 0
        while True:
            self.watch()
            if beat % 10 == 0:
                await asyncio.to_thread(self.store.hello)
            if time.monotonic() - self._idle_since >= IDLE_EVERY:
                await self.book_idle()
            beat += 1
            await asyncio.sleep(1)

    async def book_idle(self) -> None:
        """Write the time that was paid and not used since the last such line."""
        now, busy = time.monotonic(), self._busy_now()
        idle = max(0.0, now - self._idle_since - (busy - self._busy_s))
        self._idle_since, self._busy_s = now, busy
        microseconds = round(idle * 1e6)
        name = next(iter(self.registry)).name
        entry = LedgerEntry(
            kind="idle", at=time.time(), model=name, decode_us=microseconds, micro_usd=self.meter.charge(microseconds)
        )
        await asyncio.to_thread(self.store.add_entry, entry)

    def _busy_now(self) -> float:
        return float(sum(served.engine.metrics().busy_s for served in self.registry)) + self.jobs_s

    async def close(self) -> None:
        """End what runs, and write the last lines."""
        self.end_all()
        while self._runs or self._tasks:
            await asyncio.wait([*self._tasks, asyncio.create_task(asyncio.sleep(0.2))], return_when="FIRST_COMPLETED")
        await self.book_idle()
        await asyncio.to_thread(self.store.goodbye)

    def end_all(self) -> None:
        """Cut the answers that still run short; their clients are told."""
        for run in list(self._runs):
            run.cut()

    # Health

    def watch(self) -> str | None:
        """Why no tokens can be produced, or None. Called every second."""
        now = time.monotonic()
        for served in self.registry:
            metrics = served.engine.metrics()
            works = any(run.served is served and not run.is_finished for run in self._runs)
            steps, since = self._steps.get(served.name, (-1, now))
            if metrics.num_steps != steps or not works:
                self._steps[served.name] = (metrics.num_steps, now)
            elif now - since > self.config.stall_s:
                return f"{served.name}: work waits, and no step has ended for {now - since:.0f} s"
        return None

    # Requests

    async def principal(self, authorization: str | None, api_key: str | None) -> Principal:
        """Who asks. Raises ApiError 401."""
        if not self.config.auth:
            return Principal(None)
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        secret = secret or (api_key or "")
        if not secret:
            raise ApiError(
                401, "no key: send it as `Authorization: Bearer KEY`", headers={"www-authenticate": "Bearer"}
            )
        key = await asyncio.to_thread(self.store.find_key, secret)
        if key is None:
            raise ApiError(401, "this key is unknown or revoked", code="invalid_api_key")
        return Principal(key)

    async def begin(
        self,
        principal: Principal,
        served: Served,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        request_id: str | None = None,
    ) -> "Run":
        """Let a request in. Raises ApiError: nothing is then held."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down; try another", headers={"retry-after": "5"})
        if sampling.n > self.config.max_n:
            raise ApiError(400, f"n: {sampling.n} is more than {self.config.max_n}, this server's most", param="n")
        if len(sampling.stop) > self.config.max_stops or any(len(s) > 1000 for s in sampling.stop):
            raise ApiError(
                400, f"stop: give at most {self.config.max_stops} strings of at most 1000 characters", param="stop"
            )
        if sampling.grammar is not None:
            await self._compile(served, sampling.grammar)
        request_id = request_id or "req-" + secrets.token_hex(12)
        try:
            requests = [
                served.engine.request(
                    list(prompt),
                    sampling,
                    priority=priority,
                    request_id=f"{request_id}/{i}",
                    cache_salt=principal.key_id or "" if self.config.isolate_cache else "",
                )
                for i, prompt in enumerate(prompts)
            ]
            for request in requests:
                served.engine.check(request)
        except UserError as error:
            raise of_user_error(error) from error
        num_sequences = len(prompts) * sampling.n
        room = served.config.max_num_seqs + self.config.max_queued
        if self.num_in_flight and self.num_in_flight + num_sequences > room:
            raise ApiError(
                503,
                f"{self.num_in_flight} answers are running or waiting, and there is room for {room}; come again",
                code="overloaded",
                headers={"retry-after": "1"},
            )
        answer = sum(min(sampling.max_tokens, served.context - len(p)) for p in prompts) * sampling.n
        most = sum(map(len, prompts)) + answer
        headers = self.limits.take(principal.key, most) if principal.key else {}
        self.num_in_flight += num_sequences
        run = Run(self, principal, served, request_id, num_sequences, headers)
        try:
            if principal.key:
                run.reservation = await self._reserve(request_id, principal.key, most)
            run.start([Stream(served.engine, request) for request in requests], [len(p) for p in prompts])
        except BaseException as error:
            self.num_in_flight -= num_sequences
            if run.reservation:
                self.spawn(asyncio.to_thread(self.store.release, run.reservation))
            if isinstance(error, UserError):
                raise of_user_error(error) from error
            if isinstance(error, EngineError):
                raise ApiError(503, f"the engine can't take it: {error}", code="engine_error") from error
            raise
        self._runs.add(run)
        return run

    async def _compile(self, served: Served, grammar: str) -> None:
        if served.constrainer is None:
            raise ApiError(400, f"response_format: {served.name} has no grammars here", param="response_format")
        try:
            async with asyncio.timeout(10):
                await asyncio.to_thread(served.constrainer.check, grammar)
        except TimeoutError as error:
            raise ApiError(
                400, "response_format: the grammar takes more than 10 s to compile; simplify it",
                param="response_format",
            ) from error  # fmt: skip
        except UserError as error:
            raise ApiError(400, f"response_format: {error}", param="response_format") from error

    async def _reserve(self, request_id: str, key: Key, most: int) -> str | None:
        """Set aside what a request may take; the reservation, None where the key has no budget."""
        rate = self.meter.micro_usd_per_second
        money = None if rate is None else int(rate * round(most * self._seconds_per_token * 1e6) / 10**6) + 1
        amounts: Mapping[Unit, int | None] = {"tokens": most, "micro_usd": money}
        try:
            held = await asyncio.to_thread(self.store.reserve, request_id, key.id, amounts)
        except OverBudgetError as error:
            raise ApiError(429, str(error), code="insufficient_quota", headers={"retry-after": "3600"}) from error
        return request_id if held else None

    async def between_steps(
        self, principal: Principal, served: Served, prompts: Sequence[Sequence[int]], job: Callable[[Sequence[int]], T]
    ) -> tuple[list[T], Usage, dict[str, str]]:
        """Run a job for each prompt on the engine's thread: let in, limited and billed as prompts are.

        Returns the results, what they took, and headers. Raises ApiError.
        """
        if self.is_draining:
            raise ApiError(503, "the server is shutting down; try another", headers={"retry-after": "5"})
        num_tokens = sum(map(len, prompts))
        headers = self.limits.take(principal.key, num_tokens) if principal.key else {}
        request_id, reservation = "job-" + secrets.token_hex(12), None
        if principal.key:
            reservation = await self._reserve(request_id, principal.key, num_tokens)

        def timed(prompt: Sequence[int]) -> tuple[T, float]:
            started = time.perf_counter()
            return job(prompt), time.perf_counter() - started

        results, seconds = [], 0.0
        try:
            for prompt in prompts:
                result, took = await asyncio.wrap_future(served.engine.between_steps(partial(timed, prompt)))
                results.append(result)
                seconds += took
        except EngineError as error:
            raise ApiError(503, f"the engine can't take it: {error}", code="engine_error") from error
        finally:
            microseconds = round(seconds * 1e6)
            usage = Usage(
                prompt_tokens=num_tokens,
                cached_tokens=0,
                completion_tokens=0,
                prefill_s=seconds,
                decode_s=0.0,
                micro_usd=self.meter.charge(microseconds),
            )
            entry = LedgerEntry(
                kind="request",
                at=time.time(),
                model=served.name,
                key_id=principal.key_id,
                request_id=request_id,
                prompt_tokens=num_tokens,
                prefill_us=microseconds,
                micro_usd=usage.micro_usd,
            )
            self.jobs_s += seconds
            settled = self.spawn(asyncio.to_thread(self.store.settle, reservation, entry))
        await asyncio.shield(settled)
        return results, usage, headers

    def ended(self, run: "Run", usage: Usage) -> None:
        """Count a request that has ended."""
        self._runs.discard(run)
        self.num_in_flight -= run.num_sequences
        tokens = usage.prompt_tokens + usage.completion_tokens
        if tokens:
            new = (usage.prefill_s + usage.decode_s) / tokens
            old = self._seconds_per_token
            self._seconds_per_token = max(new, 0.9 * old + 0.1 * new)
        name, metrics = run.served.name, self.metrics
        metrics.prompt_tokens.labels(name).inc(usage.prompt_tokens)
        metrics.cached_tokens.labels(name).inc(usage.cached_tokens)
        metrics.generation_tokens.labels(name).inc(usage.completion_tokens)
        metrics.latency.labels(name).observe(time.perf_counter() - run.arrived_at)
        if usage.micro_usd is not None:
            metrics.micro_usd.labels(name, run.principal.key_id or "").inc(usage.micro_usd)
        if run.first_at is not None:
            spent = (run.last_at - run.first_at) / max(1, usage.completion_tokens - run.num_sequences)
            self.recent.append((time.time(), run.first_at - run.arrived_at, spent, usage.completion_tokens))


class Run:
    """One request in the engine: the outputs of its prompts as they come, `(prompt, output)`, then its usage."""

    def __init__(
        self, desk: Desk, principal: Principal, served: Served, request_id: str, num_sequences: int,
        headers: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.desk, self.principal, self.served, self.request_id = desk, principal, served, request_id
        self.num_sequences, self.headers = num_sequences, dict(headers)
        self.reservation: str | None = None
        self.usage: Usage | None = None
        self.arrived_at = self.last_at = time.perf_counter()
        self.first_at: float | None = None
        self.is_finished = self.was_cut = False
        self._streams: list[Stream] = []
        self.prompt_tokens: list[int] = []
        self._queue: asyncio.Queue[tuple[int, StepOutput] | Exception | None] = asyncio.Queue()
        self._last: dict[tuple[int, int], StepOutput] = {}
        self._num_tokens = 0
        self._pumps: list[asyncio.Task[None]] = []
        self._finishing: asyncio.Task[Usage] | None = None

    def start(self, streams: list[Stream], prompt_tokens: list[int]) -> None:
        """Take the outputs of these streams."""
        self._streams, self.prompt_tokens = streams, prompt_tokens
        self._pumps = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(streams)]

    async def _pump(self, prompt: int, stream: Stream) -> None:
        metrics, name = self.desk.metrics, self.served.name
        try:
            async for output in stream:
                now = time.perf_counter()
                if output.token_id is not None:
                    self._num_tokens += 1
                    if self.first_at is None:
                        self.first_at = now
                        metrics.ttft.labels(name).observe(now - self.arrived_at)
                    if (prompt, output.index) in self._last:
                        metrics.tpot.labels(name).observe(now - self.last_at)
                    self.last_at = now
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
        self.was_cut = True
        for stream in self._streams:
            self.served.engine.abort(stream.request_id)

    async def finish(self) -> Usage:
        """End it, free its blocks and write its line in the ledger, whatever becomes of the caller. Idempotent."""
        if self._finishing is None:
            self._finishing = self.desk.spawn(self._finish())
        return await asyncio.shield(self._finishing)

    async def _finish(self) -> Usage:
        if not all(pump.done() for pump in self._pumps):
            self.cut()
            await asyncio.wait(self._pumps, timeout=ABORT_WITHIN)
            for stream in self._streams:
                stream.close()
        self.is_finished = True
        outputs = self._last.values()
        prefill_s, decode_s = sum(o.prefill_s for o in outputs), sum(o.decode_s for o in outputs)
        prefill_us, decode_us = round(prefill_s * 1e6), round(decode_s * 1e6)
        cached = {prompt: o.num_cached_tokens for (prompt, index), o in self._last.items() if index == 0}
        usage = Usage(
            prompt_tokens=sum(self.prompt_tokens),
            cached_tokens=sum(cached.values()),
            completion_tokens=self._num_tokens,
            prefill_s=prefill_s,
            decode_s=decode_s,
            micro_usd=self.desk.meter.charge(prefill_us + decode_us),
        )
        self.usage = usage
        self.desk.ended(self, usage)
        entry = LedgerEntry(
            kind="request",
            at=time.time(),
            model=self.served.name,
            key_id=self.principal.key_id,
            request_id=self.request_id,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            prefill_us=prefill_us,
            decode_us=decode_us,
            micro_usd=usage.micro_usd,
        )
        try:
            await asyncio.to_thread(self.desk.store.settle, self.reservation, entry)
        except Exception:
            log.exception("the ledger line of %s could not be written: %s", self.request_id, entry)
        return usage
