import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.certificate import Measured
from halve.report import ReportPage, charts, svg

POSITIVE = st.floats(1e-9, 1e9)


@given(low=st.floats(-1e3, 0), span=st.floats(1e-3, 1e6))
def test_a_linear_axis_holds_its_values_at_round_ticks(low: float, span: float) -> None:
    axis = svg.linear_axis(low, low + span)
    assert -1e-6 <= axis.at(low) <= axis.at(low + span) <= 1 + 1e-6
    assert 2 <= len(axis.ticks) <= 9


@given(low=POSITIVE, factor=st.floats(1, 1e9), zero=st.booleans())
def test_a_log_axis_holds_its_values_in_order(low: float, factor: float, zero: bool) -> None:
    axis = svg.log_axis(low, low * factor, zero=zero)
    places = [axis.at(v) for v in ([0.0] if zero else []) + [low, low * factor]]
    assert places == sorted(places)
    assert places[0] >= -1e-4
    assert places[-1] <= 1 + 1e-4
    assert 1 <= len(axis.ticks) <= 9


@given(low=st.floats(-1, 0), high=st.floats(0, 1e9), limit=st.floats(1e-4, 1))
def test_a_loss_axis_shows_zero_the_limit_and_every_loss(low: float, high: float, limit: float) -> None:
    axis = charts.loss_axis([low, high], limit, 9)
    for value in (0.0, limit, low, high):
        assert -1e-4 <= axis.at(value) <= 1 + 1e-4
    assert 0.0 in axis.ticks
    assert len(axis.ticks) <= 14
    assert list(axis.ticks) == sorted(axis.ticks)


@pytest.mark.parametrize("values", [[], [0.0], [1e-9], [-1e-6, 1e-6], [math.inf, 0.1]])
def test_a_loss_axis_needs_no_limit(values: list[float]) -> None:
    axis = charts.loss_axis(values, None, 8)
    assert axis.low <= 0 < axis.high
    assert math.isfinite(axis.high)


def test_an_outlier_does_not_flatten_what_lies_near_the_limit() -> None:
    axis = charts.loss_axis([0.002, 0.005, 1e4], 0.01, 9)
    assert axis.at(0.01) - axis.at(0.0) > 0.25


def test_labels_of_candidates_do_not_cover_each_other(page: ReportPage) -> None:
    one = page.candidates[0]
    crowd = [
        replace(one, bytes_per_token=10**8 + i * 10**5, chosen=i == 50, format=f"f{i}",
                ppl_ratio=Measured(value=1.002, low=1.001, high=1.003, n=9))
        for i in range(100)
    ]  # fmt: skip
    drawn = str(charts.candidate_chart(crowd, 0.01, charts.NARROW))
    assert drawn.count("chosen: f50 clip") == 1
    assert drawn.count(" clip</text>") < 8


def test_the_limit_is_drawn_only_where_there_is_one(page: ReportPage) -> None:
    rows = [("this model", page.certificate.quality.ppl_ratio)]
    assert "limit 1 %" in charts.loss_chart(rows, 0.01, charts.WIDE)
    assert "limit" not in charts.loss_chart(rows, None, charts.WIDE)


def test_an_infinite_loss_is_named_though_it_cannot_be_drawn() -> None:
    rows = [("this model", Measured(value=math.inf, low=1.0, high=math.inf, n=3))]
    assert "infinite" in charts.loss_chart(rows, 0.01, charts.WIDE)


def test_groups_past_the_seventh_share_one_sign_and_the_largest_come_first(page: ReportPage) -> None:
    groups = [replace(page.groups[0], pattern=f"g{i}", bytes_before=i) for i in range(12)]
    series = charts.series_of(groups, [replace(page.layers[0], group="unseen")])
    assert series["g11"] == 0
    assert series["g5"] == 6
    assert {series["g4"], series["g0"], series["unseen"]} == {charts.OTHER}
    drawn = charts.layer_chart([replace(page.layers[0], group=name) for name in series], series, charts.WIDE)
    assert "6 other groups" in drawn


def test_bytes_before_and_after_share_one_scale(page: ReportPage) -> None:
    drawn = charts.size_chart(page.groups, charts.series_of(page.groups, ()), charts.WIDE)
    assert "original: 1 GB" in drawn
    assert "smaller: 250 MB, 4× smaller" in drawn


def test_unchanged_modules_lie_on_the_zero_line(page: ReportPage) -> None:
    still = [replace(e, relative_error=0.0) for e in page.layers]
    series = charts.series_of(page.groups, page.layers)
    assert "0 %" in charts.layer_chart(still, series, charts.WIDE)
    assert "0 %" in charts.layer_chart([*page.layers, *still], series, charts.NARROW)


def test_long_texts_are_cut_to_their_room() -> None:
    assert svg.shorten("short", 200) == "short"
    cut = svg.shorten("名前" * 40, 100)
    assert cut.endswith("…")
    assert svg.text_width(cut) <= 100


def test_elements_escape_text_and_attributes() -> None:
    assert svg.tag("text", "<b>", class_='"x') == '<text class="&#34;x">&lt;b&gt;</text>'
