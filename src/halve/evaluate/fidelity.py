"""How far a smaller model's predictions are from the original's, token by token on the same documents.

KL(original || smaller) measures how much the whole distribution moved, flips how often the first choice did, and the
ratio of perplexities whether the change is for the worse. KL alone cannot tell better from worse (arXiv:2606.19558)
and accuracy alone hides flips (arXiv:2407.09141), so all are kept. Both models see the same windows, so every figure
is paired: what is hard about a document cancels.

A model is a `LogitSource`, so torch, our own kernels, ONNX, GGUF and a served model are judged alike.
"""

import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from halve.core.certificate import Quality
from halve.core.errors import DataError, OutputError, QualityError
from halve.evaluate.bootstrap import intervals, ratio, upper_quantile

log = logging.getLogger("halve.evaluate")

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK_ELEMENTS = 256 * 1024  # logits scored at once; 2 MiB in float64, so that the passes run in cache
_ROWS_ELEMENTS = 1 << 24  # logits of an original that are asked for at once: 64 MiB; its head is read once for all


@dataclass(frozen=True, kw_only=True, slots=True)
class Minimum:
    """The least text that a split must hold: documents with something to predict, and predicted tokens."""

    documents: int
    tokens: int


# Documents are what the bootstrap draws, so their number decides whether an interval means what it says. Simulated
# coverage of a 95 % interval: 0.945 with 20 documents and 0.93 with 10 when documents differ as a normal distribution
# does, 0.88 and 0.895 when they differ as a lognormal one does (600 trials each).
# Width, measured on documents of 100 tokens (tiny-en, a 4.5 M parameter model, round to nearest in groups of 32):
# ln(ppl_ratio) spreads between documents by 0.0017 at 8 bits and 0.031 at 4, so 20 documents and 2000 tokens bring
# ppl_ratio within 0.08 % and 1.4 %: enough to certify 8 bits at a limit of 1 %, while 4 bits want more text.
# Selection only ranks candidates: half of that, an interval 1.4 times as wide. Calibration takes means of squares
# over tokens and has no interval; 256 tokens bring the mean square of a normal activation within 9 % (one sigma).
SplitName = Literal["calibration", "selection", "sealed"]
MINIMUM: Mapping[SplitName, Minimum] = {
    "calibration": Minimum(documents=1, tokens=256),
    "selection": Minimum(documents=10, tokens=1000),
    "sealed": Minimum(documents=20, tokens=2000),
}


class LogitSource(Protocol):
    """A model that can be judged.

    It may also have `expect(windows: Sequence[Array]) -> None`, which is then told what it will be asked, in order,
    so that it can compute many short windows at once.
    """

    @property
    def vocab_size(self) -> int:
        """Columns of its logits."""

    def logits(self, tokens: Array) -> Iterator[Array]:
        """Next-token logits of int32 [tokens], in chunks of float32 [t, vocab_size] that together cover every position.

        A chunk may be reused by the source once the next one is asked for.
        """


class Piece(Protocol):
    """Logits of some positions of one window."""

    @property
    def index(self) -> int:
        """Which of the windows."""

    @property
    def start(self) -> int:
        """Its first position."""

    @property
    def logits(self) -> Array:
        """float32 [t, vocab_size], valid until the next step."""


@runtime_checkable
class SteppedSource(Protocol):
    """A model that runs many windows side by side, step by step, as an engine does."""

    def steps(self, windows: Sequence[Array]) -> Iterator[Sequence[Piece]]:
        """All windows, in whatever order; a piece may come again, and then counts as it came last."""


