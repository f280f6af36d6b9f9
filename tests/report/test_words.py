import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.certificate import Certificate, Measured
from halve.core.plan import Activations, KVCache, LayerCaches, Plan, Speculation, WeightRule, Weights
from halve.report import words


def measured(value: float, low: float, high: float) -> Measured:
    return Measured(value=value, low=low, high=high, n=40)


def judged(certificate: Certificate, verdict: str, ppl_ratio: Measured, limit: float | None = 0.01) -> str:
    quality = replace(certificate.quality, ppl_ratio=ppl_ratio)
    said = words.verdict(replace(certificate, verdict=verdict, quality=quality, max_quality_loss=limit))
    assert said.tone == verdict
    return f"{said.word}: {said.sentence}".replace("\u00a0", " ")


def test_a_pass_is_said_with_interval_and_limit(certificate: Certificate) -> None:
    assert judged(certificate, "pass", measured(1.0025, 1.001, 1.004)) == (
        "Passed: the smaller model loses at most 0.4 % (95 % interval 0.1 … 0.4 %) against a limit of 1 %."
    )


def test_a_pass_without_any_loss_is_said_so(certificate: Certificate) -> None:
    said = judged(certificate, "pass", measured(0.998, 0.997, 0.999))
    assert said.startswith("Passed: the smaller model loses nothing: its quality loss is below zero")
    assert "(95 % interval −0.3 … −0.1 %) against a limit of 1 %." in said


def test_a_fail_says_the_least_loss_when_all_of_the_interval_is_beyond(certificate: Certificate) -> None:
    assert judged(certificate, "fail", measured(1.043, 1.036, 1.051)) == (
        "Failed: the smaller model loses at least 3.6 % (95 % interval 3.6 … 5.1 %) against a limit of 1 %."
    )


def test_a_fail_says_the_greatest_loss_when_the_interval_straddles_the_limit(certificate: Certificate) -> None:
    said = judged(certificate, "fail", measured(1.0094, 1.005, 1.014))
    assert said.startswith("Failed: the smaller model may lose as much as 1.4 % (95 % interval 0.5 … 1.4 %) against")
    assert "limit of 1 %; the interval must lie below the limit to pass." in said


def test_a_fail_within_the_limit_points_at_the_attempts(certificate: Certificate) -> None:
    assert "attempts below say why" in judged(certificate, "fail", measured(1.002, 1.001, 1.003))


def test_measured_says_that_no_limit_was_set(certificate: Certificate) -> None:
    assert judged(certificate, "measured", measured(1.0025, 1.001, 1.004), None) == (
        "Measured: the smaller model loses at most 0.4 % (95 % interval 0.1 … 0.4 %). "
        "No limit was set, so it neither passes nor fails."
    )


def test_a_verdict_without_its_limit_says_so(certificate: Certificate) -> None:
    assert judged(certificate, "pass", measured(1.002, 1.001, 1.003), None).endswith("); no limit was recorded.")


@given(
    low=st.floats(-0.5, 3),
    width=st.floats(0, 2),
    at=st.floats(0, 1),
    limit=st.floats(1e-4, 2).map(lambda x: round(x, 4)),
)
def test_a_rounded_interval_holds_the_true_one_and_stays_on_its_side_of_the_limit(
    low: float, width: float, at: float, limit: float
) -> None:
    ratio = measured(1 + low + at * width, 1 + low, 1 + low + width)
    said = words.loss(ratio, limit)
    shown_low, shown_high = (float(x.replace("−", "-").replace(",", "")) for x in (said.low, said.high))
    slack = 1e-6  # in percent: below what any loss is measured to
    assert shown_low <= (ratio.low - 1) * 100 + slack
    assert shown_high >= (ratio.high - 1) * 100 - slack
    if abs(ratio.high - 1 - limit) > 1e-9:
        assert (shown_high > limit * 100 + slack / 10) == (ratio.high - 1 > limit)


def test_an_infinite_loss_is_said() -> None:
    said = words.loss(measured(math.inf, 1.5, math.inf), 0.01)
    assert (said.value, said.high) == ("infinite", "infinite")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.00213, "0.00213"), (1240, "1,240"), (99999, "99,999"), (41.73, "41.7"), (-0.5, "−0.5"), (1, "1"),
        (3.1e-7, "3.1 × 10⁻⁷"), (-2.5e12, "−2.5 × 10¹²"), (999.9, "1,000"), (math.nan, "not a number"),
        (math.inf, "infinite"), (-math.inf, "−infinite"), (5e-324, "4.94 × 10⁻³²⁴"),
    ],
)  # fmt: skip
def test_numbers_are_said_with_three_digits(value: float, said: str) -> None:
    assert words.number(value) == said


def test_a_ratio_near_one_keeps_the_digits_that_tell_it_from_one() -> None:
    said = words.ratio_near_one(measured(1.0000012, 1.0000003, 1.0000021)).replace("\u00a0", " ")
    assert said == "1.0000012 (1.0000003 … 1.0000021)"
    assert words.ratio_near_one(measured(1.0, 1.0, 1.0)).startswith("1 (1")


