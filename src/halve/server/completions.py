"""POST /v1/completions."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halve.engine import StepOutput
from halve.kernels.ops import Array
from halve.server.desk import Desk
from halve.server.errors import ApiError
from halve.server.http import Endpoint, EventStream, event, read_body, until_done, until_gone
from halve.server.running import Principal, Run, Usage
from halve.server.sampling import format_grammar, room, sampling_of
from halve.server.served import Served
from halve.server.wire import CompletionBody


async def read_prompts(desk: Desk, served: Served, given: Any, name: str = "prompt") -> list[list[int]]:
    """Token ids of each prompt: texts or ids, one or several. Raises ApiError."""
    if isinstance(given, str):
        return [await served.encode(given, name)]
    if not given:
        raise ApiError(400, f"{name}: it is empty", param=name, code="invalid_value")
    if isinstance(given[0], int):
        given = [given]
    if len(given) > desk.config.max_prompts:
        raise ApiError(400, f"{name}: {len(given)} of them; this server takes {desk.config.max_prompts}", param=name)
    prompts = [await served.encode(one, name) if isinstance(one, str) else one for one in given]
    for prompt in prompts:
        if prompt and not 0 <= min(prompt) <= max(prompt) < served.vocab_size:
            raise ApiError(400, f"{name}: token ids must lie in 0 to {served.vocab_size - 1}", param=name)
    return prompts


class _Text:
    """One choice: its text, and the log-probabilities in the form of this endpoint."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.text, self.finish_reason = "", None  # type: str, str | None
        self.tokens: list[str] = []
        self.logprobs: list[float] = []
        self.top: list[dict[str, float]] = []
        self.offsets: list[int] = []
        self._length = 0

    def _add(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]]) -> None:
        text = self._served.tokenizer.decode([token_id], skip_special_tokens=False)
        self.tokens.append(text)
        self.logprobs.append(logprob)
        self.top.append({self._name(i): value for i, value in top})
        self.offsets.append(self._length)
        self._length += len(text)

    def _name(self, token_id: int) -> str:
        return self._served.tokenizer.decode([token_id], skip_special_tokens=False)

    def echo(self, prompt: list[int], logits: Array | None, k: int) -> None:
        """Begin with the prompt, and what the model thinks of it."""
        self.text += self._served.tokenizer.decode(prompt)
        for i, token_id in enumerate(prompt):
            if logits is None or i == 0:  # nothing comes before it; clients want a number
                self._add(token_id, 0.0, [])
                continue
            row = logits[i - 1].astype(np.float64)
            row -= row.max()
            row -= np.log(np.exp(row).sum())
            top = sorted(np.argpartition(-row, min(k, len(row) - 1))[:k], key=lambda j: -row[j])
            self._add(token_id, float(row[token_id]), [(int(j), float(row[j])) for j in top])

    def push(self, output: StepOutput) -> None:
        """Take an output."""
        self.text += output.text
        if output.finish_reason is not None:
            self.finish_reason = "length" if output.finish_reason == "length" else "stop"
        if output.logprobs is not None:
            of = output.logprobs
            self._add(of.token_id, max(of.logprob, -9999.0), [(c.token_id, c.logprob) for c in of.top])

    def wire(self, since: int = 0) -> dict[str, Any]:
        """Its log-probabilities from a token on."""
        return {
            "tokens": self.tokens[since:],
            "token_logprobs": self.logprobs[since:],
            "top_logprobs": self.top[since:],
            "text_offset": self.offsets[since:],
        }


