"""POST /v1/embeddings: the mean of a text's final hidden states, of length 1."""

import base64
from collections.abc import Sequence
from functools import partial

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from halve.kernels.ops import Array
from halve.server.completions import read_prompts
from halve.server.desk import Desk
from halve.server.errors import ApiError
from halve.server.http import Endpoint, read_body
from halve.server.running import Principal
from halve.server.served import Served
from halve.server.wire import EmbeddingBody


async def answer_embedding(desk: Desk, principal: Principal, body: EmbeddingBody, request: Request | None) -> Response:
    """Vectors of texts; billed as prompts are."""
    served = desk.registry.get(body.model)
    prompts = await read_prompts(desk, served, body.input, "input")
    for prompt in prompts:
        if not 0 < len(prompt) <= served.context:
            raise ApiError(
                400, f"input: a text has {len(prompt)} tokens; this model takes 1 to {served.context}", param="input"
            )
    pooled, usage, headers = await desk.between_steps(principal, served, prompts, partial(_pooled, served))
    if body.dimensions is not None and body.dimensions > pooled[0].size:
        raise ApiError(400, f"dimensions: {body.dimensions}; this model has {pooled[0].size}", param="dimensions")
    vectors = [vector[: body.dimensions] for vector in pooled]
    vectors = [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in vectors]
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


def _pooled(served: Served, ids: Sequence[int]) -> Array:
    return np.asarray(served.hidden(ids).astype(np.float64).mean(axis=0).astype(np.float32))


def endpoints(desk: Desk) -> list[Endpoint]:
    """Its routes."""

    async def embed(request: Request, principal: Principal) -> Response:
        return await answer_embedding(desk, principal, await read_body(request, desk, EmbeddingBody), request)

    return [
        Endpoint(path="/v1/embeddings", method="POST", handler=embed, summary="Vectors of texts", body=EmbeddingBody)
    ]
