"""When requests come, how long they are, what they share."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.core.errors import ConfigError
from halve.core.record import from_json, to_json
from halve.core.workload import ServiceLevel, Workload, WorkloadRequest


def one(arrival_s: float = 0.0, prompt_tokens: int = 10, output_tokens: int = 3, **more: object) -> WorkloadRequest:
    return WorkloadRequest(arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **more)


def workload(*requests: WorkloadRequest, **more: object) -> Workload:
    return Workload(name="w", requests=requests, **more)


def test_a_workload_goes_through_json_and_comes_back_the_same():
    level = ServiceLevel(ttft_s=1.0, time_per_token_s=0.1, share=0.9)
    there = workload(one(), one(1.5, 600, prefix_blocks=(3, 2**62)), service_level=level)
    assert from_json(Workload, to_json(there)) == there


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"arrival_s": -1.0}, "arrival_s -1.0 must be finite, 0 or more"),
        ({"arrival_s": math.nan}, "arrival_s nan must be finite"),
        ({"prompt_tokens": 0}, "0 prompt_tokens and 3 output_tokens; both must be 1 or more"),
        ({"output_tokens": 0}, "both must be 1 or more"),
        ({"prefix_blocks": (-1,)}, r"prefix_blocks \(-1,\) must be from 0"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_field(change, what):
    with pytest.raises(ConfigError, match=what):
        one(**change)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"ttft_s": 0.0}, "ttft_s: 0.0 must be above 0"),
        ({"time_per_token_s": math.inf}, "time_per_token_s: inf must be above 0 and finite"),
        ({"share": 0.0}, "share: 0.0 must be above 0"),
        ({"share": 1.1}, "share: 1.1 must be above 0"),
    ],
)
def test_a_service_level_that_cannot_be_is_refused_by_field(change, what):
    with pytest.raises(ConfigError, match=what):
        ServiceLevel(**change)


def test_a_workload_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="there are no requests in it"):
        workload()
    with pytest.raises(ConfigError, match=r"request 1 arrives at 1.0 s, the one before it at 2.0 s; sort them"):
        workload(one(2.0), one(1.0))
    with pytest.raises(ConfigError, match="request 0 names 2 blocks, its prompt of 10 tokens has 1 of 512"):
        workload(one(prefix_blocks=(1, 2)))
    with pytest.raises(ConfigError, match="block_tokens 0 must be 1 or more"):
        workload(one(), block_tokens=0)
    with pytest.raises(ConfigError, match="version 2 was written by a newer Halve"):
        workload(one(), version=2)


def test_a_service_level_keeps_what_is_within_both_limits():
    level = ServiceLevel(ttft_s=1.0, time_per_token_s=0.1)
    assert level.keeps(1.0, 0.1)
    assert not level.keeps(1.1, 0.1)
    assert not level.keeps(1.0, 0.2)
    assert ServiceLevel().keeps(1e9, 1e9)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(2, 60), st.integers(2, 1000))
def test_prompts_share_their_tokens_as_far_as_their_blocks_have_one_name(shared, first, second, vocab_size):
    names = tuple(range(shared))
    there = workload(
        one(prompt_tokens=shared * 8 + first, prefix_blocks=names),
        one(prompt_tokens=shared * 8 + second, prefix_blocks=names),
        block_tokens=8,
    )
    a, b = there.prompt_token_ids(0, vocab_size), there.prompt_token_ids(1, vocab_size)
    assert a.dtype == np.int32
    assert len(a) == shared * 8 + first
    assert a.min() >= 0
    assert a.max() < vocab_size
    assert (a[: shared * 8] == b[: shared * 8]).all()


def test_blocks_of_other_names_and_of_no_name_differ():
    there = workload(*(one(prompt_tokens=64, prefix_blocks=names) for names in [(1,), (2,), (), ()]), block_tokens=64)
    prompts = {tuple(there.prompt_token_ids(i, 1000).tolist()) for i in range(4)}
    assert len(prompts) == 4


def test_a_named_block_that_the_prompt_cuts_short_begins_like_the_whole_one():
    there = workload(one(prompt_tokens=5, prefix_blocks=(7,)), one(prompt_tokens=8, prefix_blocks=(7,)), block_tokens=8)
    assert (there.prompt_token_ids(0, 99) == there.prompt_token_ids(1, 99)[:5]).all()


def test_requests_at_random_come_at_their_rate_and_share_what_was_asked():
    there = Workload.poisson(
        requests_per_s=4.0, num_requests=4000, prompt_tokens=20, output_tokens=5, shared_tokens=12, seed=1
    )
    assert there.duration_s == pytest.approx(1000, rel=0.1)
    assert (there.num_prompt_tokens, there.num_output_tokens) == (80000, 20000)
    a, b = there.prompt_token_ids(0, 5000), there.prompt_token_ids(1, 5000)
    assert (a == b).tolist()[:13] == [True] * 12 + [False]
    at_once = Workload.poisson(requests_per_s=math.inf, num_requests=3, prompt_tokens=2, output_tokens=1)
    assert at_once.duration_s == 0
    with pytest.raises(ConfigError, match=r"0.0 requests_per_s must be above 0"):
        Workload.poisson(requests_per_s=0.0, num_requests=1, prompt_tokens=1, output_tokens=1)


def test_a_part_of_a_workload_and_a_faster_one():
    there = workload(one(0.0, 10), one(2.0, 100), one(4.0, 10))
    assert [r.arrival_s for r in there.first(2).requests] == [0.0, 2.0]
    assert [r.arrival_s for r in there.fitting(13).requests] == [0.0, 4.0]
    assert [r.arrival_s for r in there.faster(4.0).requests] == [0.0, 0.5, 1.0]
    assert there.faster(math.inf).duration_s == 0
    with pytest.raises(ConfigError, match="no requests"):
        there.fitting(5)
    with pytest.raises(ConfigError, match="factor 0 must be above 0"):
        there.faster(0)
