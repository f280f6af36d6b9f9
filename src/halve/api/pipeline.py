"""`optimize`: from a checkpoint to a certified bundle, every stage kept as it ends so that a killed run resumes."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from halve.api.certify import score
from halve.api.expert_moves import judge_experts
from halve.api.guesses import judge_guesses
from halve.api.job import MAX_ATTEMPTS, Job, in_words, label, nothing_passed, rounding_of
from halve.api.judging import search, tuned_cheaper
from halve.api.making import calibrated, make
from halve.api.plans import Plans, find_plans
from halve.api.scorers import original_scorer
from halve.api.study import study
from halve.compress import ModuleReport
from halve.core.certificate import Attempt, Quality, Tuning
from halve.core.errors import ConfigError, QualityError
from halve.core.record import from_dict, to_dict
from halve.data.overlap import require_unseen
from halve.evaluate import passes
from halve.evaluate.scorer import DecoderScorer
from halve.search import Candidate, Judged, Move
from halve.search.front import retreat

log = logging.getLogger("halve")


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
    if not job.config.timed and job.named is None and (level.ttft_s is not None or level.time_per_token_s is not None):
        raise ConfigError("slo: plans of a model of this kind are ranked by bytes, not by times; leave it out")
    plans: Plans | None = None
    ranked: tuple[Candidate, ...]
    if job.named is not None:
        statistics, ranked = calibrated(job, job.named), (job.named,)
    else:
        plans = _plans(job)
        statistics, ranked = plans.studied.statistics, plans.candidates
    original = original_scorer(job.checkpoint, job.config, job.device)
    first, judged = search(job, original, statistics, ranked, started, plans)
    order = retreat(ranked, first, MAX_ATTEMPTS)
    if (tuned := tuned_cheaper(job, original, statistics, ranked, first, judged, started)) is not None:
        index, candidate, result = tuned
        ranked = (*ranked[:index], candidate, *ranked[index + 1 :])
        order, judged = [index, *order], [*judged, result]
    attempts: list[Attempt] = []
    for index in order[: MAX_ATTEMPTS if job.searched else 1]:
        candidate = ranked[index]
        directory, modules = make(job, candidate, statistics)
        measured = _certify(job, original, candidate, directory)
        passed = None if job.limit is None else passes(measured, job.limit, job.judged_by)
        attempts.append(
            Attempt(plan=label(candidate), ppl_ratio=measured.ppl_ratio, kl_mean=measured.kl_mean, passed=passed)
        )
        if passed is not False:
            job.workspace.worth_keeping = True
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
            "%s with %s does not hold on the sealed text: %s",
            label(candidate),
            rounding_of(candidate),
            in_words(measured),
        )
    best = min(attempts, key=lambda a: a.kl_mean.value)
    raise QualityError(nothing_passed(job, ranked[-1], f"{best.plan} on the sealed text", best))


def _plans(job: Job) -> Plans:
    """Study the original, and find the plans for it; it does not take memory while times are measured."""
    original = original_scorer(job.checkpoint, job.config, job.device)
    studied = study(job.question, original, job.workspace.path, job.progress, time_s=job.time_s)
    experts = () if job.limit is None else judge_experts(job.question, original, job.limit, job.progress)
    del original
    return find_plans(job.question, studied, job.purpose, job.workspace.path, job.progress, experts)


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
