"""The verb `verify`: compute a bundle's certificate again, from its files and the original's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from halve.api.bundle import DRAFT_FOLDER, read_certificate, read_draft, read_plan
from halve.api.certify import check_plan, check_unseen, score, served_device, text_to_judge
from halve.api.cost_again import CostAgain, cost_again
from halve.api.facts import environment, versions
from halve.api.model import torch_ops
from halve.api.progress import SILENT, Progress
from halve.api.questions import ask, tasks_again
from halve.api.recorded import (
    canary_differences,
    cost_differences,
    inconsistencies,
    roofline_differences,
    served_differences,
    slower_before,
    speed_differences,
    task_differences,
)
from halve.api.replayed import check_replay
from halve.api.roofline import judged, rooflines
from halve.api.scorers import original_scorer, reload
from halve.api.texts import beginnings
from halve.api.trial import Trial, run_trial
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.core.certificate import Answer, Certificate, Size, TaskResult, WorkloadCost
from halve.core.errors import CheckpointError
from halve.data import encode
from halve.evaluate import answer, differences, require_enough
from halve.evaluate.canary import canary
from halve.models import load_config, stored_formats
from halve.models.names import num_parameters
from halve.models.sizes import bytes_per_token
from halve.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A certificate computed again.

    answer: `holds`, `inconclusive` or `contradicted` against the recorded limit, `measured` where there is none.
    certificate: with everything that was measured now; on other text quality, sizes and bytes alone.
    differences: recorded figures that did not come out again, in words; on other text, which has no record, only what
    its own figures do not bear out. not_compared: what was measured, and why nothing follows from it.
    """

    answer: Answer
    certificate: Certificate
    recorded: Certificate
    differences: tuple[str, ...]
    not_compared: tuple[str, ...]
    text: str


