"""What a C++ library prints goes to the log at its finest level: stdout is for a verb's data, a terminal for people.

HiGHS prints a line of its own at times (`HighsMipSolverData::...`), whatever its options say; in the middle of `--json`
it would break what others read, and in a terminal it says nothing to anyone.
"""

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

log = logging.getLogger("halve.search")


@contextlib.contextmanager
def stdout_to_log() -> Iterator[None]:
    """Until the end, file descriptor 1 is a file that is then logged; of the whole process, so for short calls only."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no stdout, so nothing to keep clean
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)  # what C has buffered so far is data
    with tempfile.TemporaryFile() as printed:
        try:
            os.dup2(printed.fileno(), 1)
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            printed.seek(0)
            for line in printed.read().decode(errors="replace").splitlines():
                log.debug("printed by a library: %s", line)
