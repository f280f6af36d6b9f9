"""Workers as processes that compute only in their turn, and what other processes of the machine use meanwhile."""

import dataclasses
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import halve
from halve.api.versus.engines import MODULES, Arrivals, Request, Settings

WORKER = Path(__file__).with_name("worker.py")
LONGEST_ANSWER_S = 1800.0


class WorkerError(RuntimeError):
    """A worker that does not load or answer, with what it said."""


class Worker:
    """One engine's process, and those that it starts: stopped (SIGSTOP) whenever it is not asked, so that its threads
    cannot spin beside others.

    Raises WorkerError when it does not load.
    """

    def __init__(self, kind: str, path: str, settings: Settings, *, python: Path, log: Path) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "PYTHONUNBUFFERED": "1"}
        if kind == "halve":  # this very Halve, installed or not
            environment["PYTHONPATH"] = str(Path(halve.__file__).parents[1])
        else:
            environment.pop("PYTHONPATH", None)
        self.runs_elsewhere = kind == "openai"
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, WORKER, kind, path, json.dumps(dataclasses.asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        try:
            self.loaded = self._answer()
            self._stop()
        except BaseException:
            self.close()
            raise

    def serve(self, requests: Sequence[Request]) -> Arrivals:
        """What `Engine.serve` returns. Raises WorkerError when it fails."""
        self._signal(signal.SIGCONT)
        asked = {"requests": [dataclasses.asdict(request) for request in requests]}
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, which the missing answer tells with its last words
        answer = self._answer()
        self._stop()
        return [(when, number) for when, number in answer["arrivals"]]

    @property
    def peak_bytes(self) -> int | None:
        """Peak resident memory so far, mapped pages of weight files included; None for an engine that is elsewhere."""
        if self.runs_elsewhere:
            return None
        found = 0
        for stat in self._members():
            with suppress(OSError, StopIteration):
                lines = stat.with_name("status").read_text().splitlines()
                found += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        return found

    @property
    def cpu_s(self) -> float:
        """Processor time of its processes, and of the children that these waited for."""
        found = 0.0
        for stat in self._members():
            with suppress(OSError):
                found += processor_time(stat.read_text())
        return found

    def _members(self) -> list[Path]:
        """/proc/PID/stat of the processes of its group."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if stat.read_text().rpartition(")")[2].split()[2] == str(self._process.pid):
                    found.append(stat)
        return found

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(LONGEST_ANSWER_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            words = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise WorkerError(" / ".join(words) if ready else f"no answer within {LONGEST_ANSWER_S:.0f} s")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it, and whatever it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def processor_time(stat: str) -> float:
    """Seconds of user, system and waited-for children's time in the text of /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def busy_time(stat: str) -> float:
    """Seconds that processors were not idle, those stolen by the host included, in the text of /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Others:
    """Cores that processes other than these workers and this one use, from when it was made."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self._workers = workers
        self._before = self._now()

    def _now(self) -> tuple[float, float]:
        ours = sum(worker.cpu_s for worker in self._workers.values()) + time.process_time()
        return busy_time(Path("/proc/stat").read_text()) - ours, time.monotonic()

    def cores(self) -> float:
        """So far."""
        busy, now = self._now()
        return max(0.0, (busy - self._before[0]) / max(now - self._before[1], 1e-3))


@dataclasses.dataclass(frozen=True)
class Found:
    """How an engine is started: the Python that runs its worker, and the command of its server, if that is how.

    takes_text: whether it may take no token ids.
    """

    python: Path
    command: tuple[str, ...] = ()
    takes_text: bool = False


def find_engine(kind: str, environments: Sequence[Path], *, serving: bool) -> Found:
    """Where an engine is: the first of these environments that has it, else this Python's own.

    An environment is a virtual environment, or a folder of some. llama.cpp serves requests by `llama-server`, of an
    environment or on PATH, else by the server of its Python package; without that package `llama-server` takes batches
    too. Raises WorkerError naming where was looked.
    """
    if kind in ("halve", "openai"):
        return Found(Path(sys.executable), takes_text=kind == "openai")
    every = [e for env in environments for e in ([env] if (env / "bin" / "python").exists() else sorted(env.glob("*")))]
    with_module = (e for e in [*every, Path(sys.prefix)] if has_module(e, MODULES[kind]))
    environment = next(with_module, None)
    python = environment and environment / "bin" / "python"
    if kind == "llama.cpp" and (serving or python is None):
        places = [str(place) for e in every for place in (e / "bin", e)]
        if server := shutil.which("llama-server", path=os.pathsep.join([*places, os.environ.get("PATH", "")])):
            return Found(Path(sys.executable), (server,))
        if environment is not None and has_module(environment, "uvicorn"):
            return Found(Path(sys.executable), (str(python), "-m", "llama_cpp.server"), takes_text=True)
    if python is None or (kind == "llama.cpp" and serving):
        needed = "llama-server on PATH" if kind == "llama.cpp" else f"the module {MODULES[kind]}"
        raise WorkerError(
            f"{kind}: no environment with {needed} among {[str(e) for e in [*environments, Path(sys.prefix)]]}; "
            "name one with --peers-env"
        )
    return Found(python)


def has_module(environment: Path, module: str) -> bool:
    """Whether a virtual environment has a module installed."""
    return any(environment.glob(f"lib/python*/site-packages/{module}"))
