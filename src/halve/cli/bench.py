"""What `halve bench` found, as tables for people."""

from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from halve.cli.screen import console
from halve.core.units import format_bytes
from halve.report.bench import metric_words, spread_words, unit_of
from halve.report.words import number

if TYPE_CHECKING:
    from halve.api.versus.record import Benched


def show_bench(result: "Benched") -> None:
    """Figures, ratios, engines, ceilings, and what there is to know about them."""
    from halve.api.versus.chart import headline, notes

    typer.echo(f"{result.device}, {result.threads} thread{'s' if result.threads > 1 else ''}, {result.date}")
    _show_runs(result)
    if result.ratios:
        _show_ratios(result)
    _show_engines(result)
    _show_ceilings(result)
    for note in notes(result):
        typer.echo(note)
    typer.echo(headline(result))


def _show_runs(result: "Benched") -> None:
    priced = result.usd_per_hour is not None
    table = Table()
    table.add_column("measure")
    table.add_column("engine", overflow="fold")
    table.add_column("median \\[low, high]", justify="right")
    table.add_column("of a ceiling", justify="right")
    if priced:
        table.add_column("$ / million", justify="right")
    table.add_column("")
    before = ""
    for run in result.runs:
        fraction = "" if run.ceiling_fraction is None else f"{run.ceiling_fraction:.0%} of {run.ceiling}"
        notes = ["disturbed"] * run.disturbed + ["mismeasured"] * bool(run.refused and run.value is None)
        unit = "" if unit_of(run.metric) == "bytes" or run.value is None else f" {unit_of(run.metric)}"
        cells = [
            "" if run.metric == before else metric_words(run.metric),
            escape(run.name),
            escape(f"{spread_words(run.metric, run.value, run.low, run.high)}{unit}"),
            fraction,
        ]
        if priced:
            cells.append("" if run.usd_per_mtok is None else number(run.usd_per_mtok))
        table.add_row(*cells, ", ".join(notes))
        before = run.metric
    console().print(table)


def _show_ratios(result: "Benched") -> None:
    table = Table()
    for column in ("measure", f"{escape(result.engines[0].name)} over"):
        table.add_column(column, overflow="fold")
    table.add_column("median of the rounds' ratios \\[low, high]", justify="right")
    table.add_column("rounds", justify="right")
    for ratio in result.ratios:
        said = f"{ratio.value:.2f}" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.runs > 1 else "")
        table.add_row(metric_words(ratio.metric), escape(ratio.over), escape(said), str(ratio.runs))
    console().print(table)


def _show_engines(result: "Benched") -> None:
    table = Table()
    for column in ("engine", "version", "format", "weights", "loaded in", "serving"):
        table.add_column(column, overflow="fold", justify="right" if column in ("weights", "loaded in") else "left")
    for engine in result.engines:
        table.add_row(
            escape(engine.name),
            escape(engine.version or ""),
            escape(engine.format or ""),
            "" if engine.weight_bytes is None else format_bytes(engine.weight_bytes),
            "" if engine.load_s is None else f"{engine.load_s:.1f} s",
            escape(engine.how or ""),
        )
    console().print(table)


def _show_ceilings(result: "Benched") -> None:
    from halve.api.versus.chart import ceiling_words

    said = [
        f"{ceiling_words(name)} {number(c['value'])} [{number(c['low'])}, {number(c['high'])}]"
        for name, c in result.ceilings.items()
    ]
    typer.echo(f"this machine beside the turns: {'; '.join(said)}")
