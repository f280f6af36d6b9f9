"""What `price`, `breakeven` and `plan-hardware` share: a model, a machine, a workload, as money needs them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from halve.core.certificate import Certificate
from halve.core.errors import ConfigError
from halve.core.workload import ServiceLevel, Workload
from halve.economics.catalogue import Age, Catalogue, CatalogueDevice, HourlyPrice, PriceKind, today
from halve.economics.presets import PRESETS, Preset, find_preset, preset_of
from halve.economics.roofline import Assumptions, DoesNotFitError, Throughput, estimate, scaled, step_seconds
from halve.economics.shapes import DEFAULT_SHAPE, ModelShape, find_shape
from halve.economics.validation import known_error

DEFAULT_DEVICE = "L40S"
WEIGHTS = {
    "bf16": (16.0, 16.0, "bf16"),  # bits of weights, of keys and values; what products multiply
    "fp8": (8.0, 8.0, "fp8"),
    "int8": (8.0, 8.0, "int8"),
    "int4": (4.0, 8.0, "bf16"),
    "fp4": (4.0, 8.0, "fp4"),
}
DECODE_SHARE = 0.6  # of a service level's time per token that decoding alone may take


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model whose cost is asked. quality: its loss in words; "original" where nothing was done to it."""

    name: str
    shape: ModelShape
    quality: str
    measured: Throughput | None = None
    measured_at: CatalogueDevice | None = None
    certificate: Certificate | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What runs it. device: None for one that is only known by its price. usd_per_hour: of all of it."""

    name: str
    usd_per_hour: Decimal
    source: str
    age: Age
    kind: str
    device: CatalogueDevice | None = None
    count: int = 1
    share: Fraction = Fraction(1)
    memory_gb: float | None = None


def read_subject(model: str | None, weights: str | None = None) -> Subject:
    """A bundle or checkpoint, or a known shape by its name; None is Llama-3.1-8B's. Raises ConfigError.

    weights: how a shape's are stored, one of `WEIGHTS`; a directory has its own.
    """
    if model is not None and Path(model).exists():
        if weights is not None:
            raise ConfigError(f"--weights {weights}: {model} has its own weights; leave it out, or name a shape")
        return _of_directory(model)
    shape = find_shape(model or DEFAULT_SHAPE)
    if weights is not None and weights not in WEIGHTS:
        raise ConfigError(f"--weights {weights}: must be one of {', '.join(WEIGHTS)}")
    bits, kv, kind = WEIGHTS[weights or "bf16"]
    quality = "the original" if weights in (None, "bf16") else "loss of quality not measured"
    return Subject(
        name=f"{shape.name} {weights or 'bf16'}",
        shape=shape.quantized(bits, kv_bits=kv, activations=kind),
        quality=quality,
    )


def _of_directory(model: str) -> Subject:
    from halve.api.bundle import read_certificate, read_plan
    from halve.api.describe import inspect
    from halve.checkpoint import open_checkpoint, resolve

    facts = inspect(model)
    with open_checkpoint(resolve(model)) as checkpoint:
        certificate = read_certificate(checkpoint) if facts.bundle else None
        plan = read_plan(checkpoint)
    shape = ModelShape.of_stored(
        Path(model).name,
        parameters=facts.parameters,
        active_parameters=facts.active_parameters,
        table_parameters=0 if facts.tied else facts.vocab_size * facts.hidden_size,
        num_layers=facts.num_layers,
        kv_numbers=2 * facts.num_layers * facts.num_kv_heads * facts.head_dim,
        weight_bytes=facts.bytes,
        kv_bytes_per_token=facts.kv_cache_bytes_per_token,
        activations=plan.activations.format if plan else "fp32",
    )
    if certificate is None:
        return Subject(name=shape.name, shape=shape, quality="the original" if not facts.bundle else "no certificate")
    return Subject(
        name=shape.name,
        shape=shape,
        quality=quality_words(certificate),
        measured=throughput_of(certificate),
        measured_at=_measured_device(certificate, shape),
        certificate=certificate,
    )


def quality_words(certificate: Certificate) -> str:
    """The certificate's loss of quality, to stand beside money."""
    ratio = certificate.quality.ppl_ratio
    low, value, high = ((x - 1) * 100 for x in (ratio.low, ratio.value, ratio.high))
    words = f"perplexity {value:+.2f} % [{low:+.2f}, {high:+.2f}]"
    if certificate.verdict == "measured":
        return f"{words}, no limit asked"
    assert certificate.max_quality_loss is not None
    kept = "certified at most" if certificate.verdict == "pass" else "fails its limit of"
    return f"{words}, {kept} {certificate.max_quality_loss * 100:g} %"


