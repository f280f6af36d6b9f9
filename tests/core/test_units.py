"""Quantities as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.errors import ConfigError
from halve.core.units import format_bytes, format_duration, parse_bytes, parse_percent


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("1%", 0.01),
        (" 0.5 % ", 0.005),
        ("0.01", 0.01),
        (0.01, 0.01),
        ("0", 0),
        (0, 0),
        ("0%", 0),
        ("150%", 1.5),
        ("1e-3", 0.001),
    ],
)
def test_a_share_is_read_as_people_write_it(text, fraction):
    assert parse_percent(text, "loss") == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("4096", 4096),
        ("12 B", 12),
        ("2GB", 2 * 10**9),
        (" 512 MiB ", 512 * 2**20),
        ("1.5gib", 3 * 2**29),
        ("0.5 kB", 500),
        ("3TB", 3 * 10**12),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert parse_bytes(text, "cache") == size


@pytest.mark.parametrize("text", ["", "GB", "two GB", "2 G B", "-1", "1.5", "1.5 B", "1e9", "2 gigabytes", True])
def test_words_are_no_size(text):
    with pytest.raises(ConfigError, match=r"cache: .* is no size; write it as 2GB, 512MiB or a whole number of bytes"):
        parse_bytes(text, "cache")


@pytest.mark.parametrize("text", [0, "0", "0 GB", "0.0001 kB"])
def test_a_size_of_nothing_is_refused(text):
    with pytest.raises(ConfigError, match=r"cache: .* must be 1 byte or more"):
        parse_bytes(text, "cache")


@pytest.mark.parametrize("text", ["1", 1, "5", "1.0"])
def test_a_bare_number_of_one_or_more_is_ambiguous(text):
    with pytest.raises(ConfigError, match=rf"loss: {text!r} is ambiguous; write {text}% or a fraction below 1"):
        parse_percent(text, "loss")


@pytest.mark.parametrize("text", ["", "%", "one", "1%%", "1 per cent", "None"])
def test_words_are_no_share(text):
    with pytest.raises(ConfigError, match=r"loss: .* is not a percentage; write it as 1% or 0\.01"):
        parse_percent(text, "loss")


@pytest.mark.parametrize("text", ["-1%", "-0.01", "nan", "nan%", "inf", "inf%", float("nan"), "1e999%"])
def test_a_share_is_finite_and_not_negative(text):
    with pytest.raises(ConfigError, match=r"loss: .* must be zero or more and finite"):
        parse_percent(text, "loss")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1024, "1.02 kB"),
        (8_921_600, "8.92 MB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (16_060_522_496, "16.1 GB"),
        (1.5e12, "1.5 TB"),
        (2e15, "2e+03 TB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_sizes_are_said_with_three_digits_in_decimal_units(size, said):
    assert format_bytes(size) == said


@given(st.integers(1, 10**15 - 10**12))
def test_a_size_is_said_within_half_a_percent(size):
    number, unit = format_bytes(size).split()
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(number) * factor == pytest.approx(size, rel=0.00501)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (42.4, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_durations_are_said_in_their_two_largest_units(seconds, said):
    assert format_duration(seconds) == said
