"""Workloads run for real: pace, lengths, prefixes, and figures that can't be."""

import math
from dataclasses import replace
from decimal import Decimal

import pytest

import halve
from halve.api.replayed import Paced, check_replay, play, replay_in_turns
from halve.core.certificate import Roofline
from halve.core.errors import QualityError
from halve.core.workload import ServiceLevel, Workload


@pytest.fixture(scope="module")
def model(tiny):
    loaded = halve.load(tiny)
    yield loaded
    loaded.close()


def workload(rate=math.inf, level=None, shared=0, n=12):
    return Workload.poisson(
        requests_per_s=rate,
        num_requests=n,
        prompt_tokens=20,
        output_tokens=5,
        shared_tokens=shared,
        service_level=level or ServiceLevel(),
    )


def test_every_answer_is_as_long_as_the_workload_says(model):
    played = play(model, workload(), math.inf, seed=0)
    assert played.num_tokens == 12 * 5
    assert len(played.ttft_s) == len(played.time_per_token_s) == 12
    assert min(played.ttft_s) > 0
    assert max(played.ttft_s) < played.seconds


def test_requests_come_at_their_pace(model):
    asked = workload(rate=10.0)
    played = play(model, asked, 2.0, seed=0)
    assert played.seconds > asked.duration_s / 2


def test_rounds_find_nothing_of_each_other_in_the_cache(model):
    asked = workload(shared=16, n=4)
    hits = []
    for seed in (1, 2, 2):
        before = model.engine.metrics().num_hit_tokens
        play(model, asked, 1e9, seed=seed)
        hits.append(model.engine.metrics().num_hit_tokens - before)
    assert hits[1] < 4 * 16
    assert hits[2] >= 4 * 16  # the same round again is in the cache


def asked(one, foretold=(0.1, 0.1)):
    return Paced(workload=one, paces=(math.inf, math.inf), foretold_s=foretold)


def test_a_level_is_judged_by_the_clock(model):
    strict = replay_in_turns([model, model], asked(workload(level=ServiceLevel(ttft_s=1e-6))), None, lambda *_: None)
    assert (strict.within_level, strict.level_met, strict.usd_per_mtok) == (0.0, False, None)
    loose = replay_in_turns([model, model], asked(workload()), Decimal("0.36"), lambda *_: None)
    assert loose.level_met
    assert loose.usd_per_mtok.value == pytest.approx(100 / loose.output_tok_s.value)
    assert loose.ratio.low <= loose.ratio.value <= loose.ratio.high


def test_a_long_workload_is_cut_to_what_fits():
    assert len(asked(workload(n=100)).cut().requests) == 100
    assert len(asked(workload(n=100), (20.0, 20.0)).cut().requests) == 33
    assert len(asked(workload(n=100), (1e2, 1e2)).cut().requests) == 8
    assert asked(workload(n=100), (1e4, 1e4)).cut() is None
    assert replay_in_turns([], asked(workload(n=100), (1e4, 1e4)), None, lambda *_: None) is None


def test_a_replay_faster_than_the_weights_can_be_read_is_refused(model):
    found = replay_in_turns([model, model], asked(workload()), None, lambda *_: None)
    limit = Roofline(
        model="smaller", batch=1, decode_tok_s=1.0, bytes_per_step=10**9, cached_bytes=0, read_gb_s=1000.0,
        memory_fraction=0.5, arithmetic="int8", arithmetic_fraction=0.1, tolerance=0.05,
    )  # fmt: skip
    check_replay(found, workload(), [replace(limit, bytes_per_step=1), replace(limit, bytes_per_step=1)])
    with pytest.raises(QualityError, match=r"smaller model: its replay took .* can't reach is not certified"):
        check_replay(found, workload(), [replace(limit, bytes_per_step=1), replace(limit, bytes_per_step=10**15)])
