"""What came out, as one record: rows to read, and the rounds that they are medians of."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from halve.api.versus.entrants import model_name
from halve.api.versus.figures import Ratio, Run, plain, ratio_of, ratios_of, row_of, spread
from halve.api.versus.replay import Replay, best_of, natural_load, rows_of_replays
from halve.api.versus.rounds import Batches, Contestant, Machine, Replays
from halve.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """An engine that was asked for. failed: why it has no figures, or not all. how: requests were served.

    peak_bytes_at_batch_1: once it had loaded and done batch 1 and the prompt; peak_bytes: at the end. null: not known.
    new_tokens: of a turn, by measure.
    """

    engine: str
    model: str
    name: str
    format: str | None
    version: str | None
    failed: str | None
    how: str | None
    load_s: float | None
    weight_bytes: int | None
    peak_bytes_at_batch_1: int | None
    peak_bytes: int | None
    new_tokens: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class WorkloadFacts:
    """What was replayed. natural_load: requests a second as the trace has them, null for all at once."""

    name: str
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    natural_load: float | None
    time_per_token_ms: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Benched:
    """What `halve bench` found. runs and ratios are what there is to read; rounds and replays are how they came about.

    ratios: of the model asked for, over each engine of `vs`. ceilings: of the machine beside the turns (median, lowest,
    highest, how many). usd_per_hour: the price given, or null. workload: of the replay, or null.
    """

    runs: tuple[Run, ...]
    ratios: tuple[Ratio, ...]
    engines: tuple[EngineFacts, ...]
    ceilings: Mapping[str, Mapping[str, float]]
    device: str
    features: tuple[str, ...]
    threads: int
    threads_reason: str
    usd_per_hour: str | None
    workload: WorkloadFacts | None
    command: str
    date: str
    versions: Mapping[str, str]
    rounds: Mapping[str, Any]
    replays: Mapping[str, Sequence[Mapping[str, Any]]]
    version: int = 1

    @property
    def failed(self) -> tuple[EngineFacts, ...]:
        """Engines that broke."""
        return tuple(engine for engine in self.engines if engine.failed)


def rows(
    contestants: Sequence[Contestant], batches: Batches, replays: Replays | None, price: Decimal | None
) -> tuple[tuple[Run, ...], tuple[Ratio, ...]]:
    """All rows, measure by measure, and the ratios of the first contestant over the others."""
    first, others = contestants[0].name, [c.name for c in contestants[1:]]
    runs: list[Run] = []
    ratios: list[Ratio] = []
    for measure in batches.measures:
        cells = batches.cells[measure.name]
        seen = [c for c in contestants if any(c.name in cell.turns or c.name in cell.refused for cell in cells)]
        runs += [row_of(measure, cells, price, **_who(c)) for c in seen]
        ratios += ratios_of(measure, cells, first, others)
    if replays is not None:
        found: list[Run] = []
        for c in contestants:
            done, refused = replays.done.get(c.name, []), replays.refused.get(c.name, [])
            if done or refused:
                found += rows_of_replays(done, refused, price, **_who(c))
        metrics = list(dict.fromkeys(run.metric for run in found))
        runs += sorted(found, key=lambda run: metrics.index(run.metric))
        best = {name: top for name, done in replays.done.items() if (top := best_of(done))}
        for name in others if first in best else ():
            if name in best:
                ratios.append(ratio_of(first, name, "replay_tok_s", [best[first].tok_s / best[name].tok_s]))
    for what in ("peak_bytes_at_batch_1", "peak_bytes"):
        for c in contestants:
            if (size := getattr(c, what)) is not None:
                value = float(size)
                runs.append(Run(**_who(c), metric=what, value=value, low=value, high=value, runs=1))
    return tuple(runs), tuple(ratios)


def _who(contestant: Contestant) -> dict[str, Any]:
    return {
        "engine": contestant.kind,
        "model": model_name(contestant.kind, contestant.path),
        "name": contestant.name,
        "format": contestant.format,
    }


def facts_of(contestant: Contestant) -> EngineFacts:
    """What is known of an engine."""
    return EngineFacts(
        **_who(contestant),
        version=contestant.version,
        failed=contestant.failed,
        how=contestant.how,
        load_s=contestant.load_s,
        weight_bytes=contestant.work.weight_bytes,
        peak_bytes_at_batch_1=contestant.peak_bytes_at_batch_1,
        peak_bytes=contestant.peak_bytes,
        new_tokens=contestant.new_tokens,
    )


def workload_facts(workload: Workload) -> WorkloadFacts:
    """What was replayed, in numbers."""
    level = workload.service_level
    return WorkloadFacts(
        name=workload.name,
        num_requests=len(workload.requests),
        num_prompt_tokens=workload.num_prompt_tokens,
        num_output_tokens=workload.num_output_tokens,
        natural_load=natural_load(workload) if workload.duration_s else None,
        time_per_token_ms=1000 * (level.time_per_token_s or 0.0),
        share=level.share,
    )


def ceilings_of(machine: Machine) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of what the machine gave beside the turns."""
    samples = machine.samples
    if not samples:
        return {}
    rates = {f"{what}_gmac_s": spread([c.gmac_s[what] for c in samples]) for what in machine.loops}
    return {"read_gb_s": spread([c.read_gb_s for c in samples]), **rates}


def rounds_of(batches: Batches, replays: Replays | None) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Every turn, as JSON values."""
    done: Mapping[str, Sequence[Replay]] = replays.done if replays else {}
    return plain(batches.cells), {name: [asdict(replay) for replay in found] for name, found in done.items()}
