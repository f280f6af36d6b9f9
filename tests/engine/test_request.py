import math

import pytest

from halve.core.errors import ConfigError, RequestError
from halve.core.record import from_dict, from_json, to_json
from halve.engine import Candidate, Completion, Request, SamplingParams, StepOutput, TokenLogprobs


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_tokens", 0, "max_tokens: 0 must be a whole number, 1 or more"),
        ("max_tokens", 2.0, "max_tokens: 2.0 must be a whole number"),
        ("max_tokens", True, "max_tokens: True must be"),
        ("temperature", -0.1, "temperature: -0.1 must be a finite number, 0 or more"),
        ("temperature", math.nan, "temperature: nan must be"),
        ("temperature", math.inf, "temperature: inf must be"),
        ("temperature", "hot", "temperature: 'hot' must be"),
        ("top_p", 0.0, "top_p: 0.0 must be above 0 and at most 1"),
        ("top_p", 1.5, "top_p: 1.5 must be"),
        ("seed", -1, r"seed: -1 must be None or a whole number from 0 to 2\*\*64 - 1"),
        ("seed", 2**64, "seed: 18446744073709551616 must be"),
        ("stop", "stop", "stop: 'stop' must be a tuple of strings, none of them empty"),
        ("stop", ("",), r"stop: \(''\,\) must be"),
        ("stop_token_ids", (-1,), r"stop_token_ids: \(-1,\) must be a tuple of token ids"),
        ("ignore_eos", 1, "ignore_eos: 1 must be true or false"),
        ("min_tokens", 129, "min_tokens: 129 must be a whole number from 0 to max_tokens"),
        ("top_k", -1, "top_k: -1 must be a whole number, 0 or more"),
        ("min_p", 1.1, "min_p: 1.1 must be from 0 to 1"),
        ("typical_p", 0, "typical_p: 0 must be above 0 and at most 1"),
        ("presence_penalty", 2.1, "presence_penalty: 2.1 must be from -2 to 2"),
        ("frequency_penalty", math.nan, "frequency_penalty: nan must be from -2 to 2"),
        ("repetition_penalty", 0, "repetition_penalty: 0 must be from 0.01 to 100"),
        ("logit_bias", [1], r"logit_bias: \[1\] must be a map of token ids to numbers from -100 to 100"),
        ("logit_bias", {1: 101}, r"logit_bias: \{1: 101\} must be"),
        ("logit_bias", {"one": 1.0}, "logit_bias: .* must be"),
        ("logit_bias", {1: 1.0, "1": 2.0}, "logit_bias: .* must be"),
        ("n", 0, "n: 0 must be a whole number from 1 to 1024"),
        ("logprobs", 21, "logprobs: 21 must be None or a whole number from 0 to 20"),
        ("include_stop", None, "include_stop: None must be true or false"),
        ("version", 5, r"sampling.version: 5 must be 1 to 4, the versions that this Halve reads"),
    ],
)
def test_a_sampling_parameter_out_of_range_is_refused_with_the_rule(field, value, rule):
    with pytest.raises(RequestError, match=rule):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("request_id", "", "request_id: '' must be a string, not empty"),
        ("request_id", 3, "request_id: 3 must be"),
        ("prompt_token_ids", (), r"prompt_token_ids: \(\) must be a tuple of at least one token id"),
        ("prompt_token_ids", [1], r"prompt_token_ids: \[1\] must be"),
        ("prompt_token_ids", (1, -2), r"prompt_token_ids: \(1, -2\) must be"),
        ("sampling", None, "sampling: None must be SamplingParams"),
        ("priority", 101, "priority: 101 must be a whole number from -100 to 100"),
        ("version", 0, "request.version: 0 must be 1 to 4"),
    ],
)
def test_a_malformed_request_is_refused_with_the_rule(field, value, rule):
    with pytest.raises(RequestError, match=rule):
        Request(**{"request_id": "a", "prompt_token_ids": (1,), field: value})


@pytest.mark.parametrize(
    "record",
    [
        SamplingParams(),
        Request(
            request_id="ü",
            prompt_token_ids=(1, 2),
            sampling=SamplingParams(seed=3, temperature=0.5, stop=("a", "b"), stop_token_ids=(7,), logit_bias={3: 1.5}),
            priority=-2,
        ),
        StepOutput(request_id="a", token_id=None, text="", finish_reason="abort", num_prompt_tokens=3),
        Completion(
            request_id="a",
            text="b",
            token_ids=(4,),
            prompt_tokens=1,
            completion_tokens=1,
            finish_reason="length",
            logprobs=(TokenLogprobs(token_id=4, logprob=-0.5, top=(Candidate(token_id=4, logprob=-0.5),)),),
        ),
    ],
    ids=lambda r: type(r).__name__,
)
def test_records_go_through_json_unchanged(record):
    assert from_json(type(record), to_json(record)) == record


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match=r"request.sampling: unknown keys \['temprature'\]"):
        from_dict(Request, {"request_id": "a", "prompt_token_ids": [1], "sampling": {"temprature": 1}})


def test_records_of_the_first_version_are_still_read():
    old = {"request_id": "a", "prompt_token_ids": [1], "sampling": {"top_p": 0.5, "version": 1}, "version": 1}
    read = from_dict(Request, old)
    assert (read.priority, read.sampling.top_p, read.sampling.n) == (0, 0.5, 1)


def test_loose_arguments_make_parameters():
    made = SamplingParams.of(stop="end", stop_token_ids=[3, 4], top_k=None, logit_bias={"7": 1})
    assert made == SamplingParams(stop=("end",), stop_token_ids=(3, 4), logit_bias={7: 1})
    assert SamplingParams.of(stop=["a", "b"]).stop == ("a", "b")


def test_an_argument_that_does_not_exist_is_named():
    with pytest.raises(RequestError, match="sampling: there is no 'temprature'; there are frequency_penalty, "):
        SamplingParams.of(temprature=1.0)
