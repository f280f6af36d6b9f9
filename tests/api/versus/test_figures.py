"""From arrivals and ceilings to figures, on numbers made up so that the answers are known."""

import json
from dataclasses import replace
from decimal import Decimal

import pytest

from halve.api.versus.figures import (
    Ceiling,
    Cell,
    Measure,
    MismeasuredError,
    Turn,
    Work,
    better,
    decode_rate,
    in_turn,
    is_disturbed,
    plain,
    prefill_rate,
    ratios_of,
    row_of,
    spread,
    steps_within,
    turn_of,
    usd_per_mtok,
)

DECODE_1, DECODE_8 = Measure("decode_b1", 1, 128, 64), Measure("decode_b8", 8, 128, 64)
PREFILL = Measure("prefill_512", 1, 512, 1)
WORK = Work(weight_bytes=10**9, macs_of_layers=10**9, macs_of_head=10**8)
CEILING = Ceiling(read_gb_s=40.0, gmac_s={"int8": 200.0, "int4": 250.0, "fp32": 100.0})


def turn(tok_s, others=0.0):
    return Turn(tok_s, bandwidth_fraction=0.5, arithmetic_fraction=0.25, arithmetic="int8", others=others)


def rows(measure, cells, *names, usd_per_hour=None):
    return [row_of(measure, cells, usd_per_hour, engine="e", model="m", name=n, format=None) for n in names]


def lockstep(batch, new_tokens, *, prompt_s=1.0, step_s=0.1):
    return [(prompt_s + i * step_s, s) for i in range(new_tokens) for s in range(batch)]


# Rates from arrivals


def test_a_batch_in_step_is_timed_from_its_first_token_to_its_last():
    tok_s, steps_s = decode_rate(lockstep(4, 11), 4, 11)
    assert tok_s == pytest.approx(40.0)
    assert steps_s == pytest.approx(10.0)


def test_only_the_time_in_which_all_sequences_decode_counts():
    early = [(0.1 * i, 0) for i in range(10)]  # from 0.0 to 0.9
    late = [(0.5 + 0.1 * i, 1) for i in range(10)]  # from 0.5 to 1.4
    tok_s, steps_s = decode_rate(early + late, 2, 10)
    assert tok_s == pytest.approx(8 / 0.4)  # 0.6 to 0.9, of two
    assert steps_s == pytest.approx(10.0)


@pytest.mark.parametrize("arrivals", [lockstep(2, 5)[:-1], lockstep(2, 6), lockstep(3, 5), lockstep(1, 10), []])
def test_tokens_that_do_not_add_up_are_mismeasured(arrivals):
    with pytest.raises(MismeasuredError, match="asked for 2 sequences of 5 tokens, got"):
        decode_rate(arrivals, 2, 5)


def test_sequences_that_never_decode_side_by_side_have_no_rate():
    with pytest.raises(MismeasuredError, match="never decoded side by side"):
        decode_rate([(0.0, 0), (0.1, 0), (0.2, 1), (0.3, 1)], 2, 2)
    with pytest.raises(MismeasuredError, match="take more tokens"):
        decode_rate([(0.0, 0)], 1, 1)


def test_a_prompt_is_timed_until_its_one_token():
    assert prefill_rate([(4.0, 0)], 512) == (128.0, 0.25)
    with pytest.raises(MismeasuredError, match="asked for 1 token, got 2"):
        prefill_rate([(4.0, 0), (4.1, 0)], 512)


@pytest.mark.parametrize(("step_s", "expected"), [(0.05, 61), (0.01, 64), (0.5, 7), (5.0, 4), (0.2, 16)])
def test_a_turn_has_as_many_tokens_as_its_seconds_allow(step_s, expected):
    assert steps_within(3.0, step_s, most=64) == expected


def test_a_turn_never_has_more_tokens_than_the_measure():
    assert steps_within(3.0, 10.0, most=2) == 2


# What a machine cannot do


