"""Candidates as models on disk: made once, found again by a run that goes on, scales tuned where asked."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halve.api.bundle import read_plan
from halve.api.job import Job, label
from halve.api.model import torch_ops
from halve.api.study import first_tokens, statistics_of
from halve.checkpoint import Checkpoint, open_checkpoint
from halve.compress import Energies, ModuleReport, Statistics, apply_plan, calibrate
from halve.compress.shrink import write_shrunk
from halve.compress.tune import tune, write_tuned
from halve.core.errors import ConfigError, HalveError
from halve.core.plan import ExpertPlan
from halve.core.record import from_dict, to_dict
from halve.evaluate.scorer import DecoderScorer
from halve.models import CheckpointSource, ModelConfig, load_config, load_decoder
from halve.search import Candidate

log = logging.getLogger("halve")

TUNE_STEPS = 48
HELD_OUT_TOKENS = 2048  # of selection text that says which step of tuning is kept


def calibrated(job: Job, candidate: Candidate) -> Statistics:
    """What a named format's method needs to know of inputs."""
    if candidate.method == "rtn":
        return Statistics()
    folder = job.workspace.path
    return statistics_of(
        job.checkpoint,
        job.config,
        job.texts,
        job.device,
        folder,
        folder,
        job.progress,
        hessians=candidate.method == "gptq",
    )


def make(job: Job, candidate: Candidate, statistics: Statistics) -> tuple[Path, tuple[ModuleReport, ...]]:
    """Write a candidate's model into the workspace; only the newest is kept on disk."""
    name = f"model-{candidate.format}-{candidate.method}"
    directory = job.workspace.path / name
    if (modules := made_before(job, directory)) is not None:
        return directory, modules
    for old in job.workspace.path.glob("model-*"):
        shutil.rmtree(old)
    directory = job.workspace.fresh_directory(name)
    with (
        _source(job, candidate.plan.experts, statistics) as (checkpoint, config, energies),
        job.progress.task(f"Writing {label(candidate)}", "matrices") as advance,
    ):
        modules = apply_plan(
            checkpoint,
            config,
            candidate.plan,
            directory,
            energies=energies,
            hessians=statistics.hessians,
            progress=advance,
        )
    with open_checkpoint(directory) as made:
        sha256 = made.reader.sha256()
    job.workspace.state["made"] = {"name": name, "modules": [to_dict(m) for m in modules], "sha256": sha256}
    job.workspace.save_state()
    job.workspace.made_here.add(name)
    return directory, modules


@contextmanager
def _source(
    job: Job, experts: ExpertPlan, statistics: Statistics
) -> Iterator[tuple[Checkpoint, ModelConfig, Energies | None]]:
    """What a plan is applied to: the original, or the original with other experts, written and calibrated once."""
    if not experts.changes:
        yield job.checkpoint, job.config, statistics.energies
        return
    folder = job.workspace.path / "experts"
    if experts not in job.shrunk:
        job.shrunk.clear()
        shutil.rmtree(folder, ignore_errors=True)
        with job.progress.task("Writing other experts", "matrices") as advance:
            write_shrunk(job.checkpoint, CheckpointSource(job.checkpoint), job.config, experts, folder, advance)
    with open_checkpoint(folder) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        if experts not in job.shrunk:
            with job.progress.task("Calibrating other experts", "layers") as advance:
                job.shrunk[experts] = calibrate(
                    config,
                    CheckpointSource(checkpoint),
                    job.texts.calibration,
                    window_tokens=job.texts.window_tokens,
                    device=job.device,
                    progress=advance,
                )
        yield checkpoint, config, job.shrunk[experts]


def made_before(job: Job, directory: Path) -> tuple[ModuleReport, ...] | None:
    """Modules of a candidate that lies whole in the workspace; None where it must be made, said where it is damaged.

    What another run left is read and compared with the hash that it noted.
    """
    made = job.workspace.state.get("made")
    if not isinstance(made, dict) or made.get("name") != directory.name or not directory.exists():
        return None
    try:
        if directory.name not in job.workspace.made_here:
            with open_checkpoint(directory) as found:
                if found.reader.sha256() != made["sha256"]:
                    raise ConfigError(f"{directory}: its weights are not those that were written")
            job.workspace.made_here.add(directory.name)
        return tuple(from_dict(ModuleReport, raw) for raw in made["modules"])
    except (HalveError, OSError, KeyError, TypeError) as error:
        log.warning("%s can't be used and is made again: %s", directory.name, error)
        return None


def make_tuned(
    job: Job,
    original: DecoderScorer,
    base: Candidate,
    candidate: Candidate,
    statistics: Statistics,
    seconds: float,
) -> Path:
    """Write a candidate whose scales and norms are tuned on calibration text, under its own name."""
    state, directory = job.workspace.state, job.workspace.path / f"model-{candidate.format}-{candidate.method}"
    if made_before(job, directory) is not None and "tuning" in state:
        return directory
    # What was known of another one of this name is not known of this one; an opening of the sealed text still counts.
    state.get("judged", {}).pop(label(candidate), None)
    if (opened := state.get("opened", {}).pop(label(candidate), None)) is not None:
        state["opened"][f"{label(candidate)}, made before"] = opened
    source, modules = make(job, base, statistics)
    directory = job.workspace.fresh_directory(directory.name)
    with open_checkpoint(source) as bundle, job.progress.task(f"Tuning {label(candidate)}", "steps") as advance:
        plan = read_plan(bundle)
        config = load_config(bundle, plan)
        smaller = load_decoder(bundle, config.with_kv_format("fp32"), torch_ops(job.device, "fp32", widened=False))
        tuned = tune(
            original.decoder,
            smaller,
            job.texts.calibration,
            window_tokens=job.texts.window_tokens,
            steps=TUNE_STEPS,
            seconds=seconds,
            held_out=first_tokens(job.texts.selection[::-1], HELD_OUT_TOKENS),
            progress=advance,
        )
        write_tuned(bundle, config, plan, tuned, directory)
    shutil.rmtree(source)
    record = tuned.record
    log.info(
        "scales and norms tuned in %d steps: KL %.4g to %.4g on calibration text, %.4g to %.4g on held-out text",
        record.steps,
        record.first_kl,
        record.last_kl,
        record.held_out_first_kl,
        record.held_out_kl,
    )
    with open_checkpoint(directory) as made:
        sha256 = made.reader.sha256()
    state["tuning"] = to_dict(record)
    state["made"] = {"name": directory.name, "modules": [to_dict(m) for m in modules], "sha256": sha256}
    job.workspace.save_state()
    job.workspace.made_here.add(directory.name)
    return directory
