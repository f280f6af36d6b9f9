"""`halve price`, `halve breakeven`, `halve plan-hardware`."""

import csv
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halve.cli.screen import ShellProgress, console, print_json

if TYPE_CHECKING:
    from halve.api.price import BrokenEven, HardwarePlan, Priced
    from halve.economics.currency import Currency


class Weights(StrEnum):
    """How a shape's weights are stored."""

    bf16 = "bf16"
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"
    fp4 = "fp4"


class Kind(StrEnum):
    """Of a machine's price."""

    on_demand = "on_demand"
    spot = "spot"
    reserved = "reserved"


class Language(StrEnum):
    """What the page opens in."""

    en = "en"
    ja = "ja"


Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A bundle, a model directory, or a known shape; without it Llama-3.1-8B's."),
]
WeightsOption = Annotated[Weights | None, typer.Option(help="How a shape's weights are stored; bf16 without it.")]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="A device (H100, L40S …) or a cloud instance (c7a.large …).")
]
PriceOption = Annotated[str | None, typer.Option("--price-per-hour", metavar="USD", help="Instead of the catalogue's.")]
KindOption = Annotated[Kind, typer.Option(help="Which prices of the catalogue.")]
RegionOption = Annotated[str | None, typer.Option(help="Prices of this region alone.")]
WorkloadOption = Annotated[str, typer.Option(metavar="PRESET|TRACE", help="chat, code, retrieval, batch, or a trace.")]
UtilizationOption = Annotated[
    str | None, typer.Option(metavar="SHARE", help="Share of paid time with work, as 0.4 or 40%.")
]
SloOption = Annotated[
    str | None, typer.Option(metavar="ttft=2s,tpot=100ms", help="Find the utilization that this level allows.")
]
VsOption = Annotated[str | None, typer.Option(metavar="API,API", help="MODEL or MODEL@PROVIDER, as gpt-5-mini.")]
BatchOption = Annotated[bool, typer.Option("--batch-prices", help="APIs at their price for answers within a day.")]
PricesOption = Annotated[
    Path | None, typer.Option("--prices", help="Your own prices file, instead of the usual place.")
]
CurrencyOption = Annotated[
    str | None, typer.Option(metavar="CODE=RATE@DATE", help="Show amounts by a stated rate, as JPY=155.2@2026-11-20.")
]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Report = Annotated[Path | None, typer.Option(help="Also write an HTML page, in English and Japanese.")]
LanguageOption = Annotated[Language, typer.Option(help="What the page opens in.")]


def _words(**words: Any) -> dict[str, Any]:
    from halve.economics.currency import USD, read_currency
    from halve.economics.fields import read_decimal, read_share

    hour, share, vs = words.pop("hour"), words.pop("utilization"), words.pop("vs")
    currency = words.pop("currency")
    return {
        **words,
        "price_per_hour": None if hour is None else read_decimal(hour, "--price-per-hour", "1.90"),
        "utilization": None if share is None else read_share(share, "--utilization"),
        "vs": None if vs is None else [name.strip() for name in vs.split(",") if name.strip()],
        "currency": USD if currency is None else read_currency(currency),
    }


def price(
    model: Model = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    price_per_hour: PriceOption = None,
    kind: KindOption = Kind.on_demand,
    region: RegionOption = None,
    workload: WorkloadOption = "chat",
    utilization: UtilizationOption = None,
    slo: SloOption = None,
    vs: VsOption = None,
    batch_prices: BatchOption = False,
    prices: PricesOption = None,
    currency: CurrencyOption = None,
    report: Report = None,
    language: LanguageOption = Language.en,
    as_csv: CsvOption = False,
    json: Json = False,
) -> None:
    """Show what a million tokens cost on a machine, beside what APIs ask."""
    from halve.api.price import price as verb
    from halve.api.price import write_report

    found = verb(
        **_words(
            model=model, weights=weights and weights.value, device=device, hour=price_per_hour, kind=kind.value,
            region=region, workload=workload, utilization=utilization, slo=slo, vs=vs, batch=batch_prices,
            prices=prices, currency=currency,
        )
    )  # fmt: skip
    if report is not None:
        write_report(report, found, language.value)
    if json:
        print_json(found.to_plain())
    elif as_csv:
        _csv(found.rows())
    else:
        show_price(found)
    if report is not None:
        print(f"report  {report}", file=sys.stderr)


