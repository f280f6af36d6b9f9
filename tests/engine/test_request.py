import math

import pytest

from halve.core.errors import ConfigError, RequestError
from halve.core.record import from_dict, from_json, to_json
from halve.engine import Completion, Request, SamplingParams, StepOutput


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
        ("version", 2, r"sampling.version: 2 must be 1, the version that this Halve reads"),
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
        ("version", 0, "request.version: 0 must be 1"),
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
            sampling=SamplingParams(seed=3, temperature=0.5, stop=("a", "b"), stop_token_ids=(7,)),
        ),
        StepOutput(request_id="a", token_id=None, text="", finish_reason="abort", num_prompt_tokens=3),
        Completion(
            request_id="a", text="b", token_ids=(4,), prompt_tokens=1, completion_tokens=1, finish_reason="length"
        ),
    ],
    ids=lambda r: type(r).__name__,
)
def test_records_go_through_json_unchanged(record):
    assert from_json(type(record), to_json(record)) == record


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match=r"request.sampling: unknown keys \['temprature'\]"):
        from_dict(Request, {"request_id": "a", "prompt_token_ids": [1], "sampling": {"temprature": 1}})
