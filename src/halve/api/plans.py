"""From what was learned of a model to the plans that are worth making, cheapest first, for one device and workload."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import Literal

from halve import __version__
from halve.api.elsewhere import estimated_cost
from halve.api.expert_moves import JudgedMove
from halve.api.model import cache_blocks
from halve.api.progress import Progress
from halve.api.replayed import Paced
from halve.api.serving import best_serving, engine_for
from halve.api.study import Question, Studied
from halve.api.workloads import ALONE, replay, workload_cost
from halve.compress import resolve
from halve.core.cache import cache_folder
from halve.core.certificate import WorkloadCost, WorkloadReplay
from halve.core.errors import ConfigError, QualityError
from halve.core.plan import ActivationFormat, KVCache, Serving
from halve.core.workload import ServiceLevel, Workload
from halve.economics.catalogue import CatalogueDevice
from halve.engine import EngineConfig, Simulation, simulate
from halve.engine.scheduler import Step
from halve.formats import FORMATS
from halve.kernels import native_library
from halve.models import ModelConfig
from halve.models.names import experts_of, groups
from halve.search import Candidate, Move
from halve.search.device_table import DeviceTable, PlannedTimes, device_table
from halve.search.front import (
    STORED_SHARE,
    CostOf,
    Offer,
    StepCounts,
    bytes_cost,
    candidates,
    rejected_moves,
    undominated,
)
from halve.search.sensitivity import losses_of, parts_of

log = logging.getLogger("halve")

NUM_POINTS = 96
ORIGINAL: ActivationFormat = "bf16"  # what the original is rounded to where it is timed
TOO_SLOW = 1.1  # times the usual activations' seconds, with the same weights
TYPICAL = "int4-g64"  # what the steps of a workload are counted with; which they are hardly depends on it


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What a model is for: a workload with its service level, the price of the machine, and which one."""

    workload: Workload
    usd_per_hour: Decimal | None
    elsewhere: CatalogueDevice | None = None  # that it is for, where that is not this one