def breakeven(
    model: Model = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    price_per_hour: PriceOption = None,
    kind: KindOption = Kind.on_demand,
    region: RegionOption = None,
    workload: WorkloadOption = "chat",
    utilization: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Most of its time that a machine may work, as 0.4 or 40%.")
    ] = None,
    slo: SloOption = None,
    vs: VsOption = None,
    batch_prices: BatchOption = False,
    operators: Annotated[
        str, typer.Option("--operators-per-month", metavar="USD", help="What people cost who keep it running.")
    ] = "0",
    tokens: Annotated[
        str | None, typer.Option("--tokens-per-month", metavar="N", help="Plan machines for this volume, as 2e9.")
    ] = None,
    prices: PricesOption = None,
    currency: CurrencyOption = None,
    report: Report = None,
    language: LanguageOption = Language.en,
    as_csv: CsvOption = False,
    json: Json = False,
) -> None:
    """Show from which monthly volume machines of your own beat each API."""
    from halve.api.price import breakeven as verb
    from halve.api.price import write_report
    from halve.economics.fields import read_decimal, read_number

    found = verb(
        operators_per_month=read_number(operators, "--operators-per-month"),
        tokens_per_month=None if tokens is None else read_decimal(tokens, "--tokens-per-month", "2e9"),
        **_words(
            model=model, weights=weights and weights.value, device=device, hour=price_per_hour, kind=kind.value,
            region=region, workload=workload, utilization=utilization, slo=slo, vs=vs, batch=batch_prices,
            prices=prices, currency=currency,
        ),
    )  # fmt: skip
    if report is not None:
        write_report(report, found, language.value)
    if json:
        print_json(found.to_plain())
    elif as_csv:
        _csv(found.table())
    else:
        show_breakeven(found)
    if report is not None:
        print(f"report  {report}", file=sys.stderr)


def plan_hardware(
    model: Model = None,
    weights: WeightsOption = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Machines of this device, or this instance, alone.")
    ] = None,
    kind: KindOption = Kind.on_demand,
    region: RegionOption = None,
    workload: WorkloadOption = "chat",
    utilization: UtilizationOption = None,
    slo: SloOption = None,
    prices: PricesOption = None,
    currency: CurrencyOption = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows the table shows.")] = 15,
    as_csv: CsvOption = False,
    json: Json = False,
) -> None:
    """Rank the catalogue's machines that hold a model within a service level by what a million tokens cost."""
    from halve.api.price import plan_hardware as verb

    words = _words(
        model=model, weights=weights and weights.value, device=device, hour=None, kind=kind.value, region=region,
        workload=workload, utilization=utilization, slo=slo, vs=None, prices=prices, currency=currency,
    )  # fmt: skip
    found = verb(progress=ShellProgress(), **words)
    if json:
        print_json(found.to_plain())
    elif as_csv:
        _csv(found.table())
    else:
        show_hardware(found, top)


