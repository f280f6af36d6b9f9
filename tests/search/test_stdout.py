"""What C++ prints does not reach stdout."""

import subprocess
import sys

import pytest

from tests.api.tiny import environment

PROGRAM = """
import ctypes
import logging
import sys
from halve.search.stdout import stdout_to_log
logging.basicConfig(level=sys.argv[1], format="%(message)s")
libc = ctypes.CDLL(None)
libc.printf(b"before ")
with stdout_to_log():
    libc.printf(b"noise")
libc.printf(b"after")
libc.fflush(None)
print(" python")
"""


@pytest.mark.parametrize(("level", "said"), [("DEBUG", "printed by a library: noise\n"), ("INFO", "")])
def test_only_what_is_printed_outside_reaches_stdout_and_the_rest_the_log(level, said):
    argv = [sys.executable, "-c", PROGRAM, level]
    ran = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=True)
    assert (ran.stdout, ran.stderr) == ("before after python\n", said)