@dataclass(frozen=True, kw_only=True)
class Plans:
    """candidates: cheapest first. basis: what cost is counted in; table: None where it is bytes.

    costs: of parts, by what activations are rounded to. steps: of the workload; serving: how an engine divides them.
    slower: activations that were left out, and how many times as long the workload takes with them.
    """

    candidates: tuple[Candidate, ...]
    basis: Literal["seconds", "bytes"]
    costs: Mapping[ActivationFormat, CostOf]
    studied: Studied
    question: Question
    purpose: Purpose
    table: DeviceTable | None
    steps: StepCounts | None
    serving: Serving = field(default_factory=Serving)
    slower: Mapping[ActivationFormat, float] = field(default_factory=dict)
    experts: tuple[JudgedMove, ...] = ()
    _found: dict[str, tuple[float, Simulation]] = field(default_factory=dict, compare=False)  # by plan, once simulated

    def served(self, serving: Serving) -> "Plans":
        """The same plans by an engine that divides its steps so."""
        candidates = (replace(one, plan=replace(one.plan, serving=serving)) for one in self.candidates)
        return replace(self, candidates=tuple(candidates), serving=serving, _found={})

    def simulation(self, candidate: Candidate | None) -> Simulation:
        """The workload on a plan, None for the original in bf16."""
        return self._paced(candidate)[1]

    def alone(self, candidate: Candidate) -> Simulation:
        """The workload on a plan where every request comes alone: no pace keeps a service level that this does not."""
        assert self.table is not None, "only measured times can be replayed"
        times, config, engine = times_of(self.table, candidate), self.question.config, engine_for(self.serving)
        workload = self.purpose.workload
        if len({replace(request, arrival_s=0.0) for request in workload.requests}) == 1:
            workload = workload.first(1)  # alone, all of a preset's are answered alike
        return simulate(
            workload.faster(ALONE),
            times.of_step,
            num_blocks=_num_blocks(config, times, engine),
            context=config.context,
            config=engine,
        )

    def _paced(self, candidate: Candidate | None) -> tuple[float, Simulation]:
        assert self.table is not None, "only measured times can be replayed"
        name = "" if candidate is None else candidate.format
        if name not in self._found:
            times = original_times(self.table, self.question) if candidate is None else times_of(self.table, candidate)
            self._found[name] = replayed(self.purpose.workload, times, self.question.config, engine_for(self.serving))
        return self._found[name]

    def foresee(self, candidate: Candidate, found: tuple[float, Simulation]) -> None:
        """Take a pace and what comes of it as what is foretold of a plan from now on."""
        self._found[candidate.format] = found

    def paced(self, candidate: Candidate) -> Paced | None:
        """How fast the original and a plan are to be asked when both are run; None where times were not measured."""
        if self.table is None:
            return None
        original, smaller = self._paced(None), self._paced(candidate)
        return Paced(
            workload=self.purpose.workload,
            paces=(original[0], smaller[0]),
            foretold_s=(original[1].duration_s, smaller[1].duration_s),
        )

    def cost_ratio(self, candidate: Candidate) -> float:
        """Seconds of an answered token over the original's, by the simulation."""
        return self.simulation(None).output_tok_s / self.simulation(candidate).output_tok_s

    def cost(self, candidate: Candidate, replayed: WorkloadReplay | None) -> WorkloadCost | None:
        """What the workload takes with a plan, beside the original; None where times were not measured.

        replayed: what came of running it.
        """
        if self.purpose.elsewhere is not None:
            return self._estimated(self.purpose.elsewhere, candidate)
        if self.table is None:
            return None
        smaller, original = self.simulation(candidate), self.simulation(None)
        return workload_cost(self.purpose.workload, smaller, original, self.purpose.usd_per_hour, replayed)

    def _estimated(self, device: CatalogueDevice, candidate: Candidate) -> WorkloadCost:
        """What a roofline makes of the workload there."""
        config, source = self.question.config, self.question.source
        stored = {a.module.name: a.format or source[a.module.name] for a in resolve(candidate.plan, config)}
        purpose, plan = self.purpose, candidate.plan
        return estimated_cost(device, config, (source, stored), plan, purpose.workload, purpose.usd_per_hour)

    def moves(self, candidate: Candidate, room: float) -> list[Move]:
        """What the plan did not do, and why. room: nats per token that it may lose by the sensitivities."""
        changed = (one.config for one in self.experts if one.move.plan == candidate.plan.experts)
        parts, sensitivity = self.studied.parts(next(changed, self.question.config))
        beside = (candidate.predicted_kl or 0.0) - losses_of(sensitivity, candidate.choices)
        cost_of = self.costs[candidate.plan.activations.format]
        rest = rejected_moves(parts, sensitivity, cost_of, candidate.choices, room - beside)
        own = candidate.plan.experts
        experts = [self._of_experts(one, candidate) for one in self.experts if one.move.plan != own]
        return experts + self._of_settings(candidate, room) + rest

    def _of_settings(self, candidate: Candidate, room: float) -> list[Move]:
        """Other activations, and other caches, with the same weights."""
        if self.table is None or self.steps is None:
            return []
        plan, layers = candidate.plan, self.question.config.num_layers
        caches = plan.kv_cache.formats(layers)
        settings = self.studied.settings
        own = next(s for s in settings if s.activations == plan.activations.format and s.caches == caches)
        now, moves = times_of(self.table, candidate), []
        for other in settings:
            if other == own or (other.activations != own.activations and other.caches != own.caches):
                continue
            then = replace(now, activations=other.activations, caches=other.caches)
            more = other.loss - own.loss
            if ratio := self.slower.get(other.activations):
                more_s = (ratio - 1) * sum(map(now.of, self.steps.steps))
            else:
                more_s = sum(then.of(shape) - now.of(shape) for shape in self.steps.steps)
            if more_s >= 0:
                why = "takes no less time here" if more >= 0 else "loses less, but takes more time than was needed"
            elif more > room - (candidate.predicted_kl or 0.0):
                why = "loses more than the limit leaves"
            else:
                why = "saves less for its loss than what was taken"
            of_cache = other.activations == own.activations
            moves.append(
                Move(
                    part="kv_cache" if of_cache else "activations",
                    chosen=str(plan.kv_cache) if of_cache else own.activations,
                    rejected=str(KVCache.of_layers(other.caches)) if of_cache else other.activations,
                    cost=more_s,
                    loss=more,
                    why=why,
                )
            )
        return moves

    def _of_experts(self, judged: JudgedMove, candidate: Candidate) -> Move:
        """A change of experts that a plan did not make."""
        cost_of = self.costs[candidate.plan.activations.format]

        formats: dict[str, list[str]] = {}  # of a whole group, one for each of its parts
        for name, choice in candidate.choices.items():
            formats.setdefault(experts_of(name)[0], []).append(choice.format)

        def cost(config: ModelConfig) -> float:
            return sum(fmean(cost_of(p, FORMATS[name]) for name in formats[p.name]) for p in parts_of(config))

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
    usual, config = studied.settings[0], question.config
    table = None
    if purpose.elsewhere is None:
        table = _table(question, studied, workspace, progress, {usual.activations})
    offers = {usual.activations: [Offer(setting=usual)]}
    costs: dict[ActivationFormat, CostOf] = {usual.activations: bytes_cost}
    steps, serving = None, Serving()
    slower: dict[ActivationFormat, float] = {}
    if table is not None:
        typical = PlannedTimes(table, _uniform(question, TYPICAL), usual.activations, usual.caches)
        with progress.task("Dividing steps", "ways") as advance:
            serving = best_serving(lambda engine: replayed(purpose.workload, typical, config, engine)[1], advance)
        steps, offers, costs = StepCounts(), {}, {}
        replayed(purpose.workload, typical, config, engine_for(serving), seconds=steps.watching(typical.of_step))
        slower = _slower(question, steps, typical)
        if others := set(question.activations) - {usual.activations} - slower.keys():
            table = _table(question, studied, workspace, progress, {usual.activations, *others})
            assert table is not None
        plain, part = steps.cost(table, usual.activations), next(p for p in parts_of(config) if p.group is not None)
        byte_s = STORED_SHARE * plain(part, FORMATS["int8"]) / bytes_cost(part, FORMATS["int8"])
        for setting in studied.settings:
            if setting.activations in slower:
                continue
            others_s = steps.others_s(replace(typical, activations=setting.activations, caches=setting.caches))
            offer = Offer(setting=setting, cost=others_s, suffix=setting.beside(usual))
            offers.setdefault(setting.activations, []).append(offer)
        costs = {activations: steps.cost(table, activations, byte_s=byte_s) for activations in offers}
    found: list[Candidate] = []
    for judged in (None, *(one for one in experts if one.accepted)):
        changed = config if judged is None else judged.config
        parts, sensitivity = studied.parts(changed)
        for activations, cost_of in costs.items():
            one = candidates(
                changed,
                parts,
                sensitivity,
                cost_of,
                question.source,
                offers[activations],
                portable=question.portable,
                num_points=NUM_POINTS,
            )
            found += one if judged is None else [_with_experts(candidate, judged) for candidate in one]
    if not found:
        raise QualityError("no plan makes this model cheaper here; name a format by --format to have it made anyway")
    plans = Plans(
        candidates=tuple(undominated(found)),
        basis="bytes" if table is None else "seconds",
        costs=costs,
        studied=studied,
        question=question,
        purpose=purpose,
        table=table,
        steps=steps,
        slower=slower,
        experts=experts,
    )
    return _within_level(plans.served(serving), progress)