@pytest.mark.parametrize(
    ("after", "before", "said"),
    [(1, 4, "4× smaller"), (6, 5, "1.2× larger"), (7, 7, "same size"), (1, 0, "not measured"), (0, 5, "not measured")],
)
def test_sizes_are_compared_in_words(after: int, before: int, said: str) -> None:
    assert words.times_smaller(after, before) == said


@pytest.mark.parametrize(("speedup", "said"), [(1.89, "1.89× faster"), (0.5, "2× slower"), (1.001, "same speed")])
def test_speeds_are_compared_in_words(speedup: float, said: str) -> None:
    assert words.faster(speedup) == said


def test_a_ratio_of_speeds_spans_every_pair_of_runs_and_is_none_when_one_is_missing() -> None:
    ratio = words.times_faster(measured(40, 36, 44), measured(20, 18, 22))
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (2, 36 / 22, 44 / 18)
    assert words.times_faster(None, ratio) is None
    assert words.times_faster(ratio, measured(0, 0, 0)) is None


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0, "no token at all"),
        (0.013, "about 1 token in 77"),
        (0.4, "about 4 tokens in 10"),
        (1, "every token"),
    ],
)
def test_shares_are_said_in_tokens(share: float, said: str) -> None:
    assert words.one_in(share) == said


def test_formats_are_explained_and_unknown_ones_keep_their_name() -> None:
    assert words.format_words("int4-g32") == (
        "4-bit integers, one 16-bit scale for each 32 weights: 4.5 bits per weight"
    )
    assert words.format_words("int8") == "8-bit integers, one 16-bit scale for each output row: 8 bits per weight"
    assert words.format_words("bf16") == "16-bit floats"
    assert words.format_words("gguf Q4_K") == "gguf Q4_K"
    assert words.method_words(None) == "as it is"
    assert words.method_words("awq") == "awq"


def test_a_plan_is_said_in_sentences() -> None:
    rules = tuple(
        WeightRule(pattern=p, format=f, method="clip") for p, f in [("a", "int4-g32"), ("b", "int8"), ("c", "int8")]
    )
    said = " ".join(words.plan_sentences(Plan(weights=Weights(rules=rules))))
    assert "Weights are stored in int4-g32 and int8, by the rules below" in said
    assert "inputs of every projection are not rounded" in said
    assert "Keys and values of earlier tokens are rounded to 16-bit floats (bf16)" in said
    assert "made for Halve" in said
    bare = Plan(portable=True, activations=Activations(format="bf16"), kv_cache=KVCache(format="fp32"))
    said = " ".join(words.plan_sentences(bare))
    assert "All weights keep the format of the checkpoint." in said
    assert "opens in transformers" in said
    assert "cache" in said
    eight = Plan(activations=Activations(format="int8"), kv_cache=KVCache(format="int8"))
    said = " ".join(words.plan_sentences(eight))
    assert (
        "every projection with integer weights are rounded to 8-bit integers, one scale for each token; others" in said
    )
    assert (
        "Keys and values of earlier tokens are rounded to 8-bit integers, one 16-bit scale for each token and" in said
    )
    mixed = KVCache(format="int4", layers=(LayerCaches(layers=(0, 3), format="int8"),))
    said = " ".join(words.plan_sentences(Plan(kv_cache=mixed)))
    assert (
        "Keys and values of earlier tokens are rounded to 4-bit integers, one 16-bit scale for each 32 numbers of a "
        "head, keys after a rotation, in the cache. Those of layers 0, 3 are rounded to 8-bit integers, one 16-bit "
        "scale for each token and head." in said
    )
    floats = Plan(activations=Activations(format="fp8"), kv_cache=KVCache(format="fp8"))
    said = " ".join(words.plan_sentences(floats))
    assert "with fp8 weights are rounded to 8-bit floats, one scale for each token" in said
    assert "Keys and values of earlier tokens are rounded to 8-bit floats (e4m3) in the cache" in said


def test_a_plan_says_where_guesses_come_from() -> None:
    assert "guessed" not in " ".join(words.plan_sentences(Plan()))
    said = " ".join(words.plan_sentences(Plan(speculation=Speculation(method="ngram"))))
    assert "guessed from what followed before; answers are the same" in said
    said = " ".join(words.plan_sentences(Plan(speculation=Speculation(method="draft", path="small"))))
    assert "guessed by a smaller model (small)" in said


@pytest.mark.parametrize(
    ("original", "smaller", "parts"),
    [
        ("same", "same", ("same", "", "")),
        ("a cat sat", "a car sat", ("a ", "cat sat", "car sat")),
        ("one", "one two", ("one", "", " two")),
        ("", "x", ("", "", "x")),
        ("住んでいた", "住んでいる", ("住んでい", "た", "る")),
        ("e\u0301", "e\u0300", ("", "e\u0301", "e\u0300")),
    ],
)
def test_texts_part_at_the_word_and_never_within_a_letter(
    original: str, smaller: str, parts: tuple[str, str, str]
) -> None:
    assert words.split_where_different(original, smaller) == parts
