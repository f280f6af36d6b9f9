"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halve.engine import StepOutput
from halve.server.conversation import Answer, Toolbox, read_messages
from halve.server.desk import Desk
from halve.server.errors import ApiError
from halve.server.http import Endpoint, EventStream, event, read_body, until_done, until_gone
from halve.server.running import Principal, Run
from halve.server.sampling import format_grammar, room, sampling_of
from halve.server.served import Served
from halve.server.wire import ChatBody, NamedTool


async def begin_chat(desk: Desk, principal: Principal, body: ChatBody, request_id: str) -> tuple[Run, Toolbox]:
    """Let a conversation in. Raises ApiError."""
    served = desk.registry.get(body.model)
    named = body.tool_choice if isinstance(body.tool_choice, NamedTool) else None
    toolbox = Toolbox(
        served,
        [tool.function for tool in body.tools or ()],
        None if isinstance(body.tool_choice, NamedTool) else body.tool_choice,
        wanted=named.function.name if named else None,
        parallel=body.parallel_tool_calls,
    )
    grammar = format_grammar(body.response_format)
    if grammar and toolbox.grammar:
        raise ApiError(400, "response_format and a forced tool_choice exclude each other", param="response_format")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: it needs logprobs to be true", param="top_logprobs", code="invalid_value")
    tools = toolbox.specs if toolbox.is_open else None
    ids, stops = await served.chat(read_messages(body.messages), tools, body.chat_template_kwargs)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    sampling = sampling_of(
        body,
        room(served.context, len(ids), asked),
        more_stops=stops,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=toolbox.grammar or grammar,
    )
    run = await desk.begin(principal, served, [ids], sampling, priority=body.priority or 0, request_id=request_id)
    return run, toolbox


async def answer_chat(desk: Desk, principal: Principal, body: ChatBody, request: Request | None) -> Response:
    """The answer to a conversation, whole or as a stream. request: of the client to watch, None for none."""
    request_id = "chatcmpl-" + secrets.token_hex(12)
    run, toolbox = await begin_chat(desk, principal, body, request_id)
    created, n = int(time.time()), body.n or 1
    answers = [toolbox.answer() for _ in range(n)]
    if body.stream and request is not None:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(run, answers, request_id, created, with_usage=with_usage)
        return EventStream(run, until_done(events), run.headers)
    logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]

    async def collect() -> None:
        async for _, output in run.outputs():
            answers[output.index].push(output)
            if output.logprobs is not None:
                logprobs[output.index].append(logprob_wire(run.served, output))

    try:
        await (until_gone(request, collect()) if request is not None else collect())
    finally:
        usage = await run.finish()
    choices = [
        {
            "index": i,
            "message": {
                "role": "assistant",
                "content": answer.content if answer.content or not answer.calls else None,
                "refusal": None,
                **({"tool_calls": [call.wire() for call in answer.calls]} if answer.calls else {}),
            },
            "logprobs": {"content": logprobs[i], "refusal": None} if body.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for i, answer in enumerate(answers)
    ]
    return JSONResponse(
        {
            "id": request_id,
            "object": "chat.completion",
            "created": created,
            "model": run.served.name,
            "choices": choices,
            "usage": usage.wire(),
            "system_fingerprint": None,
            "service_tier": None,
        },
        headers=run.headers,
    )


async def _events(
    run: Run, answers: list[Answer], request_id: str, created: int, *, with_usage: bool
) -> AsyncIterator[bytes]:
    def chunk(choices: list[dict[str, Any]], usage: Any = None) -> bytes:
        body = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": run.served.name,
            "system_fingerprint": None,
            "choices": choices,
        }
        return event({**body, "usage": usage} if with_usage else body)

    def choice(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> Any:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    for i in range(len(answers)):
        yield chunk([choice(i, {"role": "assistant", "content": "", "refusal": None})])
    async for _, output in run.outputs():
        answer = answers[output.index]
        piece = answer.push(output)
        logprobs = None
        if output.logprobs is not None:
            logprobs = {"content": [logprob_wire(run.served, output)], "refusal": None}
        if piece or logprobs:
            yield chunk([choice(output.index, {"content": piece}, logprobs=logprobs)])
        if answer.finish_reason is not None:
            for j, call in enumerate(answer.calls):
                yield chunk([choice(output.index, {"tool_calls": [{"index": j, **call.wire()}]})])
            yield chunk([choice(output.index, {}, answer.finish_reason)])
    usage = await run.finish()
    if with_usage:
        yield chunk([], usage.wire())


def logprob_wire(served: Served, output: StepOutput) -> dict[str, Any]:
    """A token's log-probability as chat completions tell it."""
    assert output.logprobs is not None

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text = served.tokenizer.decode([token_id], skip_special_tokens=False)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    top = [one(candidate.token_id, candidate.logprob) for candidate in output.logprobs.top]
    return {**one(output.logprobs.token_id, output.logprobs.logprob), "top_logprobs": top}


def endpoints(desk: Desk) -> list[Endpoint]:
    """Its routes."""

    async def chat(request: Request, principal: Principal) -> Response:
        return await answer_chat(desk, principal, await read_body(request, desk, ChatBody), request)

    return [
        Endpoint(
            path="/v1/chat/completions", method="POST", handler=chat, summary="Answer a conversation", body=ChatBody
        )
    ]
