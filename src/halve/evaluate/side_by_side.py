"""Two models beside each other on the same tokens, and each against a reference where there is one.

All differences are paired: both models read the same documents, so that what is hard about a document cancels. The
intervals are those of `evaluate.bootstrap`, whole documents drawn with replacement.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from halve.core.certificate import Measured
from halve.core.errors import QualityError
from halve.evaluate.bootstrap import intervals, ratio, upper_quantile
from halve.evaluate.fidelity import Array, PairedScores

Better = Literal["a", "b", "not told apart"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Apart:
    """How far a model is from the reference: KL(reference || model) in nats per token, share of other first choices."""

    kl_mean: Measured
    kl_p99: Measured
    flip_rate: Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class SideBySide:
    """Figures of both models on one text, with 95 % intervals over its documents.

    perplexity: of each, a token. ppl_ratio: B over A. a, b: each against the reference, None without one. between: B
    against A, KL(A || B); None where a reference was measured against. kl_difference: of mean KL to the reference, B
    minus A.
    """

    perplexity_a: Measured
    perplexity_b: Measured
    ppl_ratio: Measured
    reference_perplexity: Measured | None
    a: Apart | None
    b: Apart | None
    between: Apart | None
    kl_difference: Measured | None
    num_documents: int
    num_tokens: int
    vocab_size: int
    confidence: float

    @property
    def foreign(self) -> bool:
        """Whether either does worse than to hold all tokens equally likely: which one does so more tells nothing."""
        return max(self.perplexity_a.value, self.perplexity_b.value) >= self.vocab_size

    @property
    def better(self) -> Better:
        """Whose predictions are closer to the reference, or without one: who predicts the text better.

        Perplexity alone decides nothing on text that is foreign to the models, where damage may help by luck.
        """
        if self.kl_difference is None and self.foreign:
            return "not told apart"
        value, equal = (self.ppl_ratio, 1.0) if self.kl_difference is None else (self.kl_difference, 0.0)
        if value.low <= equal <= value.high:
            return "not told apart"
        return "a" if value.low > equal else "b"


def side_by_side(
    between: PairedScores, *, vocab_size: int, confidence: float = 0.95, num_resamples: int = 4000, seed: int = 0
) -> SideBySide:
    """Of scores of A (as the original) and B (as the smaller): figures without a reference."""
    sums = _Sums(between)
    nll_a, nll_b = between.nll_original, between.nll_smaller
    found = intervals(
        {**_plain(sums, nll_a, nll_b), **_apart(sums, between, "between")},
        sums.num_documents,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    return SideBySide(
        perplexity_a=found["perplexity_a"],
        perplexity_b=found["perplexity_b"],
        ppl_ratio=found["ppl_ratio"],
        reference_perplexity=None,
        a=None,
        b=None,
        between=_named(found, "between"),
        kl_difference=None,
        num_documents=sums.num_documents,
        num_tokens=len(sums.document),
        vocab_size=vocab_size,
        confidence=confidence,
    )


def against_reference(
    a: PairedScores,
    b: PairedScores,
    *,
    vocab_size: int,
    confidence: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
) -> SideBySide:
    """Of scores of A and of B, each as the smaller model beside the same reference on the same documents.

    Raises QualityError for scores of other tokens.
    """
    if not np.array_equal(a.document, b.document):
        raise QualityError("side by side: the scores are not of the same documents; score both models on the same text")
    sums = _Sums(a)
    found = intervals(
        {
            **_plain(sums, a.nll_smaller, b.nll_smaller),
            **_apart(sums, a, "a"),
            **_apart(sums, b, "b"),
            "reference": _exp(sums.mean(a.nll_original)),
            "kl_difference": sums.mean(b.kl.astype(np.float64) - a.kl),
        },
        sums.num_documents,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )
    return SideBySide(
        perplexity_a=found["perplexity_a"],
        perplexity_b=found["perplexity_b"],
        ppl_ratio=found["ppl_ratio"],
        reference_perplexity=found["reference"],
        a=_named(found, "a"),
        b=_named(found, "b"),
        between=None,
        kl_difference=found["kl_difference"],
        num_documents=sums.num_documents,
        num_tokens=len(sums.document),
        vocab_size=vocab_size,
        confidence=confidence,
    )


Statistic = Callable[[Array], Array]


class _Sums:
    """Means over tokens, by the weights of documents."""

    def __init__(self, scores: PairedScores) -> None:
        index, self.document = np.unique(scores.document, return_inverse=True)
        self.num_documents = len(index)
        self._count = np.bincount(self.document, minlength=self.num_documents)

    def mean(self, values: Array) -> Statistic:
        sums = np.bincount(self.document, weights=values.astype(np.float64), minlength=self.num_documents)
        return ratio(sums, self._count)


def _exp(log_mean: Statistic) -> Statistic:
    return lambda weights: np.exp(log_mean(weights))


def _plain(sums: _Sums, nll_a: Array, nll_b: Array) -> dict[str, Statistic]:
    return {
        "perplexity_a": _exp(sums.mean(nll_a)),
        "perplexity_b": _exp(sums.mean(nll_b)),
        "ppl_ratio": _exp(sums.mean(nll_b.astype(np.float64) - nll_a)),
    }


def _apart(sums: _Sums, scores: PairedScores, name: str) -> dict[str, Statistic]:
    return {
        f"{name}.kl_mean": sums.mean(scores.kl),
        f"{name}.kl_p99": upper_quantile(scores.kl, sums.document, tail_percent=1),
        f"{name}.flip_rate": sums.mean(scores.flip),
    }


def _named(found: dict[str, Measured], name: str) -> Apart:
    return Apart(kl_mean=found[f"{name}.kl_mean"], kl_p99=found[f"{name}.kl_p99"], flip_rate=found[f"{name}.flip_rate"])
