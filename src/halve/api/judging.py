"""The cheapest plan that is within the limit on the selection text."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log1p
from pathlib import Path

from halve.api.job import Job, in_words, label, nothing_passed, rounding_of
from halve.api.making import make, make_tuned
from halve.api.plans import Plans
from halve.api.progress import Advance, Standing, Tried
from halve.api.scorers import as_judged
from halve.checkpoint import open_checkpoint
from halve.compress import Statistics
from halve.core.certificate import JudgedBy, Quality
from halve.core.errors import ConfigError, QualityError
from halve.core.record import from_dict, to_dict
from halve.evaluate import PairedScores, compare, fails, passes, quality
from halve.evaluate.scorer import DecoderScorer
from halve.kernels.ops import Array
from halve.models import sizes
from halve.search import Candidate, Judged, cheapest_passing, likely_start

log = logging.getLogger("halve")

TUNE_S = 90.0  # and no longer, on a slow machine
TUNED_SHARE = 0.8  # of a plan's KL that is expected to be left when its scales are tuned: measured, 0.81 to 0.87
# Candidates are judged on these shares of the selection text in turn, as long as the answer is unclear.
EARLY_SHARES = (0.125, 0.25, 0.5, 1)
EARLY_DOCUMENTS = 20  # below this a bootstrap interval is not to be trusted
EARLY_CONFIDENCE = 0.999
LARGE_WORTH = 0.02  # of its cost that a plan of a large model, which takes minutes to judge, must save
EXPECTED_SHARE = 0.8  # of the limit: where the search looks first, since intervals must keep it, not values


def search(
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
        directory, _ = make(job, candidate, statistics)
        return noted(candidate, _judged(job, original, candidate, directory))

    def noted(candidate: Candidate, result: Judged) -> Judged:
        index = ranked.index(candidate)
        found[index] = result
        if result.passed:
            passed_so_far.append(index)
        job.progress.standing(_standing(job, plans, ranked, found, started))
        return result

    try:
        start, worth = likely_start(ranked, EXPECTED_SHARE * log1p(limit)), LARGE_WORTH if job.question.large else 0.0
        index, _ = cheapest_passing(ranked, judge, start=start, worth=worth)
    except (_OverError, KeyboardInterrupt):
        if not passed_so_far:
            raise
        log.info("stopped: going on with %s, the best so far", label(ranked[min(passed_so_far)]))
        index = min(passed_so_far)
    if index is None:
        best = min(found.values(), key=lambda j: j.kl_mean.value)
        raise QualityError(nothing_passed(job, ranked[-1], label(best), best))
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
            DecoderScorer(as_judged(made, job.device, large=job.question.large)),
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
        rounding_of(candidate),
        in_words(measured),
        "within the limit" if result.passed else "beyond the limit",
    )
    job.workspace.state.setdefault("judged", {})[label(candidate)] = to_dict(result)
    job.workspace.save_state()
    return result


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


def tuned_cheaper(
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
    stored = job.workspace.state.setdefault("judged", {})
    known = _judged_before(stored, candidate)
    if known is not None and not known.passed:
        return None  # a run that was killed has tuned it already
    try:
        directory = make_tuned(job, original, ranked[index], candidate, statistics, min(TUNE_S, left_s))
        result = _judged_before(stored, candidate) or _judged(job, original, candidate, directory)
    except KeyboardInterrupt:
        log.info("stopped: going on with %s, whose scales are as they were rounded", label(ranked[first]))
        return None
    return (index, candidate, result) if result.passed else None
