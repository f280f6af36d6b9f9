"""A live server over the embedded model, in a process of its own, as users start it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "src" / "halve" / "models" / "embedded" / "tiny-en"


@dataclass
class Live:
    """A running `halve serve`."""

    process: subprocess.Popen
    url: str
    db: str
    log: Path

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)


def halve(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "halve.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, **options)


def start(folder: Path, *arguments: str, db: str | None = None, model: Path = TINY) -> Live:
    """Start one and wait until it answers."""
    db = db or f"sqlite:///{folder}/server.db"
    log = folder / "log.txt"
    command = [sys.executable, "-m", "halve.cli", "serve", f"tiny={model}", "--port", "0", "--db", db, *arguments]
    with log.open("a") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    for _ in range(600):
        text = log.read_text()
        if " at http://" in text:
            url = text.rsplit(" at ", 1)[1].split("/v1")[0]
            try:
                httpx.get(url + "/health")
            except httpx.TransportError:
                pass
            else:
                return Live(process, url, db, log)
        if process.poll() is not None:
            raise AssertionError(text)
        time.sleep(0.05)
    process.kill()
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    """A server without keys, with a price."""
    server = start(tmp_path_factory.mktemp("live"), "--price-per-hour", "0.10", "--no-auth")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def metric(live: Live, name: str) -> float:
    """The sum of a metric over its labels."""
    text = httpx.get(live.url + "/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))
