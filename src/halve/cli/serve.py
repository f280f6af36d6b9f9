"""`halve serve`, `halve keys` and `halve usage`."""

import csv
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from halve.cli.screen import ShellProgress, console, print_json
from halve.core.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Db = Annotated[
    str | None,
    typer.Option("--db", metavar="URL", help="sqlite:///PATH or postgresql://...; without it: in your data folder."),
]


def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models, each as PATH or NAME=PATH.")],
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="A file of keys, one a line, beside those of the database.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let anyone ask, without a key.")] = False,
    db: Db = None,
    price_per_hour: Annotated[
        str | None, typer.Option(metavar="USD", help="What this machine costs; without it nothing is priced.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same answer alone and among others; refuses where it can't.")
    ] = False,
    isolate_cache: Annotated[
        bool, typer.Option("--isolate-cache", help="Keys share no cached prefixes, so none can be felt.")
    ] = False,
    speculate: Annotated[
        str | None, typer.Option(metavar="ngram|DRAFT|off", help="Guess next tokens; as for `halve generate`.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Answers that run at once.")] = None,
    max_queued: Annotated[int, typer.Option(help="Answers that may wait; more are told to come again.")] = 256,
    cache_bytes: Annotated[int | None, typer.Option(help="Memory for keys and values.")] = None,
    expert_cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for experts; the rest stays on disk. As for generate.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 16 << 20,
    drain: Annotated[float, typer.Option(help="Seconds that running answers get when it is told to stop.")] = 30.0,
    stall: Annotated[float, typer.Option(help="Seconds without a step after which /health says 503.")] = 60.0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or a torch device such as cuda.")] = "auto",
) -> None:
    """Serve models over HTTP, as OpenAI's and Anthropic's clients expect it."""
    from dataclasses import replace

    from halve.api.serve import MISSING, read_price
    from halve.api.serve import serve as verb
    from halve.engine import EngineConfig

    try:
        from halve.server.config import ServerConfig
    except ImportError as error:
        raise ConfigError(f"{MISSING} ({error.name} is missing)") from error
    config = ServerConfig(
        host=host,
        port=port,
        auth=not no_auth,
        usd_per_hour=read_price(price_per_hour),
        max_body_bytes=max_body_bytes,
        max_queued=max_queued,
        drain_s=drain,
        stall_s=stall,
        isolate_cache=isolate_cache,
    )
    engine = None
    if deterministic or max_num_seqs is not None:
        engine = EngineConfig(deterministic=deterministic)
        if max_num_seqs is not None:
            tokens = max(engine.max_tokens_per_step, max_num_seqs)
            engine = replace(engine, max_num_seqs=max_num_seqs, max_tokens_per_step=tokens)

    def started(address: str) -> None:
        print(f"halve: serving {', '.join(models)} at {address}/v1 (console: {address}/console)", file=sys.stderr)

    with ShellProgress().task("load", "layers") as progress:
        verb(
            models,
            config,
            db=db,
            keys=keys,
            engine=engine,
            device=device,
            cache_bytes=cache_bytes,
            speculation=speculate,
            expert_cache=expert_cache,
            progress=progress,
            started=started,
        )


keys_app = typer.Typer(no_args_is_help=True, help="Keys of `halve serve`, and what each may spend.")


class Period(StrEnum):
    """How long a budget lasts."""

    day = "day"
    month = "month"
    total = "total"


@keys_app.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    admin: Annotated[bool, typer.Option("--admin", help="It sees the sums of all keys in the console.")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests in a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most tokens in a minute.")] = None,
    db: Db = None,
    json: Json = False,
) -> None:
    """Make a key. Its secret is shown once."""
    from halve.api.serve import open_store

    key, secret = open_store(db).add_key(
        name, is_admin=admin, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
    )
    if json:
        print_json({"id": key.id, "name": key.name, "key": secret})
        return
    print(secret)
    print(f"halve: the key of {name} (id {key.id}); it can't be shown again", file=sys.stderr)


