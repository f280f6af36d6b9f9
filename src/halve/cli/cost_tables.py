"""What `price`, `breakeven` and `plan-hardware` found, as tables of a terminal."""

from typing import TYPE_CHECKING

import typer

from halve.cli.screen import console

if TYPE_CHECKING:
    from halve.api.breakeven import BrokenEven
    from halve.api.plan_hardware import HardwarePlan
    from halve.api.price import Priced
    from halve.economics.currency import Currency


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
            words, str(row.machine.age),
        )  # fmt: skip
    console().print(table)
    if len(found.rows) > top:
        typer.echo(f"and {len(found.rows) - top} more (--top, --csv, --json)")
    for name, reason in found.left_out[:top]:
        typer.echo(f"  left out: {name}: {reason}")
    if len(found.left_out) > top:
        typer.echo(f"  and {len(found.left_out) - top} more that take no part (--json)")
    typer.echo(found.sentence)
