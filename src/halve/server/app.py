"""The ASGI application: routes, keys, errors, and what runs beside requests."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from halve.core.errors import UserError
from halve.server import batches, chat, completions, embeddings, messages, meta, responses
from halve.server.config import ServerConfig
from halve.server.desk import Desk
from halve.server.errors import ApiError, of_user_error
from halve.server.http import Endpoint
from halve.server.openapi import openapi
from halve.server.running import Principal
from halve.server.served import Registry, Served
from halve.server.store import Store

log = logging.getLogger("halve.server")


def create_app(config: ServerConfig, models: Sequence[Served], store: Store) -> Starlette:
    """An application that serves these models; `app.state.desk` is what its routes share."""
    desk = Desk(config, Registry(models), store)
    jobs = batches.Batches(desk)
    table = [
        *(e for module in (chat, completions, messages, responses, embeddings, meta) for e in module.endpoints(desk)),
        *batches.endpoints(desk, jobs),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(store.hello)
        beside = [asyncio.create_task(desk.tend()), asyncio.create_task(jobs.work())]
        try:
            yield
        finally:
            desk.is_draining = True
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await desk.close()

    document = openapi(table, config.version)

    async def described(request: Request, principal: Principal) -> Response:
        return JSONResponse(document)

    async def root(request: Request) -> Response:
        return RedirectResponse("/console")

    table.append(Endpoint(path="/openapi.json", method="GET", handler=described, summary="This document"))
    app = Starlette(
        routes=[*(_route(desk, endpoint) for endpoint in table), Route("/", root)],
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error, 500: _defect},
    )
    app.state.desk = desk
    return app


def _route(desk: Desk, endpoint: Endpoint) -> Route:
    async def run(request: Request) -> Response:
        started, request_id = time.perf_counter(), "req_" + secrets.token_hex(8)
        principal = Principal(None)
        try:
            if endpoint.needs_key:
                headers = request.headers
                principal = await desk.principal(headers.get("authorization"), headers.get("x-api-key"))
            response = await endpoint.handler(request, principal)
        except ApiError as error:
            response = _refused(desk, endpoint, error, principal)
        except UserError as error:
            response = _refused(desk, endpoint, of_user_error(error), principal)
        response.headers["x-request-id"] = request_id
        response.headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - started)))
        return response

    return Route(endpoint.path, run, methods=[endpoint.method])


def _refused(desk: Desk, endpoint: Endpoint, error: ApiError, principal: Principal) -> Response:
    desk.metrics.errors.labels(str(error.status)).inc()
    # Messages may hold a few words of a prompt, so the log and the console get the kind alone.
    told = {"at": time.time(), "path": endpoint.path, "status": error.status, "code": error.code, "param": error.param}
    desk.recent_errors.append(told)
    log.info("%s %s: %d %s %s", endpoint.method, endpoint.path, error.status, error.code or "", error.param or "")
    return error.response(anthropic=endpoint.anthropic)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return ApiError(404, f"there is no {request.method} {request.url.path:.200}", code="unknown_url").response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _defect(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, "the server has a defect; its log says more", code="internal_error").response()
