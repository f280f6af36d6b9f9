"""The verb `compare`: two models side by side on the same text that neither has seen."""

import logging
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halve.api.certify import check_unseen, seen_by, text_to_judge
from halve.api.clock import witnessed
from halve.api.facts import environment, versions
from halve.api.model import Model, torch_ops
from halve.api.progress import SILENT, Progress
from halve.api.roofline import rooflines
from halve.api.scorers import original_scorer
from halve.api.sides import Kind, Side
from halve.api.texts import WINDOW_TOKENS, beginnings, shipped_sealed
from halve.api.trial import in_turns
from halve.checkpoint import Checkpoint
from halve.core.certificate import Measured, Roofline, Speed
from halve.core.errors import ConfigError
from halve.data import Document, encode, read_documents
from halve.data.overlap import without_seen
from halve.evaluate import compare as scored
from halve.evaluate import require_enough
from halve.evaluate.scorer import EngineScorer
from halve.evaluate.side_by_side import Better, SideBySide, against_reference, side_by_side
from halve.kernels.ops import Array
from halve.text import Tokenizer

log = logging.getLogger("halve")

SAME_BYTES = 0.001  # by which two sizes may differ and count as the same
Verdict = Literal["a", "b", "trade", "not told apart"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A side: kind, what its matrices are stored in (weights in each), bytes of its files and those a token reads."""

    name: str
    kind: Kind
    formats: dict[str, int]
    file_bytes: int
    bytes_per_token: int
    activations: str
    kv_cache: str


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two models beside each other.

    decode_ratio, prefill_ratio: seconds of a token, B over A, both run in turns; null where speed was left out, and
    `speed_left_out` says why. bytes_ratio: of those that a token reads, B over A. verdict: `a` or `b` where one is no
    worse in quality, bytes and speed and better in one; `trade` where each is better in something. text: what it was
    judged on. reference: null where A stands for it.
    """

    verdict: Verdict
    sentence: str
    a: Facts
    b: Facts
    quality: SideBySide
    bytes_ratio: float
    speed_a: Speed | None
    speed_b: Speed | None
    decode_ratio: Measured | None
    prefill_ratio: Measured | None
    speed_left_out: str | None
    rooflines: tuple[Roofline, ...]
    text: str
    reference: str | None
    device: str
    versions: dict[str, str]
    command: str
    version: int = 1


def compare(
    a: str | Path,
    b: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    speed: bool = True,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Compared:
    """Set two models side by side: bundles, Hugging Face or compressed-tensors directories, GGUF files.

    reference: the model that both were made from; then the KL divergence and the flips of each from it are measured,
    else those of B from A. text: what to judge on; without it the sealed text of A or else of B, less what the other's
    search saw, or the sealed part of the shipped text where neither is a bundle. tokenizer: a directory that has it,
    where both are GGUF files. speed: whether both are timed, in turns, in our engine.
    Raises ConfigError for models of other tokens, DataError for text that a search saw or that is too little, else as
    `halve.load` does.
    """
    torch_ops(device)  # a device that is not there is refused now
    with ExitStack() as stack:
        sides = [Side.open(model) for model in (a, b)]
        others = [Side.open(model) for model in (reference, tokenizer) if model is not None]
        for side in (*sides, *others):
            stack.callback(side.close)
        of_reference = others[0] if reference is not None else None
        if of_reference is not None and of_reference.checkpoint is None:
            raise ConfigError(f"reference {reference}: a GGUF file; give the directory of the original model")
        words = [_tokenizer(side, (*reversed(others), *sides)) for side in (*sides, *others)]
        _check_tokens([*sides, *others], words)
        documents, source = _documents(sides, text)
        config = sides[0].config
        tokens = encode(
            documents,
            Tokenizer.from_directory(words[0].path, vocab_size=config.vocab_size),
            vocab_size=config.vocab_size,
        )
        if text is None:
            judged_on = next((side.certificate.sealed for side in sides if side.certificate is not None), None)
            tokens = beginnings(tokens, None if judged_on is None else judged_on.document_tokens)
        require_enough(tokens, "sealed")
        models = [side.load(found, device) for side, found in zip(sides, words[:2], strict=True)]
        quality = _quality(models, of_reference, tokens, device, progress)
        left_out = _no_speed(sides, speed)
        turns = None
        limits: tuple[Roofline, ...] = ()
        if left_out is None:
            with witnessed():
                turns = in_turns(models, progress)
            pairs = zip("AB", sides, turns.speeds, strict=True)
            found = [side.judged(name, measured) for name, side, measured in pairs]
            judged = [one for one in found if one is not None]
            limits = rooflines(judged, read_gb_s=turns.read_gb_s) if device == "cpu" else ()
        facts = [_facts(side, model) for side, model in zip(sides, models, strict=True)]
        for model in models:
            model.close()
    ratio = facts[1].bytes_per_token / facts[0].bytes_per_token
    decode = None if turns is None else turns.decode
    verdict = verdict_of(quality.better, ratio, decode)
    return Compared(
        verdict=verdict,
        sentence=sentence_of(verdict, quality, ratio, decode),
        a=facts[0],
        b=facts[1],
        quality=quality,
        bytes_ratio=ratio,
        speed_a=None if turns is None else turns.speeds[0],
        speed_b=None if turns is None else turns.speeds[1],
        decode_ratio=decode,
        prefill_ratio=None if turns is None else turns.prefill,
        speed_left_out=left_out,
        rooflines=limits,
        text=source,
        reference=None if of_reference is None else of_reference.name,
        device=environment(device),
        versions=versions(),
        command=_command(a, b, reference=reference, text=text, tokenizer=tokenizer, speed=speed, device=device),
    )


def verdict_of(better: Better, bytes_ratio: float, decode: Measured | None) -> Verdict:
    """Which side to take, if one is no worse in anything that was measured and better in something."""
    votes = {better} - {"not told apart"}
    if abs(bytes_ratio - 1) > SAME_BYTES:
        votes.add("b" if bytes_ratio < 1 else "a")
    if decode is not None and not decode.low <= 1 <= decode.high:
        votes.add("b" if decode.high < 1 else "a")
    if len(votes) == 2:
        return "trade"
    return "a" if votes == {"a"} else "b" if votes == {"b"} else "not told apart"


def sentence_of(verdict: Verdict, quality: SideBySide, bytes_ratio: float, decode: Measured | None) -> str:
    """The verdict in one sentence."""
    lead = {
        "a": "Take A",
        "b": "Take B",
        "trade": "Neither is better in everything",
        "not told apart": "A and B are not told apart",
    }[verdict]
    ratio = quality.ppl_ratio
    interval = f"[{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}]"
    if quality.a is not None and quality.b is not None:
        figures = f"(KL {quality.a.kl_mean.value:.3g} and {quality.b.kl_mean.value:.3g} nats a token)"
        closer = {"a": "A is closer to the reference", "b": "B is closer to the reference"}
        said = f"{closer.get(quality.better, 'neither is shown to be closer to the reference')} {figures}"
        said += f", B's perplexity is {ratio.value - 1:+.2%} {interval} of A's"
    elif quality.foreign:
        said = "this text is foreign to them (perplexity above the vocabulary), so that it tells nothing of quality"
    elif quality.better == "not told apart":
        said = f"no difference in perplexity is shown (B over A {ratio.value - 1:+.2%} {interval})"
    else:
        word = "lower" if ratio.value < 1 else "higher"
        said = f"B's perplexity is {abs(ratio.value - 1):.2%} {word} than A's {interval}"
    if quality.between is not None:
        said += f", their first choices differ in {quality.between.flip_rate.value:.1%} of places"
    same = abs(bytes_ratio - 1) <= SAME_BYTES
    cost = "both read as many bytes for a token" if same else f"B reads {bytes_ratio:.2f}x the bytes for a token"
    if decode is not None:
        told = decode.low <= 1 <= decode.high
        cost += (
            ", no difference in decode speed is shown"
            if told
            else f" and takes {decode.value:.2f}x the time to decode it"
        )
    return f"{lead}: {said}; {cost}."


def _tokenizer(side: Side, others: Sequence[Side]) -> Checkpoint:
    return side.tokenizer_from(next((other for other in others if other.checkpoint is not None), None))


def _check_tokens(sides: Sequence[Side], words: Sequence[Checkpoint]) -> None:
    """Refuse models that read text as other tokens. words: the directory with the tokenizer of each."""
    first = sides[0]
    for other in sides[1:]:
        if other.config.vocab_size != first.config.vocab_size:
            raise ConfigError(
                f"{other.path}: {other.config.vocab_size} tokens, and {first.config.vocab_size} in {first.path}; only "
                "models with the same tokens can be compared"
            )
    size = first.config.vocab_size
    own, *theirs = (Tokenizer.from_directory(found.path, vocab_size=size) for found in words)
    names = [side.path for side in sides[1:]]
    for path, tokenizer in zip(names, theirs, strict=True):
        if difference := own.difference(tokenizer):
            raise ConfigError(
                f"{path}: another tokenizer than {first.path}, {difference}; only models with the same tokens can be "
                "compared"
            )


def _documents(sides: Sequence[Side], text: str | Path | None) -> tuple[list[Document], str]:
    """Text that no bundle's search saw, and where it came from."""
    bundles = [
        (s.name, s.checkpoint, s.certificate) for s in sides if s.checkpoint is not None and s.certificate is not None
    ]
    if text is not None:
        documents = read_documents(Path(text))
        for _, checkpoint, certificate in bundles:
            check_unseen(checkpoint, certificate, documents, str(text))
        return documents, str(text)
    if not bundles:
        return shipped_sealed(), "sealed part of the shipped mixed text"
    name, checkpoint, certificate = bundles[0]
    documents, source = text_to_judge(checkpoint, certificate, None)
    check_unseen(checkpoint, certificate, documents, source)
    for other, its_checkpoint, its_certificate in bundles[1:]:
        seen = seen_by(its_checkpoint, its_certificate)
        kept = documents if seen is None else without_seen(documents, seen)
        if len(kept) < len(documents):
            log.warning("left out %d documents that the search of %s saw", len(documents) - len(kept), other)
        documents = kept
    return documents, f"{source} of {name}"


def _quality(
    models: Sequence[Model], reference: Side | None, tokens: Sequence[Array], device: str, progress: Progress
) -> SideBySide:
    """Both as their engines run them, the reference in float32 by the reference kernels."""
    window = min(WINDOW_TOKENS, *(model.config.context for model in models))
    a, b = (EngineScorer(m.decoder, m.engine_config, num_blocks=m.num_blocks) for m in models)
    if reference is None:
        with progress.task("Scoring A and B", "tokens") as advance:
            return side_by_side(scored(a, b, tokens, window_tokens=window, progress=advance), vocab_size=a.vocab_size)
    assert reference.checkpoint is not None
    config = reference.config.with_kv_format("fp32")
    window = min(window, config.context)
    original = original_scorer(reference.checkpoint, config, device)
    found = []
    for name, source in (("A", a), ("B", b)):
        with progress.task(f"Scoring {name}", "tokens") as advance:
            found.append(scored(original, source, tokens, window_tokens=window, progress=advance))
    return against_reference(*found, vocab_size=a.vocab_size)


def _no_speed(sides: Sequence[Side], asked: bool) -> str | None:
    """Why speed is not measured; None where it is."""
    if not asked:
        return "not asked for"
    for side in sides:
        if side.unpacked:
            return (
                f"{side.name}: {', '.join(side.unpacked)} runs in float32 here, which says nothing of its speed; "
                f"measure it in llama.cpp by `halve bench MODEL --vs llama.cpp:{side.name}`"
            )
    return None


def _facts(side: Side, model: Model) -> Facts:
    return Facts(
        name=side.name,
        kind=side.kind,
        formats=side.formats,
        file_bytes=side.size_bytes,
        bytes_per_token=side.bytes_per_token,
        activations=model.plan.activations.format,
        kv_cache=str(model.plan.kv_cache),
    )


def _command(
    a: str | Path,
    b: str | Path,
    *,
    reference: str | Path | None,
    text: str | Path | None,
    tokenizer: str | Path | None,
    speed: bool,
    device: str,
) -> str:
    """The shell command that measures this again."""
    words = ["halve", "compare", str(a), str(b)]
    for flag, value in (("--reference", reference), ("--text", text), ("--tokenizer", tokenizer)):
        words += [] if value is None else [flag, str(value)]
    words += [] if speed else ["--no-speed"]
    words += [] if device == "cpu" else ["--device", device]
    return shlex.join(words)
