"""Trace files of requests to workloads. A row is known by the names of its columns (.csv) or keys (.jsonl):

    TIMESTAMP, ContextTokens, GeneratedTokens                  the Azure LLM inference traces; timestamps are dates
    timestamp, input_length, output_length, hash_ids           the Mooncake traces; ms, blocks of 512 tokens
    arrival_s, prompt_tokens, output_tokens, prefix_blocks     the fields of `WorkloadRequest`; s, blocks of 512 tokens

hash_ids and prefix_blocks may be absent, and arrival_s too: everything then comes at once. `.gz` and `.xz` are read as
they are. Requests are sorted by arrival, and the first one comes at 0 s. Sources: arXiv:2311.18677 (Azure),
arXiv:2407.00079 (Mooncake).
"""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from halve.core.errors import ConfigError, DataError
from halve.core.record import parse_json, shown
from halve.core.workload import ServiceLevel, Workload, WorkloadRequest
from halve.data.sources import read_text

BLOCK_TOKENS = 512  # of the blocks that traces name


def read_trace(path: Path | str, *, service_level: ServiceLevel | None = None) -> Workload:
    """The workload of a trace file; its name is the file's.

    Raises DataError, naming file, line and column, for what is missing, unreadable, of other columns or of a value that
    a request can't have.
    """
    path = Path(path)
    plain = path.name.lower().removesuffix(".gz").removesuffix(".xz")
    if not plain.endswith((".csv", ".jsonl")):
        raise DataError(f"{path}: a trace is a .csv or .jsonl file, also with .gz or .xz behind it")
    text = read_text(path)
    rows = _csv_rows(text, path) if plain.endswith(".csv") else _json_rows(text, path)
    timed = [_request(row, where) for where, row in rows]
    if not timed:
        raise DataError(f"{path}: no requests in it; give a trace with at least one row")
    timed.sort(key=lambda one: one[0])
    start = timed[0][0]
    try:
        return Workload(
            name=plain.rpartition(".")[0],
            requests=tuple(_at(arrival - start, fields, where) for arrival, fields, where in timed),
            block_tokens=BLOCK_TOKENS,
            service_level=service_level or ServiceLevel(),
        )
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error


_Fields = dict[str, Any]


def _at(arrival_s: float, fields: _Fields, where: str) -> WorkloadRequest:
    try:
        return WorkloadRequest(arrival_s=round(arrival_s, 9), **fields)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: as many values as the header has names are needed ({reader.fieldnames})")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_json(line, where)
        except ConfigError as error:
            raise DataError(str(error)) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: each line is an object, this is {shown(row)}")
        yield where, row


def _request(row: Mapping[str, Any], where: str) -> tuple[float, _Fields, str]:
    """Arrival in seconds from any start, the other fields of a `WorkloadRequest`, and where the row stands."""
    arrival, prompt, output, blocks, seconds = _columns(frozenset(row), where)
    arrival_s = seconds(row[arrival], f"{where}: {arrival}") if arrival in row else 0.0
    fields: _Fields = {
        "prompt_tokens": _whole(row[prompt], f"{where}: {prompt}"),
        "output_tokens": _whole(row[output], f"{where}: {output}"),
    }
    if blocks in row:
        names = row[blocks]
        if not isinstance(names, list):
            raise DataError(f"{where}: {blocks}: {shown(names)} must be a list of whole numbers")
        fields["prefix_blocks"] = tuple(_whole(name, f"{where}: {blocks}") for name in names)
    return arrival_s, fields, where


def _whole(value: Any, where: str) -> int:
    """A whole number of JSON, or of a CSV's text."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: {shown(value)} must be a whole number")
    return value


def _seconds(value: Any, where: str) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise DataError(f"{where}: {shown(value)} must be a finite number")
    return seconds


def _milliseconds(value: Any, where: str) -> float:
    return _seconds(value, where) / 1000


def _date(value: Any, where: str) -> float:
    """Of ISO 8601, with any number of digits after the second; without a zone it is taken for UTC."""
    try:
        date = datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise DataError(f"{where}: {shown(value)} must be a date such as 2023-11-16 18:17:03.9799600") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


_FORMATS: tuple[tuple[tuple[str, str, str, str], Callable[[Any, str], float], frozenset[str]], ...] = (
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens", ""), _date, frozenset()),
    (("timestamp", "input_length", "output_length", "hash_ids"), _milliseconds, frozenset({"hash_ids"})),
    (
        ("arrival_s", "prompt_tokens", "output_tokens", "prefix_blocks"),
        _seconds,
        frozenset({"arrival_s", "prefix_blocks"}),
    ),
)


def _columns(found: frozenset[str], where: str) -> tuple[str, str, str, str, Callable[[Any, str], float]]:
    """Names of arrival, prompt, output and blocks in this row, and how its arrivals are read."""
    for names, seconds, optional in _FORMATS:
        known = frozenset(filter(None, names))
        if known - optional <= found <= known:
            return (*names, seconds)
    told = "; or ".join(", ".join(filter(None, names)) for names, _, _ in _FORMATS)
    raise DataError(f"{where}: columns {shown(sorted(found))} are of no trace that Halve reads; it reads {told}")
