"""/v1/files and /v1/batches: requests in a file, answered while nobody else needs the model.

Lines run with the least priority, so that live requests go first. The answer to a line is kept as soon as it is there,
in the same table whichever server made it: after a kill the lines without an answer run, and no line has two.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halve.engine.request import MAX_PRIORITY
from halve.server import tables as t
from halve.server.chat import answer_chat
from halve.server.completions import answer_completion
from halve.server.desk import Desk
from halve.server.embeddings import answer_embedding
from halve.server.errors import ApiError
from halve.server.http import Endpoint, parse_body, read_body, read_bytes
from halve.server.responses import answer_response
from halve.server.running import Principal
from halve.server.store import Key
from halve.server.wire import BatchBody, ChatBody, CompletionBody, EmbeddingBody, ResponseBody

log = logging.getLogger("halve.server")

MAX_LINES = 50_000
WINDOW_S = 86400
TOGETHER = 8  # lines of a batch at once
_ANSWER: Mapping[str, tuple[Any, Any]] = {
    "/v1/chat/completions": (ChatBody, answer_chat),
    "/v1/completions": (CompletionBody, answer_completion),
    "/v1/embeddings": (EmbeddingBody, answer_embedding),
    "/v1/responses": (ResponseBody, answer_response),
}


def _file_object(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": int(row.created_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "expires_at": None,
    }


_FILE = (*(c for c in t.files.c if c is not t.files.c.content), sa.func.length(t.files.c.content).label("bytes"))


def _mine(table: sa.Table, principal: Principal) -> Any:
    column = table.c.key_id
    return column.is_(None) if principal.key_id is None else column == principal.key_id


class Batches:
    """The batches of a server, and the task that works on them."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._store = desk, desk.store
        self._wake = asyncio.Event()

    async def file(self, principal: Principal, file_id: str) -> Any:
        """A file's row. Raises ApiError 404."""
        query = sa.select(*_FILE).where(t.files.c.id == file_id, _mine(t.files, principal))
        rows = await asyncio.to_thread(self._store.rows, query)
        if not rows:
            raise ApiError(404, f"there is no file {file_id!r:.80}", param="file_id")
        return rows[0]

    async def content(self, principal: Principal, file_id: str) -> bytes:
        """What is in a file. Raises ApiError 404."""
        await self.file(principal, file_id)
        rows = await asyncio.to_thread(self._store.rows, sa.select(t.files.c.content).where(t.files.c.id == file_id))
        return bytes(rows[0].content)

    async def put_file(self, principal_id: str | None, filename: str, purpose: str, content: bytes) -> dict[str, Any]:
        """Keep a file."""
        file_id = "file-" + secrets.token_hex(12)
        row: dict[str, Any] = {
            "id": file_id,
            "key_id": principal_id,
            "created_at": time.time(),
            "filename": filename[:400],
        }
        row |= {"purpose": purpose, "content": content}
        await asyncio.to_thread(self._store.change, sa.insert(t.files).values(**row))
        rows = await asyncio.to_thread(self._store.rows, sa.select(*_FILE).where(t.files.c.id == file_id))
        return _file_object(rows[0])

    async def create(self, principal: Principal, body: BatchBody) -> dict[str, Any]:
        """Queue a batch. Raises ApiError naming the line that is wrong."""
        lines = read_lines(await self.content(principal, body.input_file_id), body.endpoint)
        now, batch_id = int(time.time()), "batch_" + secrets.token_hex(12)
        made = {
            "id": batch_id,
            "object": "batch",
            "endpoint": body.endpoint,
            "errors": None,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "status": "in_progress",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": now,
            "expires_at": now + WINDOW_S,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "metadata": body.metadata,
        }
        row = {"id": batch_id, "key_id": principal.key_id, "status": "in_progress", "body": json.dumps(made)}
        await asyncio.to_thread(self._store.change, sa.insert(t.batches).values(**row))
        self._wake.set()
        return made

    async def read(self, principal: Principal, batch_id: str) -> dict[str, Any]:
        """A batch as it stands. Raises ApiError 404."""
        query = sa.select(t.batches).where(t.batches.c.id == batch_id, _mine(t.batches, principal))
        rows = await asyncio.to_thread(self._store.rows, query)
        if not rows:
            raise ApiError(404, f"there is no batch {batch_id!r:.80}", param="batch_id")
        return await self._counted(rows[0])

    async def _counted(self, row: Any) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(row.body)
        ok = t.batch_lines.c.ok
        query = sa.select(ok, sa.func.count()).where(t.batch_lines.c.batch_id == row.id).group_by(ok)
        counts = {key: int(n) for key, n in await asyncio.to_thread(self._store.rows, query)}
        made["request_counts"] |= {"completed": counts.get(1, 0), "failed": counts.get(0, 0)}
        return {**made, "status": row.status}

    async def all(self, principal: Principal, limit: int, after: str | None) -> list[dict[str, Any]]:
        """The batches of a key, the newest first."""
        query = sa.select(t.batches).where(_mine(t.batches, principal))
        rows = await asyncio.to_thread(self._store.rows, query)
        rows = sorted(rows, key=lambda row: (-json.loads(row.body)["created_at"], row.id))
        if after is not None:
            at = next((i for i, row in enumerate(rows) if row.id == after), len(rows))
            rows = rows[at + 1 :]
        return [await self._counted(row) for row in rows[: limit + 1]]

    async def cancel(self, principal: Principal, batch_id: str) -> dict[str, Any]:
        """Stop a batch; the answers that are there are kept."""
        made = await self.read(principal, batch_id)
        if made["status"] == "in_progress":
            made |= {"cancelling_at": int(time.time())}
            statement = (
                sa.update(t.batches)
                .where(t.batches.c.id == batch_id, t.batches.c.status == "in_progress")
                .values(status="cancelling", body=json.dumps(made))
            )
            await asyncio.to_thread(self._store.change, statement)
            self._wake.set()
        return await self.read(principal, batch_id)

    # Work

    async def work(self) -> None:
        """Run batches, one after the other, for as long as the server runs."""
        while True:
            row = None
            try:
                row = await self._take()
                if row is not None:
                    await self._run(row)
                    continue
            except Exception:  # whatever it was, other batches are not to wait for it
                log.exception("batch %s stopped; it is taken up again", row and row.id)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 5)

    async def _take(self) -> Any:
        """A batch that nobody works on, now ours."""
        waits = t.batches.c.status.in_(("in_progress", "cancelling"))
        ours = t.batches.c.server_id == self._store.server_id
        query = sa.select(t.batches).where(waits, t.batches.c.server_id.is_(None) | ours).limit(1)
        rows = await asyncio.to_thread(self._store.rows, query)
        if not rows:
            return None
        taken = (
            sa.update(t.batches)
            .where(t.batches.c.id == rows[0].id, t.batches.c.server_id.is_(None) | ours)
            .values(server_id=self._store.server_id)
        )
        return rows[0] if await asyncio.to_thread(self._store.change, taken) else None

    async def _run(self, row: Any) -> None:
        made = json.loads(row.body)
        principal = Principal(await asyncio.to_thread(self._key, row.key_id))
        try:
            if principal.key is not None and principal.key.revoked_at is not None:
                raise ApiError(401, "the key of this batch was revoked", code="invalid_api_key")
            lines = read_lines(await self.content(principal, made["input_file_id"]), made["endpoint"])
        except ApiError as error:  # what was there when the batch began is gone
            told = {"code": error.code, "message": error.message, "param": error.param, "line": None}
            errors = {"object": "list", "data": [told]}
            await self._close(row.id, "failed", {**made, "errors": errors, "failed_at": int(time.time())})
            return
        query = sa.select(t.batch_lines.c.line).where(t.batch_lines.c.batch_id == row.id)
        done = {line for (line,) in await asyncio.to_thread(self._store.rows, query)}
        left = [(i, line) for i, line in enumerate(lines) if i not in done]
        together = asyncio.Semaphore(TOGETHER)
        stop = row.status == "cancelling"

        async def one(number: int, line: Mapping[str, Any]) -> None:
            nonlocal stop
            async with together:
                if stop or self._desk.is_draining or time.time() > made["expires_at"]:
                    return
                await self._answer(row.id, principal, made["endpoint"], number, line)
                status = await asyncio.to_thread(
                    self._store.rows, sa.select(t.batches.c.status).where(t.batches.c.id == row.id)
                )
                stop = stop or not status or status[0].status != "in_progress"

        async with asyncio.TaskGroup() as group:
            for number, line in left:
                group.create_task(one(number, line))
        if not self._desk.is_draining:
            await self._end(row, lines)

    def _key(self, key_id: str | None) -> Key | None:
        return None if key_id is None else self._store.key(key_id)

    async def _answer(
        self, batch_id: str, principal: Principal, endpoint: str, number: int, line: Mapping[str, Any]
    ) -> None:
        kind, answer = _ANSWER[endpoint]
        while True:
            try:
                asked = {"priority": MAX_PRIORITY} if kind in (ChatBody, CompletionBody) else {}
                body = parse_body(json.dumps({**asked, **line["body"]}).encode(), kind)
                if getattr(body, "stream", None):
                    raise ApiError(400, "stream: a batch does not stream; leave it out", param="stream")
                response = await answer(self._desk, principal, body, None)
                status, result = 200, json.loads(response.body)
            except ApiError as error:
                if error.status in (429, 503) and error.code != "insufficient_quota" and not self._desk.is_draining:
                    await asyncio.sleep(min(60, int(error.headers.get("retry-after", "1"))))
                    continue
                if self._desk.is_draining:
                    return
                status, result = error.status, error.body()
            break
        told = {
            "id": "batch_req_" + secrets.token_hex(12),
            "custom_id": line["custom_id"],
            "response": {"status_code": status, "request_id": secrets.token_hex(12), "body": result},
            "error": None,
        }
        await asyncio.to_thread(self._store.put_line, batch_id, number, ok=status == 200, result=told)

    async def _end(self, row: Any, lines: list[Any]) -> None:
        query = sa.select(t.batch_lines).where(t.batch_lines.c.batch_id == row.id).order_by(t.batch_lines.c.line)
        results = await asyncio.to_thread(self._store.rows, query)
        [current] = await asyncio.to_thread(self._store.rows, sa.select(t.batches).where(t.batches.c.id == row.id))
        made, now = json.loads(current.body), int(time.time())
        for ok, field, filename in ((1, "output_file_id", "output"), (0, "error_file_id", "errors")):
            content = "".join(r.result + "\n" for r in results if r.ok == ok).encode()
            if content:
                name = f"{row.id}_{filename}.jsonl"
                made[field] = (await self.put_file(row.key_id, name, "batch_output", content))["id"]
        if current.status == "cancelling":
            status, made["cancelled_at"] = "cancelled", now
        elif len(results) < len(lines):
            status, made["expired_at"] = "expired", now
        else:
            status, made["finalizing_at"], made["completed_at"] = "completed", now, now
        await self._close(row.id, status, made)

    async def _close(self, batch_id: str, status: str, made: Mapping[str, Any]) -> None:
        statement = (
            sa.update(t.batches)
            .where(t.batches.c.id == batch_id)
            .values(status=status, body=json.dumps({**made, "status": status}), server_id=None)
        )
        await asyncio.to_thread(self._store.change, statement)


