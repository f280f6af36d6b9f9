"""Replays on arrivals made up so that the answers are known, and the search for the highest load."""

from decimal import Decimal

import pytest

from halve.api.versus.engines import Request
from halve.api.versus.figures import Ceiling, MismeasuredError, Work
from halve.api.versus.replay import (
    Replay,
    best_of,
    natural_load,
    next_load,
    percentile,
    replay_of,
    requests_at,
    rows_of_replays,
)
from halve.core.workload import ServiceLevel, Workload, WorkloadRequest

WORK = Work(weight_bytes=10**9, macs_of_layers=10**9, macs_of_head=10**8)
CEILING = Ceiling(read_gb_s=40.0, gmac_s={"int8": 200.0, "fp32": 100.0})
LEVEL = ServiceLevel(time_per_token_s=0.2, share=0.95)
WHO = {"engine": "halve", "model": "m", "name": "halve:m", "format": "int8"}


def workload(*requests):
    return Workload(
        name="made up",
        requests=tuple(
            WorkloadRequest(arrival_s=at, prompt_tokens=prompt, output_tokens=new, prefix_blocks=blocks)
            for at, prompt, new, blocks in requests
        ),
        block_tokens=4,
        service_level=LEVEL,
    )


THREE = workload((0.0, 6, 2, (1,)), (1.0, 6, 3, (1,)), (4.0, 5, 1, ()))


def test_a_load_scales_all_gaps_alike():
    assert natural_load(THREE) == 0.5
    made = requests_at(THREE, 2.0, vocab_size=100, seed=0, text_of=None)
    assert [(r.at, len(r.prompt), r.new_tokens, r.text) for r in made] == [
        (0.0, 6, 2, None),
        (0.25, 6, 3, None),
        (1.0, 5, 1, None),
    ]
    assert [r.at for r in requests_at(THREE, None, vocab_size=100, seed=0, text_of=None)] == [0.0, 0.0, 0.0]


def test_requests_that_all_come_at_once_have_no_gaps_to_scale():
    together = workload((0.0, 4, 1, ()), (0.0, 4, 1, ()))
    assert natural_load(together) == float("inf")
    assert [r.at for r in requests_at(together, 3.0, vocab_size=100, seed=0, text_of=None)] == [0.0, 0.0]


def test_another_seed_gives_other_prompts_that_share_as_much():
    first, again, other = (requests_at(THREE, None, vocab_size=1000, seed=s, text_of=None) for s in (1, 1, 2))
    assert [r.prompt for r in first] == [r.prompt for r in again]
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))
    assert other[0].prompt[:4] == other[1].prompt[:4]
    assert other[0].prompt[4:] != other[1].prompt[4:]
    assert all(0 <= token < 1000 for r in other for token in r.prompt)


def test_prompts_may_be_told_as_text():
    made = requests_at(THREE, None, vocab_size=100, seed=0, text_of=lambda ids: ([7] * len(ids), "words"))
    assert (made[2].prompt, made[2].text) == ([7] * 5, "words")


REQUESTS = [Request([1] * 10, 3), Request([1] * 20, 2, at=1.0), Request([1] * 5, 1, at=2.0)]
ARRIVALS = [(0.5, 0), (0.6, 0), (0.9, 0), (1.3, 1), (1.7, 1), (2.5, 2)]


def told(requests=REQUESTS, arrivals=ARRIVALS, level=LEVEL, **options):
    return replay_of(requests, arrivals, 1.0, level, work=WORK, ceiling=CEILING, others=0.1, **options)


def test_times_count_from_when_a_request_was_due():
    found = told()
    assert found.ttft_s == pytest.approx((0.5, 0.3, 0.5))
    assert found.time_per_token_s == pytest.approx((0.2, 0.4, None), nan_ok=True)
    assert (found.tok_s, found.requests_s) == pytest.approx((6 / 2.5, 3 / 2.5))
    assert found.arithmetic_fraction == pytest.approx((41 * 10**9 + 6 * 10**8) / 2.5 / 200e9)
    assert (found.arithmetic, found.others) == ("int8", 0.1)


def test_a_level_is_kept_by_its_share_of_the_requests():
    assert not told().keeps
    assert told(level=ServiceLevel(time_per_token_s=0.2, share=0.6)).keeps
    assert told(level=ServiceLevel(time_per_token_s=0.4, share=1.0)).keeps