def _slower(question: Question, steps: StepCounts, typical: PlannedTimes) -> dict[ActivationFormat, float]:
    """Activations with which the workload takes longer than any fewer bits of weights are likely to make up for."""

    def seconds(activations: ActivationFormat) -> float:
        times = replace(typical, activations=activations)
        return sum(times.of(shape) for shape in steps.steps)

    usual, *others = question.activations
    ratios = {one: seconds(one) / seconds(usual) for one in others}
    for one, ratio in ratios.items():
        if ratio > TOO_SLOW:
            log.info("%s activations are left out: the workload takes %.2f times as long with them", one, ratio)
    return {one: ratio for one, ratio in ratios.items() if ratio > TOO_SLOW}


def _with_experts(candidate: Candidate, judged: JudgedMove) -> Candidate:
    """A plan for the model that a change of experts makes; its losses are taken to add up."""
    return replace(
        candidate,
        format=f"{candidate.format}-{judged.move.short}",
        plan=replace(candidate.plan, experts=judged.move.plan),
        predicted_kl=(candidate.predicted_kl or 0.0) + judged.kl.value,
    )


def _within_level(plans: Plans, progress: Progress) -> Plans:
    """The plans that keep the service level. A plan that is cheaper over a whole workload may be slower alone."""
    level = plans.purpose.workload.service_level
    if level.ttft_s is None and level.time_per_token_s is None:
        return plans
    if plans.purpose.elsewhere is not None:
        return plans  # whether it is kept there, the estimate says
    if plans.table is None:
        raise ConfigError(
            "slo: step times can't be measured on this device yet, so no service level can be kept; leave it out"
        )
    for serving in dict.fromkeys((plans.serving, Serving())):  # steps divided for speed may answer later
        plans = plans.served(serving)
        found: list[Simulation] = []
        with progress.task("Holding plans against the service level", "plans") as advance:
            for candidate in plans.candidates:
                found.append(plans.alone(candidate))
                advance(len(found), len(plans.candidates))
        kept = [candidate for candidate, alone in zip(plans.candidates, found, strict=True) if alone.level_met]
        if kept:
            return replace(plans, candidates=tuple(kept))
    nearest, alone = min(zip(plans.candidates, found, strict=True), key=lambda pair: _beyond(level, pair[1]))
    ttft_s, time_per_token_s = alone.ttft_s.p99, alone.time_per_token_s.p99
    raise QualityError(
        f"no plan keeps this service level: the nearest, {nearest.format}, answers requests that come alone with a "
        f"first token after {ttft_s:.3g} s and {time_per_token_s:.3g} s a token (99th percentiles); ask for no less "
        f"(--slo ttft={ttft_s * 1.05:.2g}s,tpot={time_per_token_s * 1.05e3:.2g}ms)"
    )


