"""The cost on a workload that a certificate tells, found again: this device timed anew, the same requests replayed."""

import shlex
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from halve import __version__
from halve.api.plans import ORIGINAL, replayed
from halve.api.progress import Progress
from halve.api.replayed import Paced
from halve.api.serving import engine_for
from halve.api.workloads import PRESETS, level_of, workload_cost, workload_of
from halve.checkpoint import Checkpoint
from halve.core.certificate import Certificate, WorkloadCost, WorkloadReplay
from halve.core.plan import Plan
from halve.engine import Simulation
from halve.kernels import native_library
from halve.models import ModelConfig, load_config, stored_formats
from halve.search.device_table import PlannedTimes, device_table
from halve.search.reads import Reads
from halve.search.sensitivity import parts_of

DEFAULT_WORKLOAD = "chat"


@dataclass(frozen=True, kw_only=True)
class CostAgain:
    """A workload as it is foretold now. simulations: of the original and the smaller model."""

    paced: Paced
    simulations: tuple[Simulation, Simulation]
    usd_per_hour: Decimal | None

    def cost(self, replayed: WorkloadReplay | None) -> WorkloadCost:
        """As a certificate has it. replayed: what came of running it."""
        original, smaller = self.simulations
        return workload_cost(self.paced.workload, smaller, original, self.usd_per_hour, replayed)


def cost_again(
    recorded: Certificate,
    checkpoints: tuple[Checkpoint, Checkpoint],
    config: ModelConfig,
    plan: Plan,
    progress: Progress,
) -> CostAgain | str:
    """The workload's cost as it is foretold now, or why it is not. checkpoints: of the original and the smaller model.

    Nothing of an earlier measurement is read.
    """
    cost = recorded.workload_cost
    if cost is None:
        return "nothing is recorded"
    if cost.basis == "estimated":
        return f"it was estimated for {cost.device}, not measured"
    if reason := native_library.available():
        return reason
    if plan.speculation.method != "none":
        return "it was foretold with guesses, which are not counted again"
    word, level = _asked(recorded.inputs.command)
    if word not in PRESETS and not Path(word).exists():
        return f"there is no trace {word}"
    workload = workload_of(word, config.context, level_of(level))
    (before, reads_before), (after, reads_after) = map(_formats, checkpoints)
    own, caches = plan.activations.format, plan.kv_cache.formats(config.num_layers)
    formats = {ORIGINAL: set(before.values())}
    formats[own] = formats.get(own, set()) | set(after.values())
    with progress.task("Timing every product", "products") as advance:
        table = device_table(
            config,
            formats,
            caches=(*plan.kv_cache.names, ORIGINAL),
            folder=None,
            version=__version__,
            progress=advance,
        )
    engine = engine_for(plan.serving)
    original, smaller = (
        replayed(workload, times, config, engine)
        for times in (
            PlannedTimes(table, before, ORIGINAL, (ORIGINAL,) * config.num_layers, reads_before),
            PlannedTimes(table, after, own, caches, reads_after),
        )
    )
    return CostAgain(
        paced=Paced(
            workload=workload,
            paces=(original[0], smaller[0]),
            foretold_s=(original[1].duration_s, smaller[1].duration_s),
        ),
        simulations=(original[1], smaller[1]),
        usd_per_hour=None if recorded.inputs.price is None else Decimal(recorded.inputs.price),
    )


def _formats(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, Reads]]:
    """The stored format of each fused group, or of experts of one that share it, to which tokens go alike."""
    config = load_config(checkpoint)
    stored = stored_formats(checkpoint, config)
    formats: dict[str, str] = {}
    reads: dict[str, Reads] = {}
    for part in parts_of(config):
        if part.group is None:
            continue
        by_format: dict[str, set[int]] = {}
        for module in part.modules:
            by_format.setdefault(stored[module.name].name, set()).add(-1 if module.expert is None else module.expert)
        for fmt, experts in by_format.items():
            name = part.name if len(by_format) == 1 else part.group.of_experts(experts).name
            formats[name] = fmt
            if part.reads is not None:
                reads[name] = replace(part.reads, own=part.reads.own[: len(experts)])
    return formats, reads


def _asked(command: str) -> tuple[str, str | None]:
    """The workload and the service level of the command that made a bundle."""
    words = shlex.split(command)
    given = {flag: words[words.index(flag) + 1] for flag in ("--workload", "--slo") if flag in words[:-1]}
    return given.get("--workload", DEFAULT_WORKLOAD), given.get("--slo")
