"""The record of `engine_vs_peers` for people."""

from collections.abc import Callable, Sequence
from typing import Any

from halve.core.units import format_bytes


def table(record: dict[str, Any]) -> str:
    """Ceilings, engines at each measure, ratios, memory."""
    parts = [_ceilings(record), _runs(record), _ratios(record), _engines(record)]
    head = f"{record['hardware']}, {record['threads']} threads, {record['date']}"
    return "\n\n".join([head, *(_aligned(part) for part in parts if len(part) > 1)])


def _ceilings(record: dict[str, Any]) -> list[list[str]]:
    rows = [[name, _told(value, "{:.1f}".format)] for name, value in record["ceilings"].items()]
    return [["ceiling beside the turns", "median [low, high]"], *rows]


def _runs(record: dict[str, Any]) -> list[list[str]]:
    rows = [["engine", "measure", "tokens/s", "of memory", "of int8", ""]]
    for row in record["runs"]:
        fractions = [_percent(row.get("bandwidth_fraction")), _percent(row.get("int8_fraction"))]
        note = "disturbed" if row["disturbed"] else ""
        rows.append([row["engine"], _measure(row), _told(row, "{:.1f}".format), *fractions, note])
    return rows


def _ratios(record: dict[str, Any]) -> list[list[str]]:
    rows = [[row["halve"], row["peer"], _measure(row), _told(row, "{:.2f}".format)] for row in record["ratios"]]
    return [["halve", "over", "measure", "ratio"], *rows]


def _engines(record: dict[str, Any]) -> list[list[str]]:
    rows = [["engine", "version", "weights", "peak, batch 1", "peak", "loaded in"]]
    for engine in record["engines"]:
        if engine["failed"]:
            rows.append([engine["engine"], "", "", "", "", f"not loaded: {engine['failed']}"])
            continue
        sizes = (engine["work"]["weight_bytes"], engine["peak_bytes_at_batch_1"], engine["peak_bytes"])
        told = [format_bytes(size) if size else "" for size in sizes]
        rows.append([engine["engine"], engine["version"], *told, f"{engine['load_s']:.1f} s"])
    return rows


def _measure(row: dict[str, Any]) -> str:
    return str(row["metric"]).removesuffix("_tok_s")


def _told(value: dict[str, Any], show: Callable[[float], str]) -> str:
    if value["value"] is None:
        return "mismeasured"
    return f"{show(value['value'])} [{show(value['low'])}, {show(value['high'])}]"


def _percent(value: dict[str, Any] | None) -> str:
    return f"{value['value']:.0%}" if value else ""


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
