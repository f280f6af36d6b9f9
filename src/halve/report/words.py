"""Figures and records in words: how a number, an interval, a verdict and a plan are said to a person."""

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from halve.core.certificate import Certificate, Measured
from halve.core.plan import Plan, Serving
from halve.formats import FORMATS

NOT_MEASURED = "not measured"
NOT_PRICED = "not priced"
DOTS = "\u00a0…\u00a0"  # no line break within an interval

SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

METHODS = {
    "rtn": "rounded to nearest",
    "gptq": "rounded one input after the other, later ones making up for the error of earlier ones",
    "clip": "rounded to nearest within the range that changes the output least",
}


def number(value: float, digits: int = 3) -> str:
    """Say a number with `digits` significant digits: `0.00213`, `1,240`, `3.1 × 10⁻⁷`."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "−infinite"
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    exponent = int(power)
    if not -5 <= exponent < 7:
        return f"{float(mantissa):g} × 10{str(exponent).translate(SUPERSCRIPT)}".replace("-", "−")
    text = f"{value:,.{max(digits - 1 - exponent, 0)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def percent(fraction: float, digits: int = 3) -> str:
    """Say a fraction in percent: 0.004 -> `0.4 %`."""
    return f"{number(fraction * 100, digits)} %"


def measured(value: Measured | None, say: Callable[[float], str] = number) -> str:
    """Say a measured value with its interval, or that it was not measured."""
    return NOT_MEASURED if value is None else f"{say(value.value)} ({say(value.low)}{DOTS}{say(value.high)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A quality loss in percent, as text without the sign; the interval is rounded outward, never inward."""

    value: str
    low: str
    high: str

    @property
    def interval(self) -> str:
        """`0.1 … 0.4 %`, not broken over two lines at the dots."""
        return f"{self.low}{DOTS}{self.high} %"


def loss(ppl_ratio: Measured, limit: float | None = None) -> Loss:
    """Say ppl_ratio - 1 in percent, with as many decimals as its interval and the limit need.

    Rounding never moves the upper end across the limit: what passes reads as passing, what fails as failing.
    """
    value, low, high = ((x - 1) * 100 for x in (ppl_ratio.value, ppl_ratio.low, ppl_ratio.high))
    if not all(map(math.isfinite, (value, low, high))):
        return Loss(value=number(value), low=number(low), high=number(high))
    width = high - low or abs(value) or 1.0
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 9)
    if limit is not None:
        bound = limit * 100
        while decimals < 9 and (_round(high, decimals, math.ceil) > bound) != (high > bound):
            decimals += 1

    def say(x: float, direction: Callable[[float], float]) -> str:
        text = f"{_round(x, decimals, direction):,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text.replace("-", "−")

    return Loss(value=say(value, round), low=say(low, math.floor), high=say(high, math.ceil))


def _round(value: float, decimals: int, direction: Callable[[float], float]) -> float:
    # (1.004 - 1) * 100 is 0.40000000000000036: the last bits are no reason to say 0.401
    shift = 10.0**decimals
    return direction(round(value * shift, 6)) / shift


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictWords:
    """The banner: a word, a sentence, and which of the three colours and signs it wears."""

    word: str
    sentence: str
    tone: Literal["pass", "fail", "measured"]


