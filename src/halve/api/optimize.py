"""The verb `optimize`: check everything that can be checked first, run the pipeline, publish the bundle."""

import datetime
import hashlib
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from halve.api.bundle import CERTIFICATE_FILE, FRONT_FILE, REPORT_FILE, SEALED_FILE, SEEN_FILE, read_draft
from halve.api.certify import plan_sha256
from halve.api.elsewhere import estimates_warning, refuse_elsewhere, where
from halve.api.facts import environment, versions
from halve.api.front import front_of
from halve.api.job import MAX_ATTEMPTS, Job
from halve.api.model import check_served
from halve.api.page import report_page
from halve.api.pipeline import Outcome, run
from halve.api.plans import Purpose
from halve.api.preflight import check, in_words, preflight, sealed_tokens, smallest_formats
from halve.api.progress import SILENT, Progress
from halve.api.questions import judge_tasks, keep_tasks, read_tasks
from halve.api.replayed import check_replay
from halve.api.roofline import judged, rooflines
from halve.api.scorers import reload
from halve.api.study import Question, is_large
from halve.api.texts import prepare_texts
from halve.api.trial import Trial, run_trial
from halve.api.workloads import level_of, price_of, seconds_of, workload_of
from halve.api.workspace import Workspace, refuse_existing, write_atomic
from halve.checkpoint import open_checkpoint, resolve
from halve.compress import ActivationChoice, KVChoice, rounded_format
from halve.compress import resolve as resolve_plan
from halve.core.certificate import Certificate, Cost, Inputs, JudgedBy, Preflight, SealedText, Size, TaskResult
from halve.core.errors import ConfigError, FormatError, OutputError, PlanError
from halve.core.plan import ActivationFormat, KVFormat
from halve.core.record import to_json
from halve.core.units import parse_percent
from halve.core.workload import ServiceLevel
from halve.data import write_documents
from halve.evaluate.canary import canary
from halve.formats import Format, format_named
from halve.kernels import native_library
from halve.models import ModelConfig, load_config, sizes, stored_formats
from halve.models.names import num_parameters
from halve.report import render
from halve.search import Candidate, bytes_per_token, method_for, plan_for
from halve.search.uniform import MethodChoice
from halve.text import Tokenizer

log = logging.getLogger("halve")

DEFAULT_FORMAT = "int8"  # without a limit there is nothing to search for: the format that hardly loses anything

DEFAULT_WORKLOAD = "chat"
FIGURES = ("ppl", "kl")


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """A finished bundle."""

    path: Path
    certificate: Certificate
    report: Path


