"""The front as plans: their order and names, what is found by bisection, and why moves were rejected."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.compress import Choice, resolve
from halve.core.certificate import Measured
from halve.core.plan import Plan
from halve.engine.scheduler import Chunk
from halve.formats import FORMATS
from halve.search import Candidate, Judged, candidates, cheapest_passing, in_words, likely_start
from halve.search.device_table import DeviceTable, PlannedTimes
from halve.search.front import Offer, StepCounts, bytes_cost, rejected_moves, retreat
from halve.search.line import Line
from halve.search.sensitivity import Score, Sensitivity, parts_of
from halve.search.settings import Setting
from tests.search.test_device_table import CONFIG

PARTS = parts_of(CONFIG)
USUAL = Setting(activations="int8", caches=("bf16", "bf16"))
LOSSES = {"int8": 1e-4, "int4-g32": 2e-3, "int2-g32": 5e-1, "bf16": 0.0}
WEIGHT = {"layers.0.qkv": 3.0, "lm_head": 20.0}


def sensitivity():
    return Sensitivity(
        parts={
            p.name: tuple(
                Score(
                    format=f,
                    method="gptq" if FORMATS[f].scaled else None,
                    predicted=loss,
                    measured=None,
                    loss=loss * WEIGHT.get(p.name, 1.0),
                )
                for f, loss in LOSSES.items()
            )
            for p in PARTS
        },
        num_tokens=100,
    )


def found(**options):
    stored = {m.name: FORMATS["bf16"] for p in PARTS for m in p.modules}
    given = {"offers": [Offer(setting=USUAL)], "portable": False, **options}
    return candidates(CONFIG, PARTS, sensitivity(), bytes_cost, stored, **given)


def test_the_front_rises_in_cost_and_falls_in_loss_from_the_smallest_to_the_best():
    front = found()
    assert front[0].format == "int2-g32"
    assert all(a.cost < b.cost and a.predicted_kl > b.predicted_kl for a, b in itertools.pairwise(front))
    assert all(a.bytes_per_token <= b.bytes_per_token for a, b in itertools.pairwise(front))
    assert len({c.format for c in front}) == len(front)
    assert any(c.format.startswith("mixed-") for c in front)
    assert len(front) > 8


def test_a_plan_is_what_its_choices_say_and_one_that_changes_nothing_is_left_out():
    for candidate in found():
        assert {(a.format.name, a.method) for a in resolve(candidate.plan, CONFIG)} == {
            (c.format, c.method) for c in candidate.choices.values()
        }
        assert any(c.method for c in candidate.choices.values())
        assert candidate.method == "gptq"


def test_settings_are_chosen_together_with_formats():
    smaller = Setting(activations="int8", caches=("int4", "int8"), loss=1e-3)
    front = found(offers=[Offer(setting=USUAL, cost=50.0), Offer(setting=smaller, cost=10.0, suffix="-kv4.8-1")])
    assert front[0].plan.kv_cache.formats(2) == ("int4", "int8")
    assert front[0].format == "int2-g32-kv4.8-1"
    assert front[-1].plan.kv_cache.formats(2) == ("bf16", "bf16")  # the least loss of all
    assert all(a.cost < b.cost and a.predicted_kl > b.predicted_kl for a, b in itertools.pairwise(front))
    assert len({c.format for c in front}) == len(front)


def test_what_loses_more_for_what_it_saves_keeps_more_bits():
    for candidate in found():
        bits = {n: FORMATS[c.format].bits for n, c in candidate.choices.items()}
        assert bits["layers.0.qkv"] >= bits["layers.1.qkv"]


def test_cost_counts_the_steps_of_a_workload():
    line = Line(counts=(1, 2), seconds=(1.0, 3.0))
    kinds = ("qkv", "o", "gate_up", "down", "lm_head")
    products = {k: {"int8": line} for k in kinds}
    table = DeviceTable(
        device={},
        num_layers=2,
        products={"int8": products},
        rest={"bf16": line, "int8": line},
        pair={"bf16": Line(counts=(1,), seconds=(0.5,)), "int8": Line(counts=(1,), seconds=(0.25,))},
        engine=Line(counts=(1,), seconds=(10.0,)),
    )
    counts = StepCounts()
    steps = [
        type("Step", (), {"chunks": [Chunk(None, 0, n, (), -1, 0)], "num_sampled": r})
        for n, r in ((1, 1), (2, 0), (2, 2))
    ]
    seconds = counts.watching(lambda step: 7.0)
    assert [seconds(step) for step in steps] == [7.0] * 3
    cost = counts.cost(table, "int8")
    by_name = {p.name: p for p in PARTS}
    assert cost(by_name["layers.0.o"], FORMATS["int8"]) == pytest.approx(1 + 3 + 3)
    assert cost(by_name["lm_head"], FORMATS["int8"]) == pytest.approx(1 + 3)
    times = PlannedTimes(table, {}, "int8", ("bf16", "int8"))
    pairs = 1 + 3 + 3  # of a token, and twice of two
    assert counts.others_s(times) == pytest.approx(1 + 3 + 3 + pairs * (0.5 + 0.25) / 2 + 3 * 10)


def line(n):
    return [
        Candidate(format=str(i), method="rtn", plan=Plan(), bytes_per_token=i, predicted_kl=1.0 / (i + 1), choices={})
        for i in range(n)
    ]


def test_each_further_opening_of_the_sealed_text_is_for_a_plan_that_loses_clearly_less():
    ranked = line(40)  # losses of 1, 1/2, 1/3 ...
    assert retreat(ranked, 3, 3) == [3, 5, 7]  # 1/4, at most 3/16, at most 1/8
    assert retreat(ranked, 38, 3) == [38, 39]
    assert retreat(ranked, 39, 3) == [39]
    assert retreat(ranked[:1], 0, 3) == [0]


def judge_from(first):
    """Those at `first` and above pass; the calls are kept."""
    calls = []

    def judge(candidate):
        calls.append(candidate.bytes_per_token)
        one = Measured(value=1, low=1, high=1, n=1)
        return Judged(
            format=candidate.format,
            method=candidate.method,
            bytes_per_token=candidate.bytes_per_token,
            ppl_ratio=one,
            kl_mean=one,
            passed=candidate.bytes_per_token >= first,
        )

    return judge, calls


@given(st.integers(0, 60), st.data())
def test_bisection_finds_the_cheapest_that_passes_with_few_judgements(n, data):
    first = data.draw(st.integers(0, n))
    start = data.draw(st.none() | st.integers(0, max(0, n - 1)))
    judge, calls = judge_from(first)
    index, judged = cheapest_passing(line(n), judge, start=start)
    assert index == (first if first < n else None)
    assert len(calls) == len(set(calls)) <= (1 if start is None else 2) * n.bit_length()
    assert sorted(judged) == sorted(calls)
    if 0 < first < n:
        assert not judged[first - 1].passed
        assert judged[first].passed


def test_a_good_start_takes_few_judgements():
    judge, calls = judge_from(40)
    assert cheapest_passing(line(60), judge, start=40)[0] == 40
    assert calls == [40, 39]


def test_a_plan_that_saves_too_little_is_not_judged():
    judge, calls = judge_from(30)
    ranked = [replace(one, cost=100.0 + i) for i, one in enumerate(line(60))]
    assert cheapest_passing(ranked, judge, start=31, worth=0.02)[0] == 31  # 130 and 129 of 131 are not worth it
    assert calls == [31, 28]
    judge, calls = judge_from(0)
    assert cheapest_passing(ranked, judge, start=10, worth=0.02)[0] == 0
    assert calls == [10, 7, 4, 0]


def test_without_candidates_nothing_is_judged():
    judge, calls = judge_from(0)
    assert cheapest_passing([], judge) == (None, {})
    assert calls == []


def test_when_none_passes_the_dearest_was_judged():
    judge, calls = judge_from(99)
    index, judged = cheapest_passing(line(16), judge, start=3)
    assert index is None
    assert not judged[15].passed
    assert 15 in calls


def test_the_search_starts_where_the_limit_is_expected_to_be_kept():
    assert likely_start(line(10), 0.25) == 3
    assert likely_start(line(10), 0.01) == 9
    assert likely_start([], 1.0) == 0


def test_every_part_tells_its_best_cheaper_option_and_why_it_lost():
    chosen = {p.name: Choice(format="int4-g32", method="gptq") for p in PARTS}
    moves = rejected_moves(PARTS, sensitivity(), bytes_cost, chosen, 0.1)
    assert len(moves) == len(PARTS)
    assert {m.rejected for m in moves} == {"int2-g32 (gptq)"}
    assert all(m.cost < 0 < m.loss for m in moves)
    assert {m.why for m in moves} == {"loses more than the limit leaves"}
    loose = rejected_moves(PARTS, sensitivity(), bytes_cost, chosen, 100.0)
    assert {m.why for m in loose} == {"saves less for its loss than what was taken"}
    kept = {p.name: Choice(format="int2-g32", method="gptq") for p in PARTS}
    assert rejected_moves(PARTS, sensitivity(), bytes_cost, kept, 100.0) == []


def test_a_plan_is_said_by_what_is_done_to_which_layers():
    one, other = Choice(format="int4-g32", method="gptq"), Choice(format="bf16", method=None)
    chosen = {f"layers.{i}.qkv": one for i in (0, 1, 2, 5)} | {"layers.3.qkv": other, "lm_head": one}
    assert in_words(chosen) == ["bf16: qkv of layer 3", "int4-g32 (gptq): qkv of layers 0-2, 5; lm_head"]


def test_an_untied_table_costs_a_row():
    table = parts_of(replace(CONFIG, tied=False))[0]
    assert bytes_cost(table, FORMATS["int8"]) < 0.15 * CONFIG.vocab_size * CONFIG.hidden_size
