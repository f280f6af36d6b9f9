"""Bodies in, JSON and event streams out."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from halve.server.desk import Desk
from halve.server.errors import ApiError, of_validation
from halve.server.running import Principal, Run

Handler = Callable[[Request, Principal], Awaitable[Response]]
B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """A route, and what /openapi.json says of it. needs_key: whether it asks who calls."""

    path: str
    method: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    needs_key: bool = True
    anthropic: bool = False
    content: str = "application/json"
    form: Mapping[str, Any] | None = None


async def read_bytes(request: Request, desk: Desk) -> bytes:
    """The body. Raises ApiError for one that is too large or takes too long."""
    most = desk.config.max_body_bytes
    declared = request.headers.get("content-length", "0")
    too_large = ApiError(413, f"the body is larger than {most} bytes, this server's most", code="request_too_large")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(desk.config.body_s):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {desk.config.body_s:.0f} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client left before its body was here") from error
    return b"".join(parts)


async def read_body(request: Request, desk: Desk, kind: type[B]) -> B:
    """The body as a record. Raises ApiError naming the field that is wrong."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"content-type: {content_type!r:.80} can't be read; send application/json")
    return parse_body(await read_bytes(request, desk), kind)


def parse_body(raw: bytes, kind: type[B]) -> B:
    """The same from bytes."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise of_validation(error) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deep", code="invalid_json") from error


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which ends early when the client leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(400, "the client left")
        return await working
    finally:
        for task in (working, watching):
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events of a run; however it ends, the run is finished."""

    def __init__(self, run: Run, events: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no",
                                                             **headers},
        )  # fmt: skip
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._run.finish()


def dumps(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(value)}\n\n".encode()


async def until_done(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """OpenAI's end of a stream: `[DONE]`, or an error where it is too late for a status."""
    try:
        async for one in events:
            yield one
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body())
