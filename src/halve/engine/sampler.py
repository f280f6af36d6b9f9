"""One token from a row of logits. Sources: arXiv:1904.09751 (top-p), SC 2011 "Parallel random numbers: as easy as 1, 2,
3" (Philox, random numbers by counter).

A request's draw is a function of its seed and of how many tokens it has, so neighbours in the batch change nothing.
"""

import numpy as np

from halve.core.errors import HalveError
from halve.engine.request import SamplingParams
from halve.kernels.ops import Array


def sample(logits: Array, params: SamplingParams, seed: int, step: int) -> int:
    """Choose a token id.

    logits: float32 [vocab]; -inf forbids a token. step: tokens generated before this one.
    At temperature 0 the largest logit, ties to the lowest id. Else softmax(logits / temperature) in float64, cut to
    the smallest set of likeliest tokens (ties to the lowest ids) that holds top_p.
    Raises HalveError on NaN, +inf, or when all are -inf.
    """
    top = logits.max()
    if not np.isfinite(top):
        raise HalveError(f"logits hold {top} after {step} generated tokens; the weights or a kernel are broken")
    if params.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature sends every other token to -inf, as it should
        weights = np.exp((logits.astype(np.float64) - np.float64(top)) / params.temperature)
    probabilities = weights / weights.sum()
    ids = _nucleus(probabilities, params.top_p) if params.top_p < 1 else np.arange(len(logits))
    cumulative = np.cumsum(probabilities[ids])
    drawn = np.searchsorted(cumulative, uniform(seed, step) * cumulative[-1], side="right")
    return int(ids[drawn])


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits, by Philox 4x64 with key `seed` and counter `step`."""
    bits = np.random.Philox(key=seed, counter=step).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def _nucleus(probabilities: Array, top_p: float) -> Array:
    """Ids of the smallest set of likeliest tokens whose probabilities add up to top_p."""
    # All tokens below this threshold together hold less than 1 - top_p, so none of them is in the set: sort the rest.
    ids = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    ids = ids[np.argsort(-probabilities[ids], kind="stable")]
    kept = np.searchsorted(np.cumsum(probabilities[ids]), top_p, side="left") + 1
    return ids[:kept]
