"""What `--workload`, `--slo` and `--price-per-hour` say, and what a plan costs on it by the engine's own scheduler."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from halve.api.versus.figures import usd_per_mtok
from halve.core.certificate import WorkloadCost, WorkloadReplay
from halve.core.errors import ConfigError
from halve.core.workload import ServiceLevel, Workload
from halve.data.traces import read_trace
from halve.engine import EngineConfig, Simulation, simulate
from halve.engine.scheduler import Step

NUM_REQUESTS = 64
TRACE_REQUESTS = 200
NUM_LOADS = 7  # tried by bisection for the most that keeps a service level
ALONE = 1e-6  # of a trace's pace: every request is alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Lengths of a kind of use, and whether requests come over time or all at once."""

    prompt_tokens: int
    output_tokens: int
    requests_per_s: float


PRESETS = {
    "chat": Preset(prompt_tokens=512, output_tokens=256, requests_per_s=1.0),
    "code": Preset(prompt_tokens=1536, output_tokens=128, requests_per_s=1.0),
    "batch": Preset(prompt_tokens=512, output_tokens=64, requests_per_s=math.inf),
}


def workload_of(name: str, context: int, level: ServiceLevel) -> Workload:
    """A preset, cut to the model's context with its shape kept, or a trace's first requests that fit.

    Raises ConfigError for a name that is neither, DataError for a trace that can't be read.
    """
    if name in PRESETS:
        preset = PRESETS[name]
        share = min(1.0, (context - 1) / (preset.prompt_tokens + preset.output_tokens))
        made = Workload.poisson(
            requests_per_s=preset.requests_per_s,
            num_requests=NUM_REQUESTS,
            prompt_tokens=max(1, int(preset.prompt_tokens * share)),
            output_tokens=max(1, int(preset.output_tokens * share)),
            service_level=level,
        )
        return Workload(name=name, requests=made.requests, block_tokens=made.block_tokens, service_level=level)
    if not Path(name).exists():
        raise ConfigError(f"workload: {name!r} is not one of {', '.join(PRESETS)}, and no file; give one of these")
    trace = read_trace(name, service_level=level)
    shortest = min(r.prompt_tokens + r.output_tokens for r in trace.requests)
    if shortest >= context:
        raise ConfigError(
            f"workload {name}: its shortest request has {shortest} tokens, answer included; this model's context "
            f"holds {context}"
        )
    return trace.fitting(context - 1).first(TRACE_REQUESTS)


def level_of(text: str | None) -> ServiceLevel:
    """`ttft=2s,tpot=100ms`, either or both, as a service level for 99 of 100 requests. Raises ConfigError."""
    found: dict[str, float] = {}
    names = {"ttft": "ttft_s", "tpot": "time_per_token_s"}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in names or names[name] in found:
            raise ConfigError(f"slo: {part!r} is not ttft=TIME or tpot=TIME, each once, such as ttft=2s,tpot=100ms")
        found[names[name]] = seconds_of(value, f"slo {name}")
    return ServiceLevel(**found)


def seconds_of(text: str, name: str) -> float:
    """`2s`, `100ms`, `30m`, `1h` as seconds. Raises ConfigError."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(digits) :]
    try:
        value = float(digits) * units[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: {text!r} is not a time; write it as 100ms, 2s, 30m or 1h") from None
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: {text!r} must be above 0 and finite")
    return value


def price_of(text: str | float | None) -> Decimal | None:
    """Dollars an hour. Raises ConfigError for what is no price."""
    if text is None:
        return None
    try:
        price = Decimal(str(text))
    except InvalidOperation:
        raise ConfigError(f"price_per_hour: {text!r} is not a number of dollars; write it as 0.40") from None
    if not (price.is_finite() and 0 <= price <= 1_000_000):
        raise ConfigError(f"price_per_hour: {text!r} must be from 0 to 1000000 dollars")
    return price


def replay(
    workload: Workload,
    seconds: Callable[[Step], float],
    *,
    engine: EngineConfig,
    num_blocks: int,
    context: int,
    num_drafts: int = 0,
    draft_rate: float = 0.0,
) -> tuple[float, Simulation]:
    """The highest pace at which a workload keeps its service level, and what comes of it.

    All at once, an infinite pace, where it has none. Where not even requests that come alone keep the level, that
    is what is returned, with level_met false. num_drafts, draft_rate: of guesses, as `simulate` takes them.
    """

    def at(pace: float) -> Simulation:
        return simulate(
            workload.faster(pace),
            seconds,
            num_blocks=num_blocks,
            context=context,
            config=engine,
            num_drafts=num_drafts,
            draft_rate=draft_rate,
        )

    level = workload.service_level
    if level.ttft_s is None and level.time_per_token_s is None:
        return math.inf, at(math.inf)
    full = at(math.inf)
    if full.level_met:
        return math.inf, full
    alone = at(ALONE)
    if not alone.level_met or workload.duration_s == 0:
        return ALONE, alone
    best, low = alone, ALONE
    high = full.num_requests / full.duration_s * workload.duration_s / max(1, full.num_requests - 1)
    for _ in range(NUM_LOADS):
        pace = math.sqrt(low * high) if low > high * 1e-3 else high / 4
        found = at(pace)
        if found.level_met:
            best, low = found, pace
        else:
            high = pace
    return low, best


def workload_cost(
    workload: Workload,
    smaller: Simulation,
    original: Simulation,
    usd_per_hour: Decimal | None,
    replayed: WorkloadReplay | None,
) -> WorkloadCost:
    """What both models make of a workload, as the certificate holds it."""
    return WorkloadCost(
        workload=workload.name,
        num_requests=smaller.num_requests,
        output_tok_s=smaller.output_tok_s,
        original_output_tok_s=original.output_tok_s,
        ttft_p50_s=smaller.ttft_s.p50,
        ttft_p99_s=smaller.ttft_s.p99,
        time_per_token_p50_s=smaller.time_per_token_s.p50,
        time_per_token_p99_s=smaller.time_per_token_s.p99,
        level_met=smaller.level_met,
        usd_per_hour=None if usd_per_hour is None else str(usd_per_hour),
        usd_per_mtok=usd_per_mtok(usd_per_hour, smaller.output_tok_s),
        original_usd_per_mtok=usd_per_mtok(usd_per_hour, original.output_tok_s),
        basis="simulated" if replayed is None else "replayed",
        replayed=replayed,
    )
