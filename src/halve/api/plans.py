"""From what was learned of a model to the plans that are worth making, cheapest first, for one device and workload."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal

from halve import __version__
from halve.api.expert_moves import JudgedMove
from halve.api.model import cache_blocks
from halve.api.progress import Progress
from halve.api.replayed import Paced
from halve.api.study import Question, Studied
from halve.api.workloads import replay, workload_cost
from halve.core.cache import cache_folder
from halve.core.certificate import WorkloadCost, WorkloadReplay
from halve.core.errors import ConfigError, QualityError
from halve.core.workload import Workload
from halve.engine import EngineConfig, Simulation
from halve.engine.scheduler import Step
from halve.formats import FORMATS
from halve.kernels import native, native_library
from halve.models import ModelConfig
from halve.models.names import groups
from halve.search import Candidate, Move
from halve.search.device_table import DeviceTable, PlannedTimes, device_table
from halve.search.front import STORED_SHARE, CostOf, StepCounts, bytes_cost, candidates, rejected_moves, undominated
from halve.search.sensitivity import parts_of

log = logging.getLogger("halve")

NUM_POINTS = 96
TYPICAL = "int4-g64"  # what the steps of a workload are counted with; which they are hardly depends on it


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What a model is for: a workload with its service level, and the price of the machine."""

    workload: Workload
    usd_per_hour: Decimal | None


@dataclass(frozen=True, kw_only=True)
class Plans:
    """candidates: cheapest first. basis: what cost is counted in; table: None where it is bytes."""

    candidates: tuple[Candidate, ...]
    basis: Literal["seconds", "bytes"]
    cost_of: CostOf
    studied: Studied
    question: Question
    purpose: Purpose
    table: DeviceTable | None
    experts: tuple[JudgedMove, ...] = ()
    _ratios: dict[str, float] = field(default_factory=dict, compare=False)  # tokens a second, once simulated

    def simulation(self, formats: Mapping[str, str]) -> Simulation:
        """The workload on a model whose groups are stored so."""
        return self._paced(formats)[1]

    def _paced(self, formats: Mapping[str, str]) -> tuple[float, Simulation]:
        assert self.table is not None, "only measured times can be replayed"
        return _replayed(self.question, self.purpose.workload, PlannedTimes(self.table, formats).of_step)

    def paced(self, candidate: Candidate) -> Paced | None:
        """How fast the original and a plan are to be asked when both are run; None where times were not measured."""
        if self.table is None:
            return None
        original, smaller = (self._paced(f) for f in (_original_formats(self.question), _formats(candidate)))
        return Paced(
            workload=self.purpose.workload,
            paces=(original[0], smaller[0]),
            foretold_s=(original[1].duration_s, smaller[1].duration_s),
        )

    def cost_ratio(self, candidate: Candidate) -> float:
        """Seconds of an answered token over the original's, by the simulation."""
        if not self._ratios:
            self._ratios[""] = self.simulation(_original_formats(self.question)).output_tok_s
        if candidate.format not in self._ratios:
            self._ratios[candidate.format] = self.simulation(_formats(candidate)).output_tok_s
        return self._ratios[""] / self._ratios[candidate.format]

    def cost(self, candidate: Candidate, replayed: WorkloadReplay | None) -> WorkloadCost | None:
        """What the workload takes with a plan, beside the original; None where times were not measured.

        replayed: what came of running it.
        """
        if self.table is None:
            return None
        smaller, original = (self.simulation(f) for f in (_formats(candidate), _original_formats(self.question)))
        return workload_cost(self.purpose.workload, smaller, original, self.purpose.usd_per_hour, replayed)

    def moves(self, candidate: Candidate, room: float) -> list[Move]:
        """What the plan did not do, and why. room: nats per token that it may lose by the sensitivities."""
        parts, sensitivity = self.studied.parts, self.studied.sensitivity
        rest = rejected_moves(parts, sensitivity, self.cost_of, candidate.choices, room)
        own = candidate.plan.experts
        return [self._of_experts(one, candidate) for one in self.experts if one.move.plan != own] + rest

    def _of_experts(self, judged: JudgedMove, candidate: Candidate) -> Move:
        """A change of experts that a plan did not make."""

        def cost(config: ModelConfig) -> float:
            return sum(self.cost_of(p, FORMATS[candidate.choices[p.name].format]) for p in parts_of(config))

        return Move(
            part="experts",
            chosen="as they are" if not candidate.plan.experts.changes else "changed otherwise",
            rejected=judged.move.name,
            cost=cost(judged.config) - cost(self.question.config),
            loss=judged.kl.value,
            why=judged.why if not judged.accepted else f"{judged.why}, but saves less for its loss than what was taken",
        )


