"""Calibration, selection and sealed text: three sets of documents that share no document and no near-duplicate.

A near-duplicate in two splits would let the search see what the certificate is judged on. So documents are
clustered first and a cluster goes into one split whole. Similarity is the Jaccard index of shingle sets, estimated
by MinHash and found by banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3): time grows with
the number of characters, not with the number of pairs.

A shingle is three words in a row. In scripts without spaces three characters stand for a word, so a shingle is five
characters; in code a symbol is a word. Case, width and white space do not count. The system message of a
conversation is left out where there is more: one prompt that all conversations share would make them one cluster.

Nothing here depends on the order of the file or on a random state: documents are taken in order of their hash, and
every constant comes from `_mix`. The sets are the same on every machine and under every version of numpy.
"""

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from halve.data.sources import Document

log = logging.getLogger("halve.data")

Array = np.ndarray[Any, np.dtype[Any]]

SHARES_PERCENT = (30, 25, 45)  # of documents: calibration, selection, sealed

# 42 bands of 3: a pair with Jaccard 0.5 meets in some band with probability 1 - (1 - 0.5^3)^42 = 0.996, one of 0.1
# with 0.04. Pairs that meet are joined when their hashes agree in 0.45 (standard error there: 0.044).
NUM_BANDS = 42
ROWS_PER_BAND = 3
NUM_HASHES = NUM_BANDS * ROWS_PER_BAND
MIN_AGREEMENT = 0.45

_CHUNK = 4096  # shingles hashed at once: NUM_HASHES of 8 bytes each make 4 MB

