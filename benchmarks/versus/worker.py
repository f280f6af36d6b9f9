"""The process of one engine: loads a model, then answers a JSON line with a JSON line until its input ends.

    python worker.py KIND PATH CPU,CPU,...
    <- {"version": ..., "load_s": ...}                                      once it has loaded
    -> {"prompts": [[ids]], "new_tokens": N}   <- {"arrivals": [[seconds, sequence], ...]}
    <- {"error": "..."}                                                     and it ends

What libraries print goes to standard error; the answers have a file of their own.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main() -> None:
    """Serve one engine."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped, it would outlive a benchmark that was killed
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, path, cpus = sys.argv[1], sys.argv[2], [int(cpu) for cpu in sys.argv[3].split(",")]
    os.sched_setaffinity(0, cpus)
    sys.path.insert(0, str(Path(__file__).parent))
    from engines import ENGINES

    def answer(record: dict[str, object]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    try:
        started = time.perf_counter()
        engine = ENGINES[kind](path, len(cpus))
        answer({"version": engine.version, "load_s": time.perf_counter() - started})
        for line in sys.stdin:
            answer({"arrivals": engine.generate(**json.loads(line))})
    except BaseException as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
