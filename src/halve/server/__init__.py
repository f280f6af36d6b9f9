"""HTTP in, engine requests out, usage metered. `halve serve` starts it; `create_app` is an ASGI application."""

from halve.server.app import create_app
from halve.server.config import ServerConfig
from halve.server.run import serve

__all__ = ["ServerConfig", "create_app", "serve"]