def test_decoding_reads_every_weight_once_a_step_and_multiplies_for_every_sequence():
    assert (WORK.bytes_of(DECODE_1, 20.0), WORK.macs_of(DECODE_1, 20.0)) == (20e9, 22e9)
    assert (WORK.bytes_of(DECODE_8, 10.0), WORK.macs_of(DECODE_8, 10.0)) == (10e9, 88e9)
    assert Work(None, 1, 1).bytes_of(DECODE_1, 10.0) is None
    sparse = replace(WORK, sparse=True)
    assert (sparse.bytes_of(DECODE_1, 20.0), sparse.bytes_of(DECODE_8, 20.0)) == (20e9, None)


def test_a_prompt_needs_the_head_for_its_last_token_only():
    assert WORK.macs_of(PREFILL, 0.5) == pytest.approx((512e9 + 0.1e9) / 2)


def test_a_turn_is_told_as_fractions_of_the_ceilings_beside_it():
    found = turn_of(DECODE_8, 80.0, 10.0, WORK, CEILING, cached_bytes=0, others=0.1)
    assert found == Turn(80.0, bandwidth_fraction=0.25, arithmetic_fraction=0.44, arithmetic="int8", others=0.1)


def test_more_bytes_than_memory_gave_are_mismeasured():
    turn_of(DECODE_1, 41.0, 41.0, WORK, CEILING, cached_bytes=0, others=0.0)  # within the tolerance
    with pytest.raises(
        MismeasuredError, match=r"50\.0 tokens/s would read 50\.0 GB/s, and memory gave 40\.0 beside it"
    ):
        turn_of(DECODE_1, 50.0, 50.0, WORK, CEILING, cached_bytes=0, others=0.0)


def test_what_a_cache_may_keep_need_not_be_read():
    assert turn_of(DECODE_1, 50.0, 50.0, WORK, CEILING, cached_bytes=2 * 10**8, others=0.0).tok_s == 50.0


def test_more_products_than_the_fastest_arithmetic_gives_are_mismeasured():
    turn_of(PREFILL, 240.0, 240 / 512, WORK, CEILING, cached_bytes=0, others=0.0)  # above int8, within int4
    with pytest.raises(MismeasuredError, match=r"would take 300 GMAC/s, and int4 gave 250 beside it"):
        turn_of(PREFILL, 300.0, 300 / 512, WORK, CEILING, cached_bytes=0, others=0.0)


def test_weights_that_a_cache_holds_are_not_bound_by_memory():
    found = turn_of(DECODE_1, 100.0, 100.0, WORK, CEILING, cached_bytes=10**9, others=0.0)
    assert found.bandwidth_fraction is None


def test_an_engine_elsewhere_has_no_limits_here():
    found = turn_of(DECODE_1, 1e6, 1e6, WORK, CEILING, cached_bytes=0, others=None, here=False)
    assert found == Turn(1e6, None, None, None, None)


@pytest.mark.parametrize(
    ("stored", "kind"),
    [("int4-g32", "int8"), ("Q4_0", "int8"), (None, "int8"), ("bf16", "fp32"), ("F32", "fp32"), ("fp8", "fp32")],
)
def test_arithmetic_is_told_by_the_format_and_by_what_the_machine_has(stored, kind):
    assert CEILING.kind_for(stored) == kind


def test_half_precision_weights_are_held_against_half_precision_arithmetic():
    machine = Ceiling(40.0, {"int8": 200.0, "bf16": 100.0, "fp32": 50.0})
    assert [machine.kind_for(stored) for stored in ("bf16", "F16", "fp32")] == ["bf16", "bf16", "fp32"]
    found = turn_of(DECODE_8, 80.0, 10.0, WORK, machine, cached_bytes=0, others=0.1, stored="bf16")
    assert (found.arithmetic_fraction, found.arithmetic) == (0.88, "bf16")


def test_without_byte_arithmetic_floats_are_the_ceiling():
    plain_machine = Ceiling(read_gb_s=40.0, gmac_s={"fp32": 100.0})
    found = turn_of(DECODE_1, 10.0, 10.0, WORK, plain_machine, cached_bytes=0, others=0.0)
    assert (found.arithmetic_fraction, found.arithmetic) == (0.11, "fp32")


def test_the_ceiling_of_a_turn_is_the_faster_of_before_and_after():
    before, after = Ceiling(30.0, {"int8": 200.0, "fp32": 90.0}), Ceiling(35.0, {"int8": 150.0, "fp32": 95.0})
    assert Ceiling.faster(before, after) == Ceiling(35.0, {"int8": 200.0, "fp32": 95.0})


