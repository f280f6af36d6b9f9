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
SHARED_BYTES = 227 << 10  # that one program may have on sm_90


@pytest.mark.parametrize(
    "arguments",
    [("few", "int4-g32", "int4-g128"), ("few", "int8", "fp8", "bf16"), ("many", "int4-g128", "int8", "fp8"),
     ("grouped", "int4-g128", "fp8", "bf16"), ("few", "int3-g64", "int5-g32", "int6-g64"),
     ("persistent", "int8", "fp8", "bf16"), ("other",)],
    ids="-".join,
)  # fmt: skip
def test_kernels_compile_for_sm_90_and_keep_what_they_use_in_registers(arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_products.py")), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert kernels, result.stderr
    for kernel in kernels:
        assert "error" not in kernel, kernel
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_BYTES, kernel
