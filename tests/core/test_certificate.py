"""The certificate's JSON: the names that outsiders rely on, and nothing lost on the way."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.certificate import Attempt, Certificate, Cost, Inputs, Measured, Quality, SealedText, Size, Speed
from halve.core.errors import ConfigError
from halve.core.record import from_dict, from_json, to_dict, to_json

ONE = Measured(value=1.0, low=0.5, high=1.5, n=3)
CERTIFICATE = Certificate(
    verdict="pass",
    max_quality_loss=0.01,
    quality=Quality(
        kl_mean=ONE,
        kl_p99=ONE,
        flip_rate=ONE,
        ppl_ratio=ONE,
        tasks={"boolq": ONE},
        num_documents=3,
        num_tokens=900,
    ),
    size=Size(bytes=1, original_bytes=2, float32_bytes=4, ratio=0.25),
    cost=Cost(basis="bytes", usd_per_mtok=None, original_usd_per_mtok=None, ratio=0.3),
    speed=Speed(prefill_tok_s=ONE, decode_tok_s=ONE),
    original_speed=Speed(prefill_tok_s=None, decode_tok_s=None),
    inputs=Inputs(
        model_sha256="0" * 64,
        calibration_sha256="1" * 64,
        sealed_sha256="2" * 64,
        device="a CPU",
        workload=None,
        price=None,
        versions={"halve": "0.1.0"},
        command="halve optimize model",
    ),
    sealed=SealedText(kept=True, source="halve/sealed.jsonl", window_tokens=512),
    attempts=(Attempt(plan="int4-g32 (clip)", ppl_ratio=ONE, kl_mean=ONE, passed=True),),
    max_attempts=3,
    weights_sha256="3" * 64,
)
# Words for outsiders, from the first day: added to, never renamed.
PROMISED = {
    "": "version verdict quality size cost speed inputs",
    "quality": "kl_mean kl_p99 flip_rate ppl_ratio tasks",
    "size": "bytes original_bytes float32_bytes ratio",
    "cost": "basis usd_per_mtok original_usd_per_mtok ratio",
    "speed": "prefill_tok_s decode_tok_s",
    "inputs": "model_sha256 calibration_sha256 sealed_sha256 device workload price versions command",
}


@pytest.mark.parametrize("section", PROMISED)
def test_every_promised_name_is_there(section):
    raw = to_dict(CERTIFICATE)
    assert set(PROMISED[section].split()) <= (raw[section] if section else raw).keys()


@pytest.mark.parametrize(
    ("section", "name"),
    [("quality", n) for n in ("kl_mean", "kl_p99", "flip_rate", "ppl_ratio")]
    + [("speed", n) for n in ("prefill_tok_s", "decode_tok_s")],
)
def test_a_measured_leaf_is_a_value_with_its_interval_and_count(section, name):
    assert to_dict(CERTIFICATE)[section][name] == {"value": 1.0, "low": 0.5, "high": 1.5, "n": 3}


def test_what_was_not_measured_is_null_and_never_zero():
    raw = to_dict(CERTIFICATE)
    assert raw["cost"]["usd_per_mtok"] is None
    assert raw["original_speed"] == {"prefill_tok_s": None, "decode_tok_s": None}


def test_a_certificate_survives_json():
    assert from_json(Certificate, to_json(CERTIFICATE)) == CERTIFICATE


numbers = st.floats(allow_nan=False, allow_infinity=False)
measured = st.builds(Measured, value=numbers, low=numbers, high=numbers, n=st.integers(0))


@given(st.sampled_from(["pass", "fail", "measured"]), st.none() | numbers, measured, st.none() | st.booleans())
def test_every_figure_and_verdict_survives_json(verdict, limit, figure, passed):
    certificate = replace(
        CERTIFICATE,
        verdict=verdict,
        max_quality_loss=limit,
        quality=replace(CERTIFICATE.quality, kl_mean=figure, tasks={"a": figure}),
        attempts=(Attempt(plan="x", ppl_ratio=figure, kl_mean=figure, passed=passed),) * 2,
    )
    assert from_json(Certificate, to_json(certificate)) == certificate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "passed"}, r"verdict: 'passed' is not one of \['pass', 'fail', 'measured'\]"),
        ({"signature": ""}, r"unknown keys \['signature'\]"),
        ({"cost": {"basis": "usd", "usd_per_mtok": None, "original_usd_per_mtok": None, "ratio": 1}}, "cost.basis"),
    ],
)
def test_a_certificate_of_other_words_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Certificate, {**to_dict(CERTIFICATE), **change})
