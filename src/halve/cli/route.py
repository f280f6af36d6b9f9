"""`halve route`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.screen import console, print_json

if TYPE_CHECKING:
    from halve.api.route import Routed

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def route(
    questions: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Prompts, and which model was right.")],
    cheap: Annotated[str, typer.Option(metavar="COLUMN=PRICE", help="The cheap model, such as small=0.05/0.08.")],
    dear: Annotated[str, typer.Option(metavar="COLUMN=PRICE", help="The dear one, such as large=openai/gpt-5.")],
    score: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Scores of your router; without it one is learned.")
    ] = None,
    max_quality_loss: Annotated[str, typer.Option(help="Most points of accuracy that may be lost.")] = "1%",
    answer_tokens: Annotated[int | None, typer.Option(help="Of an answer, where the file doesn't tell.")] = None,
    requests_per_month: Annotated[int | None, typer.Option(help="For the money of a month.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a page (.html) or a drawing (.svg).")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the certified router in this file (.npz).")] = None,
    seed: Annotated[int, typer.Option(help="Of the two halves.")] = 0,
    json: Json = False,
) -> None:
    """Price a router: a cheap model for most requests and a dear one for the rest, within a quality limit."""
    from halve.api.route import route as verb

    found = verb(
        questions,
        cheap=cheap,
        dear=dear,
        score=score,
        max_quality_loss=max_quality_loss,
        answer_tokens=answer_tokens,
        requests_per_month=requests_per_month,
        plot=plot,
        save=save,
        seed=seed,
    )
    if json:
        print_json(found.to_plain())
    else:
        show_routed(found)


def show_routed(found: "Routed") -> None:
    """Strategies, the curve, the verdict."""
    from rich.markup import escape
    from rich.table import Table

    from halve.economics.currency import USD
    from halve.report.routing import NAMES, percent, sentence, spread

    typer.echo(f"{found.num_questions:,} questions; scores: {found.scores}")
    for one in (found.cheap, found.dear):
        prices = " / ".join(USD.say_price(price) for price in (one.input_usd_per_mtok, one.output_usd_per_mtok))
        typer.echo(f"{one.name}: {prices} of a million tokens in / out ({one.origin})")
    monthly = found.requests_per_month is not None
    table = Table()
    table.add_column("strategy", overflow="fold")
    for name in ("dear model", "right \\[95 %]", "loss \\[95 %]", "$ of a million", *["$ a month"] * monthly):
        table.add_column(name, justify="right")
    for strategy in found.strategies:
        a_month = found.usd_per_month(strategy)
        table.add_row(
            NAMES[strategy.name].en,
            percent(strategy.dear_share),
            escape(spread(strategy.accuracy)),
            escape(spread(strategy.loss)),
            USD.say(strategy.usd_per_million),
            *([USD.say(a_month)] if a_month is not None else []),
        )
    console().print(table)
    table = Table(title="the curve", title_justify="left")
    for name in ("dear model", "right \\[95 %]", "loss \\[95 %]", "$ of a million"):
        table.add_column(name, justify="right")
    for point in found.curve[::2]:
        table.add_row(
            percent(point.dear_share),
            escape(spread(point.accuracy)),
            escape(spread(point.loss)),
            USD.say(point.usd_per_million),
        )
    console().print(table)
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(sentence(found.page()).en)