@runtime_checkable
class RowSource(Protocol):
    """A model that can be asked for any rows of a window that it has seen."""

    def states(self, window: Array) -> Any:
        """What the rows of a window are made of."""

    def rows(self, parts: Sequence[tuple[Any, int, int]]) -> Array:
        """Logits float32 [rows, vocab_size] of positions from one to another of several windows, by their states."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedScores:
    """Scores of every predicted token, in order of document and position. Logarithms are natural.

    kl: float32 [tokens], KL(original || smaller), at least 0. flip: bool [tokens], the top-1 differs.
    nll_original, nll_smaller: float32 [tokens], negative log-likelihood of the token that came.
    document: int32 [tokens], index into the documents that were given; one with nothing to predict never appears.
    """

    kl: Array
    flip: Array
    nll_original: Array
    nll_smaller: Array
    document: Array

    def followed_by(self, other: "PairedScores") -> "PairedScores":
        """These scores and those of further documents, whose indices count on."""
        first_new = int(self.document[-1]) + 1 if len(self.document) else 0
        joined = {f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)}
        joined["document"][len(self.document) :] += first_new
        return PairedScores(**joined)

    def save(self, path: Path | str) -> None:
        """Write an .npz. Raises OutputError when it can't be written."""
        path = Path(path)
        if path.suffix != ".npz":
            raise OutputError(f"{path}: scores are written as .npz; give a name that ends in .npz")
        try:
            np.savez_compressed(path, **{f.name: getattr(self, f.name) for f in fields(self)})
        except OSError as error:
            raise OutputError(f"{path}: can't be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path | str) -> "PairedScores":
        """Read what `save` wrote. Raises QualityError on anything else."""
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {f.name: file[f.name] for f in fields(cls)}
        except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise QualityError(f"{path}: no scores of Halve ({error}); compare the models again") from error
        kinds = {"kl": "f4", "flip": "b1", "nll_original": "f4", "nll_smaller": "f4", "document": "i4"}
        for name, values in arrays.items():
            if values.dtype != np.dtype(kinds[name]) or values.shape != (len(arrays["document"]),):
                raise QualityError(
                    f"{path}: {name} is {values.dtype} {list(values.shape)}, expected {np.dtype(kinds[name])} "
                    f"[{len(arrays['document'])}]; compare the models again"
                )
        return cls(**arrays)


def windows(tokens: Array, window_tokens: int) -> list[Array]:
    """Cut a document into windows that overlap by one token, so that all but its first are predicted exactly once.

    The last window may be shorter. A document of one token, or none, has nothing to predict and gives no window.
    Raises QualityError when window_tokens is below 2.
    """
    if window_tokens < 2:
        raise QualityError(f"window_tokens: {window_tokens} leaves nothing to predict; take at least 2")
    return [tokens[start : start + window_tokens] for start in range(0, len(tokens) - 1, window_tokens - 1)]


def compare(
    original: LogitSource,
    smaller: LogitSource,
    documents: Sequence[Array],
    *,
    window_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> PairedScores:
    """Score both models on every predicted token of `documents` (int [tokens] each).

    progress: called after each window with the tokens predicted so far and in all.
    Raises QualityError, naming the document, when vocabularies differ, a token is outside them, logits are not
    finite, or a source does not give one row for each position.
    """
    vocab_size = original.vocab_size
    if smaller.vocab_size != vocab_size:
        raise QualityError(
            f"vocabularies differ: {vocab_size} in the original, {smaller.vocab_size} in the smaller model; "
            "only models with the same tokens can be compared"
        )
    cut = [windows(tokens, window_tokens) for tokens in documents]
    if num_alone := sum(not parts for parts in cut):
        log.warning("%d of %d documents have fewer than two tokens, nothing to predict", num_alone, len(documents))
    for source in (original, smaller):
        if expect := getattr(source, "expect", None):
            expect([window for parts in cut for window in parts])
    for index, (tokens, parts) in enumerate(zip(documents, cut, strict=True)):
        if parts and (tokens.min() < 0 or tokens.max() >= vocab_size):
            raise QualityError(
                f"document {index + 1}: tokens {tokens.min()} to {tokens.max()} leave the vocabulary of {vocab_size}; "
                "encode with the model's own tokenizer"
            )
    side_by_side = isinstance(smaller, SteppedSource) and isinstance(original, RowSource)
    scored = _score_steps if side_by_side else _score_in_turn
    kl, flip, nll_original, nll_smaller = scored(original, smaller, cut, progress or (lambda done, total: None)).T
    return PairedScores(
        kl=kl.astype(np.float32),
        flip=flip.astype(bool),
        nll_original=nll_original.astype(np.float32),
        nll_smaller=nll_smaller.astype(np.float32),
        document=np.repeat(np.arange(len(cut), dtype=np.int32), [sum(len(w) - 1 for w in parts) for parts in cut]),
    )


def quality(scores: PairedScores, *, confidence: float = 0.95, num_resamples: int = 4000, seed: int = 0) -> Quality:
    """The figures of a certificate, each with its bootstrap interval over documents (`evaluate.bootstrap`).

    kl_mean, flip_rate: over all tokens. ppl_ratio: exp of the mean difference of nll. kl_p99: the smallest KL that at
    most 1 % of the tokens exceed. n is the number of documents with something to predict.
    Raises QualityError with fewer than 2 of these, or too few resamples for this confidence.
    """
    index, document = np.unique(scores.document, return_inverse=True)
    count = np.bincount(document, minlength=len(index))

    def mean(values: Array) -> Callable[[Array], Array]:
        return ratio(np.bincount(document, weights=values.astype(np.float64), minlength=len(index)), count)

    log_ratio = mean(scores.nll_smaller.astype(np.float64) - scores.nll_original)
    figures = intervals(
        {
            "kl_mean": mean(scores.kl),
            "kl_p99": upper_quantile(scores.kl, document, tail_percent=1),
            "flip_rate": mean(scores.flip),
            "ppl_ratio": lambda weights: np.exp(log_ratio(weights)),
        },
        len(index),
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    return Quality(
        kl_mean=figures["kl_mean"],
        kl_p99=figures["kl_p99"],
        flip_rate=figures["flip_rate"],
        ppl_ratio=figures["ppl_ratio"],
        confidence=confidence,
        num_documents=len(index),
        num_tokens=len(document),
    )


def require_enough(documents_tokens: Sequence[Array], split_name: SplitName) -> None:
    """Raise DataError when a split holds less than its MINIMUM; every token but a document's first is predicted."""
    predicted = [len(tokens) - 1 for tokens in documents_tokens if len(tokens) > 1]
    least = MINIMUM[split_name]
    if len(predicted) < least.documents or sum(predicted) < least.tokens:
        raise DataError(
            f"{split_name} text: {len(predicted)} documents with {sum(predicted)} tokens to predict; needed are "
            f"{least.documents} documents and {least.tokens} tokens. Give a file with more text, or with its "
            "documents apart: JSONL with one object a line, or blank lines between documents"
        )


def _score_in_turn(
    original: LogitSource, smaller: LogitSource, cut: list[list[Array]], progress: Callable[[int, int], None]
) -> Array:
    """Scores float64 [tokens, 4] of all windows, one after another."""
    total, done = sum(len(window) - 1 for parts in cut for window in parts), 0
    scores: list[Array] = [np.zeros((0, 4))]
    for index, parts in enumerate(cut):
        for window in parts:
            scores += _score_window(original, smaller, window, f"document {index + 1}")
            done += len(window) - 1
            progress(done, total)
    return np.concatenate(scores)


def _score_steps(original: Any, smaller: Any, cut: list[list[Array]], progress: Callable[[int, int], None]) -> Array:
    """The same where the smaller model runs windows side by side and the original gives the rows that it asks for."""
    windows_ = [window for parts in cut for window in parts]
    names = [f"document {i + 1}" for i, parts in enumerate(cut) for _ in parts]
    starts = np.cumsum([0] + [len(window) - 1 for window in windows_])
    scores = np.full((int(starts[-1]), 4), np.nan)
    missing = [len(window) - 1 for window in windows_]
    states: dict[int, Any] = {}
    most, done = max(1, _BLOCK_ELEMENTS // original.vocab_size), 0
    for pieces in smaller.steps(windows_):
        for piece in pieces:
            if piece.index not in states:
                states[piece.index] = original.states(windows_[piece.index])
        for spans in _spans(pieces, windows_, max(1, _ROWS_ELEMENTS // original.vocab_size)):
            asked = original.rows([(states[piece.index], begin, end) for piece, begin, end in spans])
            _require_finite(asked, f"{names[spans[0][0].index]} and those beside it, original")
            taken = 0
            for piece, first, last in spans:
                window = windows_[piece.index]
                for begin in range(first, last, most):
                    end = min(begin + most, last)
                    rows = asked[taken : taken + end - begin]
                    other = piece.logits[begin - piece.start : end - piece.start]
                    _require_finite(other, f"{names[piece.index]}, smaller")
                    into = scores[starts[piece.index] + begin : starts[piece.index] + end]
                    new = int(np.isnan(into[:, 0]).sum())
                    into[:] = _score(rows, other, window[begin + 1 : end + 1])
                    missing[piece.index] -= new
                    done, taken = done + new, taken + end - begin
        for index in {piece.index for piece in pieces}:
            if not missing[index]:
                states.pop(index, None)
        progress(done, int(starts[-1]))
    if left := sum(missing):
        raise QualityError(
            f"{left} of {int(starts[-1])} positions have no logits of the smaller model; its steps left them out"
        )
    return scores


def _spans(pieces: Sequence[Piece], windows_: Sequence[Array], most: int) -> Iterator[list[tuple[Piece, int, int]]]:
    """Pieces with their first and last positions that predict something, cut and put together to `most` rows."""
    spans: list[tuple[Piece, int, int]] = []
    room = most
    for piece in pieces:
        begin, last = piece.start, min(piece.start + len(piece.logits), len(windows_[piece.index]) - 1)
        while begin < last:
            end = min(begin + room, last)
            spans.append((piece, begin, end))
            room -= end - begin
            begin = end
            if not room:
                yield spans
                spans, room = [], most
    if spans:
        yield spans


def _require_finite(logits: Array, name: str) -> None:
    if not np.isfinite(logits).all():
        raise QualityError(f"{name}: logits hold NaN or infinity; the model's weights or its format are broken")


def _score_window(original: LogitSource, smaller: LogitSource, window: Array, name: str) -> Iterator[Array]:
    """Scores float64 [t, 4] (kl, flip, nll of both) of blocks of positions; the last position predicts nothing."""
    pieces = _aligned(_checked(original, window, f"{name}, original"), _checked(smaller, window, f"{name}, smaller"))
    start = 0
    for rows, other_rows in pieces:
        targets = window[start + 1 : start + 1 + len(rows)]
        yield _score(rows[: len(targets)], other_rows[: len(targets)], targets)
        start += len(rows)


def _checked(source: LogitSource, window: Array, name: str) -> Iterator[Array]:
    """The source's chunks in blocks of bounded size; raises QualityError when they are not what they should be."""
    rows_seen = 0
    most = max(1, _BLOCK_ELEMENTS // source.vocab_size)
    for chunk in source.logits(window):
        if chunk.ndim != 2 or chunk.shape[1] != source.vocab_size:
            raise QualityError(f"{name}: logits of shape {list(chunk.shape)}, expected [tokens, {source.vocab_size}]")
        rows_seen += len(chunk)
        if rows_seen > len(window):
            break
        _require_finite(chunk, name)
        yield from (chunk[start : start + most] for start in range(0, len(chunk), most))
    if rows_seen != len(window):
        raise QualityError(f"{name}: {rows_seen} or more rows of logits for {len(window)} tokens, expected one each")


def _aligned(one: Iterator[Array], other: Iterator[Array]) -> Iterator[tuple[Array, Array]]:
    """The same rows of two streams of equal length that are cut at different places."""
    left = right = np.zeros((0, 0), np.float32)
    while True:
        left = left if len(left) else next(one, left)
        right = right if len(right) else next(other, right)
        num_rows = min(len(left), len(right))
        if num_rows == 0:
            return
        yield left[:num_rows], right[:num_rows]
        left, right = left[num_rows:], right[num_rows:]


def _score(logits: Array, other_logits: Array, targets: Array) -> Array:
    """kl, flip, nll of both for each row: float64 [t, 4].

    In float64 throughout: a KL of 1e-5 is a sum of differences of logarithms that float32 keeps to 1e-6 only.
    """
    rows = np.arange(len(targets))
    # The first of equal largest values, in both.
    top, other_top = logits.argmax(axis=1), other_logits.argmax(axis=1)
    x = logits.astype(np.float64)
    y = other_logits.astype(np.float64)
    x -= x[rows, top, None]  # the largest is 0, so exp can't overflow
    y -= y[rows, other_top, None]
    nll, other_nll = -x[rows, targets], -y[rows, targets]
    p = np.exp(x)
    sum_p = p.sum(axis=1)
    x -= y
    log_sum_p, log_sum_q = np.log(sum_p), np.log(np.exp(y, out=y).sum(axis=1))
    # sum p (log p - log q), with log p = x - log_sum_p and log q = y - log_sum_q; rounding may leave it below 0.
    kl = np.maximum(np.einsum("tv,tv->t", p, x) / sum_p - log_sum_p + log_sum_q, 0)
    return np.stack([kl, top != other_top, nll + log_sum_p, other_nll + log_sum_q], axis=1)
