"""Tokens from rows of logits: what a batch of rows asks for, and the definition of the answer in numpy float64.

For each row, in this order (that of transformers' `generate`; a cut sees the distribution that the one before it
left, renormalized):

1. Forbid tokens outside `allowed`, add the logit bias.
2. Repetition penalty (arXiv:1909.05858, section 4.1; transformers for negative logits): of every token of prompt or
   output, a logit above 0 is divided by it, another multiplied. Then count * frequency penalty and, where count > 0,
   the presence penalty are subtracted; count is over output tokens alone (OpenAI's API reference; vLLM too).
   1 and 2 are computed in float64 and rounded to float32 once, so that every implementation agrees to the bit: z.
3. Temperature 0: the largest z, ties to the lowest id, and no cut matters. Else w = exp((z - max z) / temperature).
4. top_k: the k largest z, ties to the lowest ids (arXiv:1805.04833).
5. top_p: the fewest largest z, ties to the lowest ids, that hold top_p of the sum of w (arXiv:1904.09751).
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

from collections.abc import Callable, Mapping, Sequence
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
    def num_candidates(self) -> int | None:
        """How many of the likeliest tokens answer every row as well as all of them do; None where only all do.

        Greedy rows take 1 and rows with top_k that many, whatever cuts come after it; what changes logits or asks for
        log-probabilities takes all of them.
        """
        adjusted = self.bias_tokens is not None or self.allowed is not None or self.penalized.any()
        if adjusted or (self.num_logprobs >= 0).any():
            return None
        each = np.where(self.temperature == 0, 1, self.top_k)
        return None if (each < 1).any() else int(each.max(initial=1))

    @property
    def plain_greedy(self) -> bool:
        """Whether every row is the argmax of its logits as they come in, and wants no log-probabilities."""
        return self.num_candidates == 1 and not self.temperature.any()


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


def sample(logits: NDArray[Any], batch: SamplingBatch) -> Sampled:
    """Choose a token for every row of logits float32 [R, vocab]; -inf forbids a token. The top of this file says how.

    Raises KernelError for a batch that `check` refuses. Raises HalveError, naming the row, for logits that hold NaN or
    +inf, before or after bias and penalties, and for a row whose every token is forbidden.
    """
    check(logits, batch)
    sampled = unsampled(batch, logits.shape[1])
    for r, row in enumerate(logits):
        if not row.max() < np.inf:
            raise broken(r, 1)
        z = adjusted(row, batch, r)
        if not np.isfinite(z.max()):
            raise broken(r, 2 if z.max() > 0 else 3)
        token = int(z.argmax()) if batch.temperature[r] == 0 else _draw(z, batch, r)
        sampled.token_ids[r] = token
        if (wanted := int(batch.num_logprobs[r])) >= 0:
            logprobs = log_softmax(row)
            likeliest = np.argsort(-row, kind="stable")[:wanted]
            sampled.logprobs[r] = logprobs[token]
            sampled.top_ids[r, : len(likeliest)] = likeliest
            sampled.top_logprobs[r, : len(likeliest)] = logprobs[likeliest]
    return sampled


def adjusted(row: NDArray[Any], batch: SamplingBatch, r: int) -> NDArray[Any]:
    """Logits float32 [vocab] of row r after what is allowed, bias and penalties: z."""
    z = row.astype(np.float64)
    if batch.allowed is not None:
        bits = np.unpackbits(batch.allowed[r].astype("<u4").view(np.uint8), bitorder="little")
        z[bits[: len(z)] == 0] = -np.inf
    if batch.bias_tokens is not None and batch.bias_values is not None:
        biased = slice(*batch.bias_tokens.offsets[r : r + 2])
        z[batch.bias_tokens.ids[biased]] += batch.bias_values[biased]
    if batch.penalized[r]:
        assert batch.prompt_tokens is not None
        assert batch.output_tokens is not None
        count = np.bincount(batch.output_tokens.row(r), minlength=len(z))
        seen = count > 0
        seen[batch.prompt_tokens.row(r)] = True
        repetition = np.float64(batch.repetition_penalty[r])
        z[seen] = np.where(z[seen] > 0, z[seen] / repetition, z[seen] * repetition)
        z -= np.float64(batch.frequency_penalty[r]) * count
        z -= np.float64(batch.presence_penalty[r]) * (count > 0)
    with np.errstate(over="ignore"):  # told as a broken row
        return z.astype(np.float32)


def _draw(z: NDArray[Any], batch: SamplingBatch, r: int) -> int:
    temperature = np.float64(batch.temperature[r])
    top = np.float64(z.max())
    s = (z.astype(np.float64) - top) / temperature
    w = np.exp(s)
    kept = np.argsort(-z, kind="stable")[: np.count_nonzero(z > -np.inf)]
    if batch.top_k[r]:
        kept = kept[: batch.top_k[r]]
    if batch.top_p[r] < 1:
        kept = _holding(kept, w, batch.top_p[r])
    if batch.min_p[r] > 0:
        kept = kept[z[kept].astype(np.float64) >= top + temperature * np.log(np.float64(batch.min_p[r]))]
    if batch.typical_p[r] < 1:
        mean = (w[kept] * s[kept]).sum() / w[kept].sum()
        kept = _holding(kept[np.lexsort((kept, np.abs(s[kept] - mean)))], w, batch.typical_p[r])
    kept = np.sort(kept)
    running = np.cumsum(w[kept])
    drawn = np.searchsorted(running, uniform(batch.seed[r], batch.step[r]) * running[-1], side="right")
    # u * total may round to the total; the last token that adds anything is meant then.
    return int(kept[min(drawn, np.searchsorted(running, running[-1], side="left"))])


def _holding(ids: NDArray[Any], w: NDArray[Any], share: np.float32) -> NDArray[Any]:
    """The first of ids that hold this share of their weights together."""
    running = np.cumsum(w[ids])
    return ids[: np.searchsorted(running, np.float64(share) * running[-1], side="left") + 1]


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits, by Philox 4x64 with key `seed` and counter `step`."""
    bits = np.random.Philox(key=int(seed), counter=int(step)).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def log_softmax(row: NDArray[Any]) -> NDArray[Any]:
    """Natural log-probabilities float64 [vocab] of a row of logits."""
    s = row.astype(np.float64) - np.float64(row.max())
    return np.asarray(s - np.log(np.exp(s).sum()))


