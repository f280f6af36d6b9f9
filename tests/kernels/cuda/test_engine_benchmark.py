"""The benchmark of the engine on CUDA, with the smallest shape."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILE = Path(__file__).parents[3] / "benchmarks" / "cuda_engine.py"


@pytest.fixture(name="bench")
def _bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("cuda_engine", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"PROMPT": 20, "OUTPUT": 4, "SHORT_CONTEXT": 10, "PREFILL_TOKENS": 20, "MOST_SEQUENCES": 2, "DECODES": 1}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(module.SHAPES, "tiny", {**module.SHAPES["tiny"], "layers": 1})
    return module


def options(**changed):
    given = {"one": "fp8", "shape": "tiny", "parts": "a,b,e", "device": DEVICE, "sequences": 2, "real_run": "fp8"}
    return Namespace(**{**given, "run_seconds": 100.0, "tune": False, "compile_only": True, "share": 0, **changed})


def test_every_part_reports_rates_and_what_they_are_held_to(bench):
    result = bench.run_one(options())
    json.dumps(result, allow_nan=False)
    assert result["a"]["bytes_per_token"] > result["matrix_bytes"] > 0
    assert result["a"]["engine_tok_s"] > 0
    b = result["b"]
    rate = 1 / (1 / b["decode_tok_s"] + 20 / 4 / b["prefill_tok_s"])
    assert b["output_tok_s"] == pytest.approx(rate)
    assert result["e"]["output_tokens"] == 2 * 3
    assert not result["e"]["stopped_early"]


def test_a_real_run_has_as_many_sequences_as_its_time_allows(bench, monkeypatch):
    monkeypatch.setattr(bench, "PROMPT", 1000)
    monkeypatch.setattr(bench, "OUTPUT", 1000)
    b = {"sequences": 896, "decode_tok_s": 22400.0, "prefill_tok_s": 80_000.0}  # 40 ms a step
    # 640: 8 s of prompts and 29 s of 29 ms; 576: 7.2 s and 25.7 s
    assert bench.fitting_sequences(b, 50.0) == 640
    assert bench.fitting_sequences(b, 43.0) == 576
    assert bench.fitting_sequences(b, 1000.0) == 896
    assert bench.fitting_sequences(b, 1.0) == 1
    assert bench.fitting_sequences({"error": "broken"}, 50.0) == bench.SEQUENCES


def test_dollars_follow_from_the_rates(bench):
    results = {"fp8": {"b": {"output_tok_s": 10_000.0}, "e": {"output_tok_s": 5_000.0}}, "int8": {"error": "left out"}}
    assert dict(bench.prices(results, 3.6)) == {"fp8": {"b": pytest.approx(0.1), "e": pytest.approx(0.2)}}


def test_a_process_that_fails_is_a_result_with_an_error(bench):
    import subprocess
    import sys

    def process(code):
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    assert bench.finish(process("raise SystemExit(3)"), 60) == {"error": "exit code 3; see stderr"}
    assert bench.finish(process("print('talk'); print('{\"a\": 1}')"), 60) == {"a": 1}
