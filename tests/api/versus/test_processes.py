"""Workers as processes, what others use meanwhile, and where engines are; the engines are fakes that answer at once."""

import os
import sys
from pathlib import Path

import pytest

from halve.api.versus import processes
from halve.api.versus.engines import Request, Settings
from halve.api.versus.processes import Found, Others, Worker, WorkerError, busy_time, find_engine, processor_time

FAKE = """
import json, sys
if sys.argv[2].endswith("broken"):
    print(json.dumps({"error": "RuntimeError: no such instruction"}), flush=True)
    sys.exit(1)
if sys.argv[2].endswith("silent"):
    sys.exit("Illegal instruction")
print(json.dumps({"version": "1.0", "load_s": 0.5}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)["requests"]
    if asked[0]["prompt"] == [13]:
        sys.exit("out of memory")
    arrivals = [[0.1 * (i + 1), s] for i in range(asked[0]["new_tokens"]) for s in range(len(asked))]
    print(json.dumps({"arrivals": arrivals}), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Make workers run a fake engine; returns a function that starts one."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE)
    monkeypatch.setattr(processes, "WORKER", script)

    def make(name="model", kind="onnx"):
        settings = Settings(cpus=(0,), context=256, sequences=2, cache_gb=1, serving=False)
        return Worker(kind, str(tmp_path / name), settings, python=Path(sys.executable), log=tmp_path / "log")

    return make


def state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_worker_answers_in_its_turn_and_is_stopped_outside_it(fake):
    with fake() as worker:
        assert worker.loaded == {"version": "1.0", "load_s": 0.5}
        assert worker.serve([Request([1, 2], 2), Request([3, 4], 2)]) == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
        assert worker.serve([Request([5], 1)]) == [(0.1, 0)]
        assert state_of(worker._process.pid) == "T"
        assert worker.peak_bytes > 0
    assert worker._process.poll() is not None


def test_memory_of_an_engine_that_runs_elsewhere_is_not_known(fake):
    with fake(kind="openai") as worker:
        assert worker.peak_bytes is None


@pytest.mark.parametrize(("name", "said"), [("broken", "no such instruction"), ("silent", "Illegal instruction")])
def test_a_worker_that_does_not_load_says_why(fake, name, said):
    with pytest.raises(WorkerError, match=said):
        fake(name)


def test_a_worker_that_breaks_says_its_last_words(fake):
    with fake() as worker:
        with pytest.raises(WorkerError, match="out of memory"):
            worker.serve([Request([13], 1)])
        with pytest.raises(WorkerError, match="out of memory"):
            worker.serve([Request([5], 1)])


def test_a_worker_that_does_not_answer_in_time_is_given_up(fake, monkeypatch):
    with fake() as worker:
        monkeypatch.setattr(processes, "LONGEST_ANSWER_S", 0.0)
        monkeypatch.setattr(worker, "_signal", lambda number: None)  # it stays stopped
        with pytest.raises(WorkerError, match="no answer within 0 s"):
            worker.serve([Request([5], 1)])
        monkeypatch.undo()


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


def environment(path, *modules, programs=()):
    (path / "bin").mkdir(parents=True)
    for name in ("python", *programs):
        (path / "bin" / name).touch(mode=0o755)
    for module in modules:
        (path / "lib" / "python3.11" / "site-packages" / module).mkdir(parents=True)
    return path


@pytest.fixture
def nothing_on_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))


def test_an_engine_is_found_in_the_environment_that_has_it(tmp_path, nothing_on_path):
    one, two = environment(tmp_path / "one", "vllm"), environment(tmp_path / "two", "onnxruntime_genai")
    assert find_engine("onnx", [tmp_path], serving=False) == Found(two / "bin" / "python")
    assert find_engine("vllm", [two, one], serving=True) == Found(one / "bin" / "python")
    assert find_engine("halve", [], serving=False) == Found(Path(sys.executable))
    assert find_engine("openai", [], serving=False) == Found(Path(sys.executable), takes_text=True)
    with pytest.raises(WorkerError, match=r"openvino: no environment with the module openvino_genai .* --peers-env"):
        find_engine("openvino", [tmp_path], serving=False)


def test_llama_cpp_takes_batches_by_its_package_and_requests_by_its_server(tmp_path, nothing_on_path):
    there = environment(tmp_path / "env", "llama_cpp", programs=["llama-server"])
    assert find_engine("llama.cpp", [there], serving=False) == Found(there / "bin" / "python")
    server = (str(there / "bin" / "llama-server"),)
    assert find_engine("llama.cpp", [there], serving=True) == Found(Path(sys.executable), server)


def test_a_server_on_path_takes_both_where_the_package_is_not_there(tmp_path, monkeypatch):
    there = environment(tmp_path / "bare", programs=["llama-server"])
    monkeypatch.setenv("PATH", str(there / "bin"))
    for serving in (False, True):
        found = find_engine("llama.cpp", [], serving=serving)
        assert found.command == (str(there / "bin" / "llama-server"),)


def test_the_server_of_the_package_is_taken_where_there_is_no_other(tmp_path, nothing_on_path):
    there = environment(tmp_path / "env", "llama_cpp", "uvicorn")
    found = find_engine("llama.cpp", [there], serving=True)
    assert found.command == (str(there / "bin" / "python"), "-m", "llama_cpp.server")
    assert found.takes_text


def test_a_package_without_any_server_is_refused_for_requests_only(tmp_path, nothing_on_path):
    there = environment(tmp_path / "env", "llama_cpp")
    find_engine("llama.cpp", [there], serving=False)
    with pytest.raises(WorkerError, match=r"llama.cpp: no environment with llama-server on PATH"):
        find_engine("llama.cpp", [there], serving=True)
