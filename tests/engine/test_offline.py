"""A file of prompts in, a file of answers out."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from halve.core.errors import DataError, EngineError, OutputError
from halve.engine import OfflineRun, SamplingParams, run_file

from .toy import StubRunner, ToyRunner, alone


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(count):
    return [{"id": f"p{i}", "prompt": [i % 50, i // 50]} for i in range(count)]


SHORT = SamplingParams(max_tokens=3)


def test_every_line_gets_its_answer(engine, tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(70)), tmp_path / "out.jsonl"
    seen = []
    one = engine(max_num_seqs=4)
    told = run_file(one, source, out, SHORT, progress=lambda done, total: seen.append((done, total)))
    assert told == OfflineRun(num_lines=70, num_resumed=0, num_completed=70, num_errors=0)
    assert seen == [(i + 1, 70) for i in range(70)]
    records = {record["id"]: record for record in read(out)}
    for i, line in enumerate(prompts(70)):
        record = records[line["id"]]
        assert (record["line"], record["error"]) == (i + 1, None)
        [answer] = record["completions"]
        assert tuple(answer["token_ids"]) == alone(line["prompt"], 3)
        assert (answer["finish_reason"], answer["prompt_tokens"]) == ("length", 2)


def test_a_line_may_differ_from_the_rest(engine, tmp_path, tokenizer):
    lines = [
        {"id": "a", "prompt": [1], "sampling": {"max_tokens": 5, "n": 2, "logit_bias": {"7": 100}}, "priority": -3},
        "",
        {"id": "b", "prompt": "abc", "sampling": {"stop": ["zz"], "logprobs": 1}},
    ]
    out = tmp_path / "out.jsonl"
    run_file(engine(ToyRunner(tokenizer.vocab_size), tokenizer), write(tmp_path / "in.jsonl", lines), out, SHORT)
    a, b = sorted(read(out), key=lambda record: record["id"])
    assert [(c["index"], c["token_ids"]) for c in a["completions"]] == [(0, [7] * 5), (1, [7] * 5)]
    assert b["line"] == 3
    assert len(b["completions"][0]["logprobs"]) == 3


@pytest.mark.parametrize(
    ("line", "name", "error"),
    [
        ("nonsense", None, "not JSON"),
        ("[1]", None, "line: not a JSON object in UTF-8"),
        ({"prompt": [1]}, None, "id: None must be a string, not empty"),
        ({"id": 3, "prompt": [1]}, None, "id: 3 must be"),
        ({"id": "x"}, "x", "prompt: None must be text or a list of token ids"),
        ({"id": "x", "prompt": []}, "x", "prompt: it is empty"),
        ({"id": "x", "prompt": [1, "a"]}, "x", "prompt_token_ids: (1, 'a') must be"),
        ({"id": "x", "prompt": [99]}, "x", "the vocabulary ends at 49"),
        ({"id": "x", "prompt": [1], "promt": 1}, "x", "unknown keys ['promt']"),
        ({"id": "x", "prompt": [1], "sampling": 3}, "x", "sampling: 3 must be an object"),
        ({"id": "x", "prompt": [1], "sampling": {"heat": 1}}, "x", "sampling: unknown keys ['heat']"),
        ({"id": "x", "prompt": [1], "sampling": {"top_p": 2}}, "x", "top_p: 2 must be above 0"),
        ({"id": "x", "prompt": [1], "priority": "high"}, "x", "priority: 'high' must be"),
        ('{"id": "x", "id": "y", "prompt": [1]}', "y", "duplicate keys"),
    ],
)
def test_a_bad_line_becomes_a_record_of_its_error_and_stops_nothing(engine, tmp_path, line, name, error):
    source = write(tmp_path / "in.jsonl", [{"id": "first", "prompt": [1]}, line, {"id": "last", "prompt": [2]}])
    out, one = tmp_path / "out.jsonl", engine()
    assert run_file(one, source, out, SHORT).num_errors == 1
    [bad] = [record for record in read(out) if record["error"]]
    assert (bad["id"], bad["line"], bad["completions"]) == (name, 2, [])
    assert error in bad["error"]
    assert len(read(out)) == 3
    assert run_file(one, source, out, SHORT) == OfflineRun(num_lines=3, num_resumed=3, num_completed=0, num_errors=0)


def test_a_line_that_is_no_text_becomes_an_error(engine, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"id": "\xff", "prompt": [1]}\n{"id": "b", "prompt": [1]}')  # and no newline at the end
    assert run_file(engine(), source, out, SHORT).num_errors == 1
    assert {record["id"] for record in read(out)} == {None, "b"}


def test_an_id_that_occurs_twice_is_refused_before_anything_runs(engine, tmp_path):
    source = write(tmp_path / "in.jsonl", [*prompts(5), {"id": "p3", "prompt": [1]}])
    with pytest.raises(DataError, match="an id must occur once, there are 'p3' in line 4, 'p3' in line 6; rename"):
        run_file(engine(), source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_torn_line_is_cut_off_and_answered_again(engine, tmp_path, caplog):
    source, out = write(tmp_path / "in.jsonl", prompts(20)), tmp_path / "out.jsonl"
    run_file(engine(), source, out, SHORT)
    whole = out.read_bytes()
    out.write_bytes(whole[:-7])
    told = run_file(engine(), source, out, SHORT)
    assert (told.num_resumed, told.num_completed) == (19, 1)
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert "line 20 is torn, its answer is made again" in caplog.text


def test_an_output_that_is_not_ours_is_left_alone(engine, tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    out.write_text("my notes\n")
    with pytest.raises(OutputError, match="line 1 is no record of a run; choose another file"):
        run_file(engine(), source, out)
    assert out.read_text() == "my notes\n"
    write(out, [{"id": "stranger", "line": 1, "completions": [], "error": None}])
    with pytest.raises(OutputError, match="1 records of the output belong to no line of the source"):
        run_file(engine(), source, out)
    with pytest.raises(OutputError, match="can't be written"):
        run_file(engine(), source, tmp_path / "no" / "out.jsonl")
    with pytest.raises(DataError, match="can't be read"):
        run_file(engine(), tmp_path / "no.jsonl", out)


def test_two_runs_do_not_write_one_file(engine, tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    with out.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing it just now"):
            run_file(engine(), source, out)


def test_an_error_of_the_engine_ends_the_run_and_the_next_takes_it_up(engine, tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(30)), tmp_path / "out.jsonl"
    one = engine(max_num_seqs=2)
    runner = one._worker.core.runner
    run, steps = runner.run, []

    def fails_once(*arguments):
        steps.append(1)
        if len(steps) == 20:
            raise OSError("the device is gone")
        return run(*arguments)

    runner.run = fails_once
    with pytest.raises(EngineError, match="the device is gone"):
        run_file(one, source, out, SHORT)
    before = len(read(out))
    assert 0 < before < 30
    told = run_file(one, source, out, SHORT)
    assert (told.num_resumed, told.num_completed) == (before, 30 - before)
    assert {record["id"] for record in read(out)} == {line["id"] for line in prompts(30)}


KILLED = """
import sys, time
from halve.engine import Engine, SamplingParams, run_file
from tests.engine.toy import StubRunner

