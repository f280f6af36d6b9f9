"""`halve prompts`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.screen import ShellProgress, console, print_json

if TYPE_CHECKING:
    from halve.api.prompts import Prompts

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def prompts(
    log: Annotated[Path, typer.Argument(metavar="LOG.jsonl", help="Logged requests, one JSON object a line.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Count by the tokenizer of this model or bundle.")
    ] = None,
    input_price: Annotated[str | None, typer.Option(metavar="USD", help="Of a million tokens of prompts.")] = None,
    cached_price: Annotated[str | None, typer.Option(metavar="USD", help="Of a million that the cache has.")] = None,
    output_price: Annotated[str | None, typer.Option(metavar="USD", help="Of a million tokens of answers.")] = None,
    api: Annotated[str | None, typer.Option(metavar="PROVIDER/MODEL", help="An API's prices instead.")] = None,
    requests_per_month: Annotated[
        int | None, typer.Option(help="Requests of a month; without it: as the log's times say.")
    ] = None,
    first: Annotated[int | None, typer.Option(help="Read only so many requests.")] = None,
    replay: Annotated[int, typer.Option(help="Requests to replay before and after; 0 for none.")] = 500,
    engine: Annotated[bool, typer.Option("--engine", help="Replay through the model, not the simulator.")] = False,
    cache_tokens: Annotated[int, typer.Option(help="Room of the simulator's prefix cache.")] = 131_072,
    window: Annotated[float, typer.Option(help="Seconds that requests may be held back.")] = 60.0,
    long_system: Annotated[int, typer.Option(help="Tokens beyond which a system prompt is long.")] = 500,
    json: Json = False,
) -> None:
    """Show where the tokens of logged requests go, and what changes to prompts would save."""
    from halve.api.prompts import prompts as verb
    from halve.api.prompts import read_prices

    with ShellProgress().task("Replaying", "requests") as progress:
        found = verb(
            log,
            model=model,
            prices=read_prices(input_price, cached_price, output_price, api),
            requests_a_month=requests_per_month,
            first=first,
            replay=replay,
            on_engine=engine,
            cache_tokens=cache_tokens,
            window_s=window,
            long_system=long_system,
            progress=progress,
        )
    if json:
        print_json(found.to_plain())
    else:
        show_prompts(found)


def show_prompts(found: "Prompts") -> None:
    """Where tokens go, what can be saved, what the replay found."""
    from rich.markup import escape
    from rich.table import Table

    from halve.economics.currency import USD

    typer.echo(
        f"{found.num_requests:,} requests, {found.prompt_tokens:,} prompt tokens, {found.answer_tokens:,} of answers; "
        f"tokenizer: {found.tokenizer}"
    )
    month = found.usd_per_month(found.usd)
    if found.usd is not None:
        a_month = "" if month is None else f", {USD.say(month)} a month"
        typer.echo(f"cost as sent: {USD.say(found.usd)}{a_month} ({found.prices.origin})")
    table = Table()
    table.add_column("prompt tokens")
    table.add_column("tokens", justify="right")
    table.add_column("share", justify="right")
    for role in found.roles:
        table.add_row(role.name, f"{role.tokens:,}", f"{role.share:.1%}")
    console().print(table)
    table = Table(title="what can be saved, each after those above it", title_justify="left", show_lines=True)
    table.add_column("finding")
    table.add_column("tokens", justify="right")
    table.add_column("$ a month" if found.requests_per_month is not None else "$ of the log", justify="right")
    table.add_column("change", overflow="fold", ratio=1)
    table.add_column("answers")
    for one in found.findings:
        usd = one.usd if found.requests_per_month is None else found.usd_per_month(one.usd)
        text = "\n".join(map(escape, (one.change, *one.evidence)))
        answers = "the same" if one.keeps_answers else "check them"
        table.add_row(one.kind, f"{one.tokens:,}", "unknown" if usd is None else USD.say(usd), text, answers)
    console().print(table)
    if found.replays:
        table = Table(title="replayed", title_justify="left")
        for name in ("change", "through"):
            table.add_column(name, overflow="fold")
        for name in ("requests", "refused", "prompt tokens", "found in the cache", "share"):
            table.add_column(name, justify="right")
        for replayed in found.replays:
            table.add_row(
                replayed.change,
                escape(replayed.through),
                f"{replayed.num_requests:,}",
                f"{replayed.num_refused:,}",
                f"{replayed.prompt_tokens:,}",
                f"{replayed.hit_tokens:,}",
                f"{replayed.hit_rate:.1%}",
            )
        console().print(table)
    for note in found.notes:
        typer.echo(f"note: {note}")
