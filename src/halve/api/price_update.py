"""`halve price update`: what machines of the catalogue's devices cost today, by the package gpuhunt."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from importlib import metadata
from pathlib import Path
from typing import Any

from halve.api.progress import SILENT, Progress
from halve.core.errors import ConfigError, OutputError
from halve.economics.catalogue import MOST_USD_PER_HOUR, Catalogue, load_catalogue, today, updated_prices

MISSING = "halve price update: needs the package gpuhunt and the network: pip install 'halve[prices]'"
CHEAPEST = 5  # offers of a device, number and kind: enough to choose from, and no list of thousands
HEAD = "# Written by `halve price update`, and anew by the next; your own prices belong into prices.toml beside it.\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Updated:
    """What was written. source: the package and its version; num_skipped: offers of devices that are not known here."""

    path: str
    num_offers: int
    num_devices: int
    num_skipped: int
    as_of: str
    source: str


def update_prices(
    path: Path | None = None,
    *,
    query: Callable[[], Iterable[Any]] | None = None,
    day: date | None = None,
    progress: Progress = SILENT,
) -> Updated:
    """Ask clouds for offers of all devices that the catalogue knows, and keep the cheapest of each kind.

    path: instead of the usual place, a file that lies between what ships and one's own prices. query: instead of
    gpuhunt's. Raises ConfigError where gpuhunt is missing, fails, or has nothing (the file is then as it was),
    OutputError where the file can't be written.
    """
    path, day = path or updated_prices(), day or today()
    source = "given"
    if query is None:
        query, source = _gpuhunt()
    catalogue = load_catalogue(shipped_alone=True)
    with progress.task("clouds", "asking"):
        try:
            items = list(query())
        except Exception as error:  # of any provider's client, by any library
            raise ConfigError(f"gpuhunt: {type(error).__name__}: {str(error)[:200]}; {path} is as it was") from error
    offers: dict[tuple[str, int, str], list[Any]] = {}
    num_skipped = 0
    for item in items:
        name = _device(item, catalogue)
        if name is None or not 0 < _price(item) <= MOST_USD_PER_HOUR:
            num_skipped += 1
        else:
            kind = "spot" if item.spot else "on_demand"
            offers.setdefault((name, int(item.gpu_count), kind), []).append(item)
    rows = dict(_rows(offers, day, source))
    if not rows:
        raise ConfigError(f"gpuhunt: {len(items)} offers, none of a device that is known here; {path} is as it was")
    _write(path, HEAD + "version = 1\n" + "".join(rows.values()))
    return Updated(
        path=str(path),
        num_offers=len(rows),
        num_devices=len({name for name, _, _ in offers}),
        num_skipped=num_skipped,
        as_of=day.isoformat(),
        source=source,
    )


def _gpuhunt() -> tuple[Callable[[], Iterable[Any]], str]:
    try:
        import gpuhunt
    except ImportError as error:
        raise ConfigError(MISSING) from error
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)  # it tells tracebacks of what it raises anyway
    return gpuhunt.query, f"gpuhunt {metadata.version('gpuhunt')}"


def _device(item: Any, catalogue: Catalogue) -> str | None:
    """The catalogue's name of an offer's device; None of one that it does not have, or of a machine without any."""
    name = str(item.gpu_name or "")
    if not name or not item.gpu_count:
        return None
    if name.upper() == "A100" and float(item.gpu_memory or 0) < 60:
        return None  # half of the memory is another device
    if name.upper() == "H100" and "pcie" in str(item.instance_name).lower():
        name = "H100-PCIe"
    names = {"RTX4090": "RTX-4090", "RTX6000Ada": "RTX-6000-Ada", "RTXPRO6000": "RTX-PRO-6000"}
    try:
        return catalogue.device(names.get(name, name)).name
    except ConfigError:
        return None


def _price(item: Any) -> Decimal:
    try:
        return Decimal(str(item.price))
    except InvalidOperation:
        return Decimal(0)


def _rows(
    offers: dict[tuple[str, int, str], list[Any]], day: date, source: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """TOML of the cheapest offers; of several for one cloud, machine, region and kind the first, which is cheapest."""
    seen = set()
    for (device, count, kind), found in sorted(offers.items()):
        num = 0
        for item in sorted(found, key=_price):
            key = (str(item.provider), str(item.instance_name), str(item.location), kind)
            if key in seen:
                continue
            seen.add(key)
            num += 1
            words = {"cloud": key[0], "instance": key[1], "region": key[2], "device": device, "kind": kind}
            words |= {"usd_per_hour": f"{_price(item):f}", "source": source}
            # A JSON string is a TOML one, but for what is beyond the basic plane.
            lines = "".join(f"{name} = {json.dumps(value[:200], ensure_ascii=True)}\n" for name, value in words.items())
            yield key, f"\n[[price]]\n{lines}count = {count}\nas_of = {day.isoformat()}\n"
            if num == CHEAPEST:
                break


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        load_catalogue(partial)  # what is written can be read again
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
