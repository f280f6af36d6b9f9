"""The real scheduler over a model that only takes time."""

import math
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.prefix_cache import Stack, hits_by_size, infinite_hits
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import ConfigError, RequestError
from halve.core.record import from_json, to_json
from halve.core.workload import ServiceLevel, Workload, WorkloadRequest
from halve.engine import EngineConfig, EngineCore, Percentiles, Request, SamplingParams, Simulation, StepTimes, simulate

from .toy import StubRunner, run_steps

# A step takes a second and a hundredth for each token beyond the first, so that sums can be done by hand.
SECOND = StepTimes(tokens=(1, 101), seconds=(1.0, 2.0))
FREE = StepTimes(tokens=(1,), seconds=(0.0,))


def workload(*requests: tuple[float, int, int], **more: object) -> Workload:
    made = [WorkloadRequest(arrival_s=a, prompt_tokens=p, output_tokens=o) for a, p, o in requests]
    return Workload(name="w", requests=tuple(made), **more)


def test_one_request_takes_a_step_for_its_prompt_and_one_for_each_further_token():
    done = simulate(workload((5.0, 51, 4)), SECOND.of_step, num_blocks=16)
    assert done.ttft_s.mean == pytest.approx(1.5)
    assert done.time_per_token_s.p99 == pytest.approx(1.0)
    assert done.latency_s.p50 == pytest.approx(4.5)
    assert (done.duration_s, done.busy_s) == (pytest.approx(9.5), pytest.approx(4.5))
    assert done.utilization == pytest.approx(4.5 / 9.5)
    assert (done.num_steps, done.prompt_tokens, done.output_tokens) == (4, 51, 4)
    assert done.output_tok_s == pytest.approx(4 / 9.5)
    assert done.total_tok_s == pytest.approx(55 / 9.5)


def test_a_request_that_comes_while_another_runs_waits_for_the_step_and_shares_the_next():
    done = simulate(workload((0.0, 1, 5), (0.5, 1, 1)), SECOND.of_step, num_blocks=16)
    # Steps end at 1, 2.01 (two tokens), 3.01, ...; the second request waits from 0.5 on.
    assert done.ttft_s.p99 == pytest.approx(1.51, abs=0.01)
    assert done.duration_s == pytest.approx(5.01)
    assert done.mean_running == pytest.approx((1 + 2 * 1.01 + 3) / 5.01)


def test_the_same_workload_gives_the_same_figures():
    there = Workload.poisson(
        requests_per_s=2.0, num_requests=60, prompt_tokens=40, output_tokens=30, shared_tokens=32, seed=3
    )
    first, second = (simulate(there, SECOND.of_step, num_blocks=24, block_size=8) for _ in range(2))
    assert first == second
    assert from_json(Simulation, to_json(first)) == first
    assert first.num_preemptions > 0
    assert first.hit_rate > 0.5


def test_a_faster_model_keeps_a_service_level_that_a_slower_one_does_not():
    level = ServiceLevel(ttft_s=3.0, time_per_token_s=1.2, share=0.9)
    there = Workload.poisson(
        requests_per_s=0.2, num_requests=50, prompt_tokens=20, output_tokens=10, service_level=level
    )
    slower = StepTimes(tokens=(1, 101), seconds=(1.5, 3.0))
    fast, slow = (simulate(there, times.of_step, num_blocks=64) for times in (SECOND, slower))
    assert (fast.level_met, slow.level_met) == (True, False)
    assert fast.within_level > 0.9 > slow.within_level


def test_what_the_engine_can_never_serve_is_counted_and_told(caplog):
    there = workload((0.0, 20, 2), (1.0, 200, 2), (2.0, 300, 2))
    told = []
    done = simulate(there, FREE.of_step, num_blocks=4, progress=lambda *at: told.append(at))
    assert (done.num_requests, done.num_refused) == (1, 2)
    assert done.prompt_tokens == 20
    assert "left out what this engine can't serve" in caplog.text
    assert told[-1] == (3, 3)
    with pytest.raises(RequestError, match="can serve none of its 1 requests"):
        simulate(workload((0.0, 100, 2)), FREE.of_step, num_blocks=64, context=50)


def test_guesses_take_rows_and_bring_tokens_as_often_as_they_are_right():
    there = workload((0.0, 1, 4001))
    times = StepTimes(tokens=(1, 11), seconds=(1.0, 2.0))
    plain = simulate(there, times.of_step, num_blocks=300)
    sure = simulate(there, times.of_step, num_blocks=300, num_drafts=4, draft_rate=1.0)
    assert sure.num_steps == 1 + 4000 / 5
    assert sure.duration_s == pytest.approx(1 + 800 * 1.4)
    half = simulate(there, times.of_step, num_blocks=300, num_drafts=2, draft_rate=0.5)
    assert half.num_steps == pytest.approx(4000 / 1.75, rel=0.03)
    assert half.num_accepted_tokens == 4000 - (half.num_steps - 1)
    assert half.num_draft_tokens == pytest.approx(2 * (half.num_steps - 1), abs=3)
    assert plain.output_tokens == sure.output_tokens == half.output_tokens == 4001
    with pytest.raises(ConfigError, match=r"-1 num_drafts must be 0 or more, draft_rate 1.5 from 0 to 1"):
        simulate(there, times.of_step, num_blocks=300, num_drafts=-1, draft_rate=1.5)


