"""`halve plan-hardware`: where tokens of a model cost least."""

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from halve.api.costing import Machine, Subject, machine_of, read_service_level, throughput_on
from halve.api.price import Question, created_now, read_question, speed_columns, utilization_of
from halve.api.progress import SILENT, Progress
from halve.core.errors import ConfigError
from halve.core.workload import Workload
from halve.economics.catalogue import STALE_DAYS, Catalogue, HourlyPrice
from halve.economics.costs import joules_per_token, token_cost
from halve.economics.currency import USD, Currency
from halve.economics.margin_tables import rounded
from halve.economics.presets import Preset
from halve.economics.roofline import Assumptions, DoesNotFitError, Throughput


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareRow:
    """One machine of the catalogue that holds the model within the service level."""

    machine: Machine
    throughput: Throughput
    utilization: Decimal
    usd_per_mtok: Decimal
    joules_per_token: Decimal | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwarePlan:
    """Machines by $ per million tokens, cheapest first; left_out: those that take no part, and why."""

    subject: Subject
    preset: Preset
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
            f"cheapest: {best.machine.name}, {self.currency.say_price(best.usd_per_mtok)} per million tokens "
            f"({words[best.throughput.basis]}{_error(best.throughput)}; {self.subject.quality})"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        stale = sum(row.machine.age.is_stale for row in self.rows)
        return (
            f"lengths: {self.preset.source}",
            f"quality: {self.subject.quality}",
            *(f"estimates: {line}" for line in Assumptions().lines()),
            f"{stale} of {len(self.rows)} prices are stale: older than {STALE_DAYS} days, or of no known day",
        )

    def table(self) -> list[dict[str, Any]]:
        """All rows, plain. The price of a million tokens recomputes from the cells before it:
        usd_per_hour / 3600 * ((prompt - cached) / prefill + output / decode) / (prompt + output) * 10^6 / utilization.
        """
        mix = self.preset.mix
        return [
            {
                "rank": i + 1,
                "machine": row.machine.name,
                "device": row.machine.device.name if row.machine.device else None,
                "devices": row.machine.count,
                "usd_per_hour": rounded(row.machine.usd_per_hour, 9),
                "kind": row.machine.kind,
                "prompt_tokens": rounded(mix.prompt_tokens),
                "cached_tokens": rounded(mix.cached_tokens),
                "output_tokens": rounded(mix.output_tokens),
                **speed_columns(row.throughput),
                "utilization": rounded(row.utilization, 9),
                "usd_per_mtok": rounded(row.usd_per_mtok, 9),
                "joules_per_token": rounded(row.joules_per_token, 6),
                "quality": self.subject.quality,
                "price_source": row.machine.source,
                **{f"price_{name}": value for name, value in row.machine.age.to_plain().items()},
            }
            for i, row in enumerate(self.rows)
        ]

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.subject.name,
            "quality": self.subject.quality,
            "workload": self.preset.name,
            "notes": list(self.notes),
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
    if asked.measure:
        raise ConfigError("--measure: times this machine, and none of the catalogue; `halve price` takes it")
    subject, preset, trace, catalogue = read_question(asked)
    names = None if asked.device is None else {row.instance for row in catalogue.machines(asked.device, asked.kind)}
    candidates = [
        row
        for row in catalogue.prices
        if row.kind == asked.kind and asked.region in (None, row.region) and (names is None or row.instance in names)
    ]
    rows, left_out = [], []
    with progress.task("machines", "machines") as advance:
        for i, row in enumerate(candidates):
            found = _hardware_row(asked, subject, preset, trace, catalogue, row)
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
        rows=tuple(sorted(rows, key=lambda row: row.usd_per_mtok)),
        left_out=tuple(left_out),
        currency=currency,
        created=created_now(),
    )


def _hardware_row(
    asked: Question,
    subject: Subject,
    preset: Preset,
    trace: Workload | None,
    catalogue: Catalogue,
    row: HourlyPrice,
) -> HardwareRow | str:
    """A machine's place in the ranking, or why it has none."""
    if row.usd_per_hour is None:
        return f"its price is unknown ({row.source})"
    machine = machine_of(catalogue, row)
    try:
        throughput = throughput_on(subject, machine, preset, read_service_level(asked.slo))
        utilization, _ = utilization_of(asked, throughput, preset, trace)
    except DoesNotFitError as error:
        return str(error)
    cost = token_cost(machine.usd_per_hour, throughput, utilization)
    return HardwareRow(
        machine=machine,
        throughput=throughput,
        utilization=utilization,
        usd_per_mtok=cost.allocation_usd_per_mtok(preset.mix),
        joules_per_token=joules_per_token(throughput, preset.mix),
    )
