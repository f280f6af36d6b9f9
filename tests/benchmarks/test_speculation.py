"""The benchmarks of guessing ahead and of the prefix cache run and say what they found in one line of JSON."""

import json
import sys

import pytest

from benchmarks import prefix_cache, speculation
from halve.kernels import native_library
from halve.models.embedded import embedded_model_path


def run(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.skipif(native_library.available() is not None, reason="the C++ kernels are not built")
def test_speculation_compares_off_and_on_in_turns(monkeypatch, capsys):
    model = embedded_model_path()
    arguments = [model, "--draft", model, "--rounds", 1, "--tokens", 24, "--threads", 1, "--rates", 1.0]
    found = run(speculation, monkeypatch, capsys, *arguments)
    cases = {row["case"]: row for row in found["runs"]}
    assert cases.keys() == {"code", "quotes", "prose", "oracle 1.0", "draft 1.0", "as it says"}
    assert cases["oracle 1.0"]["right"] == cases["oracle 1.0"]["guessed"]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in cases.values())
    assert found["lookup_us"] > 0


def test_the_prefix_cache_finds_what_the_stack_distance_says(monkeypatch, capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000 * i, "input_length": 1500, "output_length": 3, "hash_ids": [i % 2, 2 + i % 2, 10 + i]}
        for i in range(8)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    found = run(prefix_cache, monkeypatch, capsys, trace, "--sizes", 4, 40, "--alone")
    assert found["infinite"] == pytest.approx(6 * 1024 / (8 * 1500), abs=1e-5)
    assert [row["alone_less_lru_tokens"] for row in found["runs"]] == [0, 0]
    assert found["runs"][0]["lru"] < found["runs"][1]["lru"] == found["infinite"]