def find_plans(
    question: Question,
    studied: Studied,
    purpose: Purpose,
    workspace: Path,
    progress: Progress,
    experts: tuple[JudgedMove, ...] = (),
) -> Plans:
    """The Pareto front on this device.

    experts: changes of experts that were measured; those accepted are made with every choice of formats. workspace: for
    times that are not kept elsewhere. Raises QualityError for a service level that no plan keeps.
    """
    table = _table(question, studied, workspace, progress)
    cost_of: CostOf = bytes_cost
    if table is not None:
        counts = StepCounts()
        times = PlannedTimes(table, _uniform(question, TYPICAL))
        _replayed(question, purpose.workload, counts.watching(times.of_step))
        plain, part = counts.cost(table), next(p for p in studied.parts if p.group is not None)
        byte_s = plain(part, FORMATS["int8"]) / bytes_cost(part, FORMATS["int8"])
        cost_of = counts.cost(table, byte_s=STORED_SHARE * byte_s)
    found: list[Candidate] = []
    for judged in (None, *(one for one in experts if one.accepted)):
        one = candidates(
            question.config if judged is None else judged.config,
            studied.parts if judged is None else parts_of(judged.config),
            studied.sensitivity,
            cost_of,
            question.source,
            portable=question.portable,
            activations=question.activations,
            kv_cache=question.kv_cache,
            num_points=NUM_POINTS,
        )
        found += one if judged is None else [_with_experts(candidate, judged) for candidate in one]
    found = undominated(found)
    if not found:
        raise QualityError("no plan makes this model cheaper here; name a format by --format to have it made anyway")
    plans = Plans(
        candidates=tuple(found),
        basis="bytes" if table is None else "seconds",
        cost_of=cost_of,
        studied=studied,
        question=question,
        purpose=purpose,
        table=table,
        experts=experts,
    )
    return _within_level(plans)


def _with_experts(candidate: Candidate, judged: JudgedMove) -> Candidate:
    """A plan for the model that a change of experts makes; its losses are taken to add up."""
    return replace(
        candidate,
        format=f"{candidate.format}-{judged.move.short}",
        plan=replace(candidate.plan, experts=judged.move.plan),
        predicted_kl=(candidate.predicted_kl or 0.0) + judged.kl.value,
    )


def _within_level(plans: Plans) -> Plans:
    """The plans that keep the service level: a cheaper plan is a faster one, so that the first to fail ends it."""
    level = plans.purpose.workload.service_level
    if level.ttft_s is None and level.time_per_token_s is None:
        return plans
    if plans.table is None:
        raise ConfigError(
            "slo: step times can't be measured on this device yet, so no service level can be kept; leave it out"
        )
    fastest = plans.simulation(_formats(plans.candidates[0]))
    if not fastest.level_met:
        raise QualityError(
            f"no plan keeps this service level: the fastest, {plans.candidates[0].format}, answers requests that come "
            f"alone with a first token after {fastest.ttft_s.p99:.3g} s and {fastest.time_per_token_s.p99:.3g} s a "
            f"token (99th percentiles); ask for no less (--slo ttft={fastest.ttft_s.p99 * 1.05:.2g}s,"
            f"tpot={fastest.time_per_token_s.p99 * 1.05e3:.2g}ms)"
        )
    low, high = 0, len(plans.candidates)
    while high - low > 1:
        middle = (low + high) // 2
        if plans.simulation(_formats(plans.candidates[middle])).level_met:
            low = middle
        else:
            high = middle
    return replace(plans, candidates=plans.candidates[:high])


def _table(question: Question, studied: Studied, workspace: Path, progress: Progress) -> DeviceTable | None:
    """Times of every option on this device; None where our C++ does not run the plans."""
    if not question.config.plain:
        log.info("plans are ranked by the bytes that a token reads: steps of this kind of model are not timed")
        return None
    if question.device != "cpu":
        log.info("step times are measured on the CPU only: plans are ranked by the bytes that a token reads")
        return None
    if reason := native_library.available():
        log.info("plans are ranked by the bytes that a token reads: %s", reason)
        return None
    ops = native.NativeOps(activations=question.activations)
    formats = {s.format for scores in studied.sensitivity.parts.values() for s in scores}
    formats |= {f.name for f in question.source.values()} | {TYPICAL, "int8"}
    with progress.task("Timing every product", "products") as advance:
        return device_table(
            question.config,
            ops,
            formats,
            kv_format=question.kv_cache,
            version=__version__,
            folder=cache_folder("device") or workspace / "device",
            progress=advance,
        )


def _replayed(question: Question, workload: Workload, seconds: Callable[[Step], float]) -> tuple[float, Simulation]:
    engine = EngineConfig()
    config = question.config.with_kv_format(question.kv_cache)
    return replay(
        workload, seconds, engine=engine, num_blocks=cache_blocks(config, engine, None), context=config.context
    )


def _formats(candidate: Candidate) -> dict[str, str]:
    return {name: choice.format for name, choice in candidate.choices.items() if name != "embedding"}


def _original_formats(question: Question) -> dict[str, str]:
    return {g.name: question.source[g.members[0].name].name for g in groups(question.config)}


def _uniform(question: Question, name: str) -> dict[str, str]:
    """A format for every group that it fits, int8 for the others."""
    return {g.name: "int8" if FORMATS[name].refusal(g.members[0].shape[1]) else name for g in groups(question.config)}