def unsampled(batch: SamplingBatch, vocab: int) -> Sampled:
    """Room for the tokens of a batch, everything absent."""
    num_rows, k = batch.num_rows, min(max(0, int(batch.num_logprobs.max(initial=0))), vocab)
    return Sampled(
        token_ids=np.full(num_rows, -1, np.int32),
        logprobs=np.full(num_rows, np.nan, np.float32),
        top_ids=np.full((num_rows, k), -1, np.int32),
        top_logprobs=np.full((num_rows, k), np.nan, np.float32),
    )


def broken(row: int, status: int) -> HalveError:
    """What is wrong with a row: status 1, 2 or 3, as the C++ tells it."""
    reasons = {
        1: "its logits hold NaN or +inf; the weights or a kernel are broken",
        2: "bias and penalties take a logit beyond float32; use smaller ones",
        3: "every token is forbidden, by logits of -inf or by what is allowed; leave one at least",
    }
    return HalveError(f"row {row} of the sampling batch: {reasons[status]}")


_RULES: Mapping[str, tuple[type[np.generic], Callable[[NDArray[Any]], NDArray[Any]], str]] = {
    "temperature": (np.float32, lambda a: (a >= 0) & (a < np.inf), "finite, 0 or more"),
    "top_k": (np.int32, lambda a: a >= 0, "0 or more"),
    "top_p": (np.float32, lambda a: (a > 0) & (a <= 1), "above 0 and at most 1"),
    "min_p": (np.float32, lambda a: (a >= 0) & (a <= 1), "from 0 to 1"),
    "typical_p": (np.float32, lambda a: (a > 0) & (a <= 1), "above 0 and at most 1"),
    "seed": (np.uint64, lambda a: np.ones(a.shape, bool), ""),
    "step": (np.int64, lambda a: a >= 0, "0 or more"),
    "presence_penalty": (np.float32, np.isfinite, "finite"),
    "frequency_penalty": (np.float32, np.isfinite, "finite"),
    "repetition_penalty": (np.float32, lambda a: (a > 0) & (a < np.inf), "finite, above 0"),
    "num_logprobs": (np.int32, lambda a: a >= -1, "-1 or more"),
}


