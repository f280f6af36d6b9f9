"""Tokens from rows of logits: what a batch of rows asks for, and the definition of the answer in numpy float64.

For each row, in this order (that of transformers' `generate`; a cut sees the distribution that the one before it
left, renormalized):

1. Forbid tokens outside `allowed`, add the logit bias.
2. Repetition penalty (arXiv:1909.05858, section 4.1): a logit above 0 is divided by it, another multiplied, for every
   token of prompt or output. Then count * frequency penalty and, where count > 0, the presence penalty are subtracted;
   count is over output tokens alone (OpenAI's API reference; vLLM does the same).
   1 and 2 are computed in float64 and rounded to float32 once, so that every implementation agrees to the bit: z.
3. Temperature 0: the largest z, ties to the lowest id, and no cut matters. Else w = exp((z - max z) / temperature).
4. top_k: the k largest z, ties to the lowest ids (arXiv:1805.04833).
5. top_p: the shortest run of the largest z, ties to the lowest ids, that holds top_p of the sum of w (arXiv:1904.09751).
6. min_p: tokens at least min_p times as likely as the likeliest (arXiv:2407.01082).
7. typical_p: the fewest tokens, nearest to the expected surprise first, ties to the lowest ids, that hold typical_p of
   the sum of w (arXiv:2202.00666). With s = (z - max z) / temperature, a token's surprise less the entropy is
   mean(s) - s, so nearest means the least |s - mean(s)|.
8. Draw: the first token, by id, at which the running sum of w exceeds u times its total. u has 53 random bits of
   Philox 4x64-10 (SC 2011, "Parallel random numbers: as easy as 1, 2, 3") with key `seed` and counter `step`, so a
   draw is a function of its row alone, whatever the neighbours.

Log-probabilities are those of the model itself, log_softmax of the logits as they came in, before 1 (as OpenAI's and
vLLM's are): what a token would cost, not how this sampler came by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halve.core.errors import HalveError, KernelError


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Token ids of R rows, each as many as it has: row r owns ids[offsets[r] : offsets[r + 1]].

    ids: int32. offsets: int64 [R + 1], rising from 0 to len(ids).
    """

    ids: NDArray[Any]
    offsets: NDArray[Any]

    @classmethod
    def of(cls, rows: Sequence[ArrayLike]) -> Self:
        """Join the ids of each row."""
        arrays = [np.asarray(row, np.int32) for row in rows]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        return cls(np.concatenate(arrays) if arrays else np.empty(0, np.int32), offsets)

    def row(self, r: int) -> NDArray[Any]:
        """Ids of one row."""
        return self.ids[self.offsets[r] : self.offsets[r + 1]]


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplingBatch:
    """How the next token of each of R rows is chosen; `SamplingBatch.of` fills in what acts on nothing.

    temperature: float32 [R], 0 for the likeliest token. top_k: int32 [R], 0 for all. top_p: float32 [R] in (0, 1],
    1 for all. min_p: float32 [R] in [0, 1], 0 for all. typical_p: float32 [R] in (0, 1], 1 for all.
    seed: uint64 [R]. step: int64 [R], tokens generated before this one.
    presence_penalty, frequency_penalty: float32 [R], 0 for none. repetition_penalty: float32 [R] above 0, 1 for none.
    num_logprobs: int32 [R], -1 for none, 0 for the chosen token's, k for those of the k likeliest too.
    prompt_tokens, output_tokens: what the penalties count; needed where one acts.
    bias_tokens, bias_values (float32, one for each of its ids): added to logits; finite, or -inf to forbid. A row
    names a token once.
    allowed: uint32 [R, ceil(vocab / 32)], bit i % 32 of word i // 32 is set for the tokens that may be chosen.
    """

    temperature: NDArray[Any]
    top_k: NDArray[Any]
    top_p: NDArray[Any]
    min_p: NDArray[Any]
    typical_p: NDArray[Any]
    seed: NDArray[Any]
    step: NDArray[Any]
    presence_penalty: NDArray[Any]
    frequency_penalty: NDArray[Any]
    repetition_penalty: NDArray[Any]
    num_logprobs: NDArray[Any]
    prompt_tokens: Ragged | None = None
    output_tokens: Ragged | None = None
    bias_tokens: Ragged | None = None
    bias_values: NDArray[Any] | None = None
    allowed: NDArray[Any] | None = None

    @classmethod
    def of(
        cls,
        num_rows: int,
        *,
        temperature: ArrayLike = 0.0,
        top_k: ArrayLike = 0,
        top_p: ArrayLike = 1.0,
        min_p: ArrayLike = 0.0,
        typical_p: ArrayLike = 1.0,
        seed: ArrayLike = 0,
        step: ArrayLike = 0,
        presence_penalty: ArrayLike = 0.0,
        frequency_penalty: ArrayLike = 0.0,
        repetition_penalty: ArrayLike = 1.0,
        num_logprobs: ArrayLike = -1,
        prompt_tokens: Ragged | None = None,
        output_tokens: Ragged | None = None,
        bias_tokens: Ragged | None = None,
        bias_values: NDArray[Any] | None = None,
        allowed: NDArray[Any] | None = None,
    ) -> Self:
        """A batch from one value for all rows, or one for each row, per setting."""

        def column(values: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
            return np.ascontiguousarray(np.broadcast_to(np.asarray(values, dtype), (num_rows,)))

        return cls(
            temperature=column(temperature, np.float32),
            top_k=column(top_k, np.int32),
            top_p=column(top_p, np.float32),
            min_p=column(min_p, np.float32),
            typical_p=column(typical_p, np.float32),
            seed=column(seed, np.uint64),
            step=column(step, np.int64),
            presence_penalty=column(presence_penalty, np.float32),
            frequency_penalty=column(frequency_penalty, np.float32),
            repetition_penalty=column(repetition_penalty, np.float32),
            num_logprobs=column(num_logprobs, np.int32),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            bias_tokens=bias_tokens,
            bias_values=bias_values,
            allowed=allowed,
        )

    @classmethod
    def greedy(cls, num_rows: int) -> "SamplingBatch":
        """The likeliest token of every row and nothing else; one batch for every call with the same num_rows."""
        return _greedy(num_rows)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.temperature)

    @cached_property
    def penalized(self) -> NDArray[Any]:
        """Bool [R]: rows on which a penalty acts."""
        counted = (self.presence_penalty != 0) | (self.frequency_penalty != 0)
        return np.asarray(counted | (self.repetition_penalty != 1))

    @cached_property
    def plain_greedy(self) -> bool:
        """Whether every row is the argmax of its logits as they come in, and wants no log-probabilities."""
        adjusted = self.bias_tokens is not None or self.allowed is not None or self.penalized.any()
        return not (adjusted or self.temperature.any() or (self.num_logprobs >= 0).any())


@lru_cache(maxsize=256)
def _greedy(num_rows: int) -> SamplingBatch:
    return SamplingBatch.of(num_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """The tokens of R rows.

    token_ids: int32 [R]. logprobs: float32 [R], of the chosen token; NaN where num_logprobs is -1.
    top_ids int32 [R, k] and top_logprobs float32 [R, k], k the most num_logprobs of the batch (at most the
    vocabulary): the likeliest tokens, ties to the lowest id; -1 and NaN beyond a row's num_logprobs.
    """

    token_ids: NDArray[Any]
    logprobs: NDArray[Any]
    top_ids: NDArray[Any]
    top_logprobs: NDArray[Any]