def _beyond(level: ServiceLevel, found: Simulation) -> float:
    """How many times what the level allows the slower of both takes, at the 99th percentile."""
    asked = ((level.ttft_s, found.ttft_s), (level.time_per_token_s, found.time_per_token_s))
    return max(taken.p99 / most for most, taken in asked if most is not None)


def _table(
    question: Question, studied: Studied, workspace: Path, progress: Progress, wholly: Collection[ActivationFormat]
) -> DeviceTable | None:
    """Times on this device; None where our C++ does not run the plans.

    wholly: activations that every option is timed with; others are with a typical format only.
    """
    if not question.config.timed:
        log.info("plans are ranked by the bytes that a token reads: steps of this kind of model are not timed")
        return None
    if question.device != "cpu":
        log.info("step times are measured on the CPU only: plans are ranked by the bytes that a token reads")
        return None
    if reason := native_library.available():
        log.info("plans are ranked by the bytes that a token reads: %s", reason)
        return None
    scored = {s.format for scores in studied.sensitivity.parts.values() for s in scores} | {TYPICAL, "int8"}
    original = {f.name for f in question.source.values()}
    formats = {one: scored | original if one in wholly else {TYPICAL, "int8"} for one in question.activations}
    formats[ORIGINAL] = formats.get(ORIGINAL, set()) | original
    with progress.task("Timing every product", "products") as advance:
        return device_table(
            question.config,
            formats,
            caches=dict.fromkeys((*question.kv_caches, ORIGINAL)),
            version=__version__,
            folder=cache_folder("device") or workspace / "device",
            progress=advance,
        )


def replayed(
    workload: Workload,
    times: PlannedTimes,
    config: ModelConfig,
    engine: EngineConfig,
    *,
    seconds: Callable[[Step], float] | None = None,
    num_drafts: int = 0,
    draft_rate: float = 0.0,
) -> tuple[float, Simulation]:
    """The highest pace at which a model of these step times keeps a workload's level, and what comes of it then.

    seconds: of a step, where it takes more than `times` says. num_drafts, draft_rate: as `simulate` takes them.
    """
    return replay(
        workload,
        seconds or times.of_step,
        engine=engine,
        num_blocks=_num_blocks(config, times, engine),
        context=config.context,
        num_drafts=num_drafts,
        draft_rate=draft_rate,
    )


def _num_blocks(config: ModelConfig, times: PlannedTimes, engine: EngineConfig) -> int:
    """Of the cache, in the plan's formats."""
    return cache_blocks(config.with_kv_format(times.caches), engine, None)


def times_of(table: DeviceTable, candidate: Candidate) -> PlannedTimes:
    """Step times of a plan."""
    plan = candidate.plan
    formats = {name: choice.format for name, choice in candidate.choices.items() if name != "embedding"}
    caches = plan.kv_cache.formats(table.num_layers)
    return PlannedTimes(table, formats, plan.activations.format, caches, candidate.reads)


def original_times(table: DeviceTable, question: Question) -> PlannedTimes:
    """Step times of the original, run in bf16."""
    formats = {g.name: question.source[g.members[0].name].name for g in groups(question.config)}
    return PlannedTimes(table, formats, ORIGINAL, (ORIGINAL,) * table.num_layers)


def _uniform(question: Question, name: str) -> dict[str, str]:
    """A format for every group that it fits, int8 for the others."""
    return {g.name: "int8" if FORMATS[name].refusal(g.members[0].shape[1]) else name for g in groups(question.config)}
