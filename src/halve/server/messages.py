"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients speak."""

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halve.server.conversation import Answer, Toolbox, read_messages, text_of
from halve.server.desk import Desk
from halve.server.errors import ApiError
from halve.server.http import Endpoint, EventStream, event, read_body, until_gone
from halve.server.running import Principal, Run, Usage
from halve.server.sampling import room, sampling_of
from halve.server.served import Served
from halve.server.wire import CountBody, FunctionSpec, MessagesBody, Sampling

_CHOICES: Mapping[str, Literal["none", "auto", "required"]] = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(body: CountBody) -> list[dict[str, Any]]:
    """Their messages as chat messages: tool_use blocks are calls, tool_result blocks messages of their own."""
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": text_of(body.system, "system")})
    for i, message in enumerate(body.messages):
        role, content, where = message.get("role"), message.get("content"), f"messages.{i}"
        if role not in ("user", "assistant"):
            raise ApiError(400, f"{where}.role: {role!r:.80} must be user or assistant", param=f"{where}.role")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
            continue
        if not isinstance(content, list):
            raise ApiError(400, f"{where}.content: must be text or a list of blocks", param=f"{where}.content")
        calls, texts, results = [], [], []
        for j, block in enumerate(content):
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "tool_use":
                arguments = json.dumps(block.get("input") or {})
                function = {"name": block.get("name"), "arguments": arguments}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            elif kind == "tool_result":
                text = text_of(block.get("content") or "", f"{where}.content.{j}.content")
                results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
            else:
                texts.append(text_of([block], f"{where}.content.{j}"))
        messages += results
        if texts or calls or not results:
            plain: dict[str, Any] = {"role": role, "content": "".join(texts)}
            messages.append({**plain, "tool_calls": calls} if calls else plain)
    return read_messages(messages)


def toolbox_of(served: Served, body: CountBody) -> Toolbox:
    """Their tools as functions."""
    functions = [
        FunctionSpec(name=tool.name, description=tool.description, parameters=tool.input_schema)
        for tool in body.tools or ()
    ]
    asked = body.tool_choice
    if asked is None:
        return Toolbox(served, functions, None)
    choice = _CHOICES.get(asked.type)
    wanted = asked.name or "" if asked.type == "tool" else None
    return Toolbox(served, functions, choice, wanted=wanted, parallel=not asked.disable_parallel_tool_use)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _reason(answer: Answer, run: Run, sampling_stops: tuple[str, ...]) -> str:
    if answer.calls:
        return "tool_use"
    if answer.finish_reason == "length":
        return "max_tokens"
    ended_by_token = bool(answer.token_ids) and answer.token_ids[-1] in run.served.tokenizer.special_token_ids
    return "stop_sequence" if sampling_stops and not ended_by_token else "end_turn"


async def _begin(desk: Desk, principal: Principal, body: MessagesBody, name: str) -> tuple[Run, Toolbox]:
    served = desk.registry.get(body.model)
    toolbox = toolbox_of(served, body)
    ids, stops = await served.chat(to_chat(body), toolbox.specs if toolbox.is_open else None)
    plain = Sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k or None, stop=body.stop_sequences)
    sampling = sampling_of(
        plain, room(served.context, len(ids), body.max_tokens), more_stops=stops, grammar=toolbox.grammar
    )
    return await desk.begin(principal, served, [ids], sampling, request_id=name), toolbox


def _head(run: Run, name: str, usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "type": "message",
        "role": "assistant",
        "model": run.served.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.content or not answer.calls:
        blocks.append({"type": "text", "text": answer.content, "citations": None})
    for call in answer.calls:
        made = {"type": "tool_use", "id": "toolu_" + call.id[5:], "name": call.name}
        blocks.append({**made, "input": json.loads(call.arguments)})
    return blocks


async def _events(run: Run, answer: Answer, name: str, stops: tuple[str, ...]) -> AsyncIterator[bytes]:
    def told(kind: str, **more: Any) -> bytes:
        return event({"type": kind, **more}, kind)

    try:
        began = {"input_tokens": sum(run.prompt_tokens), "output_tokens": 0}
        yield told("message_start", message=_head(run, name, began))
        opened = False
        async for _, output in run.outputs():
            piece = answer.push(output)
            if piece:
                if not opened:
                    opened = True
                    yield told("content_block_start", index=0, content_block={"type": "text", "text": ""})
                yield told("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
        if opened:
            yield told("content_block_stop", index=0)
        for i, call in enumerate(answer.calls, start=int(opened)):
            block = {"type": "tool_use", "id": "toolu_" + call.id[5:], "name": call.name, "input": {}}
            yield told("content_block_start", index=i, content_block=block)
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            yield told("content_block_delta", index=i, delta=delta)
            yield told("content_block_stop", index=i)
        usage = await run.finish()
        ended: dict[str, Any] = {"stop_reason": _reason(answer, run, stops), "stop_sequence": None}
        yield told("message_delta", delta=ended, usage=_usage(usage))
        yield told("message_stop")
    except ApiError as error:
        yield event(error.body(anthropic=True), "error")


def endpoints(desk: Desk) -> list[Endpoint]:
    """Its routes."""

    async def create(request: Request, principal: Principal) -> Response:
        body = await read_body(request, desk, MessagesBody)
        name = "msg_" + secrets.token_hex(12)
        run, toolbox = await _begin(desk, principal, body, name)
        answer, stops = toolbox.answer(), tuple(body.stop_sequences or ())
        if body.stream:
            return EventStream(run, _events(run, answer, name, stops), run.headers)

        async def collect() -> None:
            async for _, output in run.outputs():
                answer.push(output)

        try:
            await until_gone(request, collect())
        finally:
            usage = await run.finish()
        whole = _head(run, name, {**_usage(usage), "halve": usage.cost()})
        made = {"content": _blocks(answer), "stop_reason": _reason(answer, run, stops)}
        return JSONResponse({**whole, **made}, headers=run.headers)

    async def count(request: Request, principal: Principal) -> Response:
        body = await read_body(request, desk, CountBody)
        served = desk.registry.get(body.model)
        toolbox = toolbox_of(served, body)
        ids, _ = await served.chat(to_chat(body), toolbox.specs if toolbox.is_open else None)
        return JSONResponse({"input_tokens": len(ids)})

    return [
        Endpoint(
            path="/v1/messages", method="POST", handler=create, summary="Answer a conversation (Anthropic)",
            body=MessagesBody, anthropic=True,
        ),
        Endpoint(
            path="/v1/messages/count_tokens", method="POST", handler=count, summary="Count a conversation's tokens",
            body=CountBody, anthropic=True,
        ),
    ]  # fmt: skip
