import math

import ml_dtypes
import numpy as np
import pytest

from halve.core.errors import FormatError, PlanError
from halve.core.plan import Plan, WeightRule, Weights
from halve.formats import FORMATS, Weight, check, format_named, pack_codes
from halve.formats.base import BF16, FP8, formats_that_divide, widen


def ones(*shape, dtype=BF16):
    return np.ones(shape, dtype)


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(FormatError, match=r"unknown format 'int7'; known formats are fp32, .*int4-g32"):
        format_named("int7")


def test_known_format_is_found_by_name():
    assert format_named("int4-g32").group_size == 32


@pytest.mark.parametrize(
    ("name", "size_bytes", "bits_per_weight"),
    [
        ("fp32", 4 * 4 * 128, 32),
        ("bf16", 2 * 4 * 128, 16),
        ("fp8", 4 * 128 + 4 * 2, 8),
        ("int8", 4 * 128 + 4 * 2, 8),
        ("int8-g32", 4 * 128 + 4 * 4 * 2, 8.5),
        ("int4-g128", 4 * 64 + 4 * 2, 4.125),
        ("int3-g64", 4 * 48 + 4 * 2 * 2, 3.25),
        ("int2-g32", 4 * 32 + 4 * 4 * 2, 2.5),
    ],
)
def test_size_counts_codes_and_scales(name, size_bytes, bits_per_weight):
    assert FORMATS[name].size_bytes((4, 128)) == size_bytes
    assert FORMATS[name].bits_per_weight == bits_per_weight


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_weight_of_the_shapes_its_format_names_has_its_size(name):
    fmt, shape = FORMATS[name], (3, 256)
    scale = ones(*fmt.scale_shape(shape)) if fmt.scaled else None
    weight = Weight(format=fmt, shape=shape, codes=np.zeros(fmt.codes_shape(shape), fmt.dtype), scale=scale)
    assert weight.size_bytes == fmt.size_bytes(shape)
    assert weight.dequantize().shape == shape


def test_formats_that_divide_fit_every_width():
    assert formats_that_divide([128, 256]) == [f.name for f in FORMATS.values() if f.scaled]
    assert formats_that_divide([128, 96]) == [
        f.name for f in FORMATS.values() if f.scaled and f.group_size in (None, 32)
    ]
    assert formats_that_divide([10]) == ["fp8", "int8"]


def test_dequantize_is_code_times_the_scale_of_its_group():
    codes = np.arange(-8, 8, dtype=np.int8).repeat(4)[None]
    weight = Weight(
        format=FORMATS["int4-g32"],
        shape=(1, 64),
        codes=pack_codes(codes, 4),
        scale=np.array([[0.5, 3.0]], BF16),
    )
    expected = codes.astype(np.float32) * np.repeat(np.float32([0.5, 3.0]), 32)
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_dequantize_of_rows_and_floats():
    rows = Weight(
        format=FORMATS["int8"],
        shape=(2, 2),
        codes=np.array([[-128, 127], [1, 0]], np.int8),
        scale=np.array([[0.25], [2.0]], BF16),
    )
    assert rows.dequantize().tolist() == [[-32.0, 31.75], [2.0, 0.0]]
    fp8 = Weight(
        format=FORMATS["fp8"], shape=(1, 2), codes=np.array([[448, -0.5]], FP8), scale=ones(1, 1) * BF16.type(2)
    )
    assert fp8.dequantize().tolist() == [[896.0, -1.0]]
    plain = Weight(format=FORMATS["fp16"], shape=(1, 2), codes=np.array([[1.5, -2]], np.float16))
    assert plain.dequantize().tolist() == [[1.5, -2.0]]


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_scales_of_every_float_type_keep_their_value(dtype):
    scale = np.array([[0.1]], dtype)
    weight = Weight(format=FORMATS["int8"], shape=(1, 1), codes=np.array([[3]], np.int8), scale=scale)
    assert weight.dequantize()[0, 0] == np.float32(3) * np.float32(scale[0, 0])
    assert weight.size_bytes == 1 + scale.itemsize


