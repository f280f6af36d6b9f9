"""Intervals by a paired bootstrap over documents, numpy only.

Tokens of one document are correlated, so a bootstrap over tokens gives intervals that are too narrow: measured on
300 stories and web pages, the mean nll difference of tiny-en at 8 bits, by 1.2 for documents of 100 tokens and by 6
for whole ones. Here whole documents are drawn with replacement, as many as there are, and both models' scores go with
their document. Source: Efron and Tibshirani 1993, ch. 8; for ratios of sums, Davison and Hinkley 1997, ch. 3.8.

Percentiles of the resampled figures are the interval, read further out when documents are few: the plain interval is
too short by sqrt((n - 1) / n) and by the difference of the normal from Student's t. Simulated with 20 documents, a
plain 95 % interval holds the truth in 90.5 % of trials, the expanded one in 94.5 %. Source: the expanded percentile
interval of Hesterberg 2015, arXiv:1411.5279.
"""

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np

from halve.core.certificate import Measured
from halve.core.errors import QualityError

Array = np.ndarray[Any, np.dtype[Any]]

_BATCH_BYTES = 32 * 1024**2  # of one array of resample weights
_MIN_TAIL = 5  # resamples beyond an end of the interval; fewer make the end a matter of the seed


def document_weights(num_documents: int, num_resamples: int, seed: int) -> Iterator[Array]:
    """How often each document is drawn in each resample: int64 [batch, documents], in batches; rows sum to documents.

    MT19937 by way of RandomState, whose stream numpy has frozen (NEP 19): the same seed gives the same interval
    under every version of numpy.
    """
    random = np.random.RandomState(seed)
    batch = max(1, min(num_resamples, _BATCH_BYTES // (8 * num_documents)))
    for start in range(0, num_resamples, batch):
        rows = min(batch, num_resamples - start)
        drawn = random.randint(0, num_documents, (rows, num_documents))
        flat = drawn + np.arange(rows)[:, None] * num_documents
        yield np.bincount(flat.ravel(), minlength=rows * num_documents).reshape(rows, num_documents)


def ratio(numerator: Array, denominator: Array) -> Callable[[Array], Array]:
    """The statistic sum(w * numerator) / sum(w * denominator) of document sums, for weights [resamples, documents]."""
    return lambda weights: (weights @ numerator) / (weights @ denominator)


def upper_quantile(values: Array, document: Array, tail_percent: int) -> Callable[[Array], Array]:
    """The statistic "smallest value that at most tail_percent of the weight lies above", exact, by document weights.

    values: float [tokens]; document: int [tokens], the row of the weights that counts for each.
    The tokens are sorted once. Each resample cumulates weight from the largest value down and stops past the tail,
    so only a few percent of the tokens are ever touched.
    """
    order = np.argsort(-values, kind="stable")
    values, document = values[order], document[order]

    def statistic(weights: Array) -> Array:
        columns = np.ascontiguousarray(weights.T)
        limit = tail_percent * (weights @ np.bincount(document, minlength=len(columns)))
        found = np.full(len(weights), -1)
        above = np.zeros(len(weights), np.int64)
        block = max(1, _BATCH_BYTES // (8 * len(weights)))
        for start in range(0, len(values), block):
            cumulated = above + np.cumsum(columns[document[start : start + block]], axis=0)
            past = 100 * cumulated > limit
            new = (found < 0) & past[-1]
            found[new] = start + past[:, new].argmax(axis=0)
            if (found >= 0).all():
                break
            above = cumulated[-1]
        return np.asarray(values[found])

    return statistic


def intervals(
    statistics: dict[str, Callable[[Array], Array]],
    num_documents: int,
    *,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> dict[str, Measured]:
    """Each statistic's value with its expanded percentile interval; n is the number of documents.

    A statistic maps weights [resamples, documents] to figures [resamples]; with weights 1 it is the value itself.
    low <= value <= high always. All statistics see the same resamples.
    Raises QualityError with fewer than 2 documents, or too few resamples for this confidence.
    """
    if num_documents < 2:
        raise QualityError(f"{num_documents} documents with tokens to predict; an interval needs at least 2")
    if not 0 < confidence < 1:
        raise QualityError(f"confidence: {confidence!r} is not between 0 and 1, such as 0.95")
    least = math.ceil(
        round(2 * _MIN_TAIL / (1 - confidence), 6)
    )  # rounded: 10 / (1 - 0.9) is not 100 in floating point
    if num_resamples < least:
        raise QualityError(
            f"num_resamples: {num_resamples} leaves fewer than {_MIN_TAIL} beyond each end at confidence {confidence}; "
            f"take at least {least}"
        )
    tail = _expanded_tail((1 - confidence) / 2, num_documents)
    resampled: dict[str, list[Array]] = {name: [] for name in statistics}
    for weights in document_weights(num_documents, num_resamples, seed):
        for name, statistic in statistics.items():
            resampled[name].append(statistic(weights))
    result = {}
    for name, statistic in statistics.items():
        value = float(statistic(np.ones((1, num_documents), np.int64))[0])
        low, high = np.quantile(np.concatenate(resampled[name]), [tail, 1 - tail])
        result[name] = Measured(value=value, low=min(float(low), value), high=max(float(high), value), n=num_documents)
    return result


def _expanded_tail(tail: float, n: int) -> float:
    """The percentile to read instead of `tail`, so that n documents give as wide an interval as Student's t."""
    z, degrees = NormalDist().inv_cdf(1 - tail), n - 1
    # Student's t from the normal quantile; Fisher and Cornish 1960, to the second order: 0.3 % short at 5 degrees.
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return NormalDist().cdf(-math.sqrt(n / degrees) * t)