async def answer_completion(
    desk: Desk, principal: Principal, body: CompletionBody, request: Request | None
) -> Response:
    """The continuation of prompts, whole or as a stream."""
    served, n = desk.registry.get(body.model), body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise ApiError(400, f"best_of: {body.best_of} must be n ({n}); all answers are returned", param="best_of")
    if n > desk.config.max_n:
        raise ApiError(400, f"n: {n} is more than {desk.config.max_n}, this server's most", param="n")
    prompts = await read_prompts(desk, served, body.prompt)
    asked = 16 if body.max_tokens is None else body.max_tokens
    if asked == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo; give 1 or more", param="max_tokens", code="invalid_value")
    longest = max(map(len, prompts))
    fits = asked == 0 and longest <= served.context
    most = 1 if fits else room(served.context, longest, asked)
    sampling = sampling_of(body, most, logprobs=body.logprobs, grammar=format_grammar(body.response_format))
    texts = [_Text(served) for _ in range(len(prompts) * n)]
    request_id, created = "cmpl-" + secrets.token_hex(12), int(time.time())
    if asked == 0 and body.stream:
        raise ApiError(400, "stream: there is nothing to stream with max_tokens 0", param="stream")
    scores: list[Array] | None = None
    usage, headers = Usage.of_nothing(sum(map(len, prompts))), dict[str, str]()
    if body.echo and body.logprobs is not None:
        scores, usage, headers = await _scores(desk, principal, served, prompts)
    if body.echo:
        for i, text in enumerate(texts):
            text.echo(prompts[i // n], None if scores is None else scores[i // n], body.logprobs or 0)
    if asked == 0:
        for text in texts:
            text.finish_reason = "length"
        return _whole(served, request_id, created, texts, usage, body, headers)
    run = await desk.begin(principal, served, prompts, sampling, priority=body.priority or 0, request_id=request_id)
    if body.stream and request is not None:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _events(run, texts, n, request_id, created, body, with_usage=with_usage)
        return EventStream(run, until_done(events), run.headers)

    async def collect() -> None:
        async for prompt, output in run.outputs():
            texts[prompt * n + output.index].push(output)

    try:
        await (until_gone(request, collect()) if request is not None else collect())
    finally:
        usage = await run.finish()
    return _whole(served, request_id, created, texts, usage, body, run.headers)


async def _scores(
    desk: Desk, principal: Principal, served: Served, prompts: list[list[int]]
) -> tuple[list[Array], Usage, dict[str, str]]:
    """Logits [tokens, vocab_size] of each prompt, what they took, and headers. Raises ApiError."""
    if not all(prompts):
        raise ApiError(400, "prompt: it has no tokens to think of", param="prompt", code="invalid_value")
    return await desk.between_steps(principal, served, prompts, served.logits)


def _whole(
    served: Served,
    request_id: str,
    created: int,
    texts: list[_Text],
    usage: Usage,
    body: CompletionBody,
    headers: dict[str, str],
) -> Response:
    choices = [
        {
            "index": i,
            "text": text.text,
            "logprobs": text.wire() if body.logprobs is not None else None,
            "finish_reason": text.finish_reason,
        }
        for i, text in enumerate(texts)
    ]
    return JSONResponse(
        {
            "id": request_id,
            "object": "text_completion",
            "created": created,
            "model": served.name,
            "choices": choices,
            "usage": usage.wire(),
            "system_fingerprint": None,
        },
        headers=headers,
    )


async def _events(
    run: Run, texts: list[_Text], n: int, request_id: str, created: int, body: CompletionBody, *, with_usage: bool
) -> AsyncIterator[bytes]:
    told = [0] * len(texts)
    sent = [0] * len(texts)

    def chunk(choices: list[dict[str, Any]], usage: Any = None) -> bytes:
        whole = {
            "id": request_id,
            "object": "text_completion",
            "created": created,
            "model": run.served.name,
            "choices": choices,
        }
        return event({**whole, "usage": usage} if with_usage else whole)

    def choice(i: int) -> dict[str, Any]:
        text = texts[i]
        logprobs = text.wire(told[i]) if body.logprobs is not None else None
        piece = text.text[sent[i] :]
        told[i], sent[i] = len(text.tokens), len(text.text)
        return {"index": i, "text": piece, "logprobs": logprobs, "finish_reason": text.finish_reason}

    async for prompt, output in run.outputs():
        i = prompt * n + output.index
        texts[i].push(output)
        if len(texts[i].text) > sent[i] or len(texts[i].tokens) > told[i] or output.finish_reason is not None:
            yield chunk([choice(i)])
    usage = await run.finish()
    if with_usage:
        yield chunk([], usage.wire())


def endpoints(desk: Desk) -> list[Endpoint]:
    """Its routes."""

    async def complete(request: Request, principal: Principal) -> Response:
        return await answer_completion(desk, principal, await read_body(request, desk, CompletionBody), request)

    return [
        Endpoint(
            path="/v1/completions", method="POST", handler=complete, summary="Continue prompts", body=CompletionBody
        )
    ]
