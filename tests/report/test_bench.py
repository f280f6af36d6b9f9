"""The page and the drawing of a measurement."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from halve.report.bench import (
    Bar,
    Bars,
    BenchPage,
    LoadPoint,
    draw_bench,
    figure,
    metric_words,
    render_bench,
    spread_words,
    unit_of,
)

PAGE = BenchPage(
    title="m <b>: how fast is it here?",
    sentence="m makes 20 tokens/s.",
    device="CPU, 2 cores",
    created="2026-01-31",
    engines=("halve:m", "onnx:<i>"),
    charts=(
        Bars(
            metric="decode_b8_tok_s",
            bars=(
                Bar(name="halve:m", value=20.0, low=18.0, high=25.0, note="50% of memory"),
                Bar(name="onnx:<i>", value=None, low=None, high=None, note="mismeasured"),
            ),
        ),
        Bars(metric="peak_bytes", bars=(Bar(name="halve:m", value=2e9, low=2e9, high=2e9),)),
    ),
    points=(
        LoadPoint(name="halve:m", tok_s=30.0, time_per_token_ms=90.0, load="2 requests/s"),
        LoadPoint(name="halve:m", tok_s=40.0, time_per_token_ms=300.0, load="all at once"),
    ),
    level_ms=200.0,
    ratios=(("decode, batch 8", "onnx:<i>", "1.50", "1.40 to 1.60", "3"),),
    facts=(("halve:m", "0.1", "int8", "1 GB", "1.0 s", "served", ""),),
    ceilings=(("memory, GB/s", "40", "39 to 41"),),
    notes=("A note & more.",),
    command="halve bench m",
)


def parsed(html):
    """Every drawing of a page, as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_the_page_tells_figures_ranges_and_why_there_are_none():
    html = render_bench(PAGE)
    for words in ("20 [18, 25], 50% of memory", "no figure, mismeasured", "2 GB", "1.40 to 1.60", "level 200 ms"):
        assert words in html
    assert "halve bench m" in html


def test_nothing_on_the_page_is_taken_for_markup_and_nothing_is_loaded():
    html = render_bench(PAGE)
    assert "<b>:" not in html
    assert "<i>" not in html
    assert "A note &amp; more." in html
    assert not re.search(r"<script|src=|href=\"http|url\(", html)


def test_each_drawing_is_made_for_a_desk_and_for_a_phone():
    drawings = parsed(render_bench(PAGE))
    assert [d.attrib["viewBox"].split()[2] for d in drawings] == ["860", "350", "860", "350"]


@pytest.mark.parametrize("width", [350, 860])
def test_bars_and_whiskers_stay_within_the_drawing(width):
    (chart,) = parsed(draw_bench(PAGE, width))
    for rect in chart.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width + 24
    for line in chart.iter("{http://www.w3.org/2000/svg}line"):
        assert 0 <= float(line.attrib["x1"]) <= float(line.attrib["x2"]) <= width


def test_where_room_is_scarce_figures_come_before_notes():
    assert "50% of memory" in draw_bench(PAGE, 860)
    phone = draw_bench(PAGE, 250)
    assert "50% of memory" not in phone
    assert "20 [18, 25]" in phone


def test_the_drawing_alone_has_its_style_in_it():
    svg = draw_bench(PAGE)
    assert svg.startswith("<svg")
    assert "--paper" in svg
    assert "no figure" in svg


def test_without_a_replay_there_is_no_load_on_the_page():
    html = render_bench(replace(PAGE, points=(), level_ms=None, ratios=(), notes=()))
    assert "Under load" not in html
    assert "Ratios" not in html
    assert "level" not in render_bench(replace(PAGE, level_ms=None)).split("<main>")[1].split("</figure>")[1]


@pytest.mark.parametrize(
    ("metric", "words", "unit"),
    [
        ("decode_b32_tok_s", "decode, batch 32", "tokens/s"),
        ("prefill_512_tok_s", "prompt of 512 tokens", "tokens/s"),
        ("replay_tok_s", "replay within the level", "tokens/s"),
        ("replay_at_once_tok_s", "replay, all at once", "tokens/s"),
        ("replay_ttft_p95_ms", "time to first token, p95", "ms"),
        ("replay_time_per_token_p50_ms", "time per token, p50", "ms"),
        ("peak_bytes_at_batch_1", "peak memory, batch 1", "bytes"),
        ("peak_bytes", "peak memory", "bytes"),
        ("new_tok_s", "new_tok_s", "tokens/s"),
    ],
)
def test_metrics_are_said_in_words(metric, words, unit):
    assert (metric_words(metric), unit_of(metric)) == (words, unit)


def test_figures_are_said_with_their_range_where_they_have_one():
    assert spread_words("decode_b1_tok_s", 20.0, 18.0, 25.0) == "20 [18, 25]"
    assert spread_words("peak_bytes", 2e9, 2e9, 2e9) == "2 GB"
    assert spread_words("decode_b1_tok_s", None, None, None) == "no figure"
    assert figure("peak_bytes", 5e6) == "5 MB"