def test_percentiles_of_nothing_are_zero():
    assert Percentiles.of([]) == Percentiles(mean=0.0, p50=0.0, p90=0.0, p99=0.0)
    assert Percentiles.of([1.0, 3.0]).p50 == 2.0


def test_it_does_what_the_engine_does_with_a_runner_that_computes():
    """Steps, hits and preemptions are those of EngineCore on the same requests."""
    there = Workload.poisson(
        requests_per_s=math.inf, num_requests=12, prompt_tokens=30, output_tokens=20, shared_tokens=16, seed=1
    )
    config = EngineConfig(max_num_seqs=4, max_tokens_per_step=24, max_prefill_beside_decode=10)
    done = simulate(there, SECOND.of_step, num_blocks=28, block_size=4, config=config)
    core = EngineCore(StubRunner(num_blocks=28, block_size=4), config=config)
    for i in range(12):
        ids = tuple(there.prompt_token_ids(i, 256).tolist())
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        core.add(Request(request_id=str(i), prompt_token_ids=ids, sampling=params))
    run_steps(core)
    real = core.metrics()
    assert (done.num_steps, done.num_preemptions) == (real.num_steps, real.num_preemptions)
    assert done.num_preemptions > 0
    assert real.num_sampled_tokens == done.output_tokens


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60), st.integers(1, 12))
def test_places_in_the_stack_say_what_a_cache_of_each_size_holds(events, size):
    """Against a cache of one size that is a list, latest use first, None a free place."""
    stack, cache = Stack(len(events)), []
    for item, dropped in events:
        if dropped:
            if item in stack._last:
                stack.drop(item)
                if item in cache:
                    cache[cache.index(item)] = None
            continue
        place = stack.use(item)
        assert (item in cache) == (place is not None and place <= size)
        if item in cache:
            at = cache.index(item)
            if None in cache[:at]:
                cache[at] = None
                cache.remove(None)
            else:
                del cache[at]
        elif None in cache:
            cache.remove(None)
        elif len(cache) == size:
            cache.pop()
        cache.insert(0, item)


def conversations(seed: int, num_requests: int, block_tokens: int) -> Workload:
    """Prompts that take up earlier ones, none of which ends with a block."""
    rng = np.random.default_rng(seed)
    prompts: list[tuple[int, ...]] = [()]
    requests = []
    for i in range(num_requests):
        start = prompts[rng.integers(max(0, len(prompts) - 12), len(prompts))]
        start = start[: rng.integers(0, len(start) + 1)]
        names = (*start, *range(1000 * i, 1000 * i + int(rng.integers(1, 5))))
        prompts.append(names if len(names) < 20 else names[:3])
        cut = int(rng.integers(1, block_tokens))  # the last block is cut short
        requests.append(
            WorkloadRequest(
                arrival_s=float(i),
                prompt_tokens=len(prompts[-1]) * block_tokens - cut,
                output_tokens=int(rng.integers(1, 3 * block_tokens)),
                prefix_blocks=prompts[-1],
            )
        )
    return Workload(name="conversations", requests=tuple(requests), block_tokens=block_tokens)


@pytest.mark.parametrize("num_blocks", [26, 40, 80, 200, 2000])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_one_after_the_other_requests_find_what_the_stack_distance_says(num_blocks, seed):
    there = conversations(seed, 120, 4)
    config = EngineConfig(max_num_seqs=1)
    done = simulate(there, FREE.of_step, num_blocks=num_blocks, block_size=4, config=config)
    assert done.num_hit_tokens == hits_by_size(there, [num_blocks])[0]
    infinite = infinite_hits(there.requests, 4)
    assert done.num_hit_tokens <= infinite
    if num_blocks == 2000:
        assert done.num_hit_tokens == infinite


def test_many_at_once_find_a_little_less_since_those_that_run_hold_their_blocks():
    there = replace(conversations(7, 300, 4), name="at once").faster(math.inf)
    config = EngineConfig(max_num_seqs=4)
    done = simulate(there, SECOND.of_step, num_blocks=120, block_size=4, config=config)
    lru, infinite = hits_by_size(there, [120])[0], infinite_hits(there.requests, 4)
    assert 0.6 * lru < done.num_hit_tokens <= infinite
