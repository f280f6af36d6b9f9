"""What a certificate says against itself, and against what was measured again."""

from dataclasses import replace

import pytest

from halve.api.recorded import (
    canary_differences,
    cost_differences,
    inconsistencies,
    roofline_differences,
    served_differences,
    slower_before,
    speed_differences,
    task_differences,
)
from halve.core.certificate import Measured, Roofline, Speed, WorkloadCost
from halve.evaluate.answering import counted
from halve.evaluate.paired import Pairs


class Asked:
    """Two choices."""

    name, kind, sha256, chance = "mine", "choice", "0" * 64, 0.5


def task(both=700, harmed=10, fixed=8, neither=282, margin=0.02):
    return counted(Asked(), Pairs(both=both, harmed=harmed, fixed=fixed, neither=neither), margin=margin)


COST = WorkloadCost(
    workload="chat",
    num_requests=64,
    output_tok_s=100.0,
    original_output_tok_s=50.0,
    ttft_p50_s=0.1,
    ttft_p99_s=0.2,
    time_per_token_p50_s=0.01,
    time_per_token_p99_s=0.02,
    level_met=True,
    usd_per_hour="0.36",
    usd_per_mtok=1.0,
    original_usd_per_mtok=2.0,
)


@pytest.fixture
def sound(passed):
    """A certificate with everything in it, which bears itself out."""
    result, c = task(), passed.certificate
    limits = tuple(
        Roofline(
            model=model,
            batch=1,
            decode_tok_s=speed.decode_tok_s.value,
            bytes_per_step=1000,
            cached_bytes=0,
            read_gb_s=10.0,
            memory_fraction=0.5,
            arithmetic="int8",
            arithmetic_fraction=0.1,
            tolerance=0.05,
        )
        for model, speed in (("original", c.original_speed), ("smaller", c.speed))
    )
    return replace(
        c,
        tasks=(result,),
        quality=replace(c.quality, tasks={"mine": result.accuracy}),
        workload_cost=COST,
        inputs=replace(c.inputs, price="0.36"),
        rooflines=limits,
    )


def test_a_sound_certificate_bears_itself_out(sound, passed, measured):
    assert inconsistencies(sound) == []
    assert inconsistencies(passed.certificate) == []
    assert inconsistencies(measured.certificate) == []


