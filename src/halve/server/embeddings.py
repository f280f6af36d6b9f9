"""POST /v1/embeddings: the mean of a text's final hidden states, of length 1."""

import asyncio
import base64
import secrets
import time

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halve.economics.ledger import LedgerEntry
from halve.kernels.ops import Array
from halve.server.completions import read_prompts
from halve.server.desk import Desk, Principal, Usage
from halve.server.errors import ApiError
from halve.server.http import Endpoint, read_body
from halve.server.served import Served
from halve.server.wire import EmbeddingBody


async def answer_embedding(desk: Desk, principal: Principal, body: EmbeddingBody, request: Request | None) -> Response:
    """Vectors of texts; billed as prompts are."""
    served = desk.registry.get(body.model)
    prompts = read_prompts(desk, served, body.input, "input")
    for prompt in prompts:
        if not 0 < len(prompt) <= served.context:
            raise ApiError(
                400, f"input: a text has {len(prompt)} tokens; this model takes 1 to {served.context}", param="input"
            )
    headers = desk.limits.take(principal.key, sum(map(len, prompts))) if principal.key else {}
    vectors, seconds = [], 0.0
    for prompt in prompts:
        vector, took = await asyncio.wrap_future(
            served.engine.between_steps(lambda ids=tuple(prompt): _pooled(served, ids))  # type: ignore[misc]
        )
        seconds += took
        if body.dimensions is not None:
            if body.dimensions > len(vector):
                raise ApiError(400, f"dimensions: {body.dimensions}; this model has {len(vector)}", param="dimensions")
            vector = vector[: body.dimensions]
        vectors.append(vector / max(float(np.linalg.norm(vector)), 1e-12))
    microseconds = round(seconds * 1e6)
    usage = Usage(
        prompt_tokens=sum(map(len, prompts)), cached_tokens=0, completion_tokens=0, prefill_s=seconds, decode_s=0.0,
        micro_usd=desk.meter.charge(microseconds),
    )  # fmt: skip
    entry = LedgerEntry(
        kind="request", at=time.time(), model=served.name, key_id=principal.key_id,
        request_id="emb-" + secrets.token_hex(12), prompt_tokens=usage.prompt_tokens, prefill_us=microseconds,
        micro_usd=usage.micro_usd,
    )  # fmt: skip
    await asyncio.to_thread(desk.store.settle, None, entry)
    as_text = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist(),
        }
        for i, vector in enumerate(vectors)
    ]
    told = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens, "halve": usage.cost()}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": told}, headers=headers)


def _pooled(served: Served, ids: tuple[int, ...]) -> tuple[Array, float]:
    started = time.perf_counter()
    vector = served.hidden(ids).astype(np.float64).mean(axis=0).astype(np.float32)
    return vector, time.perf_counter() - started


def endpoints(desk: Desk) -> list[Endpoint]:
    """Its routes."""

    async def embed(request: Request, principal: Principal) -> Response:
        return await answer_embedding(desk, principal, await read_body(request, desk, EmbeddingBody), request)

    return [
        Endpoint(path="/v1/embeddings", method="POST", handler=embed, summary="Vectors of texts", body=EmbeddingBody)
    ]