def check(logits: NDArray[Any], batch: SamplingBatch) -> None:
    """Refuse, with KernelError, types, shapes, values and token ids that `sample` has no meaning for."""
    num_rows, vocab = batch.num_rows, logits.shape[-1]
    _expect("logits", logits, np.float32, (num_rows, vocab))
    check_batch(batch, num_rows, vocab)


def check_batch(batch: SamplingBatch, num_rows: int, vocab: int) -> None:
    """What `check` refuses of a batch for num_rows rows of logits over a vocabulary, wherever the logits are."""
    if batch.num_rows != num_rows:
        raise KernelError(f"logits: {num_rows} rows for a batch of {batch.num_rows}; give each row its logits")
    if not 1 <= vocab < 2**31:
        raise KernelError(f"logits: a row holds {vocab} of them; a vocabulary has 1 to 2**31 - 1 tokens")
    if batch is _greedy(num_rows):
        return
    for name, (dtype, fits, rule) in _RULES.items():
        values = getattr(batch, name)
        _expect(name, values, dtype, (num_rows,))
        if not (good := fits(values)).all():
            r = int(good.argmin())
            raise KernelError(f"{name}: {values[r]} of row {r} must be {rule}; check the request's parameters")
    for name in ("prompt_tokens", "output_tokens", "bias_tokens"):
        if (ragged := getattr(batch, name)) is not None:
            _check_ragged(name, ragged, num_rows, vocab)
        elif name != "bias_tokens" and batch.penalized.any():
            raise KernelError(f"{name}: row {int(batch.penalized.argmax())} has a penalty; give the tokens it counts")
    if batch.bias_tokens is not None:
        _check_bias(batch.bias_tokens, batch.bias_values)
    elif batch.bias_values is not None:
        raise KernelError("bias_values: there are no bias_tokens; name the tokens they belong to")
    if batch.allowed is not None:
        _expect("allowed", batch.allowed, np.uint32, (num_rows, -(-vocab // 32)))


def _check_ragged(name: str, ragged: Ragged, num_rows: int, vocab: int) -> None:
    ids, offsets = ragged.ids, ragged.offsets
    _expect(f"{name}.offsets", offsets, np.int64, (num_rows + 1,))
    _expect(f"{name}.ids", ids, np.int32, (len(ids),))
    if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
        raise KernelError(f"{name}: offsets must rise from 0 to the {len(ids)} ids; make it with Ragged.of")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        wrong = ids[(ids < 0) | (ids >= vocab)][0]
        raise KernelError(f"{name}: token id {wrong} is not in 0..{vocab - 1}; use the model's own tokenizer")


def _check_bias(tokens: Ragged, values: NDArray[Any] | None) -> None:
    _expect("bias_values", values, np.float32, (len(tokens.ids),))
    assert values is not None
    if not (values < np.inf).all():
        raise KernelError("bias_values hold NaN or +inf; a bias is finite, or -inf to forbid a token")
    row = np.repeat(np.arange(len(tokens.offsets) - 1), np.diff(tokens.offsets))
    if len(np.unique(row * 2**31 + tokens.ids)) < len(tokens.ids):
        raise KernelError("bias_tokens: a row names a token twice; add its biases together first")


def _expect(name: str, values: Any, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Refuse what is not a C-contiguous array of this type and shape."""
    if not isinstance(values, np.ndarray) or values.dtype != dtype or values.shape != shape:
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise KernelError(f"{name}: expected a numpy array {np.dtype(dtype)} {shape}, got {found}; make it so first")
    if not (values.flags.c_contiguous and values.flags.aligned):
        raise KernelError(f"{name}: expected C-contiguous aligned memory; pass np.ascontiguousarray({name})")
