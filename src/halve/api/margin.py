"""`halve margin`: what a product that runs on tokens earns, from a file that a founder writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from halve.core.certificate import Certificate
from halve.core.errors import ConfigError, OutputError
from halve.core.record import to_dict
from halve.economics import api_price
from halve.economics.currency import Currency
from halve.economics.fields import nearest, read_share
from halve.economics.margin import ScenarioRow, scenario_rows
from halve.economics.margin_tables import Tables, margin_tables, rounded
from halve.economics.outlook import (
    DemandResponse,
    Month,
    demand_curve,
    demand_response,
    months_ahead,
    payback_months,
)
from halve.economics.product import Product
from halve.economics.product_file import PriceOf, read_product
from halve.economics.sensitivity import Bar, tornado
from halve.economics.tenants import Books, keep_books

if TYPE_CHECKING:
    from halve.server.store import Uses

MAX_FILE_BYTES = 1 << 20  # a product is a page of text


@dataclass(frozen=True, kw_only=True, slots=True)
class Margin:
    """What `margin` found. currency: what people are shown; all figures are dollars. books: with a ledger."""

    product: Product
    currency: Currency
    rows: tuple[ScenarioRow, ...]
    bars: tuple[Bar, ...]
    demand: DemandResponse | None
    demand_curve: tuple[tuple[Decimal, DemandResponse], ...]
    months: tuple[Month, ...]
    payback_months: Decimal | None
    books: Books | None
    created: str
    version: int = 1

    @property
    def tables(self) -> Tables:
        """All figures as plain tables."""
        books = self.books
        accounts = (books.tenants, books.models) if books else ((), ())
        return margin_tables(self.rows, self.bars, self.demand_curve, self.months, *accounts)

    @property
    def sentence(self) -> str:
        """What it comes to."""
        from halve.report.margin_words import margin_sentence

        return margin_sentence(self.rows, self.demand).en

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values: dollars, and the rate of the currency that people are shown."""
        currency, books = self.currency, self.books
        return {
            "product": self.product.name,
            "currency": {
                "code": currency.code,
                "per_usd": rounded(currency.per_usd, 9),
                "as_of": currency.as_of.isoformat() if currency.as_of else None,
            },
            **to_dict(self.tables),
            "payback_months": rounded(self.payback_months, 9),
            "ledger_seconds": rounded(books.seconds) if books else None,
            "created": self.created,
            "version": self.version,
        }


def margin(
    product: Path | str | Mapping[str, Any],
    *,
    currencies: Sequence[Currency] = (),
    bundle: str | None = None,
    api_cut: str | None = None,
    ledger: str | None = None,
    since: str | None = None,
    until: str | None = None,
    report: Path | None = None,
    language: str = "en",
    prices: PriceOf | None = None,
) -> Margin:
    """Gross margin of a product now, compressed, after an API's cut, at twice the volume, and what else it hangs on.

    product: a YAML file, or what stands in one. currencies: stated rates; the first is shown, else the product's own.
    bundle: compression as its certificate has it, instead of the file's. api_cut: such as `30%`, instead of the file's.
    ledger: the URL of a server's database, for accounts of tenants and models between the days since and until.
    report: where an HTML page goes, which opens in `language` (en or ja). prices: instead of genai-prices.

    Raises ConfigError for whatever is wrong in the file, DataError, OutputError.
    """
    raw, name = (
        (product, "product") if isinstance(product, Mapping) else (_read_yaml(Path(product)), Path(product).stem)
    )
    if language not in ("en", "ja"):
        raise ConfigError(f"language: {language!r} must be en or ja")
    raw = _changed(raw, bundle, api_cut)
    read = read_product(raw, price_of=prices or api_price, rates={c.code: c for c in currencies}, name=name)
    shown = currencies[0] if currencies else read.currency
    found = Margin(
        product=read,
        currency=shown,
        rows=tuple(scenario_rows(read)),
        bars=tuple(tornado(read)),
        demand=demand_response(read),
        demand_curve=tuple(demand_curve(read)),
        months=tuple(months_ahead(read)),
        payback_months=payback_months(read),
        books=_books(read, ledger, since, until),
        created=datetime.now(UTC).date().isoformat(),
    )
    if report is not None:
        _write(report, found, language)
    return found


def _write(report: Path, found: Margin, language: str) -> None:
    from halve.report.margin import render_margin

    page = render_margin(
        product=found.product,
        currency=found.currency,
        rows=found.rows,
        bars=found.bars,
        demand=found.demand,
        demand_curve=found.demand_curve,
        months=found.months,
        payback=found.payback_months,
        books=found.books,
        created=found.created,
        language=language,
    )
    try:
        report.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{report}: can't be written: {error.strerror}; give --report a file in a folder") from error


