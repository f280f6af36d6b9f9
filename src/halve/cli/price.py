"""`halve price`, `halve breakeven`, `halve plan-hardware`."""

import csv
import sys
from collections.abc import Sequence
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from halve.cli.cost_tables import show_breakeven, show_hardware, show_price
from halve.cli.screen import ShellProgress, print_json


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
UPDATE = "update"
PricedModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|update",
        help="A bundle, a model directory, or a known shape; without it Llama-3.1-8B's. update: ask for prices.",
    ),
]
MeasureOption = Annotated[
    bool,
    typer.Option("--measure", help="Time the model's steps on this machine now, and take these."),
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
DayOption = Annotated[
    str | None,
    typer.Option(metavar="SHAPE", help="How load lies over a day for --slo: waking, office, flat, or 24 weights."),
]
VsOption = Annotated[str | None, typer.Option(metavar="API,API", help="MODEL or MODEL@PROVIDER, as gpt-5-mini.")]
AsOfOption = Annotated[
    str | None, typer.Option(metavar="DAY", help="APIs at their prices of that day, as 2026-11-20; today without it.")
]
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
    currency, as_of = words.pop("currency"), words.pop("as_of", None)
    return {
        **words,
        "price_per_hour": None if hour is None else read_decimal(hour, "--price-per-hour", "1.90"),
        "utilization": None if share is None else read_share(share, "--utilization"),
        "vs": None if vs is None else [name.strip() for name in vs.split(",") if name.strip()],
        "as_of": None if as_of is None else _date(as_of),
        "currency": USD if currency is None else read_currency(currency),
    }


def _date(text: str) -> date:
    from halve.core.errors import ConfigError

    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--as-of {text!r:.40}: must be a day, such as 2026-11-20") from None


def price(
    model: PricedModel = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    price_per_hour: PriceOption = None,
    kind: KindOption = Kind.on_demand,
    region: RegionOption = None,
    workload: WorkloadOption = "chat",
    utilization: UtilizationOption = None,
    slo: SloOption = None,
    day: DayOption = None,
    measure: MeasureOption = False,
    vs: VsOption = None,
    batch_prices: BatchOption = False,
    as_of: AsOfOption = None,
    prices: PricesOption = None,
    currency: CurrencyOption = None,
    report: Report = None,
    language: LanguageOption = Language.en,
    as_csv: CsvOption = False,
    json: Json = False,
) -> None:
    """Show what a million tokens cost on a machine, beside what APIs ask.

    `halve price update` asks clouds for today's prices instead.
    """
    if model == UPDATE:
        _update(json)
        return
    from halve.api.cost_report import write_report
    from halve.api.price import price as verb

    found = verb(
        measure=measure,
        progress=ShellProgress(),
        **_words(
            model=model, weights=weights and weights.value, device=device, hour=price_per_hour, kind=kind.value,
            region=region, workload=workload, utilization=utilization, slo=slo, day=day, vs=vs, batch=batch_prices,
            as_of=as_of, prices=prices, currency=currency,
        ),
    )  # fmt: skip
    if report is not None:
        write_report(report, found, language.value, ShellProgress())
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
    day: DayOption = None,
    measure: MeasureOption = False,
    vs: VsOption = None,
    batch_prices: BatchOption = False,
    as_of: AsOfOption = None,
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
    from halve.api.breakeven import breakeven as verb
    from halve.api.cost_report import write_report
    from halve.economics.fields import read_decimal, read_number

    found = verb(
        measure=measure,
        progress=ShellProgress(),
        operators_per_month=read_number(operators, "--operators-per-month"),
        tokens_per_month=None if tokens is None else read_decimal(tokens, "--tokens-per-month", "2e9"),
        **_words(
            model=model, weights=weights and weights.value, device=device, hour=price_per_hour, kind=kind.value,
            region=region, workload=workload, utilization=utilization, slo=slo, day=day, vs=vs, batch=batch_prices,
            as_of=as_of, prices=prices, currency=currency,
        ),
    )  # fmt: skip
    if report is not None:
        write_report(report, found, language.value, ShellProgress())
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
    day: DayOption = None,
    prices: PricesOption = None,
    currency: CurrencyOption = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows the table shows.")] = 15,
    report: Report = None,
    language: LanguageOption = Language.en,
    as_csv: CsvOption = False,
    json: Json = False,
) -> None:
    """Rank the catalogue's machines that hold a model within a service level by what a million tokens cost."""
    from halve.api.cost_report import write_report
    from halve.api.plan_hardware import plan_hardware as verb

    words = _words(
        model=model, weights=weights and weights.value, device=device, hour=None, kind=kind.value, region=region,
        workload=workload, utilization=utilization, slo=slo, day=day, vs=None, prices=prices, currency=currency,
    )  # fmt: skip
    found = verb(progress=ShellProgress(), **words)
    if report is not None:
        write_report(report, found, language.value)
    if json:
        print_json(found.to_plain())
    elif as_csv:
        _csv(found.table())
    else:
        show_hardware(found, top)
    if report is not None:
        print(f"report  {report}", file=sys.stderr)


def _update(json: bool) -> None:
    from dataclasses import asdict

    from halve.api.price_update import update_prices

    found = update_prices(progress=ShellProgress())
    if json:
        print_json(asdict(found))
        return
    what = f"{found.num_offers} offers of {found.num_devices} devices"
    typer.echo(f"{what}, {found.as_of}, by {found.source}: {found.path}")
    typer.echo(f"  {found.num_skipped} more are of devices that the catalogue does not have")


def _csv(rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
