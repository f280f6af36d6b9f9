"""`optimize`: from a checkpoint to a certified bundle, every stage kept as it ends so that a killed run resumes."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import expm1, log1p
from pathlib import Path
from typing import Literal

from halve.api.bundle import read_plan
from halve.api.certify import score
from halve.api.model import torch_ops
from halve.api.plans import Plans, Purpose, find_plans
from halve.api.progress import Advance, Progress
from halve.api.study import Question, statistics_of, study
from halve.api.texts import Texts
from halve.api.workspace import Workspace
from halve.checkpoint import Checkpoint, open_checkpoint
from halve.compress import ModuleReport, Statistics, apply_plan
from halve.core.certificate import Attempt, JudgedBy, Measured, Quality
from halve.core.errors import ConfigError, QualityError
from halve.core.record import from_dict, to_dict
from halve.data.overlap import require_unseen
from halve.evaluate import PairedScores, compare, fails, passes, quality
from halve.evaluate.scorer import DecoderScorer
from halve.formats import Format
from halve.kernels.ops import Array, Ops
from halve.models import Decoder, ModelConfig, load_config, load_decoder
from halve.models.names import num_parameters
from halve.search import Candidate, Judged, Move, cheapest_passing, likely_start, uniform_candidates
from halve.search import in_words as in_words_of

log = logging.getLogger("halve")

MAX_ATTEMPTS = 3  # openings of the sealed text when formats are searched, each at a third of the error rate
CONFIDENCE = 0.95
# Candidates are judged on these shares of the selection text in turn, as long as the answer is unclear.
EARLY_SHARES = (0.125, 0.25, 0.5, 1)
EARLY_DOCUMENTS = 20  # below this a bootstrap interval is not to be trusted
EARLY_CONFIDENCE = 0.999
EXPECTED_SHARE = 0.8  # of the limit: where the search looks first, since intervals must keep it, not values
KEEP_BYTES = 1 << 30  # of the original's final states, kept while candidates are judged on the same text
WIDEN_BYTES = 1 << 30  # a model no larger than this in float32 is scored from float32 weights


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run works on; made once, read everywhere below."""

    checkpoint: Checkpoint
    config: ModelConfig  # of the original, with its cache in fp32: the reference that quality is measured against
    source: Mapping[str, Format]
    named: Candidate | None  # when the format was named
    question: Question
    purpose: Purpose
    pick: int | None  # of the plans that a search finds, from 1; None for the cheapest within the limit
    time_s: float | None
    limit: float | None
    judged_by: JudgedBy
    device: str
    texts: Texts
    workspace: Workspace
    progress: Progress

    @property
    def searched(self) -> bool:
        """Whether plans are searched, so that the sealed text may be opened more than once."""
        return self.named is None and self.pick is None

    @property
    def confidence(self) -> float:
        """Of every interval: the error rate is shared out among the attempts (Bonferroni)."""
        return 1 - (1 - CONFIDENCE) / (MAX_ATTEMPTS if self.searched else 1)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the search ends with: a finished model directory in the workspace, and how it was judged."""

    candidate: Candidate
    directory: Path
    modules: tuple[ModuleReport, ...]
    quality: Quality
    attempts: tuple[Attempt, ...]
    judged: tuple[Judged, ...]
    ranked: tuple[Candidate, ...]
    plans: Plans | None  # None when the format was named

    def moves(self) -> list[Move]:
        """What the chosen plan left undone, best first; it had room up to the next cheaper plan that failed."""
        assert self.plans is not None
        failed = {label(j) for j in self.judged if not j.passed} | {a.plan for a in self.attempts if a.passed is False}
        own = self.candidate.predicted_kl or 0.0
        beyond = [c.predicted_kl or 0.0 for c in self.ranked if label(c) in failed]
        return self.plans.moves(self.candidate, min((x for x in beyond if x > own), default=own))


def run(job: Job) -> Outcome:
    """Calibrate, search on the selection text, certify on the sealed text.

    Raises QualityError, naming the best that was reached, when nothing passes within the attempts.
    """
    started = time.monotonic()
    original = original_scorer(job.checkpoint, job.config, job.device)
    plans: Plans | None = None
    ranked: tuple[Candidate, ...]
    if job.named is not None:
        statistics, ranked = _calibrate(job, job.named), (job.named,)
    elif not job.config.plain:
        ranked = _uniform_candidates(job)
        statistics = _calibrate(job, ranked[-1])
    else:
        studied = study(job.question, original, job.workspace.path, job.progress, time_s=job.time_s)
        plans = find_plans(job.question, studied, job.purpose, job.workspace.path, job.progress)
        statistics, ranked = studied.statistics, plans.candidates
    first, judged = _search(job, original, statistics, ranked, started)
    attempts: list[Attempt] = []
    last = min(first + (MAX_ATTEMPTS if job.searched else 1), len(ranked))
    for index in range(first, last):
        candidate = ranked[index]
        directory, modules = _make(job, candidate, statistics)
        measured = _certify(job, original, candidate, directory)
        passed = None if job.limit is None else passes(measured, job.limit, job.judged_by)
        attempts.append(
            Attempt(plan=label(candidate), ppl_ratio=measured.ppl_ratio, kl_mean=measured.kl_mean, passed=passed)
        )
        if passed is not False:
            return Outcome(
                candidate=candidate,
                directory=directory,
                modules=modules,
                quality=measured,
                attempts=tuple(attempts),
                judged=tuple(judged),
                ranked=ranked,
                plans=plans,
            )
        log.info(
            "%s with %s does not hold on the sealed text: %s", label(candidate), _rounded(candidate), in_words(measured)
        )
    best = min(attempts, key=lambda a: a.kl_mean.value)
    raise QualityError(_nothing_passed(job, ranked[-1], f"{best.plan} on the sealed text", best))


def _uniform_candidates(job: Job) -> tuple[Candidate, ...]:
    """One format for all of a sparse model, cheapest first by the bytes that a token reads.

    What single groups lose is not told apart there yet, nor what their products take. Raises ConfigError for a service
    level, which asks for times.
    """
    level = job.purpose.workload.service_level
    if level.ttft_s is not None or level.time_per_token_s is not None:
        raise ConfigError("slo: plans of a sparse model are ranked by bytes, not by times; leave it out")
    question = job.question
    return uniform_candidates(
        job.config,
        job.source,
        portable=question.portable,
        activations=question.activations,
        kv_cache=question.kv_cache,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A plan of the front. number: for --pick. cost_ratio: of the search's own unit, over the dearest plan's here.

    predicted_kl: nats per token by the sensitivities. kl, ppl_ratio: measured, or null.
    """

    number: int
    name: str
    bytes_per_token: int
    cost_ratio: float
    predicted_kl: float
    kl: Measured | None
    ppl_ratio: Measured | None
    chosen: bool
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """What a search found, cheapest first, and what the chosen plan left undone. basis: of cost."""

    basis: Literal["seconds", "bytes"]
    workload: str
    points: tuple[Point, ...]
    rejected_moves: tuple[Move, ...]
    version: int = 1


