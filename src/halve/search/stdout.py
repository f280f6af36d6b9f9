"""What a C++ library prints goes to stderr: stdout belongs to a verb's data.

HiGHS prints a line of its own at times (`HighsMipSolverData::...`), whatever its options say; in the middle of `--json`
it would break what others read.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Until the end, file descriptor 1 is stderr's; of the whole process, so for short calls only."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no stdout, so nothing to keep clean
        yield
        return
    flush = ctypes.CDLL(None).fflush
    flush(None)  # what C has buffered so far is data
    try:
        os.dup2(2, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