def optimize(
    model: str | Path,
    out: str | Path,
    *,
    max_quality_loss: float | str | None = None,
    format: str = "auto",
    method: MethodChoice = "auto",
    activations: ActivationChoice = "auto",
    kv_cache: KVChoice = "auto",
    portable: bool = False,
    calibration: str | Path | None = None,
    quality: Sequence[str] = (),
    task_margin: float | str | None = None,
    workload: str | Path = DEFAULT_WORKLOAD,
    slo: str | None = None,
    price_per_hour: str | float | None = None,
    time: str | None = None,
    pick: int | None = None,
    keep_text: bool = True,
    force: bool = False,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Optimized:
    """Make a smaller model that loses at most `max_quality_loss`, certify it, write it to `out`.

    max_quality_loss: perplexity ratio - 1, as `"1%"` or 0.01; without it the bundle is made and measured.
    format: `auto` for the cheapest plan that passes, each fused group in a format of its own; or the name of one format
    for all. method: `rtn` rounds to nearest,
    `clip` weighs each input by its energy on the calibration text, `gptq` makes later weights up for the error of
    earlier ones; `auto` takes, in a search, gptq below 8 bits and clip above (in models of 200 million parameters and
    more clip alone), and with a format's name clip for integers and rtn for fp8.
    activations, kv_cache: formats that the inputs of products, and keys and values, are rounded to where the smaller
    model runs and where it is judged; `auto` takes int8 activations with integer weights and a bf16 cache, and fp32 for
    both in a portable bundle.
    portable: the bundle also opens in transformers and vLLM (embeddings stay in 16 bits).
    calibration: a text file or directory; without it the package's own mixed text. It is split three ways:
    calibration, selection, and sealed text that only the certificate sees. keep_text: the bundle keeps the sealed
    text, so that anyone can verify it; else its hash and path only.
    quality: `tasks=FILE`, any number of them: questions that both models answer beside the text
    (`halve.evaluate.tasks`); `ppl` or `kl`: the limit holds for that figure alone, not for both. task_margin: the most
    that accuracy may have fallen, at 95 %; without it it is measured.
    workload: what cost is counted on: `chat`, `code`, `batch` or a trace (`halve.data.read_trace`). slo: what every
    plan must keep on it, as `ttft=2s,tpot=100ms`. price_per_hour: of the machine, in dollars, for $ a million tokens.
    time: that the search may take, as `30m`: swaps are then measured as far as they fit, and the cheapest plan that has
    passed by then is certified. pick: the plan of this number of the front (`halve/front.json`) instead of the cheapest
    within the limit. device: where the model is calibrated and scored, any torch device; or a device that is not
    here, by its name in the catalogue (`H100`, `L4`): then all of it runs on the CPU, and cost is estimated for it.

    Raises UserError's kinds: CheckpointError, ConfigError, FormatError, DataError, QualityError when nothing meets
    the limit, OutputError; nothing is left behind then.
    """
    limit = None if max_quality_loss is None else parse_percent(max_quality_loss, "max_quality_loss")
    _check_choice("activations", activations, get_args(ActivationFormat))
    _check_choice("kv_cache", kv_cache, get_args(KVFormat))
    price, time_s = price_of(price_per_hour), None if time is None else seconds_of(time, "time")
    searched = format == "auto" and (limit is not None or pick is not None)
    _check_search(searched, activations, workload=workload, slo=slo, time=time, pick=pick)
    margin = None if task_margin is None else parse_percent(task_margin, "task_margin")
    figures = [word for word in quality if word in FIGURES]
    tasks = read_tasks([word for word in quality if word not in FIGURES], margin)
    judged_by: JudgedBy = "both" if len(set(figures)) != 1 else "ppl" if figures[0] == "ppl" else "kl"
    text_path = None if calibration is None else Path(calibration)
    with open_checkpoint(resolve(str(model))) as checkpoint:
        if Path(out).resolve() == checkpoint.path.resolve():
            raise OutputError(f"{out}: is the model itself; choose another output")
        refuse_existing(Path(out), force=force)  # now, not after minutes of reading and hashing
        given, device, elsewhere = where(device)
        served = "auto" if device == "cpu" else device
        check_served(served, *("fp32" if chosen == "auto" else chosen for chosen in (activations, kv_cache)))
        config = load_config(checkpoint).with_kv_format("fp32")
        source = stored_formats(checkpoint, config)
        named = _named(config, source, format, method, activations, kv_cache, portable=portable, search=searched)
        rounded = rounded_format(portable, activations, kv_cache)
        choices = _roundings(config, activations, kv_cache, rounded, portable=portable, device=given)
        context = config.context
        purpose = Purpose(
            workload=workload_of(str(workload), context, level_of(slo)), usd_per_hour=price, elsewhere=elsewhere
        )
        refuse_elsewhere(
            elsewhere, config, (source, smallest_formats(config, source, portable=portable)), purpose.workload
        )
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        texts = prepare_texts(
            text_path,
            tokenizer,
            config,
            selected=searched,
            most_sealed=sealed_tokens(config) if device == "cpu" and is_large(config) else None,
        )
        command = _command(
            model,
            out,
            max_quality_loss=max_quality_loss,
            format=format,
            method=method,
            activations=activations,
            kv_cache=kv_cache,
            portable=portable,
            calibration=calibration,
            quality=quality,
            task_margin=task_margin,
            workload=workload,
            slo=slo,
            price_per_hour=price_per_hour,
            time=time,
            pick=pick,
            keep_text=keep_text,
            device=given,
        )
        before = preflight(
            config,
            source,
            texts,
            Path(out),
            weight_bytes=checkpoint.weight_bytes,
            formats=None if named is None else _stored(named, config, source),
            searched=searched,
            gptq=_may_gptq(named, method, config),
            portable=portable,
            device=device,
            activations=rounded[0],
        )
        warnings = check(
            before,
            Path(out),
            limit=limit,
            level=purpose.workload.service_level if elsewhere is None else ServiceLevel(),
            time_s=time_s,
            activations=rounded[0] if named is None else named.plan.activations.format,
        )
        before = replace(before, warnings=(*warnings, *estimates_warning(elsewhere, config)))
        for line in in_words(before):
            log.info("%s", line)
        with progress.task("Hashing the weights", "bytes") as advance:
            model_sha256 = checkpoint.sha256(advance)
        key = {
            "model": model_sha256,
            "text": texts.calibration_sha256 + texts.selection_sha256 + texts.sealed_sha256,
            "limit": limit,
            "formats": ["searched", method] if named is None else [named.format, named.method],
            "workload": [purpose.workload.name, slo],
            "pick": pick,
            "judged by": judged_by,
            "activations": activations,
            "kv_cache": kv_cache,
            "portable": portable,
            "device": given,
            "versions": versions(),
        }
        with Workspace(Path(out), key, force=force, resume=resume) as workspace:
            job = Job(
                checkpoint=checkpoint,
                config=config,
                source=source,
                named=named,
                question=Question(
                    checkpoint=checkpoint,
                    config=config,
                    source=source,
                    method=method,
                    portable=portable,
                    activations=choices[0],
                    kv_caches=choices[1],
                    device=device,
                    texts=texts,
                    model_sha256=model_sha256,
                ),
                purpose=purpose,
                pick=pick,
                time_s=time_s,
                limit=limit,
                judged_by=judged_by,
                device=device,
                texts=texts,
                workspace=workspace,
                progress=progress,
                foretold_s=before.seconds,
            )
            outcome = run(job)
            with open_checkpoint(outcome.directory) as smaller:
                trial = run_trial(
                    checkpoint.path,
                    outcome.directory,
                    partial(reload, smaller, device),
                    texts.sealed,
                    served,
                    progress,
                    None if outcome.plans is None else outcome.plans.paced(outcome.candidate),
                    price,
                )
            asked = judge_tasks(checkpoint.path, outcome.directory, tasks, margin, device, progress)
            inputs = Inputs(
                model_sha256=model_sha256,
                calibration_sha256=texts.calibration_sha256,
                sealed_sha256=texts.sealed_sha256,
                device=environment(device),
                workload=purpose.workload.name if searched else None,
                price=None if price is None else str(price),
                versions=versions(),
                command=command,
            )
            certificate = _certificate(job, outcome, inputs, trial, asked, before, keep_text=keep_text)
            _finish(job, outcome, trial, certificate, keep_text=keep_text)
            if keep_text:
                keep_tasks(outcome.directory, tasks)
            workspace.publish(outcome.directory)
    path = Path(out)
    return Optimized(path=path, certificate=certificate, report=path / REPORT_FILE)


def _check_choice(name: str, value: str, formats: Sequence[str]) -> None:
    if value not in ("auto", *formats):
        raise PlanError(f"{name}: {value!r} is not one of auto, {', '.join(formats)}")


def _check_search(
    searched: bool, activations: str, *, workload: str | Path, slo: str | None, time: str | None, pick: int | None
) -> None:
    """Refuse what only a search understands where there is none, and what no search can find."""
    given = {"workload": workload != DEFAULT_WORKLOAD, "slo": slo is not None, "time": time is not None}
    given["pick"] = pick is not None
    if not searched and (without := [name for name, there in given.items() if there]):
        raise ConfigError(
            f"{', '.join(without)}: only a search for plans takes this; leave out --format, and give --max-quality-loss"
        )
    if searched and activations == "fp8":
        raise PlanError(
            "activations fp8: they meet fp8 weights only, and the search stores integers; take int8, or --format fp8"
        )


def _named(
    config: ModelConfig,
    source: Mapping[str, Format],
    format: str,
    method: MethodChoice,
    activations: ActivationChoice,
    kv_cache: KVChoice,
    *,
    portable: bool,
    search: bool,
) -> Candidate | None:
    """The plan of the format that was named, or of the default; None where plans are searched. Raises FormatError."""
    if search:
        return None
    if format == "auto":
        log.info("no --max-quality-loss, so nothing to search for: taking %s", DEFAULT_FORMAT)
    fmt = format_named(DEFAULT_FORMAT if format == "auto" else format)
    if not fmt.scaled:
        raise FormatError(f"format {fmt.name} stores floats as they are and makes nothing smaller; take int8 or below")
    stored, chosen = dict(source), method_for(fmt, method)
    plan = plan_for(config, fmt, chosen, portable=portable, source=stored, activations=activations, kv_cache=kv_cache)
    size = bytes_per_token(config, resolve_plan(plan, config), stored)
    return Candidate(format=fmt.name, method=chosen, plan=plan, bytes_per_token=size, choices={})


def _roundings(
    config: ModelConfig,
    activations: ActivationChoice,
    kv_cache: KVChoice,
    usual: tuple[ActivationFormat, KVFormat],
    *,
    portable: bool,
    device: str,
) -> tuple[tuple[ActivationFormat, ...], tuple[KVFormat, ...]]:
    """What a search may round beside the weights, the usual first: as named, or what steps are timed with here."""
    timed = device == "cpu" and not portable and config.timed and native_library.available() is None
    others: tuple[tuple[ActivationFormat, ...], tuple[KVFormat, ...]] = (("bf16",), ("int8", "int4"))
    return (
        (usual[0], *(others[0] if timed and activations == "auto" else ())),
        (usual[1], *(others[1] if timed and kv_cache == "auto" else ())),
    )


def _stored(named: Candidate, config: ModelConfig, source: Mapping[str, Format]) -> dict[str, Format]:
    """The format of every module by a named plan."""
    return {a.module.name: a.format or source[a.module.name] for a in resolve_plan(named.plan, config)}


def _may_gptq(named: Candidate | None, method: MethodChoice, config: ModelConfig) -> bool:
    """Whether any plan of this run may be rounded by gptq, which needs second moments."""
    if named is not None:
        return named.method == "gptq"
    return method == "gptq" or (method == "auto" and not is_large(config))


def _certificate(
    job: Job,
    outcome: Outcome,
    inputs: Inputs,
    trial: Trial,
    asked: tuple[TaskResult, ...],
    before: Preflight,
    *,
    keep_text: bool,
) -> Certificate:
    with open_checkpoint(outcome.directory) as bundle:
        size, weights_sha256 = bundle.weight_bytes, bundle.reader.sha256()
        pairs = zip(("original", "smaller"), (job.checkpoint, bundle), trial.speeds, strict=True)
        found = [judged(name, checkpoint, load_config(checkpoint), speed) for name, checkpoint, speed in pairs]
    measured = [one for one in found if one is not None]
    limits = rooflines(measured, read_gb_s=trial.read_gb_s) if job.device == "cpu" else ()
    if trial.replayed is not None:
        check_replay(trial.replayed, job.purpose.workload, limits)
    float32 = 4 * num_parameters(job.config)
    original_bytes_per_token = sizes.bytes_per_token(job.config, job.source)
    return Certificate(
        verdict="measured" if job.limit is None else "pass",
        max_quality_loss=job.limit,
        quality=replace(outcome.quality, tasks={one.name: one.accuracy for one in asked}),
        size=Size(
            bytes=size,
            original_bytes=job.checkpoint.weight_bytes,
            float32_bytes=float32,
            ratio=size / float32,
        ),
        cost=Cost(
            basis="bytes",
            usd_per_mtok=None,
            original_usd_per_mtok=None,
            ratio=outcome.candidate.bytes_per_token / original_bytes_per_token,
        ),
        speed=trial.speeds[1],
        original_speed=trial.speeds[0],
        inputs=inputs,
        sealed=SealedText(
            kept=keep_text,
            source=job.texts.source,
            window_tokens=job.texts.window_tokens,
            document_tokens=job.texts.document_tokens,
        ),
        attempts=outcome.attempts,
        max_attempts=MAX_ATTEMPTS if job.searched else 1,
        weights_sha256=weights_sha256,
        plan_sha256=plan_sha256(outcome.directory),
        seen_sha256=hashlib.sha256(job.texts.seen.to_json().encode()).hexdigest(),
        served=trial.served,
        tasks=asked,
        canary=canary(trial.parted, trial.answer_tokens, outcome.quality.flip_rate, asked),
        speed_ratios=trial.ratios,
        rooflines=limits,
        judged_by=job.judged_by,
        workload_cost=None if outcome.plans is None else outcome.plans.cost(outcome.candidate, trial.replayed),
        tuning=outcome.tuning,
        draft=read_draft(outcome.directory),
        preflight=before,
    )


def _finish(job: Job, outcome: Outcome, trial: Trial, certificate: Certificate, *, keep_text: bool) -> None:
    """Add what makes a model directory a bundle: certificate, sealed text, report."""
    directory = outcome.directory
    if keep_text:
        write_documents(directory / SEALED_FILE, job.texts.sealed_documents)
    if outcome.plans is not None:
        write_atomic(directory / FRONT_FILE, to_json(front_of(outcome)))
    write_atomic(directory / SEEN_FILE, job.texts.seen.to_json())
    write_atomic(directory / CERTIFICATE_FILE, to_json(certificate))
    created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = report_page(job, outcome, trial, certificate, created)
    write_atomic(directory / REPORT_FILE, render(page))


def _command(
    model: str | Path,
    out: str | Path,
    *,
    max_quality_loss: float | str | None,
    format: str,
    method: str,
    activations: str,
    kv_cache: str,
    portable: bool,
    calibration: str | Path | None,
    quality: Sequence[str],
    task_margin: float | str | None,
    workload: str | Path,
    slo: str | None,
    price_per_hour: str | float | None,
    time: str | None,
    pick: int | None,
    keep_text: bool,
    device: str,
) -> str:
    """The shell command that makes this bundle again."""
    words = ["halve", "optimize", str(model), "-o", str(out)]
    if max_quality_loss is not None:
        words += ["--max-quality-loss", str(max_quality_loss)]
    words += ["--format", format, "--method", method, "--activations", activations, "--kv-cache", kv_cache]
    if portable:
        words.append("--portable")
    if calibration is not None:
        words += ["--calibration", str(calibration)]
    for word in quality:
        words += ["--quality", word]
    if task_margin is not None:
        words += ["--task-margin", str(task_margin)]
    if str(workload) != DEFAULT_WORKLOAD:
        words += ["--workload", str(workload)]
    searching = {"--slo": slo, "--price-per-hour": price_per_hour, "--time": time, "--pick": pick}
    for flag, value in searching.items():
        words += [] if value is None else [flag, str(value)]
    if not keep_text:
        words.append("--no-keep-text")
    if device != "cpu":
        words += ["--device", device]
    return shlex.join(words)
