"""`halve bench` as a shell sees it."""

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from halve.kernels import native_library
from halve.models.embedded import embedded_model_path
from tests.api.tiny import command, environment

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")

QUICK = ("--rounds", "1", "--repeats", "0", "--disturbed-above", "1000", "--threads", "1")


def test_a_person_reads_figures_memory_and_where_the_limits_are(shell, tmp_path):
    model = embedded_model_path()
    ran = shell("bench", model, *QUICK, "--usd-per-hour", "0.2", "--batch", "1,8", "--plot", tmp_path / "b.svg")
    assert ran.code == 0, ran.err
    for words in ("decode, batch 8", "prompt of 256 tokens", "time to first token, p95", "peak memory", "$ / million"):
        assert words in ran.out
    assert "this machine beside the turns: memory, GB/s" in ran.out
    assert ran.out.splitlines()[-1].startswith("tiny-en makes ")
    assert (tmp_path / "b.svg").read_text().startswith("<svg")


def test_json_is_one_object_and_talk_goes_to_stderr(shell):
    ran = shell("bench", embedded_model_path(), *QUICK, "--parts", "decode", "--batch", "1", "--json")
    assert ran.code == 0, ran.err
    assert [run["metric"] for run in ran.json["runs"]] == ["decode_b1_tok_s", "peak_bytes_at_batch_1", "peak_bytes"]
    assert ran.json["runs"][0]["usd_per_mtok"] is None
    assert ran.out.count("\n") == 1


def test_a_peer_that_broke_is_told_last_and_exits_1(shell, tmp_path):
    ran = shell("bench", embedded_model_path(), *QUICK, "--parts", "prefill", "--vs", "openai:http://127.0.0.1:9/v1")
    assert ran.code == 1
    assert "prompt of 256 tokens" in ran.out
    last = ran.err.strip().splitlines()[-1]
    assert last.startswith("halve: openai:127.0.0.1:9/v1: RuntimeError: 127.0.0.1:9 can't be reached")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "rounds: 0 must be 1 or more"),
        (["--batch", "one"], "batch: 'one' is not a list of sizes"),
        (["--vs", "llama.cpp:/no/such.gguf"], "there is no /no/such.gguf"),
        (["--trace", "/no/such.csv"], "/no/such.csv"),
        (["--threads", "4096"], "threads: 4096 is not between 1 and the"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(shell, words, said):
    ran = shell("bench", embedded_model_path(), *words)
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith("halve: ")
    assert said in line
    assert ran.out == ""


def children(pid):
    """Processes that a process started, and those that these started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def heeds_interrupts():
    """As at a terminal: what a shell starts in the background ignores them, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the system does not tell when another's child ends")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind_however_it_ends(number):
    words = command("bench", embedded_model_path(), "--rounds", "100000", "--parts", "decode", "--batch", "1")
    with subprocess.Popen(
        words,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds_interrupts,  # noqa: PLW1509 - there are no threads yet that could hold a lock
    ) as ran:
        assert ran.stderr is not None
        assert any(line.startswith("round 1") for line in ran.stderr)
        workers = [os.pidfd_open(pid) for pid in children(ran.pid)]
        assert workers
        ran.send_signal(number)
        rest = ran.stderr.read()
    assert ran.returncode == (130 if number == signal.SIGINT else -number), rest
    for worker in workers:
        assert select.select([worker], [], [], 60)[0], "a worker lives on"
        os.close(worker)
