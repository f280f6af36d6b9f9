"""Uvicorn around the application: one process, signals, and slow clients."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from halve.core.errors import ConfigError, OutputError
from halve.server.app import create_app
from halve.server.config import ServerConfig
from halve.server.desk import Desk
from halve.server.served import Served
from halve.server.store import Store

log = logging.getLogger("halve.server")

HEADERS_WITHIN = 20.0  # seconds for a connection to say what it wants


class _Protocol(H11Protocol):
    """A connection whose first request does not come, or comes a byte at a time, is closed."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = asyncio.get_running_loop().call_later(HEADERS_WITHIN, self._give_up)

    def _give_up(self) -> None:
        cycle: Any = self.cycle
        if cycle is None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """Told to stop, it takes nothing new, and after drain_s cuts what still runs."""

    def __init__(self, config: uvicorn.Config, desk: Desk, drain_s: float) -> None:
        super().__init__(config)
        self._desk, self._drain_s = desk, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT or SIGTERM."""
        if not self._desk.is_draining:
            log.warning("stopping: running answers have %.0f s to end", self._drain_s)
            self._desk.is_draining = True
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, self._drain_s, self._desk.end_all)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """A server that was told to stop has done as it was told: it ends with 0, not by the signal."""
        await super().shutdown(sockets)
        self._captured_signals.clear()


def listen(config: ServerConfig) -> socket.socket:
    """The socket of a server. Raises OutputError where it can't be had, ConfigError for an unknown host."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host: {config.host!r:.80} is no address of this machine") from error
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise OutputError(
            f"{config.host}:{config.port} can't be listened on: {error.strerror}; take another with --port"
        ) from error
    return made


def serve(
    config: ServerConfig,
    models: Sequence[Served],
    store: Store,
    *,
    bound: socket.socket | None = None,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve until told to stop. bound: a socket to listen on, None makes one. started: called with the address."""
    bound = bound or listen(config)
    app = create_app(config, models, store)
    options = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        loop="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(config.drain_s) + 10,
        limit_concurrency=2048,
        backlog=2048,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(options, app.state.desk, config.drain_s)
    host, port = bound.getsockname()[:2]
    if started is not None:
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        server.run(sockets=[bound])
    finally:
        for served in models:
            served.engine.close()
        store.close()
