"""Where requests are let in, run, and billed.

A request passes: key, rate limit, queue, budget (reserved), engine, ledger (settled). However it ends (done, client
gone, server told to stop) `Run.finish` frees its blocks within a step, and one line goes into the ledger.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from halve.core.errors import EngineError, UserError
from halve.economics.ledger import LedgerEntry, Meter
from halve.engine import SamplingParams, Stream
from halve.server.config import ServerConfig
from halve.server.database import DATABASE_ERRORS
from halve.server.errors import ApiError, of_user_error
from halve.server.metrics import Metrics
from halve.server.rates import RateLimits
from halve.server.running import Principal, Run, Usage
from halve.server.served import Registry, Served
from halve.server.store import Key, OverBudgetError, Store, Unit

log = logging.getLogger("halve.server")

T = TypeVar("T")

IDLE_EVERY = 60.0  # seconds between lines of idle time


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
        self._unwritten: deque[tuple[str | None, LedgerEntry]] = deque()  # lines on their way into the ledger
        self._writing = asyncio.Lock()

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
                try:
                    await asyncio.to_thread(self.store.hello)
                except DATABASE_ERRORS as error:
                    log.error("the database does not answer: %s", error)
            await self._write()
            if time.monotonic() - self._idle_since >= IDLE_EVERY:
                self.book_idle()
            beat += 1
            await asyncio.sleep(1)

    def book_idle(self) -> None:
        """Write down the time that was paid and not used since the last such line."""
        now, busy = time.monotonic(), self._busy_now()
        idle = max(0.0, now - self._idle_since - (busy - self._busy_s))
        self._idle_since, self._busy_s = now, busy
        microseconds = round(idle * 1e6)
        name = next(iter(self.registry)).name
        entry = LedgerEntry(
            kind="idle", at=time.time(), model=name, decode_us=microseconds, micro_usd=self.meter.charge(microseconds)
        )
        self._unwritten.append((None, entry))

    def _busy_now(self) -> float:
        return float(sum(served.engine.metrics().busy_s for served in self.registry)) + self.jobs_s

    async def close(self) -> None:
        """End what runs, and write the last lines."""
        self.end_all()
        while self._runs or self._tasks:
            await asyncio.wait([*self._tasks, asyncio.create_task(asyncio.sleep(0.2))], return_when="FIRST_COMPLETED")
        self.book_idle()
        await self._write()
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
        try:
            reservation = await self._reserve(request_id, principal.key, most) if principal.key else None
            streams = [Stream(served.engine, request) for request in requests]
        except BaseException as error:
            self.num_in_flight -= num_sequences
            if principal.key:
                self.spawn(asyncio.to_thread(self.store.release, request_id))
            if isinstance(error, UserError):
                raise of_user_error(error) from error
            if isinstance(error, EngineError):
                raise ApiError(503, f"the engine can't take it: {error}", code="engine_error") from error
            raise
        run = Run(
            served,
            principal,
            request_id,
            streams,
            [len(prompt) for prompt in prompts],
            num_sequences=num_sequences,
            headers=headers,
            reservation=reservation,
            metrics=self.metrics,
            settle=self._ended,
            spawn=self.spawn,
        )
        self._runs.add(run)
        return run

    async def _compile(self, served: Served, grammar: str) -> None:
        if served.constrainer is None:
            raise ApiError(400, f"response_format: {served.name} has no grammars here", param="response_format")
        try:
            async with asyncio.timeout(10):
                await served.aside(served.constrainer.check, grammar)
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
            self.jobs_s += seconds
            usage = await self._bill(
                principal, served, request_id, reservation, prompt_tokens=num_tokens, prefill_s=seconds
            )
        return results, usage, headers

    async def _bill(
        self,
        principal: Principal,
        served: Served,
        request_id: str,
        reservation: str | None,
        *,
        prompt_tokens: int,
        cached_tokens: int = 0,
        completion_tokens: int = 0,
        prefill_s: float = 0.0,
        decode_s: float = 0.0,
    ) -> Usage:
        """Charge a request. Its line is in the ledger before its client is answered, unless the database is gone."""
        prefill_us, decode_us = round(prefill_s * 1e6), round(decode_s * 1e6)
        usage = Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            prefill_s=prefill_s,
            decode_s=decode_s,
            micro_usd=self.meter.charge(prefill_us + decode_us),
        )
        entry = LedgerEntry(
            kind="request",
            at=time.time(),
            model=served.name,
            key_id=principal.key_id,
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            prefill_us=prefill_us,
            decode_us=decode_us,
            micro_usd=usage.micro_usd,
        )
        self._unwritten.append((reservation, entry))
        if usage.micro_usd is not None:
            self.metrics.micro_usd.labels(served.name, principal.key_id or "").inc(usage.micro_usd)
        await self._write()
        return usage

    async def _write(self) -> None:
        """Write the lines that wait now; those that the database does not take stay, and are tried again."""
        async with self._writing:
            for _ in range(len(self._unwritten)):
                reservation, entry = self._unwritten[0]
                try:
                    await asyncio.to_thread(self.store.settle, reservation, entry)
                except DATABASE_ERRORS as error:
                    log.error("%d lines of the ledger wait for the database: %s", len(self._unwritten), error)
                    return
                self._unwritten.popleft()

    async def _ended(self, run: Run) -> Usage:
        """Bill and count a request that has ended."""
        self._runs.discard(run)
        self.num_in_flight -= run.num_sequences
        outputs = run.last_outputs
        usage = await self._bill(
            run.principal,
            run.served,
            run.request_id,
            run.reservation,
            prompt_tokens=sum(run.prompt_tokens),
            cached_tokens=sum(o.num_cached_tokens for (_, index), o in outputs.items() if index == 0),
            completion_tokens=run.num_tokens,
            prefill_s=sum(o.prefill_s for o in outputs.values()),
            decode_s=sum(o.decode_s for o in outputs.values()),
        )
        tokens = usage.prompt_tokens + usage.completion_tokens
        new, old = (usage.prefill_s + usage.decode_s) / max(1, tokens), self._seconds_per_token
        self._seconds_per_token = max(new, 0.9 * old + 0.1 * new)
        name, metrics = run.served.name, self.metrics
        metrics.prompt_tokens.labels(name).inc(usage.prompt_tokens)
        metrics.cached_tokens.labels(name).inc(usage.cached_tokens)
        metrics.generation_tokens.labels(name).inc(usage.completion_tokens)
        metrics.latency.labels(name).observe(time.perf_counter() - run.arrived_at)
        if run.first_at is not None:
            spent = (run.last_at - run.first_at) / max(1, usage.completion_tokens - run.num_sequences)
            self.recent.append((time.time(), run.first_at - run.arrived_at, spent, usage.completion_tokens))
        return usage