def throughput_of(certificate: Certificate) -> Throughput | None:
    """What a certificate measured: prompts, and the fastest of the batches that decoded. None where it did not."""
    prefill, rows = certificate.speed.prefill_tok_s, [r for r in certificate.rooflines if r.model == "smaller"]
    if prefill is None or not rows:
        return None
    best = max(rows, key=lambda row: row.decode_tok_s)
    return Throughput(
        prefill_tok_s=prefill.value,
        decode_tok_s=best.decode_tok_s,
        sequences=best.batch,
        basis="measured",
        origin=f"certificate, {certificate.inputs.device}, {best.batch} sequences",
    )


def _measured_device(certificate: Certificate, shape: ModelShape) -> CatalogueDevice | None:
    """The machine of a certificate, as far as it says what that can do: its read loop, and the rate prompts ran at."""
    measured = throughput_of(certificate)
    rows = [r for r in certificate.rooflines if r.model == "smaller"]
    if measured is None:
        return None
    rate = 2 * shape.active_parameters * measured.prefill_tok_s / Assumptions().matrix / 1e12
    return CatalogueDevice(
        name=certificate.inputs.device,
        kind="cpu",
        memory_gb=max(16.0, 4 * shape.weight_bytes / 1e9),
        bandwidth_gb_s=max(row.read_gb_s for row in rows),
        rates={"bf16": max(rate, 1e-6)},
        source="the certificate",
    )


def read_machines(
    catalogue: Catalogue,
    device: str | None,
    usd_per_hour: Decimal | None,
    *,
    kind: PriceKind = "on_demand",
    region: str | None = None,
) -> list[Machine]:
    """A device's machines or a cloud instance's, cheapest first, or the one at the price that is given.

    Raises ConfigError for names that are not known, and for one without a known price.
    """
    if usd_per_hour is not None and not 0 <= usd_per_hour <= 100_000:
        raise ConfigError(f"--price-per-hour {usd_per_hour}: must be from 0 to 100000 dollars")
    given: dict[str, Any] = {"source": "--price-per-hour", "age": Age.of(today()), "kind": "own"}
    if device is None:
        assert usd_per_hour is not None
        return [Machine(name="your machine", usd_per_hour=usd_per_hour, **given)]
    rows = catalogue.machines(device, kind, region)
    if usd_per_hour is not None:
        if rows and rows[0].device != catalogue_name(catalogue, device):
            return [machine_of(catalogue, rows[0], usd_per_hour)]
        return [Machine(name=device, usd_per_hour=usd_per_hour, device=catalogue.device(device), **given)]
    priced = [row for row in rows if row.usd_per_hour is not None]
    if not priced:
        where = f" in {region}" if region else ""
        others = sorted(
            {
                f"{p.kind} (--kind {p.kind})"
                for other in get_args(PriceKind)
                for p in catalogue.machines(device, other, region)
                if p.usd_per_hour is not None
            }
        )
        known = f"; known is {', '.join(others)}" if others else ""
        raise ConfigError(
            f"--device {device}: its {kind} price{where} is not known here{known}; give --price-per-hour, or write it "
            "into your prices file (docs/ECONOMICS.md)"
        )
    return [machine_of(catalogue, row) for row in priced]


def first_that_holds(
    subject: Subject, machines: Sequence[Machine], preset: Preset, level: ServiceLevel | None
) -> tuple[Machine, Throughput]:
    """The first machine that holds a model within a service level, and how fast it is there.

    Raises DoesNotFitError, of the largest machine, where none does.
    """
    tightest: tuple[float, DoesNotFitError] | None = None
    for machine in machines:
        try:
            return machine, throughput_on(subject, machine, preset, level)
        except DoesNotFitError as error:
            memory = machine.memory_gb or (machine.device.memory_gb * machine.count if machine.device else 0.0)
            if tightest is None or memory > tightest[0]:
                tightest = memory, error
    assert tightest is not None
    raise tightest[1]