def verify(
    bundle: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    tasks: Sequence[str | Path] = (),
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Verified:
    """Measure a bundle against its original again, on its sealed text or on `text`.

    On the sealed text everything is measured again: quality, sizes, both speeds and their limits, the canary, tasks and
    cost; on other text quality and sizes. tasks: the files of questions, where the bundle does not keep them.
    Raises CheckpointError when the bundle is broken: a file is missing or changed since it was certified, or
    `against` is not the model it was made from; DataError for text that is too little or not the one certified;
    QualityError for a clock that lies, and for answers that part far more often than the text explains.
    """
    torch_ops(device)  # a device that is not there is refused now, not after minutes of hashing
    with open_checkpoint(resolve(str(bundle))) as smaller, open_checkpoint(resolve(str(against))) as original:
        recorded = read_certificate(smaller)
        check_plan(smaller, recorded)
        _check_files(smaller, original, recorded, progress)
        documents, source = text_to_judge(smaller, recorded, text)
        check_unseen(smaller, recorded, documents, source)
        asked = [] if text is not None else tasks_again(smaller.path, recorded.tasks, tasks)
        config = load_config(original).with_kv_format("fp32")
        tokenizer = Tokenizer.from_directory(original.path, vocab_size=config.vocab_size)
        tokens = encode(documents, tokenizer, vocab_size=config.vocab_size)
        tokens = beginnings(tokens, recorded.sealed.document_tokens)
        if text is not None:
            require_enough(tokens, "sealed")
        with progress.task("Verifying", "tokens") as advance:
            measured = score(
                original_scorer(original, config, device),
                smaller.path,
                tokens,
                recorded.sealed.window_tokens,
                recorded.quality.confidence,
                device,
                advance,
            )
        size = smaller.weight_bytes
        parameters = 4 * num_parameters(config)
        again = replace(
            recorded,
            quality=measured,
            size=Size(
                bytes=size,
                original_bytes=original.weight_bytes,
                float32_bytes=parameters,
                ratio=size / parameters,
            ),
            cost=replace(recorded.cost, ratio=_bytes_ratio(smaller, original)),
        )
        found = [*inconsistencies(recorded), *_byte_differences(recorded, again)]
        skipped: list[str] = []
        if text is None:
            plan = read_plan(smaller)
            results = ask(
                original.path,
                smaller.path,
                [(task, result.margin) for task, result in zip(asked, recorded.tasks, strict=True)],
                device,
                progress,
            )
            same = recorded.inputs.device == environment(device) and recorded.inputs.versions == versions()
            costed = cost_again(recorded, (original, smaller), config, plan, progress) if same else ""
            trial = run_trial(
                original.path,
                smaller.path,
                partial(reload, smaller, device),
                tokens,
                served_device(device),
                progress,
                costed.paced if isinstance(costed, CostAgain) else None,
                costed.usd_per_hour if isinstance(costed, CostAgain) else None,
            )
            again = _measured_again(again, trial, results, (original, smaller), device)
            # Tasks are told apart by their counts below.
            unasked = (replace(quality, tasks={}) for quality in (recorded.quality, measured))
            found += differences(*unasked, activations=plan.activations.format, caches=plan.kv_cache.names)
            found += task_differences(recorded.tasks, results)
            if trial.replayed is not None and isinstance(costed, CostAgain):
                check_replay(trial.replayed, costed.paced.workload, again.rooflines)
            more, skipped, cost = _of_this_machine(recorded, again, trial, costed, same_machine=same)
            again = replace(again, workload_cost=cost)
            found += more
    return Verified(
        answer=answer(measured, recorded.max_quality_loss),
        certificate=again,
        recorded=recorded,
        differences=tuple(found),
        not_compared=tuple(skipped),
        text=source,
    )


def _measured_again(
    again: Certificate,
    trial: Trial,
    results: tuple[TaskResult, ...],
    checkpoints: tuple[Checkpoint, Checkpoint],
    device: str,
) -> Certificate:
    """The certificate with what both models did just now. checkpoints: of the original and the smaller model."""
    pairs = zip(("original", "smaller"), checkpoints, trial.speeds, strict=True)
    found = [judged(name, checkpoint, load_config(checkpoint), speed) for name, checkpoint, speed in pairs]
    return replace(
        again,
        quality=replace(again.quality, tasks={result.name: result.accuracy for result in results}),
        speed=trial.speeds[1],
        original_speed=trial.speeds[0],
        speed_ratios=(*trial.ratios, *(ratio for ratio in again.speed_ratios if ratio.basis == "given")),
        rooflines=rooflines([one for one in found if one is not None], read_gb_s=trial.read_gb_s)
        if device == "cpu"
        else (),
        served=trial.served,
        tasks=results,
        canary=canary(trial.parted, trial.answer_tokens, again.quality.flip_rate, results),
    )


def _of_this_machine(
    recorded: Certificate,
    again: Certificate,
    trial: Trial,
    costed: CostAgain | str,
    *,
    same_machine: bool,
) -> tuple[list[str], list[str], WorkloadCost | None]:
    """What depends on the machine: differences, what was not compared, and the workload's cost as it is now."""
    assert again.served is not None
    assert again.canary is not None
    found = served_differences(recorded.served, again.served, same_machine=same_machine)
    found += canary_differences(recorded.canary, again.canary)
    if not same_machine:
        other = f"they were certified on {recorded.inputs.device}, with {recorded.inputs.versions}"
        return found, [f"speeds and cost: {other}"], None
    found += speed_differences(recorded, trial.speeds, again.speed_ratios, disturbed=trial.disturbed)
    found += roofline_differences(recorded.rooflines, again.rooflines)
    skipped = []
    if trial.disturbed:
        skipped.append("speeds alone: other programs used the processors meanwhile; their ratio was compared")
    elif told := slower_before(recorded, trial.speeds):
        skipped.append(f"{told}; their ratio was compared")
    cost = None
    if recorded.workload_cost is not None:
        if isinstance(costed, str):
            skipped.append(f"workload_cost: {costed}")
        else:
            cost = costed.cost(trial.replayed)
            found += cost_differences(recorded.workload_cost, cost, disturbed=trial.disturbed)
    return found, skipped, cost


def _check_files(smaller: Checkpoint, original: Checkpoint, recorded: Certificate, progress: Progress) -> None:
    with progress.task("Hashing the bundle", "bytes") as advance:
        if smaller.reader.sha256(advance) != recorded.weights_sha256:
            raise CheckpointError(
                f"{smaller.path}: the weight files are not the ones that were certified (their hash differs); "
                "make the bundle again by `halve optimize`"
            )
    if recorded.draft is not None:
        with progress.task("Hashing the draft", "bytes") as advance:
            if read_draft(smaller.path, advance) != recorded.draft:
                raise CheckpointError(
                    f"{smaller.path / DRAFT_FOLDER}: is not the draft that was certified with the bundle; "
                    "make the bundle again by `halve optimize`"
                )
    with progress.task("Hashing the original", "bytes") as advance:
        if original.sha256(advance) != recorded.inputs.model_sha256:
            raise CheckpointError(
                f"{original.path}: is not the model that {smaller.path} was made from (its hash differs); "
                "give that model to --against"
            )


def _bytes_ratio(smaller: Checkpoint, original: Checkpoint) -> float:
    """Bytes that a decoded token reads, smaller over original, from what the files hold."""
    found = [(checkpoint, load_config(checkpoint)) for checkpoint in (original, smaller)]  # experts may be fewer now
    before, after = (bytes_per_token(config, stored_formats(one, config)) for one, config in found)
    return after / before


def _byte_differences(recorded: Certificate, again: Certificate) -> list[str]:
    """Bytes, which need no text to be counted."""
    found = []
    for field in ("bytes", "original_bytes", "float32_bytes", "ratio"):
        one, other = getattr(recorded.size, field), getattr(again.size, field)
        if one != other:
            found.append(f"size.{field}: recorded {one}, now {other}")
    if recorded.cost.ratio != again.cost.ratio:
        found.append(f"cost.ratio: recorded {recorded.cost.ratio}, now {again.cost.ratio}")
    return found
