"""Workers as processes that compute only in their turn, and what other processes of the machine use meanwhile."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benchmarks.versus.engines import MODULES

WORKER = Path(__file__).with_name("worker.py")
LONGEST_ANSWER_S = 1800.0


class WorkerError(RuntimeError):
    """A worker that does not load or answer, with what it said."""


class Worker:
    """One engine's process: stopped (SIGSTOP) whenever it is not asked, so that its threads cannot spin beside others.

    Raises WorkerError when it does not load.
    """

    def __init__(self, kind: str, path: Path, *, python: Path, cpus: Sequence[int], log: Path) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": str(len(cpus)), "PYTHONUNBUFFERED": "1"}
        if kind == "halve":  # this very Halve, installed or not
            import halve

            environment["PYTHONPATH"] = str(Path(halve.__file__).parents[1])
        else:
            environment.pop("PYTHONPATH", None)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, WORKER, kind, path, ",".join(map(str, cpus))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise
        self._stop()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[float, int]]:
        """What `Engine.generate` returns. Raises WorkerError when it fails."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._stop()
        return [(when, sequence) for when, sequence in answer["arrivals"]]

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory so far, mapped pages of weight files included."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:"))

    @property
    def cpu_s(self) -> float:
        """Processor time of it and of the children that it waited for."""
        return processor_time(Path(f"/proc/{self._process.pid}/stat").read_text())

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
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
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


def find_python(kind: str, environments: Sequence[Path]) -> Path:
    """The Python of the first of these environments that has the engine; this Python for Halve.

    An environment is a virtual environment, or a folder of some. Raises WorkerError naming where was looked.
    """
    if kind == "halve":
        return Path(sys.executable)
    every = [e for env in environments for e in ([env] if (env / "bin" / "python").exists() else sorted(env.glob("*")))]
    for environment in every:
        if any(environment.glob(f"lib/python*/site-packages/{MODULES[kind]}")):
            return environment / "bin" / "python"
    raise WorkerError(
        f"no environment with the module {MODULES[kind]} among {[str(e) for e in environments]}; "
        "name one with --peers-env"
    )
