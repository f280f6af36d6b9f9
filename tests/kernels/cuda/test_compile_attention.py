import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
ROOT = Path(__file__).resolve().parents[3]
SHARED_BYTES = 227 << 10  # that one instance may have on sm_90


@pytest.mark.parametrize("kernels", ["decode", "prefill", "write", "elementwise", "sampling"])
def test_kernels_compile_for_sm_90_and_keep_what_they_use_in_registers(kernels):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_attention.py")), kernels],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        kernel = json.loads(line)
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_BYTES, kernel
