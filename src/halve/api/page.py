"""What a finished run knows, as the records that the report shows."""

from collections.abc import Mapping

from halve.api.bundle import PLAN_FILE
from halve.api.job import Job, label
from halve.api.pipeline import Outcome
from halve.api.trial import Trial
from halve.compress import ModuleReport
from halve.core.certificate import Certificate
from halve.core.plan import Plan
from halve.evaluate.canary import canary_words
from halve.models.names import EMBEDDING, groups
from halve.report import Candidate, GroupSize, LayerError, ReportPage, Sample
from halve.search import Judged, Move, in_words

TOLD_MOVES = 16  # that were rejected; all of them are in halve/front.json
KIND_WORDS = {
    "qkv": "attention q/k/v",
    "q_b": "attention queries of their latent",
    "kv_b": "attention keys/values of their latent",
    "o": "attention out",
    "gate_up": "feed-forward gate/up",
    "down": "feed-forward down",
}


def report_page(job: Job, outcome: Outcome, trial: Trial, certificate: Certificate, created: str) -> ReportPage:
    """Fill the page."""
    kinds = {m.name: (g.kind, g.layer) for g in groups(job.config) for m in g.members}
    name = job.checkpoint.path.name
    return ReportPage(
        title=f"{name}, made smaller",
        model_name=name,
        certificate=certificate,
        plan=Plan.from_json((outcome.directory / PLAN_FILE).read_text(encoding="utf-8")),
        architecture=job.checkpoint.config["architectures"][0],
        licence=job.checkpoint.licence(),
        groups=_group_sizes(outcome.modules, kinds, tied=job.config.tied),
        layers=tuple(
            LayerError(
                name=m.name,
                layer=kinds.get(m.name, ("", None))[1],
                group=_words(m.name, kinds, tied=job.config.tied),
                format=m.format_after,
                method=m.method or "as it is",
                relative_error=m.relative_error,
            )
            for m in outcome.modules
        ),
        candidates=_candidates(outcome),
        samples=tuple(Sample(prompt=a.prompt, original=a.original, smaller=a.smaller) for a in trial.answers),
        notes=(*_notes(job, outcome, trial), *_told_by_answers(certificate)),
        created=created,
    )


def _told_by_answers(certificate: Certificate) -> list[str]:
    """Tasks and canary in words."""
    told = [
        f"Task {task.name}: {task.accuracy.value:.1%} of {task.num_items:,} questions, the original "
        f"{task.original_accuracy.value:.1%}; {task.harmed} answered by the original alone, {task.fixed} by the "
        f"smaller model alone (McNemar's test: p = {task.mcnemar_p:.3f})"
        + ("" if task.margin is None else f"; a loss of {task.margin:.1%} or more is excluded at 95 %")
        + "."
        for task in certificate.tasks
    ]
    if certificate.canary is not None:
        told.append(canary_words(certificate.canary))
    return told


def _words(name: str, kinds: Mapping[str, tuple[str, int | None]], *, tied: bool) -> str:
    if name == EMBEDDING:
        return "embedding table and lm_head (tied)" if tied else "embedding table"
    return KIND_WORDS.get(kinds[name][0], kinds[name][0])


def _group_sizes(
    modules: tuple[ModuleReport, ...], kinds: Mapping[str, tuple[str, int | None]], *, tied: bool
) -> tuple[GroupSize, ...]:
    totals: dict[tuple[str, str, str], list[int]] = {}
    for m in modules:
        key = (_words(m.name, kinds, tied=tied), m.format_before, m.format_after)
        total = totals.setdefault(key, [0, 0, 0])
        for i, value in enumerate((m.parameters, m.bytes_before, m.bytes_after)):
            total[i] += value
    return tuple(
        GroupSize(
            pattern=pattern,
            parameters=parameters,
            format_before=before,
            bytes_before=bytes_before,
            format_after=after,
            bytes_after=bytes_after,
        )
        for (pattern, before, after), (parameters, bytes_before, bytes_after) in totals.items()
    )


def _candidates(outcome: Outcome) -> tuple[Candidate, ...]:
    judged: dict[str, Judged] = {label(j): j for j in outcome.judged}
    chosen = label(outcome.candidate)
    failed_sealed = {a.plan for a in outcome.attempts if a.passed is False}
    rows = []
    for candidate in outcome.ranked:
        name = label(candidate)
        verdict = judged.get(name)
        if name == chosen:
            words = "chosen"
        elif name in failed_sealed:
            words = "passed on the selection text but not on the sealed text"
        elif verdict is None:
            dearer = (candidate.cost or 0.0) > (outcome.candidate.cost or 0.0)
            words = "not judged: dearer than the chosen one" if dearer else "not judged: a dearer one already failed"
        else:
            words = "within the limit, but dearer than the chosen one" if verdict.passed else "beyond the limit"
        rows.append(
            Candidate(
                format=candidate.format,
                method=candidate.method,
                bytes_per_token=candidate.bytes_per_token,
                ppl_ratio=verdict.ppl_ratio if verdict else outcome.quality.ppl_ratio if name == chosen else None,
                outcome=words,
                chosen=name == chosen,
            )
        )
    return tuple(rows)


def _notes(job: Job, outcome: Outcome, trial: Trial) -> tuple[str, ...]:
    notes = [
        f"The kernels that serve this model here ({', '.join(sorted(set(trial.kernels.values())))}) differ from the "
        f"reference kernels that the certificate was measured with by a KL divergence of {trial.agreement:.1e} nats.",
        f"Text: {job.texts.source}; {len(job.texts.calibration)} documents to calibrate, {len(job.texts.selection)} to "
        f"select, {len(job.texts.sealed)} sealed, scored in windows of at most {job.texts.window_tokens} tokens.",
    ]
    if job.texts.document_tokens is not None:
        notes.append(
            f"Of each document the first {job.texts.document_tokens} tokens were read: a large model on a CPU."
        )
    plans = outcome.plans
    if plans is None:
        return tuple(notes)
    unit = "s of the workload" if plans.basis == "seconds" else "bytes a token"
    if plans.basis == "seconds":
        notes.append(
            f"Plans are ranked by the seconds that the steps of workload {plans.purpose.workload.name} take, by times "
            "of every product, of attention and of the engine that were measured on this device."
        )
    else:
        notes.append("Plans are ranked by the bytes of weights that one decoded token reads at batch 1.")
    notes += [f"Stored as {line}." for line in in_words(outcome.candidate.choices)]
    for move in outcome.moves()[:TOLD_MOVES]:
        notes.append(_not_done(move, unit))
    return tuple(notes)


def _not_done(move: Move, unit: str) -> str:
    """A change that a plan did not make, in a sentence."""
    cost = f"saves {-move.cost:.3g} {unit}" if move.cost < 0 else f"takes {move.cost:.3g} {unit} more"
    loss = f" and loses {abs(move.loss):.2g} nats per token {'more' if move.loss > 0 else 'less'}" if move.loss else ""
    return f"Not done: {move.part} in {move.rejected} instead of {move.chosen}: it {cost}{loss}. It {move.why}."
