"""A router that learns from which questions two models answered right: hashed words, two logistic regressions.

It predicts, from a prompt alone, how likely each model is right; the difference is the gain of asking the dear one. It
is small on purpose (a table of 2 x 65,536 weights, microseconds a prompt): a router has to cost less than it saves, and
whether it routes better than chance is what `halve.economics.routing` measures on questions that it never saw.
Source of the optimizer: AdaGrad (JMLR 12, 2011), over minibatches in a fixed order.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

NUM_FEATURES = 1 << 16
EPOCHS, BATCH, RATE, DECAY = 8, 128, 0.15, 1e-4
FOLDS = 5
_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Rows of a sparse matrix: features of row i lie at start[i] .. start[i + 1]. index int64, value float64."""

    start: Array
    index: Array
    value: Array

    def rows(self, which: Array) -> "Features":
        """Some rows, in the order of their numbers in `which`."""
        sizes = self.start[which + 1] - self.start[which]
        start = np.concatenate([[0], np.cumsum(sizes)])
        take = np.arange(start[-1]) - np.repeat(start[:-1] - self.start[which], sizes)
        return Features(start=start, index=self.index[take], value=self.value[take])


def features_of(prompts: Sequence[str]) -> Features:
    """Words and pairs of words, hashed, each prompt of length 1; and its length, in eight steps."""
    starts, indices, values = [0], [], []
    for prompt in prompts:
        words = [
            word.lower() if not word.isdigit() else "0" * min(len(word), 4) for word in _WORD.findall(prompt[:8000])
        ]
        names = {*words, *(f"{a} {b}" for a, b in pairwise(words))}
        found = {zlib.crc32(name.encode("utf-8", "surrogatepass")) % (NUM_FEATURES - 16) for name in names}
        size = 1 / max(1.0, len(found)) ** 0.5
        length = NUM_FEATURES - 16 + min(7, len(words).bit_length() - 1 if words else 0)
        row = [*sorted(found), length, NUM_FEATURES - 1]
        indices.append(np.array(row, np.int64))
        values.append(np.array([size] * len(found) + [0.3, 1.0]))
        starts.append(starts[-1] + len(row))
    return Features(start=np.array(starts), index=np.concatenate(indices), value=np.concatenate(values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """weights float64 [2, NUM_FEATURES]: of the cheap and the dear model's logit of being right."""

    weights: Array

    def chances(self, features: Features) -> Array:
        """How likely each model is right, float64 [2, rows]."""
        return _sigmoid(_logits(self.weights, features))

    def gain(self, features: Features) -> Array:
        """How much likelier the dear model is right, float64 [rows]."""
        cheap, dear = self.chances(features)
        return np.asarray(dear - cheap)


def fit(features: Features, right: Array, seed: int = 0) -> Router:
    """Learn from rows whose answers are known. right: bool or float [2, rows], of the cheap and the dear model."""
    weights = np.zeros((2, NUM_FEATURES))
    seen = np.full((2, NUM_FEATURES), 1e-2)
    rng = np.random.default_rng(seed)
    right = np.asarray(right, np.float64)
    for model in range(2):  # start at the model's average
        share = float(np.clip(right[model].mean(), 0.01, 0.99))
        weights[model, -1] = np.log(share / (1 - share))
    rows = right.shape[1]
    for _ in range(EPOCHS):
        order = rng.permutation(rows)
        for first in range(0, rows, BATCH):
            which = order[first : first + BATCH]
            batch = features.rows(which)
            error = _sigmoid(_logits(weights, batch)) - right[:, which]
            sizes = np.diff(batch.start)
            for model in range(2):
                spread = np.repeat(error[model], sizes) * batch.value
                gradient = np.bincount(batch.index, spread, NUM_FEATURES) / len(which) + DECAY * weights[model]
                seen[model] += gradient**2
                weights[model] -= RATE * gradient / np.sqrt(seen[model])
    return Router(weights=weights)


def gains_of_unseen(features: Features, right: Array, seed: int = 0) -> Array:
    """The gain of each row by a router that did not see it: in turn each fifth is left out of what is learned."""
    rows = right.shape[1]
    part = np.random.default_rng(seed).permutation(rows) % FOLDS
    gains = np.zeros(rows)
    for fold in range(FOLDS):
        seen, unseen = np.flatnonzero(part != fold), np.flatnonzero(part == fold)
        if len(seen) and len(unseen):
            gains[unseen] = fit(features.rows(seen), right[:, seen], seed).gain(features.rows(unseen))
    return gains


def _logits(weights: Array, features: Features) -> Array:
    terms = weights[:, features.index] * features.value
    return np.add.reduceat(terms, features.start[:-1], axis=1)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -30, 30))))