class Slow(StubRunner):
    def run(self, *arguments):
        time.sleep(0.002)
        return super().run(*arguments)

run_file(Engine(Slow()), sys.argv[1], sys.argv[2], SamplingParams(max_tokens=4))
"""


def test_a_run_that_is_killed_goes_on_where_it_was(engine, tmp_path):
    lines = [{"id": f"p{i}", "prompt": [i % 999, i // 999]} for i in range(3000)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(out)])
    while not (out.exists() and out.stat().st_size > 20_000):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = out.read_bytes().count(b"\n")
    assert 0 < before < 3000
    told = run_file(engine(StubRunner()), source, out, SamplingParams(max_tokens=4))
    assert (told.num_resumed, told.num_completed) == (before, 3000 - before)
    assert [r["id"] for r in sorted(read(out), key=lambda r: r["line"])] == [line["id"] for line in lines]


MEASURED = """
import re, sys
from halve.engine import Engine, EngineConfig, SamplingParams, run_file
from tests.engine.toy import StubRunner

engine = Engine(StubRunner(num_blocks=256), None, EngineConfig(max_num_seqs=64))
print(run_file(engine, sys.argv[1], sys.argv[2], SamplingParams(max_tokens=2)).num_completed)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def memory_of(folder, count):
    """Peak bytes of a process that runs so many lines."""
    source = write(folder / f"{count}.jsonl", ({"id": f"p{i}", "prompt": [i % 999] * 4} for i in range(count)))
    command = [sys.executable, "-c", MEASURED, str(source), str(folder / f"{count}.out")]
    completed, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(completed) == count
    return int(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_thousand_lines_take_little_more_memory_than_a_thousand(tmp_path):
    """8 bytes a line, some copies of them while they are sorted and compared, and what the allocator keeps."""
    assert memory_of(tmp_path, 100_000) - memory_of(tmp_path, 1000) < 12_000_000
