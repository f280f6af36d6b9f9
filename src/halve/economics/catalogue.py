"""Devices and what they cost an hour: a dated catalogue that ships, and files of a machine that go before it.

Nothing is made up: a rate or a price that nobody stated is None, and what has no price takes no part in rankings. A
price says where it is from and of which day it is; older than `STALE_DAYS`, or of no day, it counts as stale.

One's own file is TOML like `prices.toml` and `devices.toml` together, at `HALVE_PRICES` or in the folder of settings
(`~/.config/halve/prices.toml`): its rows replace those of the same cloud, instance, region and kind, or device name.
What `halve price update` wrote lies beside it, and comes between both.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from halve.core.errors import ConfigError
from halve.core.record import shown
from halve.economics.fields import Section, nearest

STALE_DAYS = 90
MOST_USD_PER_HOUR = 100_000
FORMATS = ("bf16", "fp8", "int8", "fp4")
PriceKind = Literal["on_demand", "spot", "reserved"]
DeviceKind = Literal["gpu", "cpu", "asic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueDevice:
    """One accelerator, or one processor with its memory.

    memory_gb, bandwidth_gb_s: of 10^9 bytes. rates: dense, in 10^12 operations a second, by format. tdp_w: watts, None
    where not stated. cores: of a processor.
    """

    name: str
    kind: DeviceKind
    memory_gb: float
    bandwidth_gb_s: float
    rates: Mapping[str, float]
    source: str
    aliases: tuple[str, ...] = ()
    tdp_w: float | None = None
    cores: int | None = None

    def rate(self, name: str) -> tuple[float, str]:
        """Operations a second of the fastest unit that multiplies a format, and its name.

        Weights of few bits are widened: to 8 bits where the device multiplies those, else to bf16.
        """
        near = {"fp4": ("fp8",), "fp8": ("int8",), "int8": ("fp8",)}
        for unit in (name, *near.get(name, ()), "bf16"):
            if unit in self.rates:
                return self.rates[unit] * 1e12, unit
        raise ConfigError(
            f"device {self.name}: its rates {dict(self.rates)} have no bf16; state it in your prices file"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HourlyPrice:
    """A machine by the hour: `count` devices, or a share of one.

    usd_per_hour: of all of it; None where not known. memory_gb: of a machine that has less than the device may have.
    """

    cloud: str
    instance: str
    device: str
    count: int
    region: str
    kind: PriceKind
    source: str
    usd_per_hour: Decimal | None = None
    as_of: date | None = None
    share: Fraction = Fraction(1)
    memory_gb: float | None = None

    @property
    def age(self) -> "Age":
        """How old it is today."""
        return Age.of(self.as_of)


@dataclass(frozen=True, slots=True)
class Age:
    """Of a price. as_of: its day; days: since then. Both are None where nobody said when, which counts as stale."""

    as_of: date | None
    days: int | None

    @classmethod
    def of(cls, as_of: date | None, at: date | None = None) -> "Age":
        """At a day, today without one."""
        return cls(as_of, None if as_of is None else max(0, ((at or today()) - as_of).days))

    @property
    def is_stale(self) -> bool:
        """Older than `STALE_DAYS`, or of no known day."""
        return self.days is None or self.days > STALE_DAYS

    def __str__(self) -> str:
        if self.days is None:
            return "of no known day, stale"
        return f"{self.as_of}, {self.days} days old{', stale' if self.is_stale else ''}"

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"as_of": self.as_of and self.as_of.isoformat(), "age_days": self.days, "stale": self.is_stale}


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All devices and prices that are known here."""

    devices: tuple[CatalogueDevice, ...]
    prices: tuple[HourlyPrice, ...]

    def device(self, name: str) -> CatalogueDevice:
        """A device by its name or alias, in any case. Raises ConfigError with the nearest names."""
        wanted = _plain(name)
        for device in self.devices:
            if wanted in {_plain(n) for n in (device.name, *device.aliases)}:
                return device
        names = [n for device in self.devices for n in (device.name, *device.aliases)]
        instances = sorted({price.instance for price in self.prices})
        hint = nearest(name, [*names, *instances]) or ";"
        raise ConfigError(
            f"device {name!r}: not in the catalogue{hint} it knows {', '.join(d.name for d in self.devices)}, and "
            "cloud instances by their names; add others to your prices file (docs/ECONOMICS.md)"
        )

    def machines(self, name: str, kind: PriceKind = "on_demand", region: str | None = None) -> list[HourlyPrice]:
        """Machines of a device or an instance's name, cheapest a device first, those without a price last.

        Raises ConfigError where neither is known.
        """
        wanted = _plain(name)
        found = [p for p in self.prices if _plain(p.instance) == wanted]
        if not found:
            device = self.device(name)
            found = [p for p in self.prices if p.device == device.name]
        found = [p for p in found if p.kind == kind and region in (None, p.region)]
        return sorted(found, key=lambda p: (p.usd_per_hour is None, (p.usd_per_hour or 0) / p.count))


