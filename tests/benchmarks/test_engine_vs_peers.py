"""The command line, the processes and the table; the engines are fakes that answer at once."""

import json
import os
import sys

import pytest
from benchmarks.versus import processes
from benchmarks.versus.processes import Others, Worker, WorkerError, busy_time, find_python, processor_time
from benchmarks.versus.table import table

from benchmarks import engine_vs_peers

FAKE = """
import json, sys
if sys.argv[2].endswith("broken"):
    print(json.dumps({"error": "RuntimeError: no such instruction"}), flush=True)
    sys.exit(1)
if sys.argv[2].endswith("silent"):
    sys.exit("Illegal instruction")
print(json.dumps({"version": "1.0", "load_s": 0.5}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    n = asked["new_tokens"]
    arrivals = [[0.1 * (i + 1), s] for i in range(n) for s in range(len(asked["prompts"]))]
    print(json.dumps({"arrivals": arrivals}), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Make workers run a fake engine; returns a function that starts one."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE)
    monkeypatch.setattr(processes, "WORKER", script)

    def make(name="model"):
        cpus = sorted(os.sched_getaffinity(0))
        return Worker("onnx", tmp_path / name, python=sys.executable, cpus=cpus, log=tmp_path / "log")

    return make


def state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_worker_answers_in_its_turn_and_is_stopped_outside_it(fake):
    with fake() as worker:
        assert worker.loaded == {"version": "1.0", "load_s": 0.5}
        assert worker.generate([[1, 2], [3, 4]], 2) == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
        assert worker.generate([[5]], 1) == [(0.1, 0)]
        assert state_of(worker._process.pid) == "T"
        assert worker.peak_bytes > 0
    assert worker._process.poll() is not None


@pytest.mark.parametrize(("name", "said"), [("broken", "no such instruction"), ("silent", "Illegal instruction")])
def test_a_worker_that_does_not_load_says_why(fake, name, said):
    with pytest.raises(WorkerError, match=said):
        fake(name)


def test_workers_are_not_others(fake):
    with fake() as worker:
        assert 0 <= Others({"a": worker}).cores() < 1000


def test_processor_time_is_read_past_names_with_brackets():
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"7 (a (b) c) S 1 7 7 0 -1 0 0 0 0 0 {ticks} {2 * ticks} {ticks} 0 20 0 1 0"
    assert processor_time(stat) == 4.0


def test_time_that_the_host_stole_counts_as_busy():
    ticks = os.sysconf("SC_CLK_TCK")
    assert busy_time(f"cpu  {ticks} 0 {ticks} {99 * ticks} 50 0 0 {ticks} 0 0\ncpu0 1 2 3") == 3.0


def test_an_engine_is_found_in_the_environment_that_has_it(tmp_path):
    for name, module in (("one", "vllm"), ("two", "llama_cpp")):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
        (tmp_path / name / "lib" / "python3.11" / "site-packages" / module).mkdir(parents=True)
    assert find_python("llama.cpp", [tmp_path]) == tmp_path / "two" / "bin" / "python"
    assert find_python("vllm", [tmp_path / "two", tmp_path / "one"]) == tmp_path / "one" / "bin" / "python"
    assert str(find_python("halve", [])) == sys.executable
    with pytest.raises(WorkerError, match=r"no environment with the module onnxruntime_genai .* --peers-env"):
        find_python("onnx", [tmp_path])


def test_the_command_line_names_engines_and_models(tmp_path):
    (tmp_path / "q4.gguf").touch()
    args = engine_vs_peers.parse([str(tmp_path), "--vs", f"llama.cpp:{tmp_path / 'q4.gguf'}", "--decode", "8,1"])
    assert args.vs == [("llama.cpp", tmp_path / "q4.gguf")]
    assert (args.decode, args.rounds, len(args.cpus)) == ([1, 8], 5, args.threads)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vs", "gpt:x"], "'gpt:x' is not KIND:PATH with a kind of llama.cpp, onnx, openvino, vllm"),
        (["--vs", "onnx:/no/such"], "there is no /no/such"),
        (["--decode", "8"], "must name batch 1 and none above 32"),
        (["--decode", "1,64"], "must name batch 1 and none above 32"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--threads", "0"], "--threads 0 is not between 1 and"),
    ],
)
def test_a_command_line_that_cannot_be_run_is_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        engine_vs_peers.parse(["bundle", *words])
    assert said in " ".join(capsys.readouterr().err.split())


def test_bytes_of_a_model_are_those_of_its_weight_files(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"1")
    (tmp_path / "model.onnx.data").write_bytes(b"1234")
    (tmp_path / "tokenizer.json").write_bytes(b"12345678")
    assert engine_vs_peers.weight_bytes(tmp_path) == 5
    assert engine_vs_peers.weight_bytes(tmp_path / "model.onnx") == 1
    with pytest.raises(WorkerError, match="no weight files"):
        engine_vs_peers.weight_bytes(tmp_path / "tokenizer.json")


def test_the_recorded_command_names_files_and_not_where_they_lie():
    words = ["/home/me/benchmarks/engine_vs_peers.py", "/data/int4", "--vs", "onnx:/data/ort/dir", "--decode", "1,8"]
    assert engine_vs_peers.command(words) == "python engine_vs_peers.py int4 --vs onnx:dir --decode 1,8"


def measured(value):
    return {"value": value, "low": value, "high": value, "n": 5}


def test_the_table_tells_what_failed_and_what_was_mismeasured():
    record = {
        "hardware": "CPU, 2 cores",
        "threads": 2,
        "date": "2026-01-31",
        "ceilings": {"read_gb_s": measured(40.0)},
        "runs": [
            {"engine": "halve:a", "metric": "decode_b1_tok_s", "disturbed": True, "refused": [], **measured(20.0)}
            | {"bandwidth_fraction": measured(0.5), "int8_fraction": None},
            {"engine": "onnx:b", "metric": "decode_b1_tok_s", "disturbed": False, "refused": ["?"], "value": None},
        ],
        "ratios": [{"halve": "halve:a", "peer": "onnx:b", "metric": "decode_b1_tok_s", **measured(1.5)}],
        "engines": [
            {"engine": "halve:a", "version": "0.1", "failed": None, "work": {"weight_bytes": 10**9}, "load_s": 1.0}
            | {"peak_bytes_at_batch_1": 2 * 10**9, "peak_bytes": 3 * 10**9},
            {"engine": "vllm:c", "failed": "needs avx512f"},
        ],
    }
    lines = [" ".join(line.split()) for line in table(json.loads(json.dumps(record))).splitlines()]
    assert "halve:a decode_b1 20.0 [20.0, 20.0] 50% disturbed" in lines
    assert "onnx:b decode_b1 mismeasured" in lines
    assert "halve:a onnx:b decode_b1 1.50 [1.50, 1.50]" in lines
    assert "halve:a 0.1 1 GB 2 GB 3 GB 1.0 s" in lines
    assert "vllm:c not loaded: needs avx512f" in lines
