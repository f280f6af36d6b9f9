"""What a measured quality says about a limit, and whether a second measurement says the same as the first."""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, log1p
from typing import Protocol

from halve.core.certificate import Answer, JudgedBy, Measured, Quality
from halve.core.plan import ActivationFormat, KVFormat

# How far a logit moves when float32 sums run in another order on another machine, by the format of the activations.
# A rounding to bf16 that falls to the other side is a thousand times the difference that caused it: with weights off
# by 1e-7, as float32 rounds, the logits of tiny-en at 4 bits move by 1e-6 (one standard deviation) without bf16, by
# 2e-4 with keys and values in bf16, by 6e-4 with them in int8, by 6e-3 with activations in bf16, by 4e-2 with
# activations in int8. Keys and values are bf16 by default.
NOISE = {"fp32": 1e-3, "bf16": 1e-2, "int8": 6e-2, "fp8": 6e-2}  # nats
# The same by the format of a cache, where that is more: int4 moves a key or a value by an eighth of the largest, and
# kernels of whole numbers round queries to 8 bits beside. Between them and the reference the logits of tiny-en move by
# 2.4e-2 (a KL of 2.8e-4).
CACHE_NOISE = {"int4": 4e-2}  # nats


def noise_of(activations: ActivationFormat, caches: Sequence[KVFormat] = ()) -> float:
    """How far a logit may move by rounding alone, in nats: the most that a format of the plan makes of it."""
    return max(NOISE[activations], *(CACHE_NOISE.get(one, 0.0) for one in caches), 0.0)


def passes(quality: Quality, limit: float, by: JudgedBy = "both") -> bool:
    """Whether a plan may be certified: the loss is within `limit` (0.01 is 1 %) at the worse end of two intervals.

    That of the perplexity ratio on the text given, and that of KL, since exp(KL) is the perplexity ratio on the text
    that the original itself would write. The second is needed because a ratio can be had for nothing on text foreign
    to the model: tiny-en at 2 bits has 0.12 of its original's perplexity on Japanese and code, while three in four of
    its predictions differ and its stories are lost. by: which of the two counts, where one alone was asked for.
    """
    # Not `high - 1 <= limit`: 1.01 - 1 is more than 0.01 in floating point.
    ppl, kl = quality.ppl_ratio.high <= 1 + limit, quality.kl_mean.high <= log1p(limit)
    return (ppl or by == "kl") and (kl or by == "ppl")


def fails(quality: Quality, limit: float, by: JudgedBy = "both") -> bool:
    """Whether all of an interval that counts is beyond `limit`; what neither passes nor fails is still open."""
    ppl, kl = quality.ppl_ratio.low > 1 + limit, quality.kl_mean.low > log1p(limit)
    return (ppl and by != "kl") or (kl and by != "ppl")


class Losses(Protocol):
    """What is said of a quality, a judged plan, or an opening of the sealed text."""

    @property
    def ppl_ratio(self) -> Measured:
        """Perplexity of the smaller model over the original."""

    @property
    def kl_mean(self) -> Measured:
        """Nats per token."""


def documents_needed(found: Losses, limit: float, by: JudgedBy = "both") -> int | None:
    """Documents like those measured with which these values would be within the limit, intervals and all.

    Half of an interval narrows with the root of their number. None where a value itself is beyond the limit, so that no
    text is enough.
    """
    needed = 0.0
    for name, value, most in (("ppl", found.ppl_ratio, 1 + limit), ("kl", found.kl_mean, log1p(limit))):
        if by not in ("both", name):
            continue
        if value.value >= most:
            return None
        needed = max(needed, value.n * ((value.high - value.value) / (most - value.value)) ** 2)
    return ceil(needed)


def answer(quality: Quality, limit: float | None) -> Answer:
    """Of the perplexity ratio: `holds` if its whole interval is within the limit, `contradicted` if all is beyond.

    Else `inconclusive`; without a limit the figures are `measured`.
    """
    if limit is None:
        return "measured"
    if quality.ppl_ratio.high <= 1 + limit:
        return "holds"
    return "contradicted" if quality.ppl_ratio.low > 1 + limit else "inconclusive"


def differences(
    recorded: Quality, again: Quality, *, activations: ActivationFormat = "fp32", caches: Sequence[KVFormat] = ()
) -> list[str]:
    """One line for each figure that does not reproduce; none when all do.

    activations, caches: as the plan of the smaller model has them. Counts, confidence and the set of tasks must be
    equal; values and both ends of intervals agree within what `noise_of` allows, since the bootstrap is the same on
    every machine.
    """
    # What rounds the other way is a part of what parts the models: two such parts differ by 2 sqrt(KL) at most.
    noise = min(noise_of(activations, caches), max(NOISE["fp32"], 2 * max(recorded.kl_mean.value, 0.0) ** 0.5))
    lines = [
        f"{name}: recorded {getattr(recorded, name)}, now {getattr(again, name)}"
        for name in ("num_documents", "num_tokens", "confidence")
        if getattr(recorded, name) != getattr(again, name)
    ]
    if lines:
        return lines  # other text: its figures are not comparable
    for name, allowed in _TOLERANCES.items():
        lines += _compare(
            name, getattr(recorded, name), getattr(again, name), partial(allowed, noise, recorded.num_tokens)
        )
    for task in sorted(recorded.tasks.keys() | again.tasks.keys()):
        one, other = recorded.tasks.get(task), again.tasks.get(task)
        if one is None or other is None:
            lines.append(f"tasks.{task}: {'not recorded' if one is None else 'recorded, but not measured again'}")
        else:
            lines += _compare(f"tasks.{task}", one, other, partial(_one_item, one.n))
    return lines


# How far a figure of this value may move; means over tokens by four standard errors.
# KL is of second order in the logits: noise e changes a token's KL by about sqrt(2 KL) e + e^2. A quantile can move
# as much as one token does, a mean by that / sqrt(tokens): what noise adds to every KL it has added to the recorded one
# as well, and only the rest differs. nll moves by e a token.
# A flip comes or goes when two logits lie within e of each other, for 0.6 e of the tokens (measured on tiny-en: noise
# of 0.23 at 4 bits flips 0.13, noise of 0.013 at 8 bits flips 0.008); two more tokens for a short text.
_TOLERANCES: dict[str, Callable[[float, int, float], float]] = {
    "kl_mean": lambda noise, num_tokens, value: 4 * ((2 * value) ** 0.5 * noise + noise**2) / num_tokens**0.5,
    "kl_p99": lambda noise, num_tokens, value: (2 * value) ** 0.5 * noise + noise**2,
    "flip_rate": lambda noise, num_tokens, value: 4 * (0.6 * noise / num_tokens) ** 0.5 + 2 / num_tokens,
    "ppl_ratio": lambda noise, num_tokens, value: value * 4 * noise / num_tokens**0.5,
}


def _one_item(num_items: int, value: float) -> float:
    return 1 / num_items


def _compare(name: str, recorded: Measured, again: Measured, allowed: Callable[[float], float]) -> list[str]:
    if recorded.n != again.n:
        return [f"{name}.n: recorded {recorded.n}, now {again.n}"]
    return [
        f"{name}.{end}: recorded {one:.6g}, now {other:.6g}, allowed difference {allowed(abs(one)):.2g}"
        for end in ("value", "low", "high")
        for one, other in [(getattr(recorded, end), getattr(again, end))]
        if not abs(one - other) <= allowed(abs(one))  # NaN never reproduces
    ]