# Rounds


def test_a_round_is_disturbed_when_others_ran_in_any_turn():
    assert not is_disturbed(Cell({"a": turn(1.0, 0.1), "b": turn(1.0, 0.15)}), 0.15)
    assert is_disturbed(Cell({"a": turn(1.0, 0.0), "b": turn(1.0, 0.2)}), 0.15)
    assert not is_disturbed(Cell({"a": turn(1.0, None)}), 0.15)  # whose own use can't be told from theirs


def test_the_less_disturbed_attempt_is_kept_unless_it_measured_less():
    noisy, quiet = Cell({"a": turn(1.0, 0.9), "b": turn(1.0)}), Cell({"a": turn(2.0, 0.3), "b": turn(2.0)})
    assert better(noisy, quiet) is quiet
    assert better(quiet, noisy) is quiet
    assert better(noisy, Cell({"a": turn(3.0)})) is noisy


def test_disturbed_rounds_are_left_out_of_the_medians():
    cells = [Cell({"a": turn(v)}) for v in (10.0, 11.0, 12.0)] + [Cell({"a": turn(1.0, 1.0)}, disturbed=True)] * 2
    (row,) = rows(DECODE_1, cells, "a")
    assert (row.value, row.low, row.high, row.runs, row.disturbed) == (11.0, 10.0, 12.0, 3, False)


def test_too_few_undisturbed_rounds_are_told_with_a_mark():
    cells = [Cell({"a": turn(10.0)})] * 2 + [Cell({"a": turn(4.0, 1.0)}, disturbed=True)] * 3
    (row,) = rows(DECODE_1, cells, "a")
    assert (row.value, row.runs, row.disturbed) == (4.0, 5, True)


def test_an_engine_refused_in_most_rounds_has_no_figure_but_its_reasons():
    cells = [Cell({"a": turn(10.0), "b": turn(1.0)})] + [Cell({"a": turn(10.0)}, refused={"b": "too fast"})] * 2
    a, b = rows(DECODE_1, cells, "a", "b", usd_per_hour=Decimal(1))
    assert a.value == 10.0
    assert (b.value, b.runs, b.refused) == (None, 0, ("too fast", "too fast"))
    assert (b.ceiling_fraction, b.usd_per_mtok) == (None, None)


def test_a_row_tells_the_nearest_of_its_ceilings():
    (row,) = rows(DECODE_1, [Cell({"a": turn(10.0)})] * 3, "a")
    assert (row.ceiling, row.ceiling_fraction, row.usd_per_mtok) == ("memory", 0.5, None)


def test_a_price_is_that_of_an_hour_over_the_millions_of_tokens_of_an_hour():
    assert usd_per_mtok(Decimal("0.36"), 100.0) == pytest.approx(1.0)
    assert usd_per_mtok(None, 100.0) is None  # unknown is never zero
    (row,) = rows(DECODE_1, [Cell({"a": turn(10.0)})] * 3, "a", usd_per_hour=Decimal("0.36"))
    assert row.usd_per_mtok == pytest.approx(10.0)


def test_a_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round():
    cells = [Cell({"h": turn(20.0), "p": turn(10.0)}), Cell({"h": turn(9.0), "p": turn(3.0)}), Cell({"h": turn(9.0)})]
    (row,) = ratios_of(DECODE_1, cells, "h", ["p", "q"])
    assert (row.value, row.low, row.high, row.runs) == (2.5, 2.0, 3.0, 2)
    assert (row.engine, row.over, row.metric) == ("h", "p", "decode_b1_tok_s")


def test_every_engine_goes_first_in_some_round():
    assert [in_turn(["a", "b", "c"], n) for n in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_spread_is_median_lowest_highest_and_count():
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"value": 2.5, "low": 1.0, "high": 10.0, "n": 4}


def test_rounds_are_plain_json():
    told = json.loads(json.dumps(plain({"decode_b1": [Cell({"a": turn(1.0)}, refused={"b": "why"})]})))
    assert told["decode_b1"][0]["turns"]["a"]["tok_s"] == 1.0
    assert told["decode_b1"][0]["refused"] == {"b": "why"}
