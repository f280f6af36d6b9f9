"""Words for workloads, service levels and prices; and the pace at which a level is kept."""

import math
from decimal import Decimal

import pytest

from halve.api.workloads import PRESETS, level_of, price_of, replay, seconds_of, workload_cost, workload_of
from halve.core.errors import ConfigError, DataError
from halve.core.workload import ServiceLevel, Workload
from halve.engine import EngineConfig

LEVEL = ServiceLevel()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("context", [64, 512, 8192])
def test_a_preset_fits_the_context_and_keeps_its_shape(name, context):
    workload = workload_of(name, context, LEVEL)
    (prompt,), (output,) = ({getattr(r, f"{w}_tokens") for r in workload.requests} for w in ("prompt", "output"))
    assert prompt + output < context
    assert workload.name == name
    if context == 8192:
        assert (prompt, output) == (PRESETS[name].prompt_tokens, PRESETS[name].output_tokens)


def test_a_trace_is_cut_to_what_fits(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,500,5\n2,20,6\n")
    assert len(workload_of(str(path), 100, LEVEL).requests) == 2
    with pytest.raises(ConfigError, match=r"its shortest request has 15 tokens, .* context holds 12"):
        workload_of(str(path), 12, LEVEL)


def test_what_is_no_workload_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'chatt' is not one of chat, code, batch, and no file"):
        workload_of("chatt", 100, LEVEL)
    (tmp_path / "bad.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,-3,5\n")
    with pytest.raises(DataError, match=r"bad\.csv:2: .*"):
        workload_of(str(tmp_path / "bad.csv"), 100, LEVEL)


def test_a_service_level_is_read():
    assert level_of(None) == level_of("") == ServiceLevel()
    assert level_of("ttft=2s,tpot=100ms") == ServiceLevel(ttft_s=2.0, time_per_token_s=0.1)
    assert level_of(" tpot = 0.5s ") == ServiceLevel(time_per_token_s=0.5)


@pytest.mark.parametrize("text", ["ttft", "ttft=", "ttft=2", "ttft=2s,ttft=3s", "latency=2s", "ttft=-1s", "tpot=nans"])
def test_what_is_no_service_level_is_refused(text):
    with pytest.raises(ConfigError, match="slo"):
        level_of(text)


@pytest.mark.parametrize(("text", "seconds"), [("100ms", 0.1), ("2s", 2), ("30m", 1800), ("5min", 300), ("1.5h", 5400)])
def test_times_are_read(text, seconds):
    assert seconds_of(text, "time") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "m", "0s", "inf", "3 weeks"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ConfigError, match="time"):
        seconds_of(text, "time")


def test_prices_are_read_exactly():
    assert price_of(None) is None
    assert price_of("0.40") == Decimal("0.40")
    for text in ("-1", "nan", "free", "1e9"):
        with pytest.raises(ConfigError, match="price_per_hour"):
            price_of(text)


def run(level, seconds=lambda step: 0.01, rate=math.inf):
    workload = Workload.poisson(
        requests_per_s=rate, num_requests=12, prompt_tokens=20, output_tokens=10, service_level=level
    )
    _, found = replay(workload, seconds, engine=EngineConfig(max_num_seqs=4), num_blocks=64, context=64)
    return workload, found


def test_without_a_level_all_requests_come_at_once():
    _, found = run(LEVEL, rate=1.0)
    assert found.duration_s == pytest.approx(found.busy_s)


def test_with_a_level_the_pace_is_the_highest_that_keeps_it():
    _, full = run(LEVEL, rate=1.0)
    _, found = run(ServiceLevel(ttft_s=0.05), rate=1.0)
    assert found.level_met
    assert found.output_tok_s < full.output_tok_s
    _, loose = run(ServiceLevel(ttft_s=100.0), rate=1.0)
    assert loose.output_tok_s == pytest.approx(full.output_tok_s)


def test_a_level_that_requests_alone_break_is_told():
    _, found = run(ServiceLevel(time_per_token_s=0.001), rate=1.0)
    assert not found.level_met
    assert found.time_per_token_s.p99 == pytest.approx(0.01)


def test_dollars_are_an_hours_price_over_an_hours_tokens():
    workload, fast = run(LEVEL)
    _, slow = run(LEVEL, lambda step: 0.03)
    cost = workload_cost(workload, fast, slow, Decimal("0.36"), None)
    assert cost.usd_per_mtok == pytest.approx(0.36 / (fast.output_tok_s * 3600 / 1e6))
    assert cost.original_usd_per_mtok == pytest.approx(3 * cost.usd_per_mtok)
    assert cost.basis == "simulated"
    assert workload_cost(workload, fast, slow, None, None).usd_per_mtok is None