def catalogue_name(catalogue: Catalogue, device: str) -> str | None:
    """The catalogue's name of a device; None where the words name an instance."""
    try:
        return catalogue.device(device).name
    except ConfigError:
        return None


def machine_of(catalogue: Catalogue, row: HourlyPrice, usd_per_hour: Decimal | None = None) -> Machine:
    """A row of the catalogue as a machine, at another price where one is given."""
    price = row.usd_per_hour if usd_per_hour is None else usd_per_hour
    assert price is not None
    given = usd_per_hour is not None
    return Machine(
        name=f"{row.cloud} {row.instance} ({row.region})",
        usd_per_hour=price,
        source="--price-per-hour" if given else row.source,
        age=Age.of(today()) if given else row.age,
        kind=row.kind,
        device=catalogue.device(row.device),
        count=row.count,
        share=row.share,
        memory_gb=row.memory_gb,
    )


def read_workload(name: str) -> tuple[Preset, Workload | None]:
    """A preset, or the statistics of a trace file and the trace. Raises ConfigError, DataError."""
    if name in PRESETS or not Path(name).suffix:
        return find_preset(name), None
    if not Path(name).exists():
        raise ConfigError(f"--workload {name}: there is no such file; presets are {', '.join(PRESETS)}")
    from halve.data import read_trace

    trace = read_trace(name)
    return preset_of(trace), trace


def read_service_level(text: str | None) -> ServiceLevel | None:
    """`ttft=2s,tpot=100ms`. Raises ConfigError."""
    if text is None:
        return None
    limits: dict[str, float] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(ttft|tpot)\s*=\s*([0-9.]+)\s*(ms|s)\s*", part)
        try:
            value = float(found[2]) / (1000 if found[3] == "ms" else 1) if found else 0.0
        except ValueError:
            value = 0.0
        if found is None or not value:
            raise ConfigError(
                f"--slo {text}: {part.strip()!r} is not ttft=TIME or tpot=TIME, such as ttft=2s,tpot=100ms"
            )
        limits[found[1]] = value
    return ServiceLevel(ttft_s=limits.get("ttft"), time_per_token_s=limits.get("tpot"))


def throughput_on(subject: Subject, machine: Machine, preset: Preset, level: ServiceLevel | None) -> Throughput:
    """How fast a model answers on a machine: measured there, scaled from a measurement, or a roofline's estimate.

    A machine that is known by its price alone is taken for the one that the certificate was measured on.
    """
    prompt, output = preset.mean_prompt, preset.mean_output
    if machine.device is None:
        if subject.measured is None:
            raise ConfigError(
                f"{subject.name}: nothing was measured of it, so that its speed on your machine is not known; name a "
                "--device for an estimate, or a bundle with a certificate that has speeds"
            )
        return subject.measured
    # A decode step alone leaves room for prompts beside it.
    limit = DECODE_SHARE * level.time_per_token_s if level and level.time_per_token_s else None
    error = known_error(sparse=bool(subject.shape.num_experts))
    there = estimate(
        machine.device,
        subject.shape,
        prompt_tokens=prompt,
        output_tokens=output,
        devices=machine.count,
        share=float(machine.share),
        memory_gb=machine.memory_gb,
        time_per_token_s=limit,
        error=error,
    )
    if subject.measured is None or subject.measured_at is None:
        return there
    here = estimate_at(subject, prompt + output / 2)
    return scaled(subject.measured, here, there, error=error)


def estimate_at(subject: Subject, context: float) -> Throughput:
    """The roofline of the machine that was measured, at the batch that was measured."""
    assert subject.measured is not None
    assert subject.measured_at is not None
    batch = subject.measured.sequences
    seconds = step_seconds(subject.measured_at, subject.shape, batch, min(context, 64), Assumptions())
    return Throughput(
        prefill_tok_s=subject.measured.prefill_tok_s,
        decode_tok_s=batch / seconds,
        sequences=batch,
        basis="roofline",
        origin=subject.measured_at.name,
    )
