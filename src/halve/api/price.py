"""`halve price`, `halve breakeven`, `halve plan-hardware`: what tokens cost here, what they cost elsewhere, and where
they cost least.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from halve.api.costing import (
    DEFAULT_DEVICE,
    Machine,
    Subject,
    allowed_utilization,
    machine_of,
    read_machine,
    read_service_level,
    read_subject,
    read_workload,
    throughput_on,
)
from halve.api.progress import SILENT, Progress
from halve.core.errors import ConfigError, OutputError
from halve.economics.api_prices import ApiPrice, named_price
from halve.economics.catalogue import Catalogue, HourlyPrice, PriceKind, load_catalogue
from halve.economics.costs import (
    BreakEven,
    Fleet,
    Mix,
    TokenCost,
    api_request_usd,
    break_even,
    fleet,
    joules_per_token,
    token_cost,
    verdict,
)
from halve.economics.currency import USD, Currency
from halve.economics.margin_tables import rounded
from halve.economics.presets import Preset
from halve.economics.roofline import Assumptions, DoesNotFitError, Throughput

MTOK = 1_000_000
RIVALS = ("gpt-5-mini", "claude-haiku-4-5", "gemini-2.5-flash-lite", "mistral-small-2603", "llama-3.1-8b-instant@groq")
UTILIZATION = Decimal("0.4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """An API, and what it asks for the same work. usd_per_mtok: of prompt and answer together."""

    price: ApiPrice
    request_usd: Decimal
    usd_per_mtok: Decimal


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """What tokens cost on a machine, beside APIs. notes: what a reader must know."""

    subject: Subject
    machine: Machine
    preset: Preset
    throughput: Throughput
    cost: TokenCost
    utilization_origin: str
    request_usd: Decimal
    usage_usd_per_mtok: Decimal
    allocation_usd_per_mtok: Decimal
    joules_per_token: Decimal | None
    rivals: tuple[Rival, ...]
    currency: Currency
    notes: tuple[str, ...]
    created: str
    version: int = 1

    @property
    def sentence(self) -> str:
        """Who is cheaper."""
        rivals = [(rival.price.name, rival.usd_per_mtok) for rival in self.rivals]
        return verdict(self.allocation_usd_per_mtok, rivals, self.subject.quality)

    def rows(self) -> list[dict[str, Any]]:
        """One's own machine and each API, dollars; a spreadsheet recomputes the last columns from those before them."""
        mix = self.preset.mix
        common = {
            "prompt_tokens": rounded(mix.prompt_tokens),
            "cached_tokens": rounded(mix.cached_tokens),
            "output_tokens": rounded(mix.output_tokens),
        }
        own = {
            "name": f"{self.subject.name} on {self.machine.name}",
            "input_usd_per_mtok": rounded(self.cost.input_usd_per_mtok, 12),
            "cached_input_usd_per_mtok": 0,
            "output_usd_per_mtok": rounded(self.cost.output_usd_per_mtok, 12),
            "utilization": rounded(self.cost.utilization, 9),
            **common,
            "usd_per_request": rounded(self.request_usd / self.cost.utilization, 12),
            "usd_per_mtok": rounded(self.allocation_usd_per_mtok, 12),
            "basis": self.throughput.basis,
            "error_factor": None if self.throughput.error is None else round(self.throughput.error, 3),
            "quality": self.subject.quality,
            "source": self.machine.source,
            "dated": self.machine.dated,
            "kind": self.machine.kind,
        }
        return [own, *(_rival_row(rival, common) for rival in self.rivals)]

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.subject.name,
            "quality": self.subject.quality,
            "machine": self.machine.name,
            "usd_per_hour": rounded(self.machine.usd_per_hour, 9),
            "price_source": self.machine.source,
            "price_dated": self.machine.dated,
            "workload": self.preset.name,
            "workload_source": self.preset.source,
            **_speed(self.throughput),
            "utilization": rounded(self.cost.utilization, 9),
            "utilization_origin": self.utilization_origin,
            "usage_usd_per_mtok": rounded(self.usage_usd_per_mtok, 12),
            "allocation_usd_per_mtok": rounded(self.allocation_usd_per_mtok, 12),
            "joules_per_token": rounded(self.joules_per_token, 6),
            "rows": self.rows(),
            "verdict": self.sentence,
            "notes": list(self.notes),
            "created": self.created,
            "version": self.version,
        }


