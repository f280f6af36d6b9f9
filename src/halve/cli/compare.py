"""`halve compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli.screen import ShellProgress, console, print_json
from halve.cli.tables import percent, rate, spread
from halve.core.units import format_bytes

if TYPE_CHECKING:
    from halve.api.compare import Compared, Facts
    from halve.core.certificate import Measured

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A bundle, a model directory, ORG/NAME, or a GGUF file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, with the same tokens.")],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What both were made from: KL and flips of each from it.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Judge on this text. Without it: a bundle's sealed text, or part of ours.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A directory with the tokenizer, where both are GGUF files.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time both, in turns.")] = True,
    device: Annotated[
        str, typer.Option("--device", help="Where to compute: cpu, or a torch device such as cuda.")
    ] = "cpu",
    json: Json = False,
) -> None:
    """Set two models side by side on the same text: bytes, perplexity, KL, flips, speed, and a verdict."""
    from halve.api.compare import compare as verb

    found = verb(
        a,
        b,
        reference=reference,
        text=text,
        tokenizer=tokenizer,
        speed=speed,
        device=device,
        progress=ShellProgress(),
    )
    if json:
        print_json(found)
    else:
        show_compared(found)


def show_compared(found: "Compared") -> None:
    """Both sides as columns, and the verdict."""
    from rich.markup import escape
    from rich.table import Table

    a, b, quality = found.a, found.b, found.quality
    table = Table()
    table.add_column("")
    for column in (f"A: {a.name}", f"B: {b.name}", r"B over A \[95% interval]"):
        table.add_column(escape(column) if column[0] in "AB" and column[1] == ":" else column, justify="right")
    table.add_row("kind", a.kind, b.kind, "")
    table.add_row("stored as", *(escape(_formats(side)) for side in (a, b)), "")
    table.add_row("activations, cache", *(f"{side.activations}, {side.kv_cache}" for side in (a, b)), "")
    files = (format_bytes(a.file_bytes), format_bytes(b.file_bytes), f"{b.file_bytes / a.file_bytes:.2f}x")
    table.add_row("weight files", *files)
    table.add_row(
        "bytes read per token",
        format_bytes(a.bytes_per_token),
        format_bytes(b.bytes_per_token),
        f"{found.bytes_ratio:.2f}x",
    )
    ratio = escape(percent(quality.ppl_ratio))
    table.add_row("perplexity", _value(quality.perplexity_a), _value(quality.perplexity_b), ratio)
    for words, name in (
        ("mean KL, nats per token", "kl_mean"),
        ("99th percentile of KL", "kl_p99"),
        ("flips", "flip_rate"),
    ):
        if quality.between is not None:
            table.add_row(f"{words}, B from A", "", "", escape(spread(getattr(quality.between, name), ".3g")))
        elif quality.a is not None and quality.b is not None:
            each = (escape(spread(getattr(side, name), ".3g")) for side in (quality.a, quality.b))
            table.add_row(f"{words}, from {escape(found.reference or '')}", *each, _difference(found, name))
    if found.speed_a is not None and found.speed_b is not None:
        for words, name, seconds in (
            ("prefill tokens/s", "prefill_tok_s", found.prefill_ratio),
            ("decode tokens/s", "decode_tok_s", found.decode_ratio),
        ):
            rates = (escape(rate(getattr(speed, name))) for speed in (found.speed_a, found.speed_b))
            table.add_row(words, *rates, "" if seconds is None else escape(f"time {spread(seconds, '.2f')}"))
    console().print(table)
    if found.speed_left_out is not None:
        typer.echo(f"speed not measured: {found.speed_left_out}")
    typer.echo(f"{quality.num_documents:,} documents, {quality.num_tokens:,} tokens; text: {found.text}")
    typer.echo(found.sentence)


def _formats(side: "Facts") -> str:
    """The commonest formats: `int4-g32, int8`."""
    names = list(side.formats)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _value(value: "Measured") -> str:
    return f"{value.value:.4g}"


def _difference(found: "Compared", name: str) -> str:
    difference = found.quality.kl_difference
    if name != "kl_mean" or difference is None:
        return ""
    return f"{difference.value:+.2g} \\[{difference.low:+.2g}, {difference.high:+.2g}]"