class _Loader(yaml.SafeLoader):
    """YAML's plain values alone; numbers keep the digits they were written with, and no key may come twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                line = node.value[i][0].start_mark.line + 1
                raise ConfigError(f"line {line}: {key!r} is there twice; keep one of them")
        return super().construct_mapping(node, deep)


def _decimal(loader: _Loader, node: Any) -> Any:
    text = loader.construct_scalar(node)
    try:
        return Decimal(str(text).replace("_", ""))
    except ArithmeticError:  # .inf, .nan and sixties are refused where they are read
        return text


_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)


def _read_yaml(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes; a product is a page of YAML, at most 1 MiB")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: can't be read: {error}; give a YAML file (halve margin in docs/GUIDE.md)"
        ) from error
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except (ConfigError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: a product is a page of `key: value` lines (halve margin in docs/GUIDE.md)")
    return raw


def _changed(raw: Any, bundle: str | None, api_cut: str | None) -> Any:
    """The file's values with those of the command line in their place."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"product: {raw!r:.80} must be a mapping of keys to values")
    changed = dict(raw)
    if api_cut is not None:
        section = changed.get("api_price_cut") or {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"api_price_cut: {section!r:.80} must be a section with keys")
        changed["api_price_cut"] = {**section, "cut": read_share(api_cut, "--api-cut")}
    if bundle is not None:
        from halve.api.bundle import read_certificate
        from halve.checkpoint import open_checkpoint, resolve

        changed["compression"] = compression_of(read_certificate(open_checkpoint(resolve(bundle))), raw, bundle)
    return changed


def compression_of(certificate: Certificate, raw: Mapping[str, Any], bundle: str) -> dict[str, Any]:
    """The section `compression` as a certificate has it: measured speeds for machines, their ratio for prices.

    quality_loss is the upper end of the certificate's interval, of perplexity or, where that says more, of exp(KL) - 1:
    a smaller model may predict a text better by luck. Raises ConfigError where the bundle doesn't say its speeds.
    """
    now, before = certificate.speed, certificate.original_speed
    speedups = {}
    for phase in ("prefill", "decode"):
        after, first = getattr(now, f"{phase}_tok_s"), getattr(before, f"{phase}_tok_s")
        if after is None or first is None or first.value <= 0:
            raise ConfigError(
                f"--bundle {bundle}: its certificate has no {phase} speed of both models; give a section compression "
                "with what halve bench measured"
            )
        speedups[f"{phase}_speedup"] = Decimal(str(round(after.value / first.value, 6)))
    quality = certificate.quality
    loss = max(quality.ppl_ratio.high - 1, math.expm1(quality.kl_mean.high), 0.0)
    known = {"quality_loss": Decimal(str(round(loss, 8))), "origin": f"certificate of {Path(bundle).name}"[:200]}
    source = raw.get("source")
    if isinstance(source, Mapping) and "machines" in source:
        return {**speedups, **known}
    ratio = 1 / min(speedups.values())  # the smaller of two gains, where a price does not tell them apart
    return {"cost_ratio": Decimal(str(round(ratio, 6))), **known}


def _books(product: Product, ledger: str | None, since: str | None, until: str | None) -> Books | None:
    if ledger is None:
        if since or until:
            raise ConfigError(f"--{'since' if since else 'until'}: it is of a ledger; give --ledger URL")
        return None
    from halve.api.serve import open_store

    start, end = _day(since, "--since"), _day(until, "--until")
    if start is not None and end is not None and start >= end:
        raise ConfigError(f"--since {since}: must be before --until {until}")
    if ledger.startswith("sqlite:///") and not Path(ledger.removeprefix("sqlite:///")).exists():
        raise ConfigError(f"--ledger {ledger}: there is no such file; halve serve --db writes one")
    uses: Uses = open_store(ledger).uses(start, end)
    if uses.start is None or uses.end is None or not uses.uses:
        raise ConfigError(f"--ledger {ledger}: no request is in it{_between(since, until)}; a margin needs some")
    seconds = Decimal(str(round(max(uses.end - uses.start, 0), 6)))
    if not seconds:
        raise ConfigError(f"--ledger {ledger}: its lines span no time; say it by --since and --until")
    known = [use.name or use.key or "" for use in uses.uses]
    for name in product.tenants:
        if name not in known and (hint := nearest(name, known)):
            raise ConfigError(f"tenants.{name}: the ledger has no key of this name{hint}")
    return keep_books(product, uses.uses, uses.idle_micro_usd, seconds)


def _between(since: str | None, until: str | None) -> str:
    return "".join(f" {word} {day}" for word, day in (("since", since), ("until", until)) if day)


def _day(text: str | None, where: str) -> float | None:
    """A day or time of ISO 8601, UTC unless it says otherwise, in seconds since 1970."""
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{where}: {text!r:.40} is not a day or time, such as 2026-11-01") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
