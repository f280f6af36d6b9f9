"""What is said of the server: models, health, metrics, the console's figures; and tokens of texts."""

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from halve.core.errors import TextError
from halve.server.conversation import read_messages
from halve.server.desk import Desk
from halve.server.errors import ApiError
from halve.server.http import Endpoint, read_body
from halve.server.running import Principal
from halve.server.served import Served
from halve.server.wire import DetokenizeBody, TokenizeBody

QUICK_S = 0.05  # a sum over the ledger that takes longer takes a twentieth of the time at most
CONSOLE = Path(__file__).with_name("console.html")


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "halve",
        "max_model_len": served.context,
    }


def figures(desk: Desk) -> dict[str, Any]:
    """What the console shows: now, and over the last minute."""
    now, models = time.time(), []
    for served in desk.registry:
        m = served.engine.metrics()
        blocks = max(1, m.blocks_used + m.blocks_cached + m.blocks_free)
        models.append(
            {
                "name": served.name,
                "num_running": m.num_running,
                "num_waiting": m.num_waiting,
                "kv_used": m.blocks_used / blocks,
                "kv_cached": m.blocks_cached / blocks,
                "num_sampled_tokens": m.num_sampled_tokens,
                "num_computed_tokens": m.num_computed_tokens,
                "num_hit_tokens": m.num_hit_tokens,
                "num_draft_tokens": m.num_draft_tokens,
                "num_accepted_tokens": m.num_accepted_tokens,
                "busy_s": m.busy_s,
                "promise": dict(served.promise),
            }
        )
    recent = [entry for entry in desk.recent if entry[0] > now - 60]

    def percentiles(values: list[float]) -> dict[str, float] | None:
        if not values:
            return None
        ordered = sorted(values)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        return {"p50": statistics.median(ordered), "p95": p95}

    price = desk.meter.usd_per_hour
    return {
        "now": now,
        "uptime_s": now - desk.started_at,
        "is_draining": desk.is_draining,
        "usd_per_hour": None if price is None else float(price),
        "models": models,
        "api_prices": [
            {"name": p.name, "output_usd_per_mtok": float(p.output_usd_per_mtok), "source": p.source}
            for p in desk.config.api_prices
        ],
        "last_minute": {
            "requests": len(recent),
            "tokens": sum(entry[3] for entry in recent),
            "ttft_s": percentiles([entry[1] for entry in recent]),
            "time_per_token_s": percentiles([entry[2] for entry in recent if entry[3] > 1]),
        },
        "errors": list(desk.recent_errors)[-20:],
    }


def endpoints(desk: Desk) -> list[Endpoint]:
    """Their routes."""

    async def models(request: Request, principal: Principal) -> Response:
        return JSONResponse({"object": "list", "data": [_model(served) for served in desk.registry]})

    async def model(request: Request, principal: Principal) -> Response:
        return JSONResponse(_model(desk.registry.get(request.path_params["id"])))

    async def tokenize(request: Request, principal: Principal) -> Response:
        body = await read_body(request, desk, TokenizeBody)
        served = desk.registry.get(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: give either prompt or messages", param="prompt", code="invalid_value")
        if body.messages is not None:
            ids, _ = await served.chat(read_messages(body.messages), None)
        else:
            ids = await served.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": served.context})

    async def detokenize(request: Request, principal: Principal) -> Response:
        body = await read_body(request, desk, DetokenizeBody)
        try:
            text = desk.registry.get(body.model).tokenizer.decode(body.tokens, skip_special_tokens=False)
        except (TextError, OverflowError) as error:
            raise ApiError(400, f"tokens: {error}", param="tokens", code="invalid_value") from error
        return JSONResponse({"prompt": text})

    async def health(request: Request, principal: Principal) -> Response:
        reason = desk.watch()
        if reason is not None:
            raise ApiError(503, reason, code="stalled")
        return JSONResponse({"status": "ok"})

    async def ready(request: Request, principal: Principal) -> Response:
        if desk.is_draining:
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "5"})
        return JSONResponse({"status": "ready", "models": [served.name for served in desk.registry]})

    async def metrics(request: Request, principal: Principal) -> Response:
        return Response(desk.metrics.text(principal.sees_only), media_type="text/plain; version=0.0.4; charset=utf-8")

    sums, summed_at, took = list[dict[str, Any]](), 0.0, 0.0

    async def spending() -> list[dict[str, Any]]:
        """Sums over the whole ledger, by key: of a long one not anew for every look of every console."""
        nonlocal sums, summed_at, took
        now = time.monotonic()
        if took < QUICK_S or now - summed_at > 20 * took:
            sums = await asyncio.to_thread(desk.store.usage, "key")
            summed_at, took = time.monotonic(), time.monotonic() - now
        return sums

    async def console(request: Request, principal: Principal) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"content-security-policy": policy, "cache-control": "no-cache"}
        return HTMLResponse(CONSOLE.read_text(encoding="utf-8"), headers=headers)

    async def console_data(request: Request, principal: Principal) -> Response:
        keys = [row for row in await spending() if principal.sees_only in (None, row["key"])]
        return JSONResponse({**figures(desk), "keys": keys})

    return [
        Endpoint(path="/v1/models", method="GET", handler=models, summary="List models"),
        Endpoint(path="/v1/models/{id:path}", method="GET", handler=model, summary="Describe a model"),
        Endpoint(path="/tokenize", method="POST", handler=tokenize, summary="Tokens of a text", body=TokenizeBody),
        Endpoint(
            path="/detokenize", method="POST", handler=detokenize, summary="Text of tokens", body=DetokenizeBody
        ),
        Endpoint(
            path="/health", method="GET", handler=health, summary="Whether tokens can be produced", needs_key=False
        ),
        Endpoint(path="/ready", method="GET", handler=ready, summary="Whether requests are taken"),
        Endpoint(
            path="/metrics", method="GET", handler=metrics, summary="Metrics for Prometheus", content="text/plain"
        ),
        Endpoint(path="/console/data", method="GET", handler=console_data, summary="Figures of the console"),
        # The page itself holds nothing; its figures need the key that its user types in.
        Endpoint(
            path="/console", method="GET", handler=console, summary="The console", needs_key=False,
            content="text/html",
        ),
    ]  # fmt: skip