def load_catalogue(own: Path | str | None = None, *, shipped_alone: bool = False) -> Catalogue:
    """What ships, with what `halve price update` wrote before it, and one's own file before both. Raises ConfigError.

    own: one's own file, instead of the usual place.
    """
    shipped = resources.files("halve.economics")
    names = ("devices.toml", "prices.toml")
    parts = [(name, _read((shipped / name).read_text(encoding="utf-8"), name)) for name in names]
    path = Path(own) if own is not None else own_prices()
    if not shipped_alone:
        updated = updated_prices()
        parts += [_file(updated)] if own is None and updated.exists() else []
        parts += [_file(path)] if own is not None or path.exists() else []
    known: dict[str, CatalogueDevice] = {}
    rows: dict[tuple[str, ...], HourlyPrice] = {}
    for where, part in parts:
        known |= {device.name: device for device in part.devices}
        rows |= {(p.cloud, p.instance, p.region, p.kind): p for p in part.prices}
        for price in part.prices:
            if price.device not in known:
                hint = nearest(price.device, known) or ";"
                raise ConfigError(
                    f"{where}: {price.instance}: device {price.device!r} is not known{hint} describe it there"
                )
    return Catalogue(tuple(known.values()), tuple(rows.values()))


def _file(path: Path) -> tuple[str, Catalogue]:
    try:
        return str(path), _read(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: prices can't be read: {error}") from error


def own_prices() -> Path:
    """Where one's own prices lie."""
    if given := os.environ.get("HALVE_PRICES"):
        return Path(given)
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "halve" / "prices.toml"


def updated_prices() -> Path:
    """Where `halve price update` writes, beside one's own: `prices.toml` becomes `prices.update.toml`."""
    own = own_prices()
    return own.with_name(f"{own.stem}.update.toml")


def today() -> date:
    """The day in UTC."""
    return datetime.now(UTC).date()


def _plain(name: str) -> str:
    """As names are compared. Azure's begin with a word that nobody says."""
    return name.lower().replace("-", "").replace(" ", "").replace("_", "").removeprefix("standard")


def _read(text: str, where: str) -> Catalogue:
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from error
    top = Section(raw, where, ("version", "device", "price"))
    if (version := top.get("version")) not in (None, 1):
        raise ConfigError(f"{where}: version {shown(version)} was written by a newer Halve (this one reads 1)")
    return Catalogue(
        tuple(_device(row, f"{where}: device {i + 1}") for i, row in enumerate(_rows(top, "device"))),
        tuple(_price(row, f"{where}: price {i + 1}") for i, row in enumerate(_rows(top, "price"))),
    )


def _rows(top: Section, key: str) -> Iterable[Any]:
    rows = top.get(key) or []
    if not isinstance(rows, list):
        raise ConfigError(f"{top.path(key)}: must be a list of tables, each under [[{key}]]")
    return rows


def _device(raw: Any, where: str) -> CatalogueDevice:
    keys = ("name", "kind", "memory_gb", "bandwidth_gb_s", "rates", "source", "aliases", "tdp_w", "cores")
    row = Section(raw, where, keys, required=("name", "kind", "memory_gb", "bandwidth_gb_s", "rates", "source"))
    rates = Section(row.get("rates"), row.path("rates"), FORMATS, required=("bf16",))
    aliases = row.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise ConfigError(f"{row.path('aliases')}: {shown(aliases)} must be a list of names")
    return CatalogueDevice(
        name=row.text("name"),
        kind=_one_of(row, "kind", get_args(DeviceKind)),
        memory_gb=float(row.number("memory_gb", low=Decimal("0.1"), high=100_000)),
        bandwidth_gb_s=float(row.number("bandwidth_gb_s", low=1, high=1_000_000)),
        rates={name: float(rates.number(name, low=Decimal("0.01"), high=1_000_000)) for name in row.get("rates")},
        source=row.text("source"),
        aliases=tuple(aliases),
        tdp_w=float(row.number("tdp_w", low=1, high=100_000)) if row.has("tdp_w") else None,
        cores=row.whole("cores", 1, low=1) if row.has("cores") else None,
    )


def _price(raw: Any, where: str) -> HourlyPrice:
    keys = ("cloud", "instance", "device", "count", "region", "usd_per_hour", "kind", "as_of", "source", "share")
    row = Section(
        raw, where, (*keys, "memory_gb"), required=("cloud", "instance", "device", "region", "kind", "source")
    )
    as_of = row.get("as_of")
    if as_of is not None and (not isinstance(as_of, date) or isinstance(as_of, datetime)):
        raise ConfigError(f"{row.path('as_of')}: {shown(as_of)} must be a day, such as 2026-11-20")
    usd = None
    if row.has("usd_per_hour"):
        usd = row.number("usd_per_hour", low=Decimal("0.000001"), high=MOST_USD_PER_HOUR)
    return HourlyPrice(
        cloud=row.text("cloud"),
        instance=row.text("instance"),
        device=row.text("device"),
        count=row.whole("count", 1, low=1, high=100_000),
        region=row.text("region"),
        kind=_one_of(row, "kind", get_args(PriceKind)),
        source=row.text("source"),
        usd_per_hour=usd,
        as_of=as_of,
        share=_fraction(row),
        memory_gb=float(row.number("memory_gb", low=Decimal("0.1"))) if row.has("memory_gb") else None,
    )


def _fraction(row: Section) -> Fraction:
    if not row.has("share"):
        return Fraction(1)
    try:
        share = Fraction(str(row.get("share")))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(f"{row.path('share')}: {shown(row.get('share'))} must be a share of a device, such as 2/96")
    return share


def _one_of(row: Section, key: str, known: tuple[str, ...]) -> Any:
    value = row.text(key)
    if value not in known:
        raise ConfigError(f"{row.path(key)}: {value!r} is none of {', '.join(known)}")
    return value