@keys_app.command("list")
def list_keys(db: Db = None, json: Json = False) -> None:
    """Show all keys, without their secrets."""
    from rich.table import Table

    from halve.api.serve import open_store

    store = open_store(db)
    found = [{**{n: getattr(k, n) for n in k.__slots__}, "budgets": store.budgets(k.id)} for k in store.all_keys()]
    if json:
        print_json({"keys": found})
        return
    table = Table("id", "name", "begins with", "state", "a minute", "budgets")
    for key in found:
        limits = [
            f"{key[f'{what}_per_minute']} {what}"
            for what in ("requests", "tokens")
            if key[f"{what}_per_minute"] is not None
        ]
        spent = [f"{b['spent']} of {b['amount']} {b['unit']} a {b['period']}" for b in key["budgets"]]
        state = "revoked" if key["revoked_at"] else "admin" if key["is_admin"] else "in use"
        table.add_row(key["id"], key["name"], key["prefix"], state, "\n".join(limits), "\n".join(spent))
    console().print(table)


@keys_app.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(help="Id or name.")], db: Db = None) -> None:
    """End a key; requests with it are refused from now on."""
    from halve.api.serve import open_store

    print(f"halve: {open_store(db).revoke(key).name} is revoked", file=sys.stderr)


@keys_app.command("budget")
def budget(
    key: Annotated[str, typer.Argument(help="Id or name.")],
    period: Annotated[Period, typer.Argument(help="day, month (both UTC) or total.")],
    usd: Annotated[str | None, typer.Option(help="Most dollars; none lifts the limit.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Most tokens; none lifts the limit.")] = None,
    db: Db = None,
) -> None:
    """Limit what a key spends."""
    from halve.api.serve import open_store, read_price

    if (usd is None) == (tokens is None):
        raise ConfigError("budget: give either --usd or --tokens")
    store = open_store(db)
    found = store.key(key)
    period_: Any = period.value
    if usd is not None:
        price = None if usd == "none" else read_price(usd)
        store.set_budget(found.id, period_, "micro_usd", None if price is None else int(price * 1_000_000))
        return
    if tokens != "none" and not (tokens or "").isdecimal():
        raise ConfigError(f"--tokens {tokens!r}: give a whole number, or none")
    store.set_budget(found.id, period_, "tokens", None if tokens == "none" else int(tokens or 0))


class By(StrEnum):
    """What usage is summed by."""

    key = "key"
    model = "model"
    day = "day"


def usage(
    by: Annotated[By | None, typer.Option(help="Sums for each key, model or day (UTC).")] = None,
    db: Db = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print lines of CSV.")] = False,
    json: Json = False,
) -> None:
    """Show what was served, and what it cost: usage (the work) and allocation (the machine, idle too)."""
    from rich.table import Table

    from halve.api.serve import open_store

    rows: list[dict[str, Any]] = open_store(db).usage(cast(Any, by.value if by else None))
    for row in rows:
        row["usage_share"] = (
            row["usage_micro_usd"] / row["allocation_micro_usd"] if row["allocation_micro_usd"] else None
        )
    if json:
        print_json({"usage": rows})
        return
    if as_csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else ["requests"])
        writer.writeheader()
        writer.writerows(rows)
        return
    table = Table()
    if by:
        table.add_column(by.value)
    for name in ("requests", "prompt", "cached", "answer tokens", "seconds", "usage $", "allocation $", "share"):
        table.add_column(name, justify="right")
    for row in rows:
        priced = row["requests"] == 0 or row["unpriced_requests"] < row["requests"]
        money = [f"{row[f'{k}_micro_usd'] / 1e6:.6f}" if priced else "unknown" for k in ("usage", "allocation")]
        head = [str(row.get("name") or row[by.value] or "(idle)")] if by else []
        table.add_row(
            *head,
            *(f"{row[k]:,}" for k in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")),
            f"{(row['prefill_us'] + row['decode_us']) / 1e6:.1f}",
            *money,
            "" if row["usage_share"] is None else f"{row['usage_share']:.0%}",
        )
    console().print(table)
