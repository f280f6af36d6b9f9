"""Figures of README.md and docs/FORMATS.md, written between marker comments from a record and from the format table.

The record is the output of `halve demo --json`, kept as docs/results/demo_DATE.json; the newest is shown. The
transcript is printed by the command's own code, so that it is what the shell shows.

    .venv/bin/halve demo --json > docs/results/demo_2026-11-23.json
    .venv/bin/python scripts/readme_figures.py           # or --check: write nothing, exit 1 if a page is out of date
"""

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.api.demo import Answered, Demonstrated
from halve.api.optimize import Optimized
from halve.api.shape_cost import ShapeCost
from halve.checkpoint.quantization_config import storage_of
from halve.cli.tables import percent, rate, show_demo, spread
from halve.core.certificate import Certificate
from halve.core.record import from_dict
from halve.core.units import format_bytes
from halve.formats import FORMATS, Format

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of the demo, and the day of it."""

    date: str
    shown: Demonstrated

    @property
    def certificate(self) -> Certificate:
        """Of the bundle that the demo made."""
        return self.shown.optimized.certificate


def read_record(path: Path) -> Record:
    """What `halve demo --json` printed; the date is in the file's name."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    optimized = Optimized(
        path=Path(raw["bundle"]),
        certificate=from_dict(Certificate, raw["certificate"]),
        report=Path(raw["report"]),
    )
    answers = {name: from_dict(Answered, raw[name]) for name in ("original", "smaller")}
    return Record(
        date=path.stem.rpartition("_")[2],
        shown=Demonstrated(
            optimized=optimized,
            prompt=raw["prompt"],
            shape_cost=raw.get("shape_cost") and from_dict(ShapeCost, raw["shape_cost"]),
            **answers,
        ),
    )


def newest_record() -> Path:
    """The record that the README shows."""
    return max(RESULTS.glob("demo_*.json"))


def sentence(record: Record) -> str:
    """What Halve is, with a number."""
    c = record.certificate
    assert c.max_quality_loss is not None
    return (
        "Halve makes open Llama-family language models smaller within a quality limit that you set, and proves it on "
        f"text that the search never saw: under a limit of {c.max_quality_loss:.0%}, the model it ships goes from "
        f"{format_bytes(c.size.original_bytes)} to {format_bytes(c.size.bytes)} of weights "
        f"({c.size.bytes / c.size.original_bytes:.2f}x), at a KL divergence of {c.quality.kl_mean.value:.2g} nats per "
        "token from the original."
    )


def transcript(record: Record) -> str:
    """The demo's output as the shell shows it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        show_demo(record.shown)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "```console\n$ .venv/bin/halve demo 2>/dev/null\n" + "\n".join(lines) + "\n```"


def result_table(record: Record) -> str:
    """One table of results with model, hardware, date and command."""
    c = record.certificate
    size, q = c.size, c.quality
    rows = [
        ("weight files", format_bytes(size.original_bytes), format_bytes(size.bytes)),
        ("share of the original's weight files", "1", f"{size.bytes / size.original_bytes:.2f}"),
        ("share of float32", f"{size.original_bytes / size.float32_bytes:.2f}", f"{size.ratio:.2f}"),
        ("share of bytes read per token", "1", f"{c.cost.ratio:.2f}"),
        ("quality loss (perplexity ratio - 1)", "0", percent(q.ppl_ratio)),
        ("mean KL divergence, nats per token", "0", spread(q.kl_mean, ".2g")),
        ("top-1 flips, share of tokens", "0", spread(q.flip_rate, ".2g")),
        (
            "peak memory of a process that answers",
            format_bytes(record.shown.original.peak_memory_bytes),
            format_bytes(record.shown.smaller.peak_memory_bytes),
        ),
        ("decode, tokens/s, batch 1", rate(c.original_speed.decode_tok_s), rate(c.speed.decode_tok_s)),
        ("prefill, tokens/s, batch 1", rate(c.original_speed.prefill_tok_s), rate(c.speed.prefill_tok_s)),
    ]
    lines = [
        f"| tiny-en | original (bf16) | {c.attempts[-1].plan} |",
        "| --- | --: | --: |",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows),
        "",
        f"Model: tiny-en (in the package). Hardware: {c.inputs.device}, shared with other work. Date: {record.date}. "
        f"Command: `halve demo --json`. Quality on {q.num_documents} sealed documents, {q.num_tokens:,} tokens; "
        f"brackets hold the {q.confidence:.1%} interval, for speeds the slowest and fastest of "
        f"{c.speed.decode_tok_s.n if c.speed.decode_tok_s else 0} runs.",
    ]
    return "\n".join(lines)


def format_table() -> str:
    """Every format that there is."""
    lines = [
        "| format | bits per weight | codes | scale | in a native bundle | in a portable bundle |",
        "| --- | --: | --- | --- | --- | --- |",
    ]
    for fmt in FORMATS.values():
        native, portable = (_layout(fmt, portable=flag) for flag in (False, True))
        cells = (f"`{fmt.name}`", f"{fmt.bits_per_weight:g}", _codes(fmt), _scale(fmt), native, portable)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _codes(fmt: Format) -> str:
    if fmt.kind == "float":
        return "float8 e4m3" if fmt.name == "fp8" else f"{fmt.dtype} as they are"
    half = 1 << (fmt.bits - 1)
    return f"whole numbers {-half} to {half - 1}"


def _scale(fmt: Format) -> str:
    if not fmt.scaled:
        return "none"
    return f"bf16, one for {fmt.group_size} inputs" if fmt.group_size else "bf16, one a row"


def _layout(fmt: Format, *, portable: bool) -> str:
    return storage_of(fmt, portable) if fmt.scaled else "plain"


def fill(page: str, parts: Mapping[str, str]) -> str:
    """Put each part between `<!-- NAME: ... -->` and `<!-- end NAME -->`. Raises ValueError where a marker lacks."""
    for name, text in parts.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end {name} -->)"
        found = list(re.finditer(pattern, page, re.DOTALL))
        if len(found) != 1:
            raise ValueError(f"markers of {name}: found {len(found)} pairs, needed is 1")
        before, after = page[: found[0].end(1)], page[found[0].start(2) :]
        page = f"{before}{text}\n{after}"
    return page


def pages() -> dict[Path, str]:
    """Each page as it should read."""
    record = read_record(newest_record())
    parts: dict[str, dict[str, str]] = {
        "README.md": {
            "sentence": sentence(record),
            "transcript": transcript(record),
            "results": result_table(record),
        },
        "docs/FORMATS.md": {"formats": format_table()},
    }
    return {ROOT / name: fill((ROOT / name).read_text(encoding="utf-8"), filled) for name, filled in parts.items()}


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or with --check say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    options: Any = parser.parse_args(arguments)
    stale = {path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if not options.check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