def test_an_engine_elsewhere_has_no_fraction_of_this_machine():
    found = told(here=False)
    assert (found.arithmetic_fraction, found.arithmetic) == (None, None)


def test_other_tokens_than_asked_for_are_mismeasured():
    with pytest.raises(MismeasuredError, match=r"asked for 2 tokens, got 1 in request 1 \(1 such requests\)"):
        told(arrivals=ARRIVALS[:-2] + ARRIVALS[-1:])


def test_more_products_than_arithmetic_gives_are_mismeasured():
    with pytest.raises(MismeasuredError, match="GMAC/s, and int8 gave 200 beside it"):
        told(arrivals=[(when / 100, number) for when, number in ARRIVALS], requests=[
            Request(r.prompt, r.new_tokens) for r in REQUESTS
        ])  # fmt: skip


def replay(load, *, keeps, tok_s=10.0):
    return Replay(
        load=load,
        tok_s=tok_s,
        requests_s=8.0 if load is None else load,
        ttft_s=(0.1, 0.2),
        time_per_token_s=(0.05, 0.07),
        keeps=keeps,
        arithmetic_fraction=0.5,
        arithmetic="int8",
        others=0.0,
    )


AT_ONCE = replay(None, keeps=False)


@pytest.mark.parametrize(
    ("done", "load"),
    [
        ([replay(None, keeps=True)], None),  # nothing is harder
        ([AT_ONCE], 6.0),
        ([AT_ONCE, replay(6.0, keeps=False)], 3.0),
        ([AT_ONCE, replay(6.0, keeps=True)], 7.5),
        ([AT_ONCE, replay(7.5, keeps=True)], None),  # as much as it can do at all
        ([AT_ONCE, replay(4.0, keeps=True), replay(1.0, keeps=True), replay(9.0, keeps=False)], 6.0),
        ([AT_ONCE, replay(4.0, keeps=True), replay(4.3, keeps=False)], None),
    ],
)
def test_loads_close_in_on_the_highest_that_keeps_the_level(done, load):
    assert next_load(done) == load


def test_the_best_replay_is_the_fastest_that_keeps_the_level():
    slow, fast = replay(2.0, keeps=True, tok_s=5.0), replay(3.0, keeps=True, tok_s=7.0)
    assert best_of([replay(None, keeps=False, tok_s=20.0), slow, fast]) is fast
    assert best_of([AT_ONCE]) is None


@pytest.mark.parametrize(("share", "value"), [(0.5, 2.0), (0.75, 3.0), (0.95, 4.0), (1.0, 4.0), (0.0, 1.0)])
def test_a_percentile_is_a_value_that_occurred(share, value):
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == value


def test_rows_tell_the_best_load_with_its_percentiles_and_all_at_once():
    done = [replay(None, keeps=False, tok_s=20.0), replay(3.0, keeps=True, tok_s=7.0)]
    rows = {row.metric: row for row in rows_of_replays(done, [], Decimal("0.0252"), **WHO)}
    assert list(rows) == [
        "replay_tok_s",
        "replay_ttft_p50_ms",
        "replay_ttft_p95_ms",
        "replay_time_per_token_p50_ms",
        "replay_time_per_token_p95_ms",
        "replay_at_once_tok_s",
    ]
    assert (rows["replay_tok_s"].value, rows["replay_at_once_tok_s"].value) == (7.0, 20.0)
    assert (rows["replay_ttft_p50_ms"].value, rows["replay_time_per_token_p95_ms"].value) == pytest.approx((100, 70))
    assert rows["replay_tok_s"].usd_per_mtok == pytest.approx(1.0)
    assert rows["replay_ttft_p50_ms"].usd_per_mtok is None


def test_where_no_load_keeps_the_level_there_is_no_figure_and_the_reasons_are_told():
    first, *_, last = rows_of_replays([AT_ONCE], ["too fast"], None, **WHO)
    assert (first.value, first.runs, first.refused) == (None, 0, ("too fast",))
    assert last.value == 10.0
    only, other = rows_of_replays([], ["too fast"], None, **WHO)
    assert (only.value, other.value) == (None, None)
