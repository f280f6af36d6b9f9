"""How a server behaves."""

import ipaddress
from dataclasses import dataclass
from decimal import Decimal

from halve.core.errors import ConfigError
from halve.economics import ApiPrice


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where it listens and what it allows.

    auth: whether routes but /health need a key. usd_per_hour: of the machine; None where it is not known.
    max_body_bytes: of a request. max_queued: sequences beyond those that run; more are told to come again.
    max_n, max_stops, max_prompts: answers to a prompt, stop strings, prompts of one request. body_s: seconds in which a
    request must have arrived. drain_s: seconds that answers get to end when the server is told to. stall_s: seconds
    without a step, while something waits for one, after which /health says 503. isolate_cache: keys share no cached
    prefixes. response_days: how long /v1/responses are kept. version: of Halve. api_prices: of
    closed APIs, for the console to show beside. Raises ConfigError.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    auth: bool = True
    usd_per_hour: Decimal | None = None
    max_body_bytes: int = 16 << 20
    max_queued: int = 256
    max_n: int = 128
    max_stops: int = 16
    max_prompts: int = 512
    body_s: float = 30.0
    drain_s: float = 30.0
    stall_s: float = 60.0
    isolate_cache: bool = False
    response_days: int = 30
    version: str = ""
    api_prices: tuple[ApiPrice, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: {self.port} must be from 0 to 65535 (0 takes a free one)")
        for name in ("max_body_bytes", "max_queued", "max_n", "max_stops", "max_prompts", "response_days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be 1 or more")
        for name in ("body_s", "drain_s", "stall_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"{name}: {getattr(self, name)} must be above 0 and below 1000000 seconds")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