def verdict(certificate: Certificate) -> VerdictWords:
    """Say the verdict so that someone who knows no statistics can repeat it."""
    q, limit = certificate.quality, certificate.max_quality_loss
    said = loss(q.ppl_ratio, limit)
    sure = percent(q.confidence, 4)
    against = "; no limit was recorded" if limit is None else f" against a limit of {percent(limit, 6)}"
    finding = f"the smaller model loses at most {said.high} % ({sure} interval {said.interval})"
    if q.ppl_ratio.high <= 1:
        finding = f"the smaller model loses nothing: its quality loss is below zero ({sure} interval {said.interval})"
    if certificate.verdict == "measured":
        sentence = f"{finding}. No limit was set, so it neither passes nor fails."
        return VerdictWords(word="Measured", sentence=sentence, tone="measured")
    if certificate.verdict == "pass":
        return VerdictWords(word="Passed", sentence=f"{finding}{against}.", tone="pass")
    if limit is None or q.ppl_ratio.high - 1 <= limit:
        sentence = f"{finding}{against}; the attempts below say why it still fails."
    elif q.ppl_ratio.low - 1 > limit:
        sentence = f"the smaller model loses at least {said.low} % ({sure} interval {said.interval}){against}."
    else:
        sentence = (
            f"the smaller model may lose as much as {said.high} % ({sure} interval {said.interval})"
            f"{against}; the interval must lie below the limit to pass."
        )
    return VerdictWords(word="Failed", sentence=sentence, tone="fail")


def ratio(after: float, before: float) -> float | None:
    """after / before, or None where there is nothing to divide by."""
    return after / before if before > 0 else None


def times_smaller(after: float, before: float) -> str:
    """Say a ratio of sizes: `3.9× smaller`, `1.2× larger`, `same size`."""
    share = ratio(after, before)
    if not share:
        return NOT_MEASURED
    if f"{share:.2f}" == "1.00":
        return "same size"
    return f"{number(1 / share)}× smaller" if share < 1 else f"{number(share)}× larger"


def ratio_near_one(value: Measured) -> str:
    """Say a ratio with its interval, with as many decimals as tell it from 1: `1.0000012 (1.0000003 … 1.0000021)`."""
    width = value.high - value.low
    if not (math.isfinite(width) and width > 0):
        return measured(value, lambda v: number(v, 9))
    decimals = min(max(1 - math.floor(math.log10(width)), 2), 12)
    return measured(value, lambda v: f"{v:,.{decimals}f}")


def unbroken(text: str) -> str:
    """Keep each figure on one line with its unit."""
    return re.sub(r"(?<=\d) (?=(%|B|kB|MB|GB|TB)(?!\w))", "\u00a0", text)


def times_faster(after: Measured | None, before: Measured | None) -> Measured | None:
    """Ratio of two speeds; its range is the narrowest that every pair of runs lies in. None where not measured."""
    if after is None or before is None or min(before.value, before.low, before.high) <= 0:
        return None
    return Measured(
        value=after.value / before.value,
        low=after.low / before.high,
        high=after.high / before.low,
        n=min(after.n, before.n),
    )


def faster(speedup: float) -> str:
    """Say a ratio of speeds: `1.9× faster`, `1.2× slower`, `same speed`."""
    if f"{speedup:.2f}" == "1.00":
        return "same speed"
    return f"{number(speedup)}× faster" if speedup > 1 or speedup <= 0 else f"{number(1 / speedup)}× slower"


def dollars(value: Measured | None) -> str:
    """Say a price per million tokens, or that there is none."""
    return NOT_PRICED if value is None else measured(value, lambda v: f"${number(v)}")


def odds_lost(kl: float) -> float:
    """Share of the probability that `kl` nats cost on the (geometric) average token: 1 - exp(-kl)."""
    return -math.expm1(-kl)


def one_in(share: float) -> str:
    """Say a share as `about 1 token in 77`."""
    if share <= 0:
        return "no token at all"
    if share >= 1:
        return "every token"
    if share > 0.3:
        return f"about {number(share * 10, 2)} tokens in 10"
    return f"about 1 token in {number(1 / share, 2)}"


def format_words(name: str) -> str:
    """Say what a format is: `4-bit integers, one 16-bit scale for each 32 weights: 4.5 bits per weight`."""
    if name not in FORMATS:
        return name
    f = FORMATS[name]
    kind = f"{f.bits}-bit {'integers' if f.kind == 'int' else 'floats'}"
    if not f.scaled:
        return kind
    shared = f"each {f.group_size} weights" if f.group_size else "each output row"
    return f"{kind}, one 16-bit scale for {shared}: {f.bits_per_weight:g} bits per weight"


