"""`halve margin`."""

import csv
import sys
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halve.cli.screen import console, print_json

if TYPE_CHECKING:
    from halve.api.margin import Margin
    from halve.economics.margin_tables import Tables

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


class Table(StrEnum):
    """What `--csv` prints."""

    scenarios = "scenarios"
    sensitivity = "sensitivity"
    demand = "demand"
    months = "months"
    tenants = "tenants"
    models = "models"


class Language(StrEnum):
    """What the page opens in."""

    en = "en"
    ja = "ja"


def margin(
    product: Annotated[Path, typer.Argument(metavar="PRODUCT.yaml", help="What is sold, and what it runs on.")],
    bundle: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="Compression as this bundle's certificate has it.")
    ] = None,
    api_cut: Annotated[str | None, typer.Option(metavar="PERCENT", help="By how much an API's price falls.")] = None,
    currency: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE=RATE@DATE", help="Units for a dollar, such as JPY=155.2@2026-11-20; the first shows."
        ),
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(metavar="URL", help="A server's database: margin of each tenant and model.")
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="DAY", help="The ledger from this day on (UTC).")] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="The ledger before this day (UTC).")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page, in English and Japanese.")] = None,
    language: Annotated[Language, typer.Option(help="What the page opens in.")] = Language.en,
    as_csv: Annotated[Table | None, typer.Option("--csv", help="Print one table as CSV.")] = None,
    json: Json = False,
) -> None:
    """Show a product's gross margin: now, compressed, after an API's price cut, at twice the volume."""
    from halve.api.margin import margin as verb
    from halve.economics.currency import read_currency

    found = verb(
        product,
        currencies=[read_currency(text) for text in currency or ()],
        bundle=bundle,
        api_cut=api_cut,
        ledger=ledger,
        since=since,
        until=until,
        report=report,
        language=language.value,
    )
    if json:
        print_json(found.to_plain())
    elif as_csv is not None:
        _print_csv(found.tables, as_csv)
    else:
        show_margin(found)
    if report is not None:
        print(f"report  {report}", file=sys.stderr)


def _print_csv(tables: "Tables", which: Table) -> None:
    from halve.core.errors import ConfigError

    rows: list[dict[str, Any]] = getattr(tables, which.value)
    if not rows:
        need = "a section compression in the file" if which is Table.demand else "--ledger URL"
        raise ConfigError(f"--csv {which.value}: there are no such rows; it needs {need}")
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def show_margin(found: "Margin") -> None:
    """Scenarios, sensitivity, the response of demand, accounts; as tables in the currency that is shown."""
    from rich.markup import escape
    from rich.table import Table as Grid

    from halve.report.margin_words import DRIVERS, case_words, count, quality_words, share

    money = found.currency.say
    if found.currency.as_of is not None:
        typer.echo(f"amounts in {found.currency.code}: {found.currency.stated}")
    table = Grid(title="a month", title_justify="left")
    for name in ("scenario", "revenue", "tokens", "other costs", "gross profit", "margin", "machines", "quality loss"):
        table.add_column(name, justify="left" if name in ("scenario", "quality loss") else "right", overflow="fold")
    for row in found.rows:
        one = row.statement
        cells = [money(v) for v in (one.revenue_usd, one.token_usd, one.cost_usd - one.token_usd, one.gross_profit_usd)]
        machines = "" if one.machines is None else str(one.machines)
        table.add_row(escape(case_words(row).en), *cells, share(one.gross_margin), machines, quality_words(row).en)
    console().print(table)
    table = Grid(title="what it hangs on: the margin at each driver's ends", title_justify="left")
    for name in ("driver", "low", "high", "margin at low", "margin at high"):
        table.add_column(name, justify="left" if name == "driver" else "right")
    for bar in found.bars:
        low, high = (_driver(found, bar.driver, value) for value in (bar.low, bar.high))
        table.add_row(DRIVERS[bar.driver].en, low, high, share(bar.at_low), share(bar.at_high))
    console().print(table)
    if found.demand is not None:
        table = Grid(title="where the saving goes, a month, by elasticity of use", title_justify="left")
        names = "elasticity", "requests/seat", "saved", "more tokens", "lower price", "more seats", "kept", "margin"
        for name in names:
            table.add_column(name, justify="right")
        for elasticity, response in found.demand_curve:
            steps = (response.saved_usd, response.more_tokens_usd, response.lower_price_usd, response.more_seats_usd)
            table.add_row(
                count(elasticity),
                count(response.requests_per_seat),
                *(money(v) for v in (*steps, response.kept_usd)),
                share(response.after.gross_margin),
            )
        console().print(table)
    _show_books(found)
    typer.echo(found.sentence)


def _driver(found: "Margin", driver: str, value: Decimal) -> str:
    from halve.report.margin_words import driver_words

    return driver_words(driver, value, found.currency)


def _show_books(found: "Margin") -> None:
    from rich.markup import escape
    from rich.table import Table as Grid

    from halve.report.margin_words import share, span_words

    if found.books is None:
        return
    money, books = found.currency.say, found.books
    for title, accounts in (("tenant", books.tenants), ("model or adapter", books.models)):
        table = Grid(title=f"by {title}, {span_words(books.seconds).en} of the ledger", title_justify="left")
        for name in (title, "requests", "tokens", "usage", "idle", "$ / million", "revenue", "other", "margin"):
            table.add_column(name, justify="left" if name == title else "right", overflow="fold")
        for one in accounts:
            at_least = "" if one.cost_known else "≥ "
            paid = [at_least + money(Decimal(v) / 1_000_000) for v in (one.usage_micro_usd, one.idle_micro_usd)]
            known = [one.usd_per_mtok, one.revenue_usd, one.other_usd]
            table.add_row(
                escape(one.name) or "(without a key)",
                f"{one.requests:,}",
                f"{one.tokens:,}",
                *paid,
                *("unknown" if v is None else money(v) for v in known),
                "unknown" if one.margin is None else share(one.margin),
            )
        console().print(table)
    if books.missing:
        typer.echo(f"without a request in this time: {', '.join(books.missing)}")
