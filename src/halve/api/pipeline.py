"""`optimize`: from a checkpoint to a certified bundle, every stage kept as it ends so that a killed run resumes."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import expm1, log1p
from pathlib import Path

from halve.api.bundle import read_plan
from halve.api.certify import score
from halve.api.expert_moves import judge_experts
from halve.api.guesses import judge_guesses
from halve.api.model import make_ops, torch_ops
from halve.api.plans import Plans, Purpose, find_plans
from halve.api.progress import Advance, Progress, Standing, Tried
from halve.api.study import Question, first_tokens, statistics_of, study
from halve.api.texts import Texts
from halve.api.workspace import Workspace
from halve.checkpoint import Checkpoint, open_checkpoint
from halve.compress import Energies, ModuleReport, Statistics, apply_plan, calibrate
from halve.compress.shrink import write_shrunk
from halve.compress.tune import tune, write_tuned
from halve.core.certificate import Attempt, JudgedBy, Measured, Quality, Tuning
from halve.core.errors import ConfigError, HalveError, QualityError
from halve.core.plan import ExpertPlan
from halve.core.record import from_dict, to_dict
from halve.data.overlap import require_unseen
from halve.evaluate import PairedScores, compare, documents_needed, fails, passes, quality
from halve.evaluate.scorer import DecoderScorer
from halve.formats import Format
from halve.kernels.ops import Array, Ops
from halve.models import CheckpointSource, Decoder, ModelConfig, load_config, load_decoder, sizes
from halve.models.decoder import Projection
from halve.models.names import head_group, num_parameters
from halve.search import Candidate, Judged, Move, cheapest_passing, likely_start
from halve.search.front import retreat

log = logging.getLogger("halve")

TUNE_STEPS = 48
TUNE_S = 90.0  # and no longer, on a slow machine
HELD_OUT_TOKENS = 2048  # of selection text that says which step of tuning is kept
TUNED_SHARE = 0.8  # of a plan's KL that is expected to be left when its scales are tuned: measured, 0.81 to 0.87
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
    foretold_s: float  # a rough guess of the whole run
    shrunk: dict[ExpertPlan, Energies] = field(default_factory=dict)  # of the model that lies with other experts

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
    tuning: Tuning | None = None  # of the candidate's scales
    guesses: tuple[Move, ...] = ()  # of next tokens, that it does not make

    def moves(self) -> list[Move]:
        """What the chosen plan left undone, best first; it had room up to the next cheaper plan that failed."""
        assert self.plans is not None
        failed = {label(j) for j in self.judged if not j.passed} | {a.plan for a in self.attempts if a.passed is False}
        own = self.candidate.predicted_kl or 0.0
        beyond = [c.predicted_kl or 0.0 for c in self.ranked if label(c) in failed]
        return [*self.guesses, *self.plans.moves(self.candidate, min((x for x in beyond if x > own), default=own))]


def run(job: Job) -> Outcome:
    """Calibrate, search on the selection text, certify on the sealed text.

    Raises QualityError, naming the best that was reached, when nothing passes within the attempts.
    """
    started = time.monotonic()
    level = job.purpose.workload.service_level
    if not job.config.plain and job.named is None and (level.ttft_s is not None or level.time_per_token_s is not None):
        raise ConfigError("slo: plans of a model of this kind are ranked by bytes, not by times; leave it out")
    original = original_scorer(job.checkpoint, job.config, job.device)
    plans: Plans | None = None
    ranked: tuple[Candidate, ...]
    if job.named is not None:
        statistics, ranked = _calibrate(job, job.named), (job.named,)
    else:
        studied = study(job.question, original, job.workspace.path, job.progress, time_s=job.time_s)
        experts = () if job.limit is None else judge_experts(job.question, original, job.limit, job.progress)
        plans = find_plans(job.question, studied, job.purpose, job.workspace.path, job.progress, experts)
        statistics, ranked = studied.statistics, plans.candidates
    first, judged = _search(job, original, statistics, ranked, started, plans)
    order = retreat(ranked, first, MAX_ATTEMPTS)
    if (tuned := _tuned(job, original, statistics, ranked, first, judged, started)) is not None:
        index, candidate, result = tuned
        ranked = (*ranked[:index], candidate, *ranked[index + 1 :])
        order, judged = [index, *order], [*judged, result]
    attempts: list[Attempt] = []
    for index in order[: MAX_ATTEMPTS if job.searched else 1]:
        candidate = ranked[index]
        directory, modules = _make(job, candidate, statistics)
        measured = _certify(job, original, candidate, directory)
        passed = None if job.limit is None else passes(measured, job.limit, job.judged_by)
        attempts.append(
            Attempt(plan=label(candidate), ppl_ratio=measured.ppl_ratio, kl_mean=measured.kl_mean, passed=passed)
        )
        if passed is not False:
            guesses = (
                () if plans is None else judge_guesses(plans, candidate, directory, job.texts.selection, job.progress)
            )
            return Outcome(
                candidate=candidate,
                directory=directory,
                modules=modules,
                quality=measured,
                attempts=tuple(attempts),
                judged=tuple(judged),
                ranked=ranked,
                plans=plans,
                tuning=from_dict(Tuning, job.workspace.state["tuning"]) if tuned and candidate is tuned[1] else None,
                guesses=guesses,
            )
        log.info(
            "%s with %s does not hold on the sealed text: %s", label(candidate), _rounded(candidate), in_words(measured)
        )
    best = min(attempts, key=lambda a: a.kl_mean.value)
    raise QualityError(_nothing_passed(job, ranked[-1], f"{best.plan} on the sealed text", best))


def label(candidate: Candidate | Judged) -> str:
    """A candidate as people say it: `int4-g32 (clip)`."""
    return f"{candidate.format} ({candidate.method})"


def _rounded(candidate: Candidate) -> str:
    """What a plan rounds beside the weights, for the log: `int8 activations and a bf16 cache`."""
    plan = candidate.plan
    return f"{plan.activations.format} activations and a {plan.kv_cache} cache"


def in_words(measured: Quality | Attempt | Judged) -> str:
    """Quality loss with its interval, and what KL makes of it: `0.41 % [0.28 %, 0.55 %], by KL 0.44 % [...]`."""

    def percent(value: Measured, loss: Callable[[float], float]) -> str:
        return f"{loss(value.value):.3%} [{loss(value.low):.3%}, {loss(value.high):.3%}]"

    return f"{percent(measured.ppl_ratio, lambda r: r - 1)}, by KL {percent(measured.kl_mean, expm1)}"


def original_scorer(checkpoint: Checkpoint, config: ModelConfig, device: str) -> DecoderScorer:
    """The original model in float32 arithmetic by the reference kernels.

    Its head is kept in float32 whatever the size of the model: it runs for few rows at a time.
    """
    decoder = load_decoder(checkpoint, config, _reference_ops(config, device))
    if not _widened(config):
        decoder.head = Projection(head_group(config), torch_ops(device, widened=True), CheckpointSource(checkpoint))
    return DecoderScorer(decoder, keep_bytes=KEEP_BYTES)


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
    job: Job,
    original: DecoderScorer,
    statistics: Statistics,
    ranked: Sequence[Candidate],
    started: float,
    plans: Plans | None,
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
        if (known := _judged_before(stored, candidate)) is not None:
            return noted(candidate, known)
        if passed_so_far and job.time_s is not None and time.monotonic() - started > job.time_s:
            log.info("the time is over: going on with the best so far")
            raise _OverError
        directory, _ = _make(job, candidate, statistics)
        return noted(candidate, _judged(job, original, candidate, directory))

    def noted(candidate: Candidate, result: Judged) -> Judged:
        index = ranked.index(candidate)
        found[index] = result
        if result.passed:
            passed_so_far.append(index)
        job.progress.standing(_standing(job, plans, ranked, found, started))
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


def _judged_before(stored: Mapping[str, object], candidate: Candidate) -> Judged | None:
    """What a run that was killed knew of a plan; None, and that is said, where its record is broken."""
    if label(candidate) not in stored:
        return None
    try:
        return from_dict(Judged, stored[label(candidate)])
    except ConfigError as error:
        log.warning("what was known of %s can't be read and is judged again: %s", label(candidate), error)
        return None


def _standing(
    job: Job, plans: Plans | None, ranked: Sequence[Candidate], found: Mapping[int, Judged], started: float
) -> Standing:
    """Where the search stands. Each plan's cost is told over the original's."""
    assert job.limit is not None
    whole = sizes.bytes_per_token(job.config, job.source)
    seconds = plans is not None and plans.table is not None
    tried = tuple(
        Tried(
            plan=label(ranked[i]),
            cost_ratio=plans.cost_ratio(ranked[i]) if seconds and plans else ranked[i].bytes_per_token / whole,
            ppl_ratio=found[i].ppl_ratio,
            passed=found[i].passed,
        )
        for i in sorted(found)
    )
    left = (job.time_s or job.foretold_s) - (time.monotonic() - started)
    return Standing(
        tried=tried,
        limit=job.limit,
        basis="seconds" if seconds else "bytes",
        seconds_left=max(0.0, left),
        guessed=job.time_s is None,
    )


def _judged(job: Job, original: DecoderScorer, candidate: Candidate, directory: Path) -> Judged:
    """Measure a candidate on the selection text, and note it."""
    assert job.limit is not None
    with job.progress.task(f"Judging {label(candidate)}", "tokens") as advance, open_checkpoint(directory) as made:
        measured, passed = judge_early(
            original,
            DecoderScorer(_as_judged(job, made)),
            job.texts.selection,
            job.texts.window_tokens,
            job.limit,
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
    job.workspace.state.setdefault("judged", {})[label(candidate)] = to_dict(result)
    job.workspace.save_state()
    return result


def _tuned(
    job: Job,
    original: DecoderScorer,
    statistics: Statistics,
    ranked: Sequence[Candidate],
    first: int,
    judged: Sequence[Judged],
    started: float,
) -> tuple[int, Candidate, Judged] | None:
    """A cheaper plan than the cheapest that passes, which passes once its scales are tuned: its place, and itself.

    None where none is expected to, where the time is over, or at Ctrl-C.
    """
    if not job.searched or not job.config.plain or job.question.large:
        return None
    assert job.limit is not None
    own = next((j for j in judged if label(j) == label(ranked[first])), None)
    predicted = ranked[first].predicted_kl
    left_s = TUNE_S if job.time_s is None else job.time_s - (time.monotonic() - started)
    if own is None or not predicted or left_s <= 0:
        return None
    expected, aim = TUNED_SHARE * own.kl_mean.value / predicted, EXPECTED_SHARE * log1p(job.limit)
    index = next((i for i, c in enumerate(ranked[:first]) if expected * (c.predicted_kl or aim) <= aim), None)
    if index is None:
        return None
    candidate = replace(ranked[index], format=f"{ranked[index].format}-tuned")
    try:
        directory = _make_tuned(job, original, ranked[index], candidate, statistics, min(TUNE_S, left_s))
        stored = job.workspace.state.setdefault("judged", {})
        result = _judged_before(stored, candidate) or _judged(job, original, candidate, directory)
    except KeyboardInterrupt:
        log.info("stopped: going on with %s, whose scales are as they were rounded", label(ranked[first]))
        return None
    return (index, candidate, result) if result.passed else None


def _make_tuned(
    job: Job,
    original: DecoderScorer,
    base: Candidate,
    candidate: Candidate,
    statistics: Statistics,
    seconds: float,
) -> Path:
    """Write a candidate whose scales and norms are tuned on calibration text, under its own name."""
    state, directory = job.workspace.state, job.workspace.path / f"model-{candidate.format}-{candidate.method}"
    if _made_before(job, directory) is not None and "tuning" in state:
        return directory
    # What was known of another one of this name is not known of this one; an opening of the sealed text still counts.
    state.get("judged", {}).pop(label(candidate), None)
    if (opened := state.get("opened", {}).pop(label(candidate), None)) is not None:
        state["opened"][f"{label(candidate)}, made before"] = opened
    source, modules = _make(job, base, statistics)
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


def _as_judged(job: Job, made: Checkpoint) -> Decoder:
    """A candidate by the reference kernels; a large one by those that will serve it, which are several times as fast.

    The certificate is measured by the latter in any case, and says how far they are from the reference.
    """
    if not job.question.large or job.device != "cpu":
        return reload(made, job.device)
    plan = read_plan(made)
    return load_decoder(made, load_config(made, plan), make_ops("cpu", plan.activations.format))


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
    assert job.limit is not None, "only under a limit is there something to pass"
    more, needed = "give more text (--calibration)", documents_needed(best, job.limit, job.judged_by)
    if needed is not None and needed > best.ppl_ratio.n:
        more = f"give more text (--calibration): about {needed} documents, not {best.ppl_ratio.n}, to judge this one on"
    advice = f"allow more, {more}, or leave out --max-quality-loss to have it made and measured"
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
    rounded = {"--activations": plan.activations.format, "--kv-cache": str(plan.kv_cache)}
    return " ".join(f"{flag} fp32" for flag, chosen in rounded.items() if chosen != "fp32")


def _make(job: Job, candidate: Candidate, statistics: Statistics) -> tuple[Path, tuple[ModuleReport, ...]]:
    """Write a candidate's model into the workspace; only the newest is kept on disk."""
    name = f"model-{candidate.format}-{candidate.method}"
    directory = job.workspace.path / name
    if (modules := _made_before(job, directory)) is not None:
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


def _made_before(job: Job, directory: Path) -> tuple[ModuleReport, ...] | None:
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


def _certify(job: Job, original: DecoderScorer, candidate: Candidate, directory: Path) -> Quality:
    """Open the sealed text for this candidate; the opening is on record before the first token is read."""
    opened = job.workspace.state.setdefault("opened", {})
    if isinstance(opened.get(label(candidate)), dict):
        try:
            return from_dict(Quality, opened[label(candidate)])
        except ConfigError as error:
            log.warning("the certified figures of %s can't be read and are taken again: %s", label(candidate), error)
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
    return torch_ops(device, activations, widened=_widened(config))


def _widened(config: ModelConfig) -> bool:
    """Whether weights are kept in float32 while a model is scored."""
    return 4 * num_parameters(config) <= WIDEN_BYTES