def front_of(outcome: Outcome) -> Front:
    """The front with what was measured of it."""
    plans = outcome.plans
    assert plans is not None
    judged = {label(j): j for j in outcome.judged}
    most = max(c.cost or 0.0 for c in outcome.ranked) or 1.0
    points = []
    for i, candidate in enumerate(outcome.ranked):
        found, chosen = judged.get(label(candidate)), candidate is outcome.candidate
        points.append(
            Point(
                number=i + 1,
                name=label(candidate),
                bytes_per_token=candidate.bytes_per_token,
                cost_ratio=(candidate.cost or 0.0) / most,
                predicted_kl=candidate.predicted_kl or 0.0,
                kl=outcome.quality.kl_mean if chosen else found.kl_mean if found else None,
                ppl_ratio=outcome.quality.ppl_ratio if chosen else found.ppl_ratio if found else None,
                chosen=chosen,
                layers=tuple(in_words_of(candidate.choices)),
            )
        )
    return Front(
        basis=plans.basis,
        workload=plans.purpose.workload.name,
        points=tuple(points),
        rejected_moves=tuple(outcome.moves()),
    )


def label(candidate: Candidate | Judged) -> str:
    """A candidate as people say it: `int4-g32 (clip)`."""
    return f"{candidate.format} ({candidate.method})"


def _rounded(candidate: Candidate) -> str:
    """What a plan rounds beside the weights, for the log: `int8 activations and a bf16 cache`."""
    plan = candidate.plan
    return f"{plan.activations.format} activations and a {plan.kv_cache.format} cache"