def test_dequantize_keeps_an_expert_axis():
    fmt = FORMATS["int4-g32"]
    codes = np.random.default_rng(0).integers(-8, 8, (2, 3, 64)).astype(np.int8)
    weight = Weight(format=fmt, shape=(2, 3, 64), codes=pack_codes(codes, 4), scale=ones(2, 3, 2))
    np.testing.assert_array_equal(weight.dequantize(), codes)


@pytest.mark.parametrize(
    ("name", "shape", "codes", "scale", "words"),
    [
        ("int4-g32", (1, 40), np.zeros((1, 5), np.uint32), ones(1, 1), "group_size 32 does not divide in_features 40"),
        (
            "int4-g32",
            (1, 64),
            np.zeros((1, 8), np.int32),
            ones(1, 2),
            r"codes are int32 \(1, 8\).*needs uint32 \(1, 8\)",
        ),
        ("int4-g32", (1, 64), np.zeros((1, 64), np.uint32), ones(1, 2), r"codes are uint32 \(1, 64\)"),
        ("int8", (1, 4), np.zeros((1, 4), np.int8), None, "int8: needs scale"),
        ("bf16", (1, 4), np.zeros((1, 4), BF16), ones(1, 1), "bf16: takes no scale"),
        ("int8", (2, 4), np.zeros((2, 4), np.int8), ones(2), r"scale is bfloat16 \(2,\).*float32 \(2, 1\)"),
        ("int8", (2, 4), np.zeros((2, 4), np.int8), ones(2, 1, dtype=np.float64), "scale is float64"),
    ],
)
def test_a_weight_refuses_arrays_that_do_not_fit_its_format(name, shape, codes, scale, words):
    with pytest.raises(FormatError, match=words):
        Weight(format=FORMATS[name], shape=shape, codes=codes, scale=scale)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.float32, np.int8])
def test_widening_is_exact_for_every_bit_pattern_it_is_given(dtype):
    itemsize = np.dtype(dtype).itemsize
    patterns = np.arange(2 ** (8 * min(itemsize, 2)), dtype=np.uint32).astype({1: "u1", 2: "u2", 4: "u4"}[itemsize])
    values = patterns.view(dtype).reshape(2, -1)
    np.testing.assert_array_equal(widen(values), values.astype(np.float32))


def test_widening_takes_slices():
    values = np.arange(8, dtype=np.float32).astype(BF16).reshape(2, 4)
    assert widen(values[:, ::2]).tolist() == [[0, 2], [4, 6]]


def plan(*rules, **other):
    return Plan(weights=Weights(rules=tuple(WeightRule(**rule) for rule in rules)), **other)


def test_a_plan_that_fits_is_accepted():
    check(plan({"pattern": "*", "format": "int4-g32", "method": "rtn"}, {"pattern": "lm_head", "format": "bf16"}))
    check(plan({"pattern": "model.embed_tokens", "format": "bf16"}, portable=True))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (plan({"pattern": "*", "format": "int9"}), r"rules\[0\] \('\*'\): unknown format 'int9'; known formats"),
        (plan({"pattern": "*", "format": "bf16", "method": "rtn"}), "bf16 is stored as it is and takes no method"),
        (plan({"pattern": "*", "format": "int8"}), "int8 needs a method: rtn, clip or gptq"),
        (plan({"pattern": "*", "format": "fp8", "method": "gptq"}), "format fp8: gptq rounds to integers"),
        (
            plan({"pattern": "model.embed_tokens", "format": "int8", "method": "rtn"}, portable=True),
            "embeddings in 16 bits; set portable to false",
        ),
    ],
)
def test_a_plan_that_breaks_a_rule_is_refused(bad, words):
    with pytest.raises(PlanError, match=words):
        check(bad)


def test_codes_of_short_rows_round_up_to_whole_words():
    assert FORMATS["int3-g32"].codes_shape((2, 96)) == (2, math.ceil(96 * 3 / 32))
