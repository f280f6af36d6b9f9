"""Codes and scales: by hand, within the bound that each format promises, and clip against plain rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halve.compress import rounding
from halve.compress.rounding import relative_error, round_weight
from halve.core.errors import FormatError
from halve.formats import FORMATS
from halve.formats.base import BF16, widen

SCALED = [f.name for f in FORMATS.values() if f.scaled]
INTEGERS = [name for name in SCALED if name.startswith("int")]
METHODS = ("rtn", "clip")


def gaussian(*shape, seed=0, size=0.02):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def rounded(weight, name, method="rtn", energy=None):
    if method == "clip" and energy is None:
        energy = np.ones(weight.shape[-1])
    return round_weight(np.asarray(weight, np.float32), FORMATS[name], method, energy)


def grouped(values, fmt):
    return np.asarray(values, np.float64).reshape(-1, fmt.group_size or values.shape[-1])


def weighted_error(weight, stored, energy):
    return grouped((weight.astype(np.float64) - stored.dequantize()) ** 2 * energy, stored.format).sum(-1)


def test_scale_and_codes_of_plain_rounding_by_hand():
    values = np.zeros(32)
    values[:7] = [7.5, -7.5, 1.0, 0.5, 1.5, -0.49, 0.51]
    stored = rounded(values[None], "int4-g32")
    assert widen(stored.scale).tolist() == [[1.0]]  # 7.5 / ((2^4 - 1) / 2)
    # Halves go to the even code; 8 is beyond the highest code, 7.
    assert stored.unpacked_codes()[0, :7].tolist() == [7, -8, 1, 0, 2, 0, 1]
    assert not stored.unpacked_codes()[0, 7:].any()


def test_codes_are_rounded_against_the_scale_as_stored():
    values = np.zeros(32)
    values[:3] = [10.0, 5.0, -10.0]
    stored = rounded(values[None], "int8-g32")
    scale = np.float32(10 / 127.5).astype(BF16)
    assert stored.scale[0, 0] == scale
    assert stored.unpacked_codes()[0, :3].tolist() == [
        127,
        round(5 / float(scale)),
        max(-128, round(-10 / float(scale))),
    ]


def test_one_scale_a_row_by_hand():
    stored = rounded([[127.5, -127.5, 3.2], [0, 0, 0], [1.0, 0.0, -1.0]], "int8")
    assert widen(stored.scale)[:2].tolist() == [[1.0], [0.0]]
    assert stored.codes[:2].tolist() == [[127, -128, 3], [0, 0, 0]]


def test_fp8_puts_a_rows_largest_value_at_448():
    stored = rounded([[448.0, -448.0, 1.0, 17.0], [0, 0, 0, 0]], "fp8")
    assert widen(stored.scale).tolist() == [[1.0], [0.0]]
    assert stored.codes.astype(np.float32).tolist() == [[448.0, -448.0, 1.0, 16.0], [0, 0, 0, 0]]


EDGES = {
    "gaussian": gaussian(5, 128),
    "all_negative": -np.abs(gaussian(3, 128)) - 0.01,
    "zero_rows": np.where(np.arange(4)[:, None] % 2, gaussian(4, 128), 0),
    "one_outlier": np.where(np.arange(128) == 77, 50.0, gaussian(3, 128)),
    "constant": np.full((3, 128), 0.3),
    "huge": gaussian(3, 128, size=1e36),
    "tiny": gaussian(3, 128, size=1e-30),
    "denormal": gaussian(3, 128, size=1e-40),
    "smallest_denormal": np.where(np.arange(128) % 2, 1.4e-45, -1.4e-45)[None].repeat(2, 0),
    "mixed_sizes": gaussian(4, 128) * (10.0 ** np.arange(-12, 20, 0.25)),
    "single_value": np.where(np.arange(128) == 3, -2.0, 0.0)[None],
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", INTEGERS)
def test_a_weight_within_range_is_off_by_half_a_step_and_beyond_by_what_is_clipped(name, edge):
    fmt, weight = FORMATS[name], EDGES[edge].astype(np.float32)
    stored = rounded(weight, name)
    scale = widen(stored.scale).astype(np.float64).reshape(-1, 1)
    wide, half = grouped(weight, fmt), 2 ** (fmt.bits - 1)
    error = np.abs(wide - grouped(stored.dequantize(), fmt))
    clipped = np.maximum(0, np.maximum(wide - (half - 0.5) * scale, (-half - 0.5) * scale - wide))
    # Division and product are rounded to float32: two parts in 2^24 of the weight, or a denormal.
    assert (error <= scale / 2 + clipped + 2.0**-22 * np.abs(wide) + 1e-44).all()
    # The scale is max / ((2^b - 1) / 2), so no more is clipped than bf16 took off it (or a denormal bf16, far more).
    assert (clipped <= np.abs(wide).max(-1, keepdims=True) * 2.0**-8 + half * 1e-40).all()


@pytest.mark.parametrize("edge", EDGES)
def test_fp8_is_off_by_a_sixteenth_or_half_its_smallest_step(edge):
    weight = EDGES[edge].astype(np.float32)
    stored = rounded(weight, "fp8")
    scale = widen(stored.scale).astype(np.float64)
    error = np.abs(weight.astype(np.float64) - stored.dequantize())
    assert (error <= np.abs(weight) * (2.0**-4 + 2.0**-8) + scale * 2.0**-10 + 448 * 1e-40).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", SCALED)
def test_every_edge_gives_finite_values_and_zeros_stay_zero(name, edge, method):
    weight = EDGES[edge].astype(np.float32)
    stored = rounded(weight, name, method)
    values = stored.dequantize()
    assert np.isfinite(values).all()
    assert (values[weight == 0] == 0).all()
    assert (widen(stored.scale) >= 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_do_not_depend_on_each_other(name, rows, method):
    weight, energy = gaussian(rows, 384), np.random.default_rng(1).random(384)
    stored = rounded(weight, name, method, energy)
    for i in range(rows):
        alone = rounded(weight[i : i + 1], name, method, energy)
        np.testing.assert_array_equal(stored.codes[i : i + 1], alone.codes)
        np.testing.assert_array_equal(stored.scale[i : i + 1], alone.scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCALED)
def test_experts_are_rounded_as_matrices_of_their_own(name, method):
    weight, energy = gaussian(3, 5, 128), np.random.default_rng(1).random(128)
    stored = rounded(weight, name, method, energy)
    assert stored.shape == (3, 5, 128)
    for e in range(3):
        alone = rounded(weight[e], name, method, energy)
        np.testing.assert_array_equal(stored.codes[e], alone.codes)
        np.testing.assert_array_equal(stored.scale[e], alone.scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["int8", "fp8", "int4-g32", "int3-g128"])
def test_the_result_is_the_same_whatever_is_rounded_at_a_time(monkeypatch, name, method):
    weight, energy = gaussian(9, 1024), np.random.default_rng(1).random(1024)
    whole = rounded(weight, name, method, energy)
    for chunk in (1, 1024, 4 * 1024, 1 << 30):
        monkeypatch.setattr(rounding, "CHUNK_WEIGHTS", chunk)
        part = rounded(weight, name, method, energy)
        np.testing.assert_array_equal(part.codes, whole.codes)
        np.testing.assert_array_equal(part.scale, whole.scale)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_plain_floats_are_rounded_to_nearest(name):
    weight = gaussian(4, 33)
    stored = round_weight(weight, FORMATS[name], None)
    np.testing.assert_array_equal(stored.codes, weight.astype(FORMATS[name].dtype))
    assert stored.scale is None


def test_a_weight_that_may_not_be_written_to_is_taken_and_left_alone():
    weight = gaussian(4, 64)
    weight.flags.writeable = False
    before = weight.copy()
    for name, method in (("int4-g32", "clip"), ("int8", "rtn"), ("fp8", "rtn")):
        rounded(weight, name, method)
    np.testing.assert_array_equal(weight, before)


sizes = st.sampled_from([1e-6, 1e-3, 1.0, 1e4])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int2-g32", "int3-g32", "int4-g32", "int4-g64", "int8-g32", "int8"]),
    hnp.arrays(np.float32, (3, 64), elements=st.floats(-1, 1, width=32)),
    hnp.arrays(np.float64, 64, elements=st.floats(0, 1e6)),
    sizes,
)
def test_clip_never_loses_more_of_the_output_than_plain_rounding(name, weight, energy, size):
    weight = (weight * np.float32(size)).astype(np.float32)
    counted = energy + rounding.ENERGY_FLOOR * energy.mean()
    clip = weighted_error(weight, rounded(weight, name, "clip", energy), counted)
    plain = weighted_error(weight, rounded(weight, name), counted)
    # Both are summed in float32 where they are compared.
    slack = 1e-5 * grouped(weight.astype(np.float64) ** 2 * counted, FORMATS[name]).sum(-1)
    assert (clip <= plain * (1 + 1e-5) + slack * 1e-3).all()


@pytest.mark.parametrize(
    ("name", "share"), [("int4-g128", 0.9), ("int4-g32", 0.95), ("int3-g64", 0.85), ("int2-g64", 0.7)]
)
def test_clip_of_gaussian_weights_beats_plain_rounding_clearly(name, share):
    weight = gaussian(64, 512)
    clip = weighted_error(weight, rounded(weight, name, "clip"), 1).sum()
    plain = weighted_error(weight, rounded(weight, name), 1).sum()
    assert clip < share * plain


def test_clip_spends_its_codes_where_the_energy_is():
    weight = gaussian(32, 256)
    energy = np.where(np.arange(256) % 4 == 0, 100.0, 0.01)
    aware = weighted_error(weight, rounded(weight, "int3-g32", "clip", energy), energy).sum()
    blind = weighted_error(weight, rounded(weight, "int3-g32", "clip"), energy).sum()
    assert aware < 0.8 * blind


def test_the_scale_of_all_energies_does_not_matter():
    weight, energy = gaussian(8, 128), np.random.default_rng(1).random(128)
    first, second = (rounded(weight, "int4-g32", "clip", energy * factor) for factor in (1.0, 1024.0))
    np.testing.assert_array_equal(first.codes, second.codes)


def test_inputs_that_were_never_awake_round_as_plainly_as_possible():
    weight = gaussian(4, 64)
    clip = rounded(weight, "int4-g32", "clip", np.zeros(64))
    np.testing.assert_array_equal(clip.codes, rounded(weight, "int4-g32").codes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_that_is_not_finite_is_refused_by_every_format(name, value):
    weight = gaussian(2, 128)
    weight[1, 100] = value
    method = "rtn" if FORMATS[name].scaled else None
    with pytest.raises(FormatError, match=f"{name}: weight holds NaN or infinity; check the checkpoint"):
        round_weight(weight, FORMATS[name], method)


@pytest.mark.parametrize(("name", "value"), [("fp16", 65520.0), ("fp16", -1e5), ("bf16", 3.4e38), ("int2-g32", -3e38)])
def test_a_weight_beyond_the_range_of_a_format_is_refused_before_it_becomes_infinite(name, value):
    weight = gaussian(2, 128)
    weight[1, 100] = value
    method = "rtn" if FORMATS[name].scaled else None
    with pytest.raises(FormatError, match=rf"{name}: a weight of size \S+ is beyond its range; store .* as fp32"):
        round_weight(weight, FORMATS[name], method)
    assert round_weight(weight, FORMATS["fp32"], None).codes[1, 100] == np.float32(value)


def test_the_largest_weights_of_fp16_are_kept():
    weight = np.array([[65519.0, -65504.0]], np.float32)
    assert round_weight(weight, FORMATS["fp16"], None).codes.tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize(
    ("name", "method"), [("int8", None), ("int4-g32", "awq"), ("fp8", "gptq"), ("fp8", None), ("bf16", "rtn")]
)
def test_a_method_that_a_format_does_not_take_is_refused(name, method):
    with pytest.raises(FormatError, match=rf"{name}: method {method!r}; it takes (rtn, clip or gptq|rtn or clip|none)"):
        round_weight(gaussian(2, 64), FORMATS[name], method, np.ones(64))


@pytest.mark.parametrize("energy", [None, np.ones(63), np.ones((1, 64)), np.ones(())])
def test_missing_or_misshapen_energy_is_refused(energy):
    with pytest.raises(FormatError, match="method clip needs the energy of 64 inputs; calibrate first, or use rtn"):
        round_weight(gaussian(2, 64), FORMATS["int4-g32"], "clip", energy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_energy_that_is_no_energy_is_refused(value):
    energy = np.ones(64)
    energy[5] = value
    with pytest.raises(FormatError, match="method clip needs energies that are finite and not negative"):
        round_weight(gaussian(2, 64), FORMATS["int4-g32"], "clip", energy)


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(FormatError, match="int4-g64: group_size 64 does not divide in_features 96"):
        round_weight(gaussian(2, 96), FORMATS["int4-g64"], "rtn")


def test_relative_error_is_that_of_the_output_under_independent_inputs():
    weight, energy = gaussian(6, 64), np.random.default_rng(1).random(64)
    stored = rounded(weight, "int4-g32")
    difference = weight.astype(np.float64) - stored.dequantize()
    expected = np.sqrt((difference**2 * energy).sum() / (weight.astype(np.float64) ** 2 * energy).sum())
    assert relative_error(weight, stored, energy) == pytest.approx(expected)
    plain = np.sqrt((difference**2).sum() / (weight.astype(np.float64) ** 2).sum())
    assert relative_error(weight, stored, None) == pytest.approx(plain)


def test_relative_error_counts_all_experts_and_is_zero_for_zeros():
    weight = gaussian(2, 3, 64)
    flat = relative_error(weight.reshape(6, 64), rounded(weight.reshape(6, 64), "int4-g32"), None)
    assert relative_error(weight, rounded(weight, "int4-g32"), None) == pytest.approx(flat)
    zeros = np.zeros((2, 64), np.float32)
    assert relative_error(zeros, rounded(zeros, "int4-g32"), None) == 0


def test_the_error_of_a_large_matrix_is_summed_in_parts_to_the_same(monkeypatch):
    weight = np.random.default_rng(0).standard_normal((2, 9, 64)).astype(np.float32)
    energy = np.linspace(0.1, 2, 64)
    stored = round_weight(weight, FORMATS["int3-g32"], "clip", energy)
    whole = relative_error(weight, stored, energy)
    monkeypatch.setattr("halve.compress.rounding.ERROR_WEIGHTS", 5 * 64)
    assert relative_error(weight, stored, energy) == pytest.approx(whole, rel=1e-12)
