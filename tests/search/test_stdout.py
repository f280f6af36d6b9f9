"""What C++ prints does not reach stdout."""

import subprocess
import sys

from tests.api.tiny import environment

PROGRAM = """
import ctypes
from halve.search.stdout import stdout_to_stderr
libc = ctypes.CDLL(None)
libc.printf(b"before ")
with stdout_to_stderr():
    libc.printf(b"noise")
libc.printf(b"after")
libc.fflush(None)
print(" python")
"""


def test_only_what_is_printed_outside_reaches_stdout():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment(), check=True)
    assert (ran.stdout, ran.stderr) == ("before after python\n", "noise")
