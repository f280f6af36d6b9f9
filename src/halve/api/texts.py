"""The text of one run: read, split three ways, in tokens; and the sealed part as a bundle keeps it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halve.core.errors import DataError
from halve.data import Document, documents_sha256, encode, read_documents, split
from halve.data.mixed import mixed_text_paths
from halve.data.overlap import Fingerprint, without_seen
from halve.data.split import Splits
from halve.evaluate import require_enough
from halve.kernels.ops import Array
from halve.models import ModelConfig
from halve.text import Tokenizer

log = logging.getLogger("halve")

# Windows are no longer than this even where the context is: attention over a longer one costs more than it tells.
WINDOW_TOKENS = 2048
LEAST_BEGINNING = 64  # tokens of a document of which not all are read


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Token ids of each split's documents, and the sealed documents themselves."""

    calibration: list[Array]
    selection: list[Array]
    sealed: list[Array]
    sealed_documents: tuple[Document, ...]
    calibration_sha256: str
    selection_sha256: str
    sealed_sha256: str
    seen: Fingerprint  # of all that calibration and search see
    window_tokens: int
    source: str
    document_tokens: int | None = None  # of each document, at most


def read_texts(path: Path | None) -> list[Document]:
    """Documents of a file or directory; without one, the mixed text that the package ships."""
    if path is not None:
        return read_documents(path)
    return [document for part in mixed_text_paths() for document in read_documents(part)]


def window_of(config: ModelConfig) -> int:
    """Tokens of a scoring window: the context, at most WINDOW_TOKENS."""
    return min(config.context, WINDOW_TOKENS)


def prepare_texts(
    path: Path | None,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    selected: bool,
    most_sealed: int | None = None,
) -> Texts:
    """Split, encode and check that each split that will be used holds enough.

    selected: whether candidates will be judged on the selection split. most_sealed: tokens of the sealed split, where
    not all can be read: of each document that is judged on, so many first tokens are then taken that all speak, a power
    of two. Raises DataError saying how much text is there and how much is needed.
    """
    parts = split(read_texts(path))
    seen, unseen = _unseen(parts)
    calibration, selection, sealed = (
        encode(part, tokenizer, vocab_size=config.vocab_size) for part in (parts.calibration, parts.selection, unseen)
    )
    require_enough(sealed, "sealed")
    require_enough(calibration, "calibration")
    if selected:
        require_enough(selection, "selection")
    document_tokens = None if most_sealed is None else _cut(sealed, most_sealed)
    selection, sealed = beginnings(selection, document_tokens), beginnings(sealed, document_tokens)
    return Texts(
        calibration=calibration,
        selection=selection,
        sealed=sealed,
        sealed_documents=tuple(unseen),
        calibration_sha256=documents_sha256(parts.calibration),
        selection_sha256=documents_sha256(parts.selection),
        sealed_sha256=documents_sha256(unseen),
        seen=seen,
        window_tokens=window_of(config),
        source="shipped mixed text" if path is None else str(Path(path).resolve()),
        document_tokens=document_tokens,
    )


def _cut(documents: Sequence[Array], most: int) -> int | None:
    """Tokens of each document, LEAST_BEGINNING times a power of two, that are `most` in all; None for all of them."""
    if sum(map(len, documents)) <= most:
        return None
    size = LEAST_BEGINNING
    while sum(min(len(document), 2 * size) for document in documents) <= most:
        size *= 2
    return size


def beginnings(documents: list[Array], most: int | None) -> list[Array]:
    """The first tokens of each document, at most so many; all of them for None."""
    return documents if most is None else [tokens[:most] for tokens in documents]


def _unseen(parts: Splits) -> tuple[Fingerprint, list[Document]]:
    """What the search sees, and the sealed documents that hold nothing of it."""
    seen = Fingerprint.of([*parts.calibration, *parts.selection])
    unseen = without_seen(parts.sealed, seen)
    if left_out := len(parts.sealed) - len(unseen):
        log.warning("left out %d sealed documents that hold long runs of text which the search sees", left_out)
    return seen, unseen


def sealed_again(source: str, expected_sha256: str) -> list[Document]:
    """The sealed split of a text that a bundle only names. Raises DataError when it is not the same any more."""
    _, documents = _unseen(split(read_texts(None if source == "shipped mixed text" else Path(source))))
    if documents_sha256(documents) != expected_sha256:
        raise DataError(
            f"{source}: its sealed part is not the text that was certified (its hash differs); "
            "give the original file back, or judge on other text with --text FILE"
        )
    return documents


def shipped_sealed() -> list[Document]:
    """The sealed part of the shipped text, which no search of Halve's defaults sees."""
    return _unseen(split(read_texts(None)))[1]