def in_words(measured: Quality | Attempt | Judged) -> str:
    """Quality loss with its interval, and what KL makes of it: `0.41 % [0.28 %, 0.55 %], by KL 0.44 % [...]`."""

    def percent(value: Measured, loss: Callable[[float], float]) -> str:
        return f"{loss(value.value):.3%} [{loss(value.low):.3%}, {loss(value.high):.3%}]"

    return f"{percent(measured.ppl_ratio, lambda r: r - 1)}, by KL {percent(measured.kl_mean, expm1)}"


def original_scorer(checkpoint: Checkpoint, config: ModelConfig, device: str) -> DecoderScorer:
    """The original model in float32 arithmetic by the reference kernels."""
    return DecoderScorer(load_decoder(checkpoint, config, _reference_ops(config, device)), keep_bytes=KEEP_BYTES)


def _calibrate(job: Job, candidate: Candidate) -> Statistics:
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


def _search(
    job: Job, original: DecoderScorer, statistics: Statistics, ranked: Sequence[Candidate], started: float
) -> tuple[int, list[Judged]]:
    """Index of the cheapest candidate that passes on the selection text. What was named or picked is not judged there.

    When the time is over, or at Ctrl-C, the cheapest that has passed by then is taken, if there is one.
    """
    if not job.searched:
        return _picked(job.pick, len(ranked)), []
    assert job.limit is not None, "plans are searched only under a limit"
    limit = job.limit
    passed_so_far: list[int] = []
    found: dict[int, Judged] = {}

    def judge(candidate: Candidate) -> Judged:
        stored = job.workspace.state.setdefault("judged", {})
        if label(candidate) in stored:
            return noted(candidate, from_dict(Judged, stored[label(candidate)]))
        if passed_so_far and job.time_s is not None and time.monotonic() - started > job.time_s:
            log.info("the time is over: going on with the best so far")
            raise _OverError
        directory, _ = _make(job, candidate, statistics)
        with job.progress.task(f"Judging {label(candidate)}", "tokens") as advance, open_checkpoint(directory) as made:
            measured, passed = judge_early(
                original,
                DecoderScorer(reload(made, job.device)),
                job.texts.selection,
                job.texts.window_tokens,
                limit,
                job.confidence,
                advance,
                job.judged_by,
            )
        result = Judged(
            format=candidate.format,
            method=candidate.method,
            bytes_per_token=candidate.bytes_per_token,
            ppl_ratio=measured.ppl_ratio,
            kl_mean=measured.kl_mean,
            passed=passed,
        )
        log.info(
            "%s with %s: quality loss %s on the selection text: %s",
            label(candidate),
            _rounded(candidate),
            in_words(measured),
            "within the limit" if result.passed else "beyond the limit",
        )
        stored[label(candidate)] = to_dict(result)
        job.workspace.save_state()
        return noted(candidate, result)

    def noted(candidate: Candidate, result: Judged) -> Judged:
        index = ranked.index(candidate)
        found[index] = result
        if result.passed:
            passed_so_far.append(index)
        return result

    try:
        index, _ = cheapest_passing(ranked, judge, start=likely_start(ranked, EXPECTED_SHARE * log1p(limit)))
    except (_OverError, KeyboardInterrupt):
        if not passed_so_far:
            raise
        log.info("stopped: going on with %s, the best so far", label(ranked[min(passed_so_far)]))
        index = min(passed_so_far)
    if index is None:
        best = min(found.values(), key=lambda j: j.kl_mean.value)
        raise QualityError(_nothing_passed(job, ranked[-1], label(best), best))
    return index, [found[i] for i in sorted(found)]


class _OverError(Exception):
    """The time that was given is over."""


def _picked(pick: int | None, num_plans: int) -> int:
    """Index of the plan that was asked for by its number."""
    if pick is None:
        return 0
    if not 1 <= pick <= num_plans:
        raise ConfigError(f"pick: there is no plan {pick}; this model has plans 1 to {num_plans}")
    return pick - 1


def _nothing_passed(job: Job, dearest: Candidate, what: str, best: Attempt | Judged) -> str:
    advice = "allow more, give more text (--calibration), or leave out --max-quality-loss to have it made and measured"
    if flags := _exact_flags(dearest):
        advice = f"round less ({flags}), {advice}"
    subject = "no plan meets" if job.searched else "this format does not meet"
    return (
        f"{subject} a quality loss of {job.limit:.3%}; best reached: {what} with {in_words(best)}. "
        f"Nothing written; {advice}"
    )