def method_words(name: str | None) -> str:
    """Say how weights were rounded."""
    return "as it is" if name is None else METHODS.get(name, name)


def plan_sentences(plan: Plan) -> list[str]:
    """Say a plan in a few sentences; the rules one by one stand in a table of their own."""
    return [_weights_sentence(plan), *_other_sentences(plan)]


def _weights_sentence(plan: Plan) -> str:
    if not plan.weights.rules:
        return "All weights keep the format of the checkpoint."
    formats = list(dict.fromkeys(rule.format for rule in plan.weights.rules))
    names = " and ".join([", ".join(formats[:-1]), formats[-1]] if len(formats) > 1 else formats)
    return (
        f"Weights are stored in {names}, by the rules below: the first that matches a module holds, "
        "and a module that none names keeps the checkpoint's format."
    )


def _other_sentences(plan: Plan) -> list[str]:
    floats = {"fp32": "are not rounded (32-bit floats)", "bf16": "are rounded to 16-bit floats (bf16)"}
    inputs = {
        **floats,
        "int8": "with integer weights are rounded to 8-bit integers, one scale for each token; others are not rounded",
        "fp8": "with fp8 weights are rounded to 8-bit floats, one scale for each token; others are not rounded",
    }
    kept = {
        **floats,
        "int8": "are rounded to 8-bit integers, one 16-bit scale for each token and head,",
        "int4": "are rounded to 4-bit integers, one 16-bit scale for each 32 numbers of a head, keys after a rotation,",
        "fp8": "are rounded to 8-bit floats (e4m3)",
    }
    apart = [
        f"Those of layers {', '.join(map(str, some.layers))} {kept[some.format].rstrip(',')}."
        for some in plan.kv_cache.layers
    ]
    guessed = {
        "none": [],
        "ngram": ["Next tokens are guessed from what followed before; answers are the same without."],
        "draft": [
            f"Next tokens are guessed by a smaller model ({plan.speculation.path}); answers are the same without."
        ],
    }
    return [
        f"The inputs of every projection {inputs[plan.activations.format]}.",
        f"Keys and values of earlier tokens {kept[plan.kv_cache.format]} in the cache.",
        *apart,
        *guessed[plan.speculation.method],
        *_serving_sentences(plan.serving),
        "The model directory opens in transformers and other engines that read compressed-tensors."
        if plan.portable
        else "The model directory is made for Halve: every part may be compressed, and other engines may refuse it.",
    ]


def _serving_sentences(serving: Serving) -> list[str]:
    said = {
        "max_num_seqs": "up to {} answers",
        "max_tokens_per_step": "up to {} tokens",
        "max_prefill_beside_decode": "up to {} tokens of prompts beside answers",
    }
    words = [said[name].format(f"{value:,}") for name, value in serving.chosen.items()]
    return [f"A step of the engine runs {' and '.join(words)}: found for the workload by simulation."] if words else []


def split_where_different(original: str, smaller: str) -> tuple[str, str, str]:
    """Split two texts into what they share at the start and how each goes on, at the start of a word if near."""
    shared = next((i for i, (a, b) in enumerate(zip(original, smaller, strict=False)) if a != b), None)
    if shared is None:
        shared = min(len(original), len(smaller))
    if shared == len(original) == len(smaller):
        return original, "", ""
    while shared and any(unicodedata.combining(text[shared]) for text in (original, smaller) if shared < len(text)):
        shared -= 1
    words = re.search(r"\s(?=\S{0,24}$)", original[:shared])
    if words and shared < len(original) and shared < len(smaller):
        shared = words.end()
    return original[:shared], original[shared:], smaller[shared:]


def printable(html: str) -> str:
    """Show control characters as pictures (␀) and lone surrogates as U+FFFD: HTML may hold neither."""
    return re.sub(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]",
        lambda match: chr(0x2400 + ord(match[0])) if match[0] < "\x20" else "\ufffd",
        html,
    )
