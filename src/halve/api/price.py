"""`halve price`: what tokens cost here, and what they cost elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from halve.api.costing import (
    DEFAULT_DEVICE,
    Machine,
    Subject,
    first_that_holds,
    read_machines,
    read_service_level,
    read_subject,
    read_workload,
)
from halve.api.progress import SILENT, Progress
from halve.api.under_load import Steps, allowed_utilization, certified_steps, measured_steps, replay
from halve.core.errors import ConfigError
from halve.core.workload import Workload
from halve.economics.api_prices import ApiPrice, named_price
from halve.economics.catalogue import Age, Catalogue, PriceKind, load_catalogue
from halve.economics.costs import Mix, TokenCost, api_request_usd, joules_per_token, token_cost, verdict
from halve.economics.currency import USD, Currency
from halve.economics.days import DEFAULT_DAY, day_of_trace, read_day
from halve.economics.margin_tables import rounded
from halve.economics.presets import Preset
from halve.economics.roofline import Assumptions, Throughput

MTOK = 1_000_000
RIVALS = ("gpt-5-mini", "claude-haiku-4-5", "gemini-2.5-flash-lite", "mistral-small-2603", "llama-3.1-8b-instant@groq")
UTILIZATION = Decimal("0.4")


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
    day: str | None = None
    measure: bool = False
    as_of: date | None = None


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
    asked: Question
    version: int = 1

    @property
    def sentence(self) -> str:
        """Who is cheaper."""
        rivals = [(rival.price.name, rival.usd_per_mtok) for rival in self.rivals]
        return verdict(self.allocation_usd_per_mtok, rivals, self.subject.quality, self.currency)

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
            **self.machine.age.to_plain(),
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
            **{f"price_{name}": value for name, value in self.machine.age.to_plain().items()},
            "workload": self.preset.name,
            "workload_source": self.preset.source,
            **speed_columns(self.throughput),
            "utilization": rounded(self.cost.utilization, 9),
            "utilization_origin": self.utilization_origin,
            "usage_usd_per_mtok": rounded(self.usage_usd_per_mtok, 12),
            "allocation_usd_per_mtok": rounded(self.allocation_usd_per_mtok, 12),
            "joules_per_token": rounded(self.joules_per_token, 6),
            "rows": self.rows(),
            "verdict": self.sentence,
            "notes": list(self.notes),
            "api_prices_of": (self.asked.as_of or date.fromisoformat(self.created)).isoformat(),
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
        **Age.of(price.as_of).to_plain(),
        "kind": "api",
    }


def speed_columns(throughput: Throughput) -> dict[str, Any]:
    """How fast a machine is, as columns of a table."""
    return {
        "prefill_tok_s": throughput.prefill_tok_s,
        "decode_tok_s": throughput.decode_tok_s,
        "sequences": throughput.sequences,
        "basis": throughput.basis,
        "error_factor": throughput.error,
        "speed_origin": throughput.origin,
    }


def price(
    question: Question | None = None, *, currency: Currency = USD, progress: Progress = SILENT, **words: Any
) -> Priced:
    """What tokens of a model cost on a machine, beside what APIs ask for the same requests.

    model: a bundle, a checkpoint, or a known shape (None: Llama-3.1-8B's, an estimate); weights: how a shape's are
    kept. device: of the catalogue, or a cloud instance; price_per_hour: instead of the catalogue's, and alone for the
    machine that a bundle's certificate was measured on, or for this one with measure, which times the model's steps
    here and now. kind, region: of the price. workload: a preset or a trace file. utilization: the share of what the
    machine can do that it is asked for, or slo: the service level that a simulation finds it from, over the hours of a
    day. vs: APIs as `MODEL` or `MODEL@PROVIDER`. batch: APIs at their price for answers within a day; as_of: at
    those of that day. prices: one's own prices file.

    A trace with times, on a machine whose steps were measured, is simulated as it is unless a utilization or a level is
    asked for. Raises ConfigError for whatever is unknown or out of range, DataError for a trace.
    """
    return priced(replace(question or Question(), **words), currency, progress, as_it_is=True)


def priced(asked: Question, currency: Currency, progress: Progress, *, as_it_is: bool) -> Priced:
    """`price`; as_it_is: a trace on a measured machine is simulated at its own pace, rather than the machine filled."""
    subject, preset, trace, catalogue = read_question(asked)
    steps = _steps(asked, subject, progress)
    if asked.measure:
        assert steps is not None
        subject = replace(subject, measured=steps.throughput(preset.mean_prompt + preset.mean_output / 2))
    device = asked.device or (None if asked.price_per_hour is not None or subject.measured else DEFAULT_DEVICE)
    if device is None and asked.price_per_hour is None:
        raise ConfigError(
            f"{subject.name} was measured on {subject.measured_at.name if subject.measured_at else 'this machine'}: "
            "what does that cost? give --price-per-hour, or --device for another machine"
        )
    machines = read_machines(catalogue, device, asked.price_per_hour, kind=asked.kind, region=asked.region)
    machine, throughput = first_that_holds(subject, machines, preset, read_service_level(asked.slo))
    free = asked.utilization is None and asked.slo is None and machine.device is None
    if as_it_is and free and steps is not None and trace is not None and trace.duration_s > 0:
        with progress.task("trace", "simulating"):
            found = replay(steps, trace)
        throughput, utilization, origin = found.throughput, found.utilization, found.words
        preset = replace(preset, cached_share=found.hit_share)
    else:
        utilization, origin = utilization_of(asked, throughput, preset, trace)
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
        created=created_now(),
        asked=asked,
    )


def read_question(asked: Question) -> tuple[Subject, Preset, Workload | None, Catalogue]:
    """Model, workload (its trace, where it is one) and catalogue. Raises ConfigError, DataError."""
    if asked.kind not in ("on_demand", "spot", "reserved"):
        raise ConfigError(f"--kind {asked.kind}: must be on_demand, spot or reserved")
    return read_subject(asked.model, asked.weights), *read_workload(asked.workload), load_catalogue(asked.prices)


def _steps(asked: Question, subject: Subject, progress: Progress) -> Steps | None:
    """The steps of the machine that was measured, or of this one now; None where there are none."""
    if not asked.measure:
        return None if subject.certificate is None else certified_steps(subject.certificate)
    if asked.model is None or not Path(asked.model).exists():
        raise ConfigError(f"--measure: {subject.name} is a shape; name a bundle or a model directory to measure")
    if asked.device is not None:
        raise ConfigError(
            f"--measure: times this machine, and --device {asked.device} is another; leave one out, and give "
            "--price-per-hour for this one"
        )
    return measured_steps(asked.model, progress)


def utilization_of(
    asked: Question, throughput: Throughput, preset: Preset, trace: Workload | None
) -> tuple[Decimal, str]:
    """The share of what a machine can do that it is asked for, and where that is from. Raises ConfigError."""
    level = read_service_level(asked.slo)
    if asked.utilization is not None:
        if not 0 < asked.utilization <= 1:
            raise ConfigError(f"--utilization {asked.utilization}: must be above 0 and at most 1, such as 0.4")
        return asked.utilization, "given"
    if level is None:
        if asked.day is not None:
            raise ConfigError(f"--day {asked.day}: says how load lies over a day; it takes --slo to find how much load")
        return UTILIZATION, "assumed; --slo finds what a service level allows"
    own = day_of_trace(trace) if trace is not None and asked.day is None else None
    found, origin = allowed_utilization(throughput, preset, level, own or read_day(asked.day or DEFAULT_DAY))
    return Decimal(repr(round(found, 6))), origin


def _rivals(asked: Question, mix: Mix) -> tuple[Rival, ...]:
    names = RIVALS if asked.vs is None else asked.vs
    at = None if asked.as_of is None else datetime.combine(asked.as_of, time(12), UTC)
    found = []
    for name in names:
        try:
            known = named_price(name, at, prompt_tokens=max(1, round(mix.prompt_tokens)))
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
    notes.append(f"price of the machine: {machine.source}, {machine.age}")
    if machine.age.is_stale:
        notes.append("that price is stale: check it, or give --price-per-hour")
    notes.append(f"quality: {subject.quality}")
    return tuple(notes)


def created_now() -> str:
    """The day in UTC."""
    return datetime.now(UTC).date().isoformat()


def big(value: Decimal) -> str:
    """A large number for people: `460.8 million`."""
    for size, word in ((Decimal(10) ** 12, "trillion"), (Decimal(10) ** 9, "billion"), (Decimal(10) ** 6, "million")):
        if value >= size:
            return f"{value / size:,.1f} {word}"
    return f"{value:,.0f}"
