"""The thread that owns an `EngineCore`. Others hand it requests and aborts; it hands back outputs.

Requests are checked in the thread that submits them, so a bad one never reaches the others. A step that fails ends the
requests it held; after MAX_FAILURES in a row the worker is dead, and says so to everyone who waits or comes later.
"""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from halve.core.errors import EngineError, RequestError
from halve.engine.core import EngineCore, StepError
from halve.engine.request import Request, StepOutput

log = logging.getLogger("halve.engine")

MAX_FAILURES = 3


class Mailbox:
    """Outputs on their way from the worker to one reader, which waits in a thread or in an event loop."""

    def __init__(self) -> None:
        self._items: deque[StepOutput | EngineError] = deque()
        self._filled = threading.Condition(threading.Lock())
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, item: StepOutput | EngineError) -> None:
        """Add an item; wakes the reader."""
        with self._filled:
            self._items.append(item)
            waiter, self._waiter = self._waiter, None
            self._filled.notify()
        if waiter is not None:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(_wake, future)

    def get(self) -> StepOutput:
        """The next output, when it is there. Raises what was put as an error."""
        with self._filled:
            while not self._items:
                self._filled.wait()
            return _opened(self._items.popleft())

    async def get_async(self) -> StepOutput:
        """As `get`, in an event loop."""
        while True:
            with self._filled:
                if self._items:
                    return _opened(self._items.popleft())
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = loop, future
            await future


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _opened(item: StepOutput | EngineError) -> StepOutput:
    if isinstance(item, EngineError):
        raise EngineError(str(item)) from item.__cause__  # each reader raises its own
    return item


class _Job:
    """Something to run between two steps."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run, self.future = run, Future[Any]()

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self._run())
            except Exception as error:  # whoever asked raises it
                self.future.set_exception(error)


@dataclass(slots=True)
class _Reader:
    mailbox: Mailbox
    num_unfinished: int  # answers of the request whose end is not told


class Worker:
    """Runs an `EngineCore` in a thread of its own, from the first request on."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.metrics = core.metrics()  # between two steps; replaced, never changed
        self._changed = threading.Condition(threading.RLock())
        # Requests, and ids to abort. Appended to without the lock too, since a collected stream aborts anywhere.
        self._inbox: deque[Request | str | _Job] = deque()
        self._readers: dict[str, _Reader] = {}
        self._thread: threading.Thread | None = None
        self._closing = False
        self._death: EngineError | None = None

    def submit(self, request: Request, mailbox: Mailbox) -> None:
        """Hand over a request; its outputs will come into the mailbox.

        Raises RequestError for one that can't be served or whose id is in use, EngineError when the engine is closed
        or dead.
        """
        self.core.check(request)
        with self._changed:
            self._require_open()
            if request.request_id in self._readers:
                raise RequestError(
                    f"request {request.request_id!r}: a request that has not ended has this id; take another"
                )
            self._readers[request.request_id] = _Reader(mailbox, request.sampling.n)
            self._inbox.append(request)
            self._begin()

    def abort(self, request_id: str) -> bool:
        """End a request at the next step; its last outputs then come with reason "abort". False when it has ended."""
        if request_id not in self._readers:
            return False
        self._inbox.append(request_id)
        with self._changed:
            self._changed.notify()
        return True

    def between_steps(self, run: Callable[[], Any]) -> "Future[Any]":
        """Run something when no step runs. Raises EngineError when the engine is closed or dead."""
        job = _Job(run)
        with self._changed:
            self._require_open()
            self._inbox.append(job)
            self._begin()
        return job.future

    def _require_open(self) -> None:
        if self._death is not None:
            raise EngineError(str(self._death)) from self._death.__cause__
        if self._closing:
            raise EngineError("the engine is closed; make a new one")

    def _begin(self) -> None:
        """Wake the thread, or start it. The caller holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="halve-engine", daemon=True)
            self._thread.start()
        self._changed.notify()

    def close(self) -> None:
        """Abort what is unfinished and end the thread. May be called again, from any thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        failures = 0
        try:
            while self._wait():
                self._take_inbox()
                try:
                    outputs = self.core.step()
                    failures = 0
                except StepError as error:
                    failures += 1
                    log.error("%s", error, exc_info=error)
                    self._fail(error.request_ids, error)
                    if failures == MAX_FAILURES:
                        raise
                    continue
                finally:
                    self.metrics = self.core.metrics()
                self._deliver(outputs)
            self._take_inbox()
            self._deliver(self._end_all(self._readers))
            self.metrics = self.core.metrics()
        except BaseException as error:  # a defect of ours, or a runner that fails again and again: nobody may wait on
            self._die(error)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine is to close."""
        with self._changed:
            while not (self._closing or self._inbox or self.core.has_unfinished):
                self._changed.wait()
            return not self._closing

    def _take_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Request):
                self.core.add(message)
            elif isinstance(message, _Job):
                message.run()
            else:
                self.core.abort(message)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            reader = self._readers[output.request_id]
            if output.finish_reason is not None:
                reader.num_unfinished -= 1
                if not reader.num_unfinished:
                    self._forget(output.request_id)  # before its reader knows: the id is free for it to use
            reader.mailbox.put(output)

    def _fail(self, request_ids: frozenset[str], error: EngineError) -> None:
        for request_id in request_ids:
            self._forget(request_id).mailbox.put(error)

    def _forget(self, request_id: str) -> _Reader:
        with self._changed:
            return self._readers.pop(request_id)

    def _die(self, error: BaseException) -> None:
        cause = error.__cause__ if isinstance(error, StepError) else error
        death = EngineError(f"the engine has stopped: {error or type(error).__name__}; make a new one")
        death.__cause__ = cause
        with self._changed:
            self._death = death
            readers, self._readers = self._readers, {}
        log.critical("%s", death, exc_info=error)
        for message in self._inbox:
            if isinstance(message, _Job) and message.future.set_running_or_notify_cancel():
                message.future.set_exception(death)
        for reader in readers.values():
            reader.mailbox.put(death)
        with contextlib.suppress(Exception):  # what the core keeps is of use to nobody now
            self._end_all(readers)

    def _end_all(self, request_ids: Iterable[str]) -> list[StepOutput]:
        for request_id in request_ids:
            self.core.abort(request_id)
        return self.core.step()