# Scripts that are written without spaces: Thai to Myanmar, Khmer, Kana, Han, and Han beyond the basic plane.
_UNSPACED = ((0x0E00, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0x20000, 0x323AF))


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Documents by what they are for, each in order of hash; no document or near-duplicate is in two of them."""

    calibration: tuple[Document, ...]
    selection: tuple[Document, ...]
    sealed: tuple[Document, ...]


def split(documents: Sequence[Document]) -> Splits:
    """Divide documents by SHARES_PERCENT, whatever their order.

    Exact duplicates are kept once and counted in a log line. Shares are met to within one document by those that
    have no near-duplicate; clusters go first, the largest first, each where most is still missing.
    """
    by_hash = {document.sha256: document for document in documents}
    unique = [by_hash[sha256] for sha256 in sorted(by_hash)]
    if len(unique) < len(documents):
        log.warning("kept %d of %d documents, the others are exact copies", len(unique), len(documents))
    roots = clusters(unique)
    parts = _assign(roots)
    num_near = len(unique) - len(set(roots.tolist()))
    log.info("split %d documents into %s", len(unique), [int((parts == part).sum()) for part in range(3)])
    if num_near:
        largest = int(np.bincount(roots).max())
        log.info("%d documents are near-duplicates of another; the largest cluster holds %d", num_near, largest)
    chosen = [tuple(d for d, part in zip(unique, parts, strict=True) if part == p) for p in range(3)]
    return Splits(calibration=chosen[0], selection=chosen[1], sealed=chosen[2])


def clusters(documents: Sequence[Document]) -> Array:
    """For each document the index of the first document of its cluster, int64 [documents].

    Two documents that MinHash finds similar (see the constants above) are in one cluster, and so are the similar
    documents of those.
    """
    signatures = np.stack([_signature(_shingles(d)) for d in documents]) if documents else np.zeros((0, NUM_HASHES))
    roots = list(range(len(documents)))
    for first, second in _similar_pairs(signatures):
        one, other = sorted((_find(roots, first), _find(roots, second)))
        roots[other] = one
    return np.array([_find(roots, i) for i in range(len(documents))], np.int64)


def _assign(roots: Array) -> Array:
    """The split of each document (0, 1, 2), int64; equal roots fall together. Root order is hash order."""
    sizes = np.bincount(roots, minlength=len(roots))
    # In hundredths of a document, so that every comparison is between whole numbers.
    missing = np.array(SHARES_PERCENT) * len(roots)
    part_of_root = np.zeros(len(roots), np.int64)
    for root in sorted(np.flatnonzero(sizes > 1).tolist(), key=lambda r: (-sizes[r], r)):
        part_of_root[root] = np.argmax(missing)
        missing[part_of_root[root]] -= 100 * sizes[root]
    # The others fill what is missing, in order of hash and contiguously: a new document then moves few of the old.
    alone = np.flatnonzero(sizes == 1)
    ends = np.cumsum(np.maximum(missing, 0))
    middles = (2 * np.arange(len(alone)) + 1) * ends[-1]
    part_of_root[alone] = np.searchsorted(2 * len(alone) * ends, middles, side="right")
    return part_of_root[roots]


def _similar_pairs(signatures: Array) -> list[tuple[int, int]]:
    """Pairs of documents to join.

    Within the documents that share a band, each is compared with the one before it and with the first one: joined
    through these, and through 42 bands, a cluster holds together, and the work stays linear.
    """
    num_documents = len(signatures)
    codes = [np.zeros(0, np.int64)]  # a pair as one number, so that sorting out repeats is quick
    for band in range(NUM_BANDS):
        rows = signatures[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND]
        order = np.lexsort(rows.T)  # stable: equal rows stay in order of document
        same = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
        follows = np.flatnonzero(same) + 1
        is_first = np.concatenate([[True], ~same])[:num_documents]
        starts = np.maximum.accumulate(np.where(is_first, np.arange(num_documents), 0))
        codes += [order[partner] * num_documents + order[follows] for partner in (follows - 1, starts[follows])]
    first, second = np.divmod(np.unique(np.concatenate(codes)), max(num_documents, 1))
    agree = np.zeros(len(first), bool)
    for start in range(0, len(first), 65536):
        part = slice(start, start + 65536)
        agree[part] = (signatures[first[part]] == signatures[second[part]]).mean(axis=1) >= MIN_AGREEMENT
    return list(zip(first[agree].tolist(), second[agree].tolist(), strict=True))


def _find(roots: list[int], index: int) -> int:
    """The root of `index`; the path to it is halved on the way."""
    while roots[index] != index:
        roots[index] = roots[roots[index]]
        index = roots[index]
    return index


def _signature(shingles: Array) -> Array:
    """The least of each of NUM_HASHES hashes over the shingles, uint32 [NUM_HASHES]."""
    factors, offsets = _hash_constants()
    least = np.full(len(factors), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), _CHUNK):
        hashed = shingles[start : start + _CHUNK, None] * factors + offsets
        least = np.minimum(least, hashed.min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)


def _shingles(document: Document) -> Array:
    """Hashes of three words in a row, uint64 [shingles], distinct; at least one."""
    parts = document.contents()
    if document.messages is not None:
        spoken = [m["content"] for m in document.messages if m["role"] != "system"]
        parts = spoken if any(part.strip() for part in spoken) else parts
    words = _words("\n".join(parts))
    padded = np.concatenate([words, np.zeros(2, np.uint64)])  # a short text still has a shingle
    return np.unique(_mix(_follow(padded)))


def _words(text: str) -> Array:
    """A hash of each word, uint64 [words], at least one. A character of an unspaced script hashes with the next two."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    codes = np.frombuffer(folded.encode("utf-32-le"), np.uint32)
    kind = _kinds()[codes]
    codes, before, kind = codes[kind > 0], np.concatenate([[0], kind[:-1]])[kind > 0], kind[kind > 0]
    if not len(codes):
        return np.zeros(1, np.uint64)
    # A letter continues a word when the character before it is a letter too; all else starts one.
    starts = np.flatnonzero((kind != _LETTER) | (before != _LETTER))
    place = np.arange(len(codes)) - np.repeat(starts, np.diff(np.append(starts, len(codes))))
    letters = _mix(codes.astype(np.uint64) + (place.astype(np.uint64) << np.uint64(32)))
    words = np.add.reduceat(letters, starts)
    follow = _follow(np.concatenate([words, np.zeros(2, np.uint64)]))
    return np.where(kind[starts] == _UNSPACED_LETTER, follow, words)


def _follow(words: Array) -> Array:
    """A hash of each word with the two after it: uint64 [n + 2] -> [n]."""
    one, two = _mix(np.arange(2, dtype=np.uint64)) | np.uint64(1)
    hashed: Array = words[:-2] + words[1:-1] * one + words[2:] * two
    return hashed


def _mix(values: Array) -> Array:
    """SplitMix64's output function, uint64 to uint64. Source: Steele, Lea and Flood, OOPSLA 2014."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed


@cache
def _hash_constants() -> tuple[Array, Array]:
    """Odd factors and offsets of the hashes, uint64 [NUM_HASHES] each."""
    numbers = _mix(np.arange(100, 100 + 2 * NUM_HASHES, dtype=np.uint64))
    return numbers[::2] | np.uint64(1), numbers[1::2]


_SYMBOL, _LETTER, _UNSPACED_LETTER = 1, 2, 3


@cache
def _kinds() -> Array:
    """What each code point is, int8 [0x110000]: 0 white space, else one of the three above."""
    kinds = np.fromiter((_kind(chr(code)) for code in range(0x110000)), np.int8, 0x110000)
    for first, last in _UNSPACED:
        spaced = kinds[first : last + 1]
        spaced[spaced == _LETTER] = _UNSPACED_LETTER
    return kinds


def _kind(character: str) -> int:
    if character.isspace():
        return 0
    # A mark belongs to the letter that it sits on.
    return _LETTER if character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M" else _SYMBOL
