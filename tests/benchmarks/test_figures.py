"""From arrivals and ceilings to figures, on numbers made up so that the answers are known."""

import json

import pytest
from benchmarks.versus.figures import (
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
    rows_of,
    spread,
    steps_within,
    turn_of,
)

DECODE_1, DECODE_8 = Measure("decode_b1", 1, 128, 64), Measure("decode_b8", 8, 128, 64)
PREFILL = Measure("prefill_512", 1, 512, 1)
WORK = Work(weight_bytes=10**9, macs_of_layers=10**9, macs_of_head=10**8)
CEILING = Ceiling(read_gb_s=40.0, gmac_s={"int8": 200.0, "int4": 250.0, "fp32": 100.0})


def turn(tok_s, others=0.0):
    return Turn(tok_s=tok_s, bandwidth_fraction=0.5, int8_fraction=0.25, others=others)


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
    assert WORK.of(DECODE_1, 20.0) == (20e9, 22e9)
    assert WORK.of(DECODE_8, 10.0) == (10e9, 88e9)


def test_a_prompt_needs_the_head_for_its_last_token_only():
    assert WORK.of(PREFILL, 0.5) == (0.5e9, pytest.approx((512e9 + 0.1e9) / 2))


def test_a_turn_is_told_as_fractions_of_the_ceilings_beside_it():
    found = turn_of(DECODE_8, 80.0, 10.0, WORK, CEILING, cached_bytes=0, others=0.1)
    assert found == Turn(tok_s=80.0, bandwidth_fraction=0.25, int8_fraction=0.44, others=0.1)


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


def test_without_byte_arithmetic_there_is_no_fraction_of_it():
    plain_machine = Ceiling(read_gb_s=40.0, gmac_s={"fp32": 100.0})
    assert turn_of(DECODE_1, 10.0, 10.0, WORK, plain_machine, cached_bytes=0, others=0.0).int8_fraction is None


def test_the_ceiling_of_a_turn_is_the_faster_of_before_and_after():
    before, after = Ceiling(30.0, {"int8": 200.0, "fp32": 90.0}), Ceiling(35.0, {"int8": 150.0, "fp32": 95.0})
    assert Ceiling.faster(before, after) == Ceiling(35.0, {"int8": 200.0, "fp32": 95.0})


# Rounds


def test_a_round_is_disturbed_when_others_ran_in_any_turn():
    assert not is_disturbed(Cell({"a": turn(1.0, 0.1), "b": turn(1.0, 0.15)}), 0.15)
    assert is_disturbed(Cell({"a": turn(1.0, 0.0), "b": turn(1.0, 0.2)}), 0.15)


def test_the_less_disturbed_attempt_is_kept_unless_it_measured_less():
    noisy, quiet = Cell({"a": turn(1.0, 0.9), "b": turn(1.0)}), Cell({"a": turn(2.0, 0.3), "b": turn(2.0)})
    assert better(noisy, quiet) is quiet
    assert better(quiet, noisy) is quiet
    assert better(noisy, Cell({"a": turn(3.0)})) is noisy


def test_disturbed_rounds_are_left_out_of_the_medians():
    cells = [Cell({"a": turn(v)}) for v in (10.0, 11.0, 12.0)] + [Cell({"a": turn(1.0, 1.0)}, disturbed=True)] * 2
    (row,) = rows_of(DECODE_1, cells, ["a"])
    assert (row["value"], row["low"], row["high"], row["n"], row["disturbed"]) == (11.0, 10.0, 12.0, 3, False)


def test_too_few_undisturbed_rounds_are_told_with_a_mark():
    cells = [Cell({"a": turn(10.0)})] * 2 + [Cell({"a": turn(4.0, 1.0)}, disturbed=True)] * 3
    (row,) = rows_of(DECODE_1, cells, ["a"])
    assert (row["value"], row["n"], row["disturbed"]) == (4.0, 5, True)


def test_an_engine_refused_in_most_rounds_has_no_figure_but_its_reasons():
    cells = [Cell({"a": turn(10.0), "b": turn(1.0)})] + [Cell({"a": turn(10.0)}, refused={"b": "too fast"})] * 2
    a, b = rows_of(DECODE_1, cells, ["a", "b"])
    assert a["value"] == 10.0
    assert (b["value"], b["n"], b["refused"]) == (None, 0, ["too fast", "too fast"])


def test_a_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round():
    cells = [Cell({"h": turn(20.0), "p": turn(10.0)}), Cell({"h": turn(9.0), "p": turn(3.0)}), Cell({"h": turn(9.0)})]
    (row,) = ratios_of(DECODE_1, cells, ["h"], ["p"])
    assert (row["value"], row["low"], row["high"], row["n"]) == (2.5, 2.0, 3.0, 2)
    assert (row["halve"], row["peer"], row["metric"]) == ("h", "p", "decode_b1_tok_s")


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
