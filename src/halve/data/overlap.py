"""Whether a document holds text that was seen before: runs of words that both share, found by their hashes.

The split keeps documents apart that are alike as a whole (`data/split.py`). What it can't see is a page of one document
pasted into another, long one. So every run of RUN words of the text that a search saw is hashed, and sealed text that
shares too many of them is left out. The hashes of a large text are thinned by their value, the same on every machine,
so that a bundle can carry them and anyone can check other text against them without having what was seen.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halve.core.errors import ConfigError, DataError
from halve.core.record import parse_json
from halve.data.sources import Document
from halve.data.split import _mix, _words

Array = np.ndarray[Any, np.dtype[Any]]

RUN = 24  # words: longer than a phrase that people repeat
MOST_RUNS = 1 << 16  # that are kept: half a megabyte
SEEN_SHARE = 0.2  # of a document's runs, from which on it counts as seen
SEEN_RUNS = 50  # or so many, in a document of any length: 73 words in a row


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Hashes of the runs of a text, uint64 sorted; of all runs those that `thinning` divides."""

    thinning: int
    runs: Array

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Fingerprint":
        """Of all runs of these documents, thinned to MOST_RUNS at most."""
        found = [_runs(document) for document in documents]
        runs, thinning = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64), 1
        while len(runs) > MOST_RUNS:
            thinning *= 2
            runs = runs[runs % np.uint64(thinning) == 0]
        return cls(thinning, runs)

    def holds(self, document: Document) -> bool:
        """Whether too much of a document was seen."""
        runs = _runs(document)
        runs = runs[runs % np.uint64(self.thinning) == 0]
        hits = int(np.isin(runs, self.runs).sum())
        return hits > 0 and (hits >= SEEN_SHARE * len(runs) or hits * self.thinning >= SEEN_RUNS)

    def to_json(self) -> str:
        """As a file."""
        packed = base64.b64encode(self.runs.astype("<u8").tobytes()).decode()
        return json.dumps({"run_words": RUN, "thinning": self.thinning, "runs": packed}) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Fingerprint":
        """What `to_json` wrote. Raises DataError naming the file for anything else."""
        try:
            raw = parse_json(text, where)
            if raw["run_words"] != RUN or raw["thinning"] < 1:
                raise DataError(f"{where}: runs of {raw['run_words']!r} words, this Halve reads runs of {RUN}")
            runs = np.frombuffer(base64.b64decode(raw["runs"], validate=True), "<u8").astype(np.uint64)
            return cls(int(raw["thinning"]), runs)
        except (ConfigError, KeyError, TypeError, ValueError, binascii.Error) as error:
            raise DataError(f"{where}: no fingerprint of text ({error}); make the bundle again") from error


def without_seen(documents: Sequence[Document], seen: Fingerprint) -> list[Document]:
    """The documents that hold nothing of what was seen."""
    return [document for document in documents if not seen.holds(document)]


def require_unseen(documents: Sequence[Document], seen: Fingerprint, what: str) -> None:
    """Raise DataError, naming the first, when any document holds what the search saw."""
    for number, document in enumerate(documents, 1):
        if seen.holds(document):
            raise DataError(
                f"{what}: document {number} ({document.contents()[0][:40]!r}) holds text that calibration or search "
                "saw; a certificate is of unseen text only, give other documents"
            )


def _runs(document: Document) -> Array:
    """Hashes of every RUN words in a row, distinct; a shorter document is one run."""
    words = _words("\n".join(document.contents()))
    if len(words) < RUN:
        words = np.concatenate([words, np.zeros(RUN - len(words), np.uint64)])
    factors = _mix(np.arange(1000, 1000 + RUN, dtype=np.uint64)) | np.uint64(1)
    count = len(words) - RUN + 1
    total = np.zeros(count, np.uint64)
    for place, factor in enumerate(factors):
        total += words[place : place + count] * factor
    return np.unique(_mix(total))
