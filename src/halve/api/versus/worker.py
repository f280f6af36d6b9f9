"""The process of one engine: loads a model, then answers a JSON line with a JSON line until its input ends.

    python worker.py KIND PATH SETTINGS                                          SETTINGS: of `engines.Settings`, JSON
    <- {"version": ..., "load_s": ..., "shape": {...}, "format": ..., "how": ...}   once it has loaded
    -> {"requests": [{"prompt": [ids], "new_tokens": N, "at": s}]}
    <- {"arrivals": [[seconds, request], ...]}
    <- {"error": "..."}                                                          and it ends

What libraries print goes to standard error; the answers have a file of their own.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

PR_SET_PDEATHSIG = 1  # of Linux's prctl
PACKAGE = "halve_versus"  # this directory, where there is no Halve to import it from


def load_beside(name: str) -> ModuleType:
    """Import a module of this directory, without putting its names in the way of a peer's."""
    here = Path(__file__).parent
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, here / "__init__.py", submodule_search_locations=[str(here)]
        )
        assert spec is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")


def main() -> None:
    """Serve one engine."""
    if sys.platform == "linux":  # stopped, it would outlive a benchmark that was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    kind, path = sys.argv[1:3]
    engines, servers = load_beside("engines"), load_beside("servers")
    settings = engines.Settings(**json.loads(sys.argv[3]))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings.cpus)

    def answer(record: dict[str, object]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    try:
        started = time.perf_counter()
        makers = servers.SERVERS if settings.command or kind == "openai" else engines.ENGINES
        engine = makers[kind](path, settings)
        told = {name: getattr(engine, name) for name in ("version", "shape", "format", "how")}
        answer({**told, "load_s": time.perf_counter() - started})
        for line in sys.stdin:
            requests = [engines.Request(**one) for one in json.loads(line)["requests"]]
            answer({"arrivals": engine.serve(requests)})
    except BaseException as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