FAULTS = {
    "more openings than allowed": (lambda c: replace(c, attempts=c.attempts * 2), "attempts: recorded 2 openings"),
    "narrower intervals": (
        lambda c: replace(c, quality=replace(c.quality, confidence=0.8)),
        r"quality.confidence: recorded 0.8; 1 openings share an error of 5%, which is 0.95",
    ),
    "quality of another opening": (
        lambda c: replace(c, quality=replace(c.quality, kl_mean=replace(c.quality.kl_mean, value=1e-9, low=0.0))),
        "attempts: the last has kl_mean",
    ),
    "a failed opening called passed": (
        lambda c: replace(c, attempts=(replace(c.attempts[0], passed=False),)),
        "attempts: number 1 is recorded as False; by its figures it is True",
    ),
    "a cheaper price": (
        lambda c: replace(c, workload_cost=replace(COST, usd_per_mtok=0.5)),
        "workload_cost.usd_per_mtok: recorded 0.5; its own tokens a second make 1",
    ),
    "another machine's price": (
        lambda c: replace(
            c, workload_cost=replace(COST, usd_per_hour="0.18", usd_per_mtok=0.5, original_usd_per_mtok=1)
        ),
        "workload_cost.usd_per_hour: recorded 0.18, and inputs.price is 0.36",
    ),
    "a speed above the machine": (
        lambda c: replace(c, rooflines=(replace(c.rooflines[1], memory_fraction=1.3),)),
        "rooflines: the smaller model at 1.30 of what the machine can do (memory_fraction)",
    ),
    "a speed without its limit": (
        lambda c: replace(c, speed=Speed(prefill_tok_s=None, decode_tok_s=Measured(value=1e6, low=1e6, high=1e6, n=5))),
        "its speed is 1e+06",
    ),
    "a task whose counts say otherwise": (
        lambda c: replace(c, tasks=(replace(c.tasks[0], harmed=40),)),
        "tasks.mine.non_inferior: does not follow from its 1000 questions",
    ),
    "an accuracy from nowhere": (
        lambda c: replace(c, quality=replace(c.quality, tasks={"mine": Measured(value=1.0, low=1.0, high=1.0, n=9)})),
        "quality.tasks: is not what the results of the tasks say",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_figures_that_contradict_each_other_are_said(sound, fault):
    change, said = FAULTS[fault]
    assert any(said in line for line in inconsistencies(change(sound))), inconsistencies(change(sound))


def speed(decode, prefill=1000.0):
    return Speed(
        prefill_tok_s=Measured(value=prefill, low=0.9 * prefill, high=1.1 * prefill, n=5),
        decode_tok_s=Measured(value=decode, low=0.9 * decode, high=1.1 * decode, n=5),
    )


def with_speeds(c, original, smaller, ratio=None):
    value = ratio or original / smaller
    told = replace(c.speed_ratios[0], ratio=Measured(value=value, low=0.95 * value, high=1.05 * value, n=5))
    return replace(c, original_speed=speed(original), speed=speed(smaller), speed_ratios=(told,))


def test_speeds_that_come_out_again_are_not_said(passed):
    recorded, now = with_speeds(passed.certificate, 100, 200), with_speeds(passed.certificate, 120, 210)
    both = (now.original_speed, now.speed)
    assert speed_differences(recorded, both, now.speed_ratios, disturbed=False) == []


def test_a_clock_that_lied_when_it_was_certified_is_said(passed):
    """Ten times as fast, both or the smaller model alone; where others disturb, their ratio still tells."""
    now = with_speeds(passed.certificate, 100, 200)
    both = (now.original_speed, now.speed)
    lied = with_speeds(passed.certificate, 1000, 2000)
    found = speed_differences(lied, both, now.speed_ratios, disturbed=False)
    assert [line.partition(":")[0] for line in found] == ["original_speed.decode_tok_s", "speed.decode_tok_s"]
    assert speed_differences(lied, both, now.speed_ratios, disturbed=True) == []
    alone = with_speeds(passed.certificate, 100, 2000)
    found = speed_differences(alone, both, now.speed_ratios, disturbed=True)
    assert found == [
        "speed_ratios (original in bf16, same engine): recorded 0.05 [0.0475, 0.0525], now 0.5 [0.475, 0.525]"
    ]


def test_a_machine_that_was_slow_meanwhile_is_no_difference_and_is_told(passed):
    recorded, now = with_speeds(passed.certificate, 20, 40), with_speeds(passed.certificate, 100, 200)
    both = (now.original_speed, now.speed)
    assert speed_differences(recorded, both, now.speed_ratios, disturbed=False) == []
    assert "this machine is 4." in slower_before(recorded, both)
    assert slower_before(now, both) is None


def test_a_ratio_that_its_speeds_do_not_make_is_said(passed):
    recorded = with_speeds(passed.certificate, 100, 110, ratio=0.2)
    now = with_speeds(passed.certificate, 100, 110, ratio=0.2)
    found = speed_differences(recorded, (now.original_speed, now.speed), now.speed_ratios, disturbed=False)
    assert found == ["speed_ratios: recorded 0.2; the recorded speeds make 0.909"]


def test_a_recorded_speed_beyond_this_machine_is_said(sound):
    now = [replace(limit, decode_tok_s=10.0, memory_fraction=0.9) for limit in sound.rooflines]
    recorded = [replace(limit, decode_tok_s=30.0) for limit in sound.rooflines]
    found = roofline_differences(recorded, now)
    assert found[0] == (
        "rooflines: the original model: recorded 30 tokens/s are 2.70 of what this machine does (memory_fraction)"
    )
    assert roofline_differences(now, now) == []


def test_costs_that_are_not_found_again_are_said():
    assert cost_differences(COST, replace(COST, output_tok_s=110.0), disturbed=False) == []
    found = cost_differences(COST, replace(COST, output_tok_s=40.0), disturbed=True)
    assert found == ["workload_cost: recorded 2x the original's tokens a second, now 0.8x"]
    slow = replace(COST, output_tok_s=10.0, original_output_tok_s=5.0)
    found = cost_differences(COST, slow, disturbed=False)
    assert found[0] == "workload_cost.output_tok_s: recorded 100, now 10"
    assert cost_differences(COST, slow, disturbed=True) == []
    found = cost_differences(COST, replace(COST, workload="code"), disturbed=False)
    assert found == ["workload_cost: recorded chat, 64 requests, now code, 64 requests"]


def test_other_answers_are_said_beyond_what_rounding_elsewhere_may_change():
    one = task()
    assert task_differences([one], [task(both=698, harmed=12, fixed=9, neither=281)]) == []
    found = task_differences([one], [task(both=640, harmed=70, fixed=8, neither=282)])
    assert found[0] == "tasks.mine.accuracy: recorded 0.708, now 0.648, allowed are 10 questions"
    assert found[-1] == "tasks.mine: the margin of 2.0% was held, and is not shown now"


def test_a_model_that_is_served_otherwise_is_said(passed):
    served, answers = passed.certificate.served, passed.certificate.canary
    assert served_differences(served, replace(served, batch=8), same_machine=False) == []
    assert served_differences(served, replace(served, batch=8), same_machine=True) == [
        "served.batch: recorded 32, now 8"
    ]
    assert served_differences(served, replace(served, kv_cache="int8"), same_machine=False) == [
        "served.kv_cache: recorded bf16, now int8"
    ]
    early = Measured(value=0.0, low=0.0, high=0.0, n=24)
    assert canary_differences(answers, answers) == []
    assert canary_differences(None, answers) == []
    late = replace(answers, divergence=Measured(value=40.0, low=30.0, high=48.0, n=24))
    assert canary_differences(late, replace(late, divergence=early)) == [
        "canary.divergence: recorded 40 [30, 48], now 0 [0, 0]"
    ]
    assert canary_differences(late, replace(late, num_prompts=3)) == ["canary.num_prompts: recorded 24, now 3"]
