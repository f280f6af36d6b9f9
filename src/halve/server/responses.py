"""/v1/responses: answers that are kept, and conversations that go on from them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halve.server.conversation import Answer, Toolbox, read_messages, text_of
from halve.server.desk import Desk
from halve.server.errors import ApiError
from halve.server.http import Endpoint, EventStream, event, read_body, until_gone
from halve.server.running import Principal, Run, Usage
from halve.server.sampling import format_grammar, room, sampling_of
from halve.server.served import Served
from halve.server.wire import FunctionSpec, NamedResponseTool, ResponseBody, ResponseFormat, Sampling


def _input_messages(given: Any) -> list[dict[str, Any]]:
    """Items of the input as chat messages."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": text_of(item.get("content"), f"input.{i}.content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            text = text_of(item.get("output"), f"input.{i}.output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        else:
            raise ApiError(400, f"input.{i}.type: {kind!r:.80} is not read here", param=f"input.{i}.type")
    return messages


def _toolbox(body: ResponseBody, served: Served) -> Toolbox:
    functions = [
        FunctionSpec(name=tool.name, description=tool.description, parameters=tool.parameters)
        for tool in body.tools or ()
    ]
    asked = body.tool_choice
    named = asked.name if isinstance(asked, NamedResponseTool) else None
    choice = None if isinstance(asked, NamedResponseTool) else asked
    return Toolbox(served, functions, choice, wanted=named, parallel=body.parallel_tool_calls)


def _format(body: ResponseBody) -> ResponseFormat | None:
    given = body.text.format if body.text else None
    if given is None or given.type != "json_schema":
        return None if given is None else ResponseFormat(type=given.type)
    return ResponseFormat(type="json_schema", json_schema={"name": given.name, "schema": given.schema_})


class _Conversation:
    """A response that is being made: what its object says, and what is kept of it."""

    def __init__(self, body: ResponseBody, run: Run, answer: Answer, messages: list[dict[str, Any]], name: str) -> None:
        self.body, self.run, self.answer, self.messages, self.name = body, run, answer, messages, name
        self.created_at = int(time.time())
        self.message_id = "msg_" + secrets.token_hex(12)

    def item(self, status: str = "completed") -> dict[str, Any]:
        """The message."""
        part = {"type": "output_text", "text": self.answer.content, "annotations": [], "logprobs": []}
        made = {"type": "message", "id": self.message_id, "status": status, "role": "assistant"}
        return {**made, "content": [part] if status == "completed" else []}

    def calls(self) -> list[dict[str, Any]]:
        """The calls."""
        return [
            {
                "type": "function_call",
                "id": "fc_" + call.id[5:],
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
            for call in self.answer.calls
        ]

    def whole(self, status: str, usage: Usage | None = None, error: Any = None) -> dict[str, Any]:
        """The response object."""
        body = self.body
        output: list[dict[str, Any]] = []
        if status in ("completed", "incomplete"):
            if self.answer.content or not self.answer.calls:
                output.append(self.item())
            output += self.calls()
        choice = body.tool_choice
        return {
            "id": self.name,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.run.served.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.text.format.model_dump(exclude_none=True, by_alias=True)
                     if body.text and body.text.format else {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedResponseTool) else choice or "auto",
            "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "halve": usage.cost(),
            },
            "user": body.user,
        }  # fmt: skip

    @property
    def status(self) -> str:
        """How it ended."""
        return "incomplete" if self.answer.finish_reason == "length" else "completed"

    def continued(self) -> list[dict[str, Any]]:
        """The conversation with this answer."""
        said: dict[str, Any] = {"role": "assistant", "content": self.answer.content}
        if self.answer.calls:
            said["tool_calls"] = [call.wire() for call in self.answer.calls]
        return [*self.messages, said]


async def _begin(desk: Desk, principal: Principal, body: ResponseBody) -> _Conversation:
    served = desk.registry.get(body.model)
    messages: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        found = await asyncio.to_thread(desk.store.response, body.previous_response_id, principal.key_id)
        if found is None:
            raise ApiError(
                404, f"previous_response_id: there is no {body.previous_response_id!r:.80}, or it has expired",
                param="previous_response_id", code="previous_response_not_found",
            )  # fmt: skip
        messages = found[1]
    messages = [*messages, *_input_messages(body.input)]
    toolbox = _toolbox(body, served)
    grammar = toolbox.grammar or format_grammar(_format(body))
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    ids, stops = await served.chat(
        read_messages([*instructions, *messages]), toolbox.specs if toolbox.is_open else None
    )
    plain = Sampling(temperature=body.temperature, top_p=body.top_p)
    most = room(served.context, len(ids), body.max_output_tokens)
    sampling = sampling_of(plain, most, more_stops=stops, grammar=grammar)
    name = "resp_" + secrets.token_hex(16)
    run = await desk.begin(principal, served, [ids], sampling, request_id=name)
    return _Conversation(body, run, toolbox.answer(), messages, name)


async def _keep(desk: Desk, principal: Principal, made: _Conversation, whole: dict[str, Any]) -> None:
    if made.body.store is not False:
        expires = time.time() + 86400 * desk.config.response_days
        await asyncio.to_thread(desk.store.put_response, made.name, principal.key_id, expires, whole, made.continued())


async def answer_response(desk: Desk, principal: Principal, body: ResponseBody, request: Request | None) -> Response:
    """The answer, whole or as a stream."""
    made = await _begin(desk, principal, body)
    run = made.run
    if body.stream and request is not None:
        return EventStream(run, _events(desk, principal, made), run.headers)

    async def collect() -> None:
        async for _, output in run.outputs():
            made.answer.push(output)

    try:
        await (until_gone(request, collect()) if request is not None else collect())
    finally:
        usage = await run.finish()
    whole = made.whole(made.status, usage)
    await _keep(desk, principal, made, whole)
    return JSONResponse(whole, headers=run.headers)


async def _events(desk: Desk, principal: Principal, made: _Conversation) -> AsyncIterator[bytes]:
    number = 0

    def told(kind: str, **more: Any) -> bytes:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **more}, kind)

    at = {"output_index": 0, "content_index": 0, "item_id": made.message_id}
    try:
        yield told("response.created", response=made.whole("in_progress"))
        yield told("response.in_progress", response=made.whole("in_progress"))
        opened = False
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        async for _, output in made.run.outputs():
            piece = made.answer.push(output)
            if piece or (output.finish_reason is not None and not opened and not made.answer.calls):
                if not opened:
                    opened = True
                    yield told("response.output_item.added", output_index=0, item=made.item("in_progress"))
                    yield told("response.content_part.added", **at, part=part)
                if piece:
                    yield told("response.output_text.delta", **at, delta=piece, logprobs=[])
        if opened:
            text = made.answer.content
            yield told("response.output_text.done", **at, text=text, logprobs=[])
            yield told("response.content_part.done", **at, part={**part, "text": text})
            yield told("response.output_item.done", output_index=0, item=made.item())
        for i, call in enumerate(made.calls(), start=int(opened)):
            place = {"output_index": i, "item_id": call["id"]}
            begun = {**call, "arguments": "", "status": "in_progress"}
            yield told("response.output_item.added", output_index=i, item=begun)
            yield told("response.function_call_arguments.delta", **place, delta=call["arguments"])
            yield told("response.function_call_arguments.done", **place, name=call["name"], arguments=call["arguments"])
            yield told("response.output_item.done", output_index=i, item=call)
        usage = await made.run.finish()
        whole = made.whole(made.status, usage)
        await _keep(desk, principal, made, whole)
        yield told(f"response.{made.status}", response=whole)
    except ApiError as error:
        failed = {"code": "server_error", "message": error.message}
        yield told("response.failed", response=made.whole("failed", error=failed))


def endpoints(desk: Desk) -> list[Endpoint]:
    """Its routes."""

    async def create(request: Request, principal: Principal) -> Response:
        return await answer_response(desk, principal, await read_body(request, desk, ResponseBody), request)

    async def read(request: Request, principal: Principal) -> Response:
        name = request.path_params["id"]
        found = await asyncio.to_thread(desk.store.response, name, principal.key_id)
        if found is None:
            raise ApiError(404, f"there is no response {name!r:.80}, or it has expired")
        return JSONResponse(found[0])

    async def delete(request: Request, principal: Principal) -> Response:
        name = request.path_params["id"]
        if not await asyncio.to_thread(desk.store.delete_response, name, principal.key_id):
            raise ApiError(404, f"there is no response {name!r:.80}, or it has expired")
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    one = "/v1/responses/{id}"
    return [
        Endpoint(path="/v1/responses", method="POST", handler=create, summary="Make a response", body=ResponseBody),
        Endpoint(path=one, method="GET", handler=read, summary="Read a response that was kept"),
        Endpoint(path=one, method="DELETE", handler=delete, summary="Forget a response"),
    ]