def _rival_row(rival: Rival, common: Mapping[str, Any]) -> dict[str, Any]:
    price = rival.price
    cached = price.cached_usd_per_mtok
    return {
        "name": price.name,
        "input_usd_per_mtok": rounded(price.input_usd_per_mtok, 9),
        "cached_input_usd_per_mtok": rounded(price.input_usd_per_mtok if cached is None else cached, 9),
        "output_usd_per_mtok": rounded(price.output_usd_per_mtok, 9),
        "utilization": 1,
        **common,
        "usd_per_request": rounded(rival.request_usd, 12),
        "usd_per_mtok": rounded(rival.usd_per_mtok, 12),
        "basis": "list price",
        "error_factor": None,
        "quality": "another model; compare on your tasks",
        "source": price.source,
        "dated": "as of the package",
        "kind": "api",
    }


def _speed(throughput: Throughput) -> dict[str, Any]:
    return {
        "prefill_tok_s": throughput.prefill_tok_s,
        "decode_tok_s": throughput.decode_tok_s,
        "sequences": throughput.sequences,
        "basis": throughput.basis,
        "error_factor": throughput.error,
        "speed_origin": throughput.origin,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What all three verbs are asked; see `price`."""

    model: str | None = None
    weights: str | None = None
    device: str | None = None
    price_per_hour: Decimal | None = None
    kind: PriceKind = "on_demand"
    region: str | None = None
    workload: str = "chat"
    utilization: Decimal | None = None
    slo: str | None = None
    vs: Sequence[str] | None = None
    batch: bool = False
    prices: Path | None = None


def price(question: Question | None = None, *, currency: Currency = USD, **words: Any) -> Priced:
    """What tokens of a model cost on a machine, beside what APIs ask for the same requests.

    model: a bundle, a checkpoint, or a known shape (None: Llama-3.1-8B's, an estimate); weights: how a shape's are
    kept. device: of the catalogue, or a cloud instance; price_per_hour: instead of the catalogue's, and alone for the
    machine
    that a bundle's certificate was measured on. kind, region: of the price. workload: a preset or a trace file.
    utilization: the share of time with work, or slo: the service level that a simulation finds it from. vs: APIs as
    `MODEL` or `MODEL@PROVIDER`. batch: APIs at their price for answers within a day. prices: one's own prices file.

    Raises ConfigError for whatever is unknown or out of range, DataError for a trace.
    """
    asked = replace(question or Question(), **words)
    subject, preset, catalogue = _read(asked)
    device = asked.device or (None if asked.price_per_hour is not None or subject.measured else DEFAULT_DEVICE)
    if device is None and asked.price_per_hour is None:
        raise ConfigError(
            f"{subject.name} was measured on {subject.measured_at.name if subject.measured_at else 'a machine'}: what "
            "does that cost? give --price-per-hour, or --device for another machine"
        )
    machine = read_machine(catalogue, device, asked.price_per_hour, kind=asked.kind, region=asked.region)
    level = read_service_level(asked.slo)
    throughput = throughput_on(subject, machine, preset, level)
    utilization, origin = _utilization(asked, throughput, preset)
    cost, mix = token_cost(machine.usd_per_hour, throughput, utilization), preset.mix
    return Priced(
        subject=subject,
        machine=machine,
        preset=preset,
        throughput=throughput,
        cost=cost,
        utilization_origin=origin,
        request_usd=cost.request_usd(mix),
        usage_usd_per_mtok=cost.usage_usd_per_mtok(mix),
        allocation_usd_per_mtok=cost.allocation_usd_per_mtok(mix),
        joules_per_token=joules_per_token(throughput, mix),
        rivals=_rivals(asked, mix),
        currency=currency,
        notes=_notes(subject, machine, throughput, preset),
        created=_now(),
    )


def _read(asked: Question) -> tuple[Subject, Preset, Catalogue]:
    if asked.kind not in ("on_demand", "spot", "reserved"):
        raise ConfigError(f"--kind {asked.kind}: must be on_demand, spot or reserved")
    return read_subject(asked.model, asked.weights), read_workload(asked.workload), load_catalogue(asked.prices)


def _utilization(asked: Question, throughput: Throughput, preset: Preset) -> tuple[Decimal, str]:
    level = read_service_level(asked.slo)
    if asked.utilization is not None:
        if not 0 < asked.utilization <= 1:
            raise ConfigError(f"--utilization {asked.utilization}: must be above 0 and at most 1, such as 0.4")
        return asked.utilization, "given"
    if level is None:
        return UTILIZATION, "assumed; --slo finds what a service level allows"
    found, origin = allowed_utilization(throughput, preset, level)
    return Decimal(repr(round(found, 4))), origin


def _rivals(asked: Question, mix: Mix) -> tuple[Rival, ...]:
    names = RIVALS if asked.vs is None else asked.vs
    found = []
    for name in names:
        try:
            known = named_price(name, prompt_tokens=max(1, round(mix.prompt_tokens)))
        except ConfigError:
            if asked.vs is None:
                continue  # nobody asked for it by name
            raise
        usd = api_request_usd(known, mix, batch=asked.batch)
        found.append(Rival(price=known, request_usd=usd, usd_per_mtok=usd * MTOK / mix.tokens))
    return tuple(found)


def _notes(subject: Subject, machine: Machine, throughput: Throughput, preset: Preset) -> tuple[str, ...]:
    notes = [f"lengths: {preset.source}", f"speed: {throughput.origin}"]
    if throughput.basis == "roofline":
        notes.append("an estimate; " + "; ".join(Assumptions().lines()))
    if throughput.error is not None:
        notes.append(f"estimates of this kind were off by a factor of {throughput.error:.2f} (docs/ECONOMICS.md)")
    notes.append(f"price of the machine: {machine.source}, {machine.dated}")
    if machine.stale:
        notes.append("that price is stale: check it, or give --price-per-hour")
    notes.append(f"quality: {subject.quality}")
    return tuple(notes)


def _now() -> str:
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvenRow:
    """Break-even against one API: as the model is, and with operators; before compression where that is known."""

    rival: Rival
    case: str
    even: BreakEven


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenEven:
    """What `breakeven` found. fleet: for the volume that was asked about."""

    priced: Priced
    rows: tuple[EvenRow, ...]
    monthly_ops_usd: Decimal
    most_utilization: Decimal
    fleet: Fleet | None
    tokens_per_month: Decimal | None

    @property
    def sentence(self) -> str:
        """From which volume, against whom."""
        lines = []
        for row in self.rows:
            if row.case != "now":
                continue
            name = row.rival.price.name
            if row.even.tokens is None:
                lines.append(f"never against {name} (the API is cheaper for you at any volume)")
            else:
                lines.append(f"from {big(row.even.tokens)} tokens a month against {name}")
        return f"your own machines pay {'; '.join(lines)}" if lines else "there is no API to compare with"

    def table(self) -> list[dict[str, Any]]:
        """All rows, plain."""
        return [
            {
                "api": row.rival.price.name,
                "case": row.case,
                "api_usd_per_mtok": rounded(row.even.api_usd_per_mtok, 9),
                "tokens_per_month": rounded(row.even.tokens, 3),
                "requests_per_month": rounded(row.even.requests, 3),
                "machines": row.even.machines,
                "load": rounded(row.even.load, 6),
                "usd_per_month": rounded(row.even.monthly_usd, 4),
                "capacity_tokens_per_machine": rounded(row.even.capacity_tokens, 3),
                "api_price_of_capacity_over_machine": None
                if row.even.share_of_capacity.is_infinite()
                else rounded(row.even.share_of_capacity, 6),
            }
            for row in self.rows
        ]

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        plan = self.fleet
        return {
            **{k: v for k, v in self.priced.to_plain().items() if k not in ("rows", "verdict")},
            "operators_usd_per_month": rounded(self.monthly_ops_usd),
            "most_utilization": rounded(self.most_utilization, 6),
            "rows": self.table(),
            "fleet": plan
            and {
                "tokens_per_month": rounded(self.tokens_per_month, 3),
                "machines": plan.machines,
                "load": rounded(plan.load, 6),
                "headroom_tokens": rounded(plan.headroom_tokens, 3),
                "usd_per_month": rounded(plan.monthly_usd, 4),
            },
            "verdict": self.sentence,
        }


def breakeven(
    question: Question | None = None,
    *,
    operators_per_month: Decimal = Decimal(0),
    tokens_per_month: Decimal | None = None,
    currency: Currency = USD,
    **words: Any,
) -> BrokenEven:
    """From which monthly volume machines of one's own beat each API; see `price` for the rest.

    operators_per_month: dollars for people, in a case of their own. tokens_per_month: a volume to plan machines for.
    The utilization here is the most that a machine may have. Raises as `price`.
    """
    asked = replace(question or Question(), **words)
    if tokens_per_month is not None and not tokens_per_month > 0:
        raise ConfigError(f"--tokens-per-month {tokens_per_month}: must be above 0; a volume of zero needs no machine")
    found = price(asked, currency=currency)
    most = found.cost.utilization
    original = _before(found)
    rows = []
    for rival in found.rivals:
        cases: list[tuple[str, Throughput, Decimal]] = [("now", found.throughput, Decimal(0))]
        if operators_per_month:
            cases.append(("with operators", found.throughput, operators_per_month))
        if original is not None:
            cases.append(("before compression", original, Decimal(0)))
        for case, throughput, ops in cases:
            even = break_even(
                usd_per_hour=found.machine.usd_per_hour,
                throughput=throughput,
                mix=found.preset.mix,
                api_usd_per_request=rival.request_usd,
                monthly_ops_usd=ops,
                most_utilization=most,
            )
            rows.append(EvenRow(rival=rival, case=case, even=even))
    plan = None
    if tokens_per_month is not None:
        plan = fleet(
            tokens_per_month=tokens_per_month,
            usd_per_hour=found.machine.usd_per_hour,
            throughput=found.throughput,
            mix=found.preset.mix,
            most_utilization=most,
        )
    return BrokenEven(
        priced=found,
        rows=tuple(rows),
        monthly_ops_usd=operators_per_month,
        most_utilization=most,
        fleet=plan,
        tokens_per_month=tokens_per_month,
    )


def _before(found: Priced) -> Throughput | None:
    """The original's speed on the same machine, as the certificate measured both; None where it did not."""
    certificate = found.subject.certificate
    if certificate is None:
        return None
    now, before = certificate.speed, certificate.original_speed
    rows = [r for r in certificate.rooflines if r.model == "original"]
    if now.prefill_tok_s is None or before.prefill_tok_s is None or not rows or found.subject.measured is None:
        return None
    prefill = before.prefill_tok_s.value / now.prefill_tok_s.value
    decode = max(r.decode_tok_s for r in rows) / found.subject.measured.decode_tok_s
    return replace(
        found.throughput,
        prefill_tok_s=found.throughput.prefill_tok_s * prefill,
        decode_tok_s=found.throughput.decode_tok_s * decode,
        origin=f"original, {found.throughput.origin}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareRow:
    """One machine of the catalogue that holds the model within the service level."""

    machine: Machine
    throughput: Throughput
    usd_per_mtok: Decimal
    joules_per_token: Decimal | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwarePlan:
    """Machines by $ per million tokens, cheapest first; left_out: those that take no part, and why."""

    subject: Subject
    preset: Preset
    utilization: Decimal
    rows: tuple[HardwareRow, ...]
    left_out: tuple[tuple[str, str], ...]
    currency: Currency
    created: str
    version: int = 1

    @property
    def sentence(self) -> str:
        """The cheapest."""
        if not self.rows:
            return "no machine with a known price holds this model within the service level"
        best = self.rows[0]
        words = {"measured": "measured", "scaled": "scaled from a measurement", "roofline": "a roofline estimate"}
        return (
            f"cheapest: {best.machine.name}, ${best.usd_per_mtok:.4f} per million tokens "
            f"({words[best.throughput.basis]}{_error(best.throughput)}; {self.subject.quality})"
        )

    def table(self) -> list[dict[str, Any]]:
        """All rows, plain."""
        return [
            {
                "rank": i + 1,
                "machine": row.machine.name,
                "device": row.machine.device.name if row.machine.device else None,
                "devices": row.machine.count,
                "usd_per_hour": rounded(row.machine.usd_per_hour, 9),
                "kind": row.machine.kind,
                "usd_per_mtok": rounded(row.usd_per_mtok, 9),
                **_speed(row.throughput),
                "joules_per_token": rounded(row.joules_per_token, 6),
                "quality": self.subject.quality,
                "price_source": row.machine.source,
                "price_dated": row.machine.dated,
            }
            for i, row in enumerate(self.rows)
        ]

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.subject.name,
            "quality": self.subject.quality,
            "workload": self.preset.name,
            "utilization": rounded(self.utilization, 6),
            "assumptions": Assumptions().lines(),
            "rows": self.table(),
            "left_out": [{"machine": name, "reason": reason} for name, reason in self.left_out],
            "verdict": self.sentence,
            "created": self.created,
            "version": self.version,
        }


def _error(throughput: Throughput) -> str:
    return "" if throughput.error is None else f", off by a factor of {throughput.error:.2f} as a rule"


def plan_hardware(
    question: Question | None = None, *, currency: Currency = USD, progress: Progress = SILENT, **words: Any
) -> HardwarePlan:
    """All machines of the catalogue that hold a model within a service level, by $ per million tokens; see `price`.

    device: only machines of this device. kind: of the prices. Without utilization or slo the same utilization is taken
    for all; with slo each machine gets what its simulation allows. Raises as `price`.
    """
    asked = replace(question or Question(), **words)
    if asked.price_per_hour is not None:
        raise ConfigError("--price-per-hour: every machine has its own here; write yours into the prices file")
    subject, preset, catalogue = _read(asked)
    names = None if asked.device is None else {row.instance for row in catalogue.machines(asked.device, asked.kind)}
    candidates = [
        row
        for row in catalogue.prices
        if row.kind == asked.kind and asked.region in (None, row.region) and (names is None or row.instance in names)
    ]
    rows, left_out = [], []
    with progress.task("machines", "machines") as advance:
        for i, row in enumerate(candidates):
            found = _hardware_row(asked, subject, preset, catalogue, row)
            if isinstance(found, HardwareRow):
                rows.append(found)
            else:
                left_out.append((f"{row.cloud} {row.instance} ({row.region})", found))
            advance(i + 1, len(candidates))
    listed = {price.device for price in catalogue.prices if price.kind == asked.kind}
    if names is None:
        left_out += [
            (d.name, f"no {asked.kind} price of it is known") for d in catalogue.devices if d.name not in listed
        ]
    return HardwarePlan(
        subject=subject,
        preset=preset,
        utilization=asked.utilization or UTILIZATION,
        rows=tuple(sorted(rows, key=lambda row: row.usd_per_mtok)),
        left_out=tuple(left_out),
        currency=currency,
        created=_now(),
    )


def _hardware_row(
    asked: Question, subject: Subject, preset: Preset, catalogue: Catalogue, row: HourlyPrice
) -> HardwareRow | str:
    """A machine's place in the ranking, or why it has none."""
    if row.usd_per_hour is None:
        return f"its price is unknown ({row.source})"
    machine = machine_of(catalogue, row)
    try:
        throughput = throughput_on(subject, machine, preset, read_service_level(asked.slo))
        utilization, _ = _utilization(asked, throughput, preset)
    except DoesNotFitError as error:
        return str(error)
    cost = token_cost(machine.usd_per_hour, throughput, utilization)
    return HardwareRow(
        machine=machine,
        throughput=throughput,
        usd_per_mtok=cost.allocation_usd_per_mtok(preset.mix),
        joules_per_token=joules_per_token(throughput, preset.mix),
    )


def write_report(path: Path, found: Priced | BrokenEven, language: str = "en") -> None:
    """Write what was found as an HTML page that opens in a language, en or ja. Raises ConfigError, OutputError."""
    from halve.report.costs import render_costs

    if language not in ("en", "ja"):
        raise ConfigError(f"language: {language!r} must be en or ja")
    priced = found.priced if isinstance(found, BrokenEven) else found
    html = render_costs(
        title=f"{priced.subject.name}, {priced.preset.name}",
        currency=priced.currency,
        rows=priced.rows(),
        even=found.table() if isinstance(found, BrokenEven) else (),
        sentence=priced.sentence,
        notes=priced.notes,
        created=priced.created,
        language=language,
    )
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}; give --report a file in a folder") from error


def big(value: Decimal) -> str:
    """A large number for people: `460.8 million`."""
    for size, word in ((Decimal(10) ** 12, "trillion"), (Decimal(10) ** 9, "billion"), (Decimal(10) ** 6, "million")):
        if value >= size:
            return f"{value / size:,.1f} {word}"
    return f"{value:,.0f}"