def _csv(rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rated(currency: "Currency") -> None:
    if currency.as_of is not None:
        typer.echo(f"amounts in {currency.code}: {currency.stated}")


def show_price(found: "Priced") -> None:
    """One's own machine and each API, notes and the verdict."""
    from rich.markup import escape
    from rich.table import Table

    say = found.currency.say_price
    _rated(found.currency)
    mix = found.preset.mix
    title = f"$ per million tokens, {found.preset.name}: {mix.prompt_tokens:,.0f} in, {mix.output_tokens:,.0f} out"
    table = Table(title=title.replace("$", found.currency.code), title_justify="left")
    for name in ("", "input", "output", "all of it", "a request", "basis", "quality"):
        left = name in ("", "basis", "quality")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    speed = found.throughput
    words = speed.basis if speed.error is None else f"{speed.basis}, ×/÷ {speed.error:.2f}"
    load = found.cost.utilization
    table.add_row(
        escape(f"{found.subject.name} on {found.machine.name}, {say(found.machine.usd_per_hour)} an hour"),
        say(found.cost.input_usd_per_mtok / load), say(found.cost.output_usd_per_mtok / load),
        say(found.allocation_usd_per_mtok), say(found.request_usd / load), words, found.subject.quality,
    )  # fmt: skip
    for rival in found.rivals:
        table.add_row(
            escape(rival.price.name), say(rival.price.input_usd_per_mtok), say(rival.price.output_usd_per_mtok),
            say(rival.usd_per_mtok), say(rival.request_usd), rival.price.source, "another model",
        )  # fmt: skip
    console().print(table)
    joules = found.joules_per_token
    energy = "" if joules is None else f"; at most {joules:.3g} J a token"
    typer.echo(
        f"at {load:.0%} utilization ({found.utilization_origin}); usage alone {say(found.usage_usd_per_mtok)}{energy}"
    )
    for note in found.notes:
        typer.echo(f"  {note}")
    typer.echo(found.sentence)


def show_breakeven(found: "BrokenEven") -> None:
    """Volumes, machines and their load, for each API."""
    from rich.markup import escape
    from rich.table import Table

    from halve.api.price import big

    say = found.priced.currency.say
    _rated(found.priced.currency)
    table = Table(title="from this volume a month your own machines cost less", title_justify="left")
    for name in ("API", "case", "its price / million", "tokens", "machines", "load", "a month"):
        table.add_column(name, justify="left" if name in ("API", "case") else "right", overflow="fold")
    for row in found.rows:
        even = row.even
        cells = ["never", "", "", ""]
        if even.tokens is not None and even.load is not None and even.monthly_usd is not None:
            cells = [big(even.tokens), str(even.machines), f"{even.load:.1%}", say(even.monthly_usd)]
        price = found.priced.currency.say_price(even.api_usd_per_mtok)
        table.add_row(escape(row.rival.price.name), row.case, price, *cells)
    console().print(table)
    if found.fleet is not None and found.tokens_per_month is not None:
        plan = found.fleet
        typer.echo(
            f"{big(found.tokens_per_month)} tokens a month: {plan.machines} machine{'s' * (plan.machines > 1)} at "
            f"{plan.load:.1%} load, {say(plan.monthly_usd)} a month, room for {big(plan.headroom_tokens)} more"
        )
    for note in found.priced.notes:
        typer.echo(f"  {note}")
    typer.echo(found.sentence)


def show_hardware(found: "HardwarePlan", top: int) -> None:
    """The ranking, and who takes no part in it."""
    from rich.markup import escape
    from rich.table import Table

    say = found.currency.say_price
    _rated(found.currency)
    table = Table(title=f"{found.subject.name}, {found.preset.name}: {found.subject.quality}", title_justify="left")
    for name in ("machine", "an hour", "/ million tokens", "tokens/s", "side by side", "basis", "price of"):
        table.add_column(name, justify="left" if name in ("machine", "basis", "price of") else "right", overflow="fold")
    mix = found.preset.mix
    for row in found.rows[:top]:
        speed = row.throughput
        words = speed.basis if speed.error is None else f"{speed.basis}, ×/÷ {speed.error:.2f}"
        table.add_row(
            escape(row.machine.name), say(row.machine.usd_per_hour), say(row.usd_per_mtok),
            f"{speed.output_tok_s(float(mix.prompt_tokens), float(mix.output_tokens)):,.0f}", f"{speed.sequences:,.0f}",
            words, row.machine.dated,
        )  # fmt: skip
    console().print(table)
    if len(found.rows) > top:
        typer.echo(f"and {len(found.rows) - top} more (--top, --csv, --json)")
    for name, reason in found.left_out[:top]:
        typer.echo(f"  left out: {name}: {reason}")
    if len(found.left_out) > top:
        typer.echo(f"  and {len(found.left_out) - top} more that take no part (--json)")
    typer.echo(found.sentence)