def read_lines(content: bytes, endpoint: str) -> list[dict[str, Any]]:
    """The requests of an input file. Raises ApiError naming the first line that is wrong."""
    lines, seen = [], set()
    for number, raw in enumerate(content.splitlines(), start=1):
        if not raw.strip():
            continue
        wrong = None
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            raise ApiError(400, f"input_file_id: line {number} is not JSON", param="input_file_id") from None
        if not isinstance(line, dict) or not isinstance(line.get("body"), dict):
            wrong = "needs custom_id, method, url and body"
        elif not isinstance(line.get("custom_id"), str) or line["custom_id"] in seen:
            wrong = f"custom_id {line.get('custom_id')!r:.80} must be text that no other line has"
        elif line.get("method") != "POST" or line.get("url") != endpoint:
            wrong = f"must be POST {endpoint}, as the batch says"
        if wrong:
            raise ApiError(400, f"input_file_id: line {number} {wrong}", param="input_file_id")
        seen.add(line["custom_id"])
        lines.append(line)
    if not 0 < len(lines) <= MAX_LINES:
        raise ApiError(400, f"input_file_id: {len(lines)} lines; give 1 to {MAX_LINES}", param="input_file_id")
    return lines


def endpoints(desk: Desk, batches: Batches) -> list[Endpoint]:
    """Their routes."""

    async def upload(request: Request, principal: Principal) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise ApiError(415, "send a file as multipart/form-data with `file` and `purpose`")
        raw = await read_bytes(request, desk)

        async def receive() -> Any:
            return {"type": "http.request", "body": raw, "more_body": False}

        try:
            form = await Request(request.scope, receive).form(max_files=1, max_fields=10)
        except Exception as error:  # python-multipart raises several
            raise ApiError(400, f"the form can't be read: {error}") from error
        file, purpose = form.get("file"), form.get("purpose")
        if file is None or isinstance(file, str):
            raise ApiError(400, "file: missing", param="file", code="missing_required_parameter")
        if purpose != "batch":
            raise ApiError(400, f"purpose: {purpose!r:.80} must be `batch`", param="purpose", code="invalid_value")
        content = await file.read()
        return JSONResponse(await batches.put_file(principal.key_id, file.filename or "file", purpose, content))

    async def files(request: Request, principal: Principal) -> Response:
        query = sa.select(*_FILE).where(_mine(t.files, principal)).order_by(t.files.c.created_at.desc())
        data = [_file_object(row) for row in await asyncio.to_thread(desk.store.rows, query)]
        return JSONResponse(_list(data, has_more=False))

    async def file(request: Request, principal: Principal) -> Response:
        return JSONResponse(_file_object(await batches.file(principal, request.path_params["id"])))

    async def content(request: Request, principal: Principal) -> Response:
        found = await batches.content(principal, request.path_params["id"])
        return Response(found, media_type="application/jsonl")

    async def delete(request: Request, principal: Principal) -> Response:
        found = await batches.file(principal, request.path_params["id"])
        await asyncio.to_thread(desk.store.change, sa.delete(t.files).where(t.files.c.id == found.id))
        return JSONResponse({"id": found.id, "object": "file", "deleted": True})

    async def create(request: Request, principal: Principal) -> Response:
        return JSONResponse(await batches.create(principal, await read_body(request, desk, BatchBody)))

    async def read(request: Request, principal: Principal) -> Response:
        return JSONResponse(await batches.read(principal, request.path_params["id"]))

    async def cancel(request: Request, principal: Principal) -> Response:
        return JSONResponse(await batches.cancel(principal, request.path_params["id"]))

    async def all_(request: Request, principal: Principal) -> Response:
        raw = request.query_params.get("limit", "20")
        if not raw.isdecimal() or not 1 <= int(raw) <= 100:
            raise ApiError(400, f"limit: {raw!r:.80} must be from 1 to 100", param="limit")
        found = await batches.all(principal, int(raw), request.query_params.get("after"))
        return JSONResponse(_list(found[: int(raw)], has_more=len(found) > int(raw)))

    form = {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
    }
    one_file, one_batch = "/v1/files/{id}", "/v1/batches/{id}"
    return [
        Endpoint(path="/v1/files", method="POST", handler=upload, summary="Upload a file", form=form),
        Endpoint(path="/v1/files", method="GET", handler=files, summary="List files"),
        Endpoint(path=one_file, method="GET", handler=file, summary="Describe a file"),
        Endpoint(path=one_file + "/content", method="GET", handler=content, summary="Read a file",
                 content="application/jsonl"),
        Endpoint(path=one_file, method="DELETE", handler=delete, summary="Delete a file"),
        Endpoint(path="/v1/batches", method="POST", handler=create, summary="Start a batch", body=BatchBody),
        Endpoint(path="/v1/batches", method="GET", handler=all_, summary="List batches"),
        Endpoint(path=one_batch, method="GET", handler=read, summary="Describe a batch"),
        Endpoint(path=one_batch + "/cancel", method="POST", handler=cancel, summary="Cancel a batch"),
    ]  # fmt: skip


def _list(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
