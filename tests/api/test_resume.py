"""Runs that are killed, resumed, or meet each other. A run here is a process of its own."""

import json
import signal
import subprocess
import sys

import pytest

import halve
from halve.api import judging
from halve.core.errors import OutputError
from tests.api.tiny import environment
from tests.tools import not_of_time

# The run stops at the moment that its state says what we wait for, so that nothing here depends on timing.
RUN = """
import sys
import halve
from halve.api import judging
from halve.api.workspace import Workspace

judging.TUNED_SHARE = float("inf")
model, out, text, awaited = sys.argv[1:5]
real = Workspace.save_state

def save_state(self):
    real(self)
    if awaited in self.state:
        print("reached", flush=True)
        sys.stdin.readline()  # until we are killed, or told to go on

Workspace.save_state = save_state
halve.optimize(model, out, max_quality_loss="5%", calibration=text)
"""


def start(model, out, text, awaited):
    """Start a run and wait until it has reached a stage."""
    argv = [sys.executable, "-c", RUN, *map(str, (model, out, text, awaited))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment())
    line = process.stdout.readline()
    assert line == "reached\n", process.communicate()[1]
    return process


def end(process, how):
    process.send_signal(how)
    process.communicate(timeout=60)


@pytest.fixture(scope="module", autouse=True)
def _untuned():
    """Sums of gradients depend on where memory lies, so that of tuned scales a last bit may differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "TUNED_SHARE", float("inf"))  # no plan is expected to pass when it is tuned
        yield


@pytest.fixture(scope="module")
def unbroken(tiny, text, tmp_path_factory):
    return halve.optimize(
        tiny, tmp_path_factory.mktemp("unbroken") / "out", max_quality_loss="5%", calibration=text
    ).certificate


@pytest.mark.parametrize("stage", ["made", "judged", "opened"])
def test_a_killed_run_leaves_no_output_and_resume_gives_the_certificate_of_an_unbroken_one(
    tiny, text, tmp_path, unbroken, stage
):
    out = tmp_path / "out"
    end(start(tiny, out, text, stage), signal.SIGKILL)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    assert stage in json.loads((tmp_path / ".out.partial/state.json").read_text())
    if stage == "judged":
        with pytest.raises(OutputError, match="unfinished run with other formats, limit; repeat that run's options"):
            halve.optimize(tiny, out, format="int8", calibration=text, resume=True)
    resumed = halve.optimize(tiny, out, max_quality_loss="5%", calibration=text, resume=True).certificate
    for part in ("verdict", "quality", "size", "cost", "attempts", "weights_sha256", "sealed"):
        assert getattr(resumed, part) == getattr(unbroken, part)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not_of_time(halve.verify(out, against=tiny).differences) == []


def test_of_two_runs_at_once_the_second_is_refused_and_the_first_finishes(tiny, text, tmp_path):
    first = start(tiny, tmp_path / "out", text, "made")
    for resume in (False, True):
        with pytest.raises(OutputError, match="another run is writing it just now; wait for it or choose another out"):
            halve.optimize(tiny, tmp_path / "out", max_quality_loss="5%", calibration=text, resume=resume)
    _, errors = first.communicate("go on\n" * 100, timeout=120)
    assert first.returncode == 0, errors
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_damaged_on_disk_is_done_again_and_that_alone(tiny, text, tmp_path, unbroken, caplog):
    end(start(tiny, tmp_path / "out", text, "judged"), signal.SIGKILL)
    work = tmp_path / ".out.partial"
    (weights,) = work.glob("model-*/*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    state = json.loads((work / "state.json").read_text())
    fmt, _, method = state["made"]["name"].removeprefix("model-").rpartition("-")
    state["judged"][f"{fmt} ({method})"] = {"format": 3}
    (work / "state.json").write_text(json.dumps(state))
    resumed = halve.optimize(tiny, tmp_path / "out", max_quality_loss="5%", calibration=text, resume=True).certificate
    assert "can't be used and is made again" in caplog.text
    assert "can't be read and is judged again" in caplog.text
    assert resumed.quality == unbroken.quality
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
