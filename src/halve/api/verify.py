"""The verb `verify`: compute a bundle's certificate again, from its files and the original's."""

from dataclasses import dataclass, replace
from pathlib import Path

from halve.api.bundle import read_certificate, read_plan
from halve.api.certify import check_plan, check_unseen, score, text_to_judge
from halve.api.model import torch_ops
from halve.api.pipeline import original_scorer
from halve.api.progress import SILENT, Progress
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.core.certificate import Answer, Certificate, Size
from halve.core.errors import CheckpointError
from halve.data import encode
from halve.evaluate import answer, differences, passes, require_enough
from halve.models import ModelConfig, load_config, stored_formats
from halve.models.names import num_parameters
from halve.search import plain_bytes_per_token
from halve.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A certificate computed again.

    answer: `holds`, `inconclusive` or `contradicted` against the recorded limit, `measured` where there is none.
    differences: recorded figures that did not come out again, in words; empty on other text, which has no record.
    """

    answer: Answer
    certificate: Certificate  # with the quality and size measured now
    recorded: Certificate
    differences: tuple[str, ...]
    text: str


def verify(
    bundle: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Verified:
    """Measure a bundle against its original again, on its sealed text or on `text`.

    Raises CheckpointError when the bundle is broken: a file is missing or changed since it was certified, or
    `against` is not the model it was made from; DataError for text that is too little or not the one certified.
    """
    torch_ops(device)  # a device that is not there is refused now, not after minutes of hashing
    with open_checkpoint(resolve(str(bundle))) as smaller, open_checkpoint(resolve(str(against))) as original:
        recorded = read_certificate(smaller)
        check_plan(smaller, recorded)
        _check_files(smaller, original, recorded, progress)
        documents, source = text_to_judge(smaller, recorded, text)
        check_unseen(smaller, recorded, documents, source)
        config = load_config(original).with_kv_format("fp32")
        tokenizer = Tokenizer.from_directory(original.path, vocab_size=config.vocab_size)
        tokens = encode(documents, tokenizer, vocab_size=config.vocab_size)
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
            cost=replace(recorded.cost, ratio=_bytes_ratio(smaller, original, config)),
        )
    found = (
        differences(recorded.quality, measured, activations=read_plan(smaller).activations.format)
        if text is None
        else []
    )
    found += _recorded_wrongly(recorded, again)
    return Verified(
        answer=answer(measured, recorded.max_quality_loss),
        certificate=again,
        recorded=recorded,
        differences=tuple(found),
        text=source,
    )


def _check_files(smaller: Checkpoint, original: Checkpoint, recorded: Certificate, progress: Progress) -> None:
    with progress.task("Hashing the bundle", "bytes") as advance:
        if smaller.reader.sha256(advance) != recorded.weights_sha256:
            raise CheckpointError(
                f"{smaller.path}: the weight files are not the ones that were certified (their hash differs); "
                "make the bundle again by `halve optimize`"
            )
    with progress.task("Hashing the original", "bytes") as advance:
        if original.sha256(advance) != recorded.inputs.model_sha256:
            raise CheckpointError(
                f"{original.path}: is not the model that {smaller.path} was made from (its hash differs); "
                "give that model to --against"
            )


def _bytes_ratio(smaller: Checkpoint, original: Checkpoint, config: ModelConfig) -> float:
    """Bytes that a decoded token reads, smaller over original, from what the files hold."""
    before, after = (plain_bytes_per_token(config, stored_formats(c, config)) for c in (original, smaller))
    return after / before


def _recorded_wrongly(recorded: Certificate, again: Certificate) -> list[str]:
    """What needs no text to be found: bytes, and a verdict that its own figures do not bear out."""
    found = []
    for field in ("bytes", "original_bytes", "float32_bytes", "ratio"):
        one, other = getattr(recorded.size, field), getattr(again.size, field)
        if one != other:
            found.append(f"size.{field}: recorded {one}, now {other}")
    if recorded.cost.ratio != again.cost.ratio:
        found.append(f"cost.ratio: recorded {recorded.cost.ratio}, now {again.cost.ratio}")
    limit = recorded.max_quality_loss
    verdict = "measured" if limit is None else "pass" if passes(recorded.quality, limit, recorded.judged_by) else "fail"
    if recorded.verdict != verdict:
        found.append(f"verdict: recorded {recorded.verdict}; by the recorded figures and limit it is {verdict}")
    return found