def _exact_flags(candidate: Candidate) -> str:
    """The flags that leave unrounded what the candidate rounds beside its weights; empty when it rounds nothing."""
    plan = candidate.plan
    rounded = {"--activations": plan.activations.format, "--kv-cache": plan.kv_cache.format}
    return " ".join(f"{flag} fp32" for flag, chosen in rounded.items() if chosen != "fp32")


def _make(job: Job, candidate: Candidate, statistics: Statistics) -> tuple[Path, tuple[ModuleReport, ...]]:
    """Write a candidate's model into the workspace; only the newest is kept on disk."""
    name = f"model-{candidate.format}-{candidate.method}"
    directory = job.workspace.path / name
    made = job.workspace.state.get("made")
    if made is not None and made["name"] == name and directory.exists():
        return directory, tuple(from_dict(ModuleReport, raw) for raw in made["modules"])
    for old in job.workspace.path.glob("model-*"):
        shutil.rmtree(old)
    directory = job.workspace.fresh_directory(name)
    with job.progress.task(f"Writing {label(candidate)}", "matrices") as advance:
        modules = apply_plan(
            job.checkpoint,
            job.config,
            candidate.plan,
            directory,
            energies=statistics.energies,
            hessians=statistics.hessians,
            progress=advance,
        )
    job.workspace.state["made"] = {"name": name, "modules": [to_dict(m) for m in modules]}
    job.workspace.save_state()
    return directory, modules


def _certify(job: Job, original: DecoderScorer, candidate: Candidate, directory: Path) -> Quality:
    """Open the sealed text for this candidate; the opening is on record before the first token is read."""
    opened = job.workspace.state.setdefault("opened", {})
    if isinstance(opened.get(label(candidate)), dict):
        return from_dict(Quality, opened[label(candidate)])
    require_unseen(job.texts.sealed_documents, job.texts.seen, "sealed text")
    opened[label(candidate)] = "begun"
    job.workspace.save_state()
    with job.progress.task(f"Certifying {label(candidate)}", "tokens") as advance:
        measured = score(
            original, directory, job.texts.sealed, job.texts.window_tokens, job.confidence, job.device, advance
        )
    opened[label(candidate)] = to_dict(measured)
    job.workspace.save_state()
    return measured


def judge_early(
    original: DecoderScorer,
    smaller: DecoderScorer,
    documents: Sequence[Array],
    window_tokens: int,
    limit: float,
    confidence: float,
    progress: Advance,
    by: JudgedBy = "both",
) -> tuple[Quality, bool]:
    """Measure on a growing part of the selection text until it is clear on which side of the limit a model is.

    Documents come in order of their hash, so that any first part is a random sample. Looking several times makes a
    wrong early answer likelier, which an interval of EARLY_CONFIDENCE pays for; the certificate is not touched by it.
    Returns the quality on the part that was read, and whether it passes.
    """
    tokens_in_all = sum(len(tokens) for tokens in documents)
    scores: PairedScores | None = None
    start = 0
    for share in EARLY_SHARES:
        end = len(documents) if share == 1 else max(int(len(documents) * share), EARLY_DOCUMENTS)
        part = documents[start:end]
        if not part:
            continue
        new = compare(original, smaller, part, window_tokens=window_tokens)
        progress(sum(len(tokens) for tokens in documents[:end]), tokens_in_all)
        scores = new if scores is None else scores.followed_by(new)
        start = end
        if end < len(documents):
            wide = quality(scores, confidence=EARLY_CONFIDENCE, num_resamples=20_000)
            if passes(wide, limit, by) or fails(wide, limit, by):
                break
    assert scores is not None, "the selection text holds its minimum of documents"
    measured = quality(scores, confidence=confidence)
    return measured, passes(measured, limit, by)


def reload(checkpoint: Checkpoint, device: str) -> Decoder:
    """A compressed model as it lies on disk, by the reference kernels and as its plan says."""
    plan = read_plan(checkpoint)
    config = load_config(checkpoint, plan)
    return load_decoder(checkpoint, config, _reference_ops(config, device, plan.activations.format))


def _reference_ops(config: ModelConfig, device: str, activations: str = "fp32") -> Ops:
    return torch_ops(device, activations, widened=4 * num_parameters(config) <= WIDEN_BYTES)
