"""`halve serve`: models behind HTTP."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve import __version__
from halve.api.bundle import read_certificate
from halve.api.model import Model, load
from halve.core.errors import ConfigError, UserError
from halve.economics import ApiPrice, api_price
from halve.engine import EngineConfig
from halve.kernels.ops import TokenBatch

if TYPE_CHECKING:
    from halve.server import ServerConfig
    from halve.server.served import Served
    from halve.server.store import Store

log = logging.getLogger("halve")

BESIDE = (("openai", "gpt-5-mini"), ("anthropic", "claude-haiku-4-5"))  # whose prices the console shows
MISSING = "the server needs more packages: pip install 'halve[serve]'"


def default_db() -> str:
    """Where keys and the ledger lie unless told."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return f"sqlite:///{home}/halve/server.db"


def open_store(url: str | None = None) -> "Store":
    """The database of a server. Raises ConfigError where the extra is not installed, OutputError, ConfigError."""
    try:
        from halve.server.store import Store
    except ImportError as error:
        raise ConfigError(f"{MISSING} ({error.name} is missing)") from error
    return Store(url or default_db())


def read_price(text: str | None) -> Decimal | None:
    """A price in dollars per hour. Raises ConfigError."""
    if text is None:
        return None
    try:
        price = Decimal(text.removeprefix("$"))
    except InvalidOperation as error:
        raise ConfigError(f"price per hour: {text!r:.40} is no number of dollars, such as 0.10") from error
    if not (price.is_finite() and 0 <= price <= 1_000_000):
        raise ConfigError(f"price per hour: {text} must be from 0 to 1000000 dollars")
    return price


def read_names(models: Sequence[str]) -> dict[str, str]:
    """`name=path` or a path, whose last part is its name. Raises ConfigError for a name that comes twice."""
    named: dict[str, str] = {}
    for given in models:
        name, is_named, path = given.partition("=")
        if not is_named:
            name, path = Path(given).resolve().name if Path(given).exists() else given, given
        if not name or not path:
            raise ConfigError(f"{given!r}: give NAME=PATH, or a path")
        if name in named:
            raise ConfigError(f"two models are called {name!r}; give one another name: NAME=PATH")
        named[name] = path
    return named


def serve(
    models: Sequence[str],
    config: "ServerConfig | None" = None,
    *,
    db: str | None = None,
    keys: Path | None = None,
    engine: EngineConfig | None = None,
    device: str = "auto",
    cache_bytes: int | None = None,
    speculation: str | None = None,
    expert_cache: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve models until told to stop.

    models: directories, bundles or ORG/NAME, each as it is or as NAME=PATH. keys: a file with a key in each line, taken
    into the database beside those that are there. expert_cache: of each model, as for `load`. Raises ConfigError for an
    address beyond this machine without keys, and what `load` raises.
    """
    named = read_names(models)

    def load_all() -> list[tuple[str, Model]]:
        options: Any = {"device": device, "engine": engine, "cache_bytes": cache_bytes, "speculation": speculation}
        options["expert_cache"] = expert_cache
        return [(name, load(path, progress=progress, **options)) for name, path in named.items()]

    # Weights are read while the server's packages are imported, which takes half a second.
    with ThreadPoolExecutor(1, "halve-load") as pool:
        loading = pool.submit(load_all)
        try:
            from halve.server import ServerConfig
            from halve.server import serve as run
            from halve.server.run import listen
        except ImportError as error:
            raise ConfigError(f"{MISSING} ({error.name} is missing)") from error
        config = replace(config or ServerConfig(), version=__version__, api_prices=_api_prices())
        bound = listen(config)
        store = open_store(db)
        if keys is not None:
            _import_keys(store, keys)
        config = _with_keys(config, store)
        loaded = loading.result()
    run(config, [served_model(name, model) for name, model in loaded], store, bound=bound, started=started)


def _with_keys(config: "ServerConfig", store: "Store") -> "ServerConfig":
    """Whether keys are asked for. Raises ConfigError where others can reach a server that has none."""
    if not config.auth or any(key.revoked_at is None for key in store.all_keys()):
        return config
    if not config.is_loopback:
        raise ConfigError(
            f"host {config.host}: others can reach it, and there are no keys; make one with `halve keys add NAME`, "
            "or let anyone ask with --no-auth"
        )
    log.warning("there are no keys, so every program of this machine may ask; `halve keys add NAME` makes one")
    return replace(config, auth=False)


def _api_prices() -> tuple[ApiPrice, ...]:
    found = (api_price(provider, model) for provider, model in BESIDE)
    return tuple(price for price in found if price is not None)


def _import_keys(store: "Store", path: Path) -> None:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}; give a file with a key in each line") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if len(line) < 16 or line != line.split()[0]:
            raise ConfigError(f"{path}: line {number} holds no key: one word of 16 characters or more")
        store.import_secret(f"{path.name}:{number}", line)


def served_model(name: str, model: Model) -> "Served":
    """A loaded model as the server sees it."""
    from halve.server.served import Served

    decoder, ops = model.decoder, model.ops

    def hidden(ids: Sequence[int]) -> Any:
        return ops.to_host(decoder.hidden(TokenBatch.whole([list(ids)])))

    def logits(ids: Sequence[int]) -> Any:
        return ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([list(ids)]))))

    return Served(
        name=name,
        engine=model.engine,
        config=model.engine.config,
        tokenizer=model.tokenizer,
        context=model.config.context,
        vocab_size=model.config.vocab_size,
        created=int(time.time()),
        constrainer=model.constrainer,
        hidden=hidden,
        logits=logits,
        promise=_promise(model),
    )


def _promise(model: Model) -> Mapping[str, Any]:
    """What the bundle's certificate says of its cost and speed; nothing for a plain checkpoint."""
    try:
        certificate = read_certificate(model.checkpoint)
    except UserError:
        return {}
    speed, cost = certificate.speed, certificate.cost
    return {
        "verdict": certificate.verdict,
        "decode_tok_s": speed.decode_tok_s and speed.decode_tok_s.value,
        "prefill_tok_s": speed.prefill_tok_s and speed.prefill_tok_s.value,
        "usd_per_mtok": cost.usd_per_mtok and cost.usd_per_mtok.value,
    }
