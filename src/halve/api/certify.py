"""What a certificate says, measured on the bundle as it lies on disk and as it will be served.

Quality is that of the engine's own steps: the kernels, the paged cache in the plan's format and the batch that users
get, not of a scorer that stands in for them. Guesses must not change an answer, so with a plan that guesses, answers
are made with and without.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from halve.api.bundle import PLAN_FILE, SEALED_FILE, SEEN_FILE
from halve.api.model import Model, load
from halve.api.progress import Advance
from halve.api.texts import sealed_again
from halve.checkpoint import Checkpoint
from halve.core.certificate import Certificate, Quality, Served
from halve.core.errors import CheckpointError, KernelError
from halve.core.plan import Speculation
from halve.data import Document, documents_sha256, read_documents
from halve.data.overlap import Fingerprint, require_unseen
from halve.engine import EngineCore, ModelRunner, Request, SamplingParams
from halve.engine.forced import PROMPT_SHARE, step_tokens_of
from halve.evaluate import compare, quality
from halve.evaluate.scorer import DecoderScorer, EngineScorer
from halve.kernels.ops import Array

ANSWER_TOKENS = 64  # of an answer that is made with and without guesses


def served_device(device: str) -> str:
    """Where `halve.load` runs a model that is judged on `device`."""
    return "auto" if device == "cpu" else device


def score(
    original: DecoderScorer,
    directory: Path,
    documents: Sequence[Array],
    window_tokens: int,
    confidence: float,
    device: str,
    progress: Advance,
) -> Quality:
    """Reload the smaller model from disk and measure it against the original on documents, run by the engine."""
    model = load(directory, device=served_device(device), keep=False)
    smaller = EngineScorer(model.decoder, model.engine_config, num_blocks=model.num_blocks)
    scores = compare(original, smaller, documents, window_tokens=window_tokens, progress=progress)
    return quality(scores, confidence=confidence)


def served(model: Model, reference_kl: float, prompts: Sequence[Array]) -> Served:
    """How the model is served, for the record. prompts: token ids that it continues where its plan guesses."""
    config, plan = model.engine_config, model.plan
    return Served(
        ops=model.ops.name,
        batch=config.max_num_seqs,
        step_tokens=step_tokens_of(config, model.config.vocab_size),
        activations=plan.activations.format,
        kv_cache=str(plan.kv_cache),
        decoded_share=1 - PROMPT_SHARE,
        reference_kl=reference_kl,
        speculation=config.speculation.method,
        answers_compared=same_answers(model, prompts),
    )


def same_answers(model: Model, prompts: Sequence[Array]) -> int:
    """How many greedy answers were compared with and without guesses; 0 for a model that guesses nothing.

    Raises KernelError when one differs on kernels that promise the same result in every batch.
    """
    if model.engine_config.speculation.method == "none":
        return 0
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    asked = [prompt[: model.config.context // 2].tolist() for prompt in prompts]
    guessed = [answer.token_ids for answer in model.generate_all(asked, sampling)]
    plain = _plain_answers(model, asked, sampling)
    differ = [i for i, (one, other) in enumerate(zip(guessed, plain, strict=True)) if one != other]
    if differ and model.decoder.batch_invariant:
        method = model.engine_config.speculation.method
        raise KernelError(
            f"{len(differ)} of {len(asked)} answers differ with speculation {method!r}; "
            "this is a defect of Halve on this machine: please report it, with `halve doctor --json`"
        )
    return len(asked)


def _plain_answers(model: Model, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[tuple[int, ...]]:
    """The same decoder in an engine that guesses nothing."""
    config = replace(model.engine_config, speculation=Speculation())
    core = EngineCore(ModelRunner(model.decoder, num_blocks=model.num_blocks), None, config)
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        core.add(Request(request_id=str(i), prompt_token_ids=tuple(prompt), sampling=sampling))
    while core.has_unfinished:
        for output in core.step():
            if output.token_id is not None:
                answers[output.request_id].append(output.token_id)
    return [tuple(answers[str(i)]) for i in range(len(prompts))]


def plan_sha256(directory: Path) -> str:
    """SHA-256 in hex of the plan as it lies in a bundle."""
    return hashlib.sha256((directory / PLAN_FILE).read_bytes()).hexdigest()


def check_plan(bundle: Checkpoint, recorded: Certificate) -> None:
    """Raise CheckpointError for a plan that was edited since it was certified; an older certificate names none."""
    if recorded.plan_sha256 is not None and plan_sha256(bundle.path) != recorded.plan_sha256:
        raise CheckpointError(
            f"{bundle.path / PLAN_FILE}: is not the plan that was certified (its hash differs); put the original file "
            "back, or make the bundle again by `halve optimize`"
        )


def check_unseen(bundle: Checkpoint, recorded: Certificate, documents: Sequence[Document], what: str) -> None:
    """Raise when text to judge on holds what the search saw, by the fingerprint in the bundle.

    CheckpointError for a fingerprint that is missing or edited, DataError for a document that was seen; an older
    certificate has none.
    """
    seen = seen_by(bundle, recorded)
    if seen is not None:
        require_unseen(documents, seen, what)


def seen_by(bundle: Checkpoint, recorded: Certificate) -> Fingerprint | None:
    """The fingerprint of what the search of a bundle saw; None in an older one. Raises CheckpointError as above."""
    if recorded.seen_sha256 is None:
        return None
    path = bundle.path / SEEN_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: is missing; put it back, or make the bundle again by `halve optimize`")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != recorded.seen_sha256:
        raise CheckpointError(f"{path}: is not the file that was certified (its hash differs); put the original back")
    return Fingerprint.from_json(raw.decode(), str(path))


def text_to_judge(bundle: Checkpoint, recorded: Certificate, text: str | Path | None) -> tuple[list[Document], str]:
    """The sealed text of a bundle, or other text, and where it came from. Raises CheckpointError, DataError."""
    if text is not None:
        return read_documents(Path(text)), str(text)
    if not recorded.sealed.kept:
        return sealed_again(recorded.sealed.source, recorded.inputs.sealed_sha256), recorded.sealed.source
    path = bundle.path / SEALED_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: is missing from the bundle; judge it on other text with --text FILE")
    documents = read_documents(path)
    if documents_sha256(documents) != recorded.inputs.sealed_sha256:
        raise CheckpointError(f"{path}: is not the text that was certified (its hash differs)")
    return documents, SEALED_FILE
