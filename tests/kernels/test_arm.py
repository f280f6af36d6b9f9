"""The rows of 64-bit ARM: cross-compiled, run in qemu-user with and without what they need, and looked at.

`scripts/aarch64-linux-gnu.cmake` says how they are compiled. What qemu runs is right or wrong, not fast or slow.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.test_disassembly import functions, innermost_loops
from tests.kernels.test_selftest import ROOT, failures

COMPILER, QEMU, OBJDUMP = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "aarch64-linux-gnu-objdump"
ISAS = ("baseline", "neon_dotprod", "neon_i8mm")
RUN_BY = {  # a processor of qemu's, and the instruction sets that it has
    "cortex-a72": ISAS[:1],
    "neoverse-n1": ISAS[:2],
    "max": ISAS,
}
LACKS = 77


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """The self-test and the library, built for ARM."""
    if missing := [program for program in (COMPILER, "cmake") if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed (apt-get install g++-aarch64-linux-gnu cmake)")
    folder = tmp_path_factory.mktemp("arm")
    toolchain = ROOT / "scripts" / "aarch64-linux-gnu.cmake"
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), "--toolchain", str(toolchain), "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(folder), "--target", "halve_kernels", "halve_selftest", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processor", RUN_BY)
def test_rows_agree_with_the_baseline_on_an_emulated_arm_processor(build, processor):
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed (apt-get install qemu-user-static)")
    program = build / "tests" / "kernels" / "selftest" / "halve_selftest"
    for isa in ISAS:
        for side in ([], ["--before"]):
            command = [QEMU, "-cpu", processor, str(program), *side, isa]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == (0 if isa in RUN_BY[processor] else LACKS), f"{isa}: {failures(done)}"


def loops_of(build: Path, isa: str, function: str) -> dict[str, list[list[str]]]:
    """The innermost loops of a function template in one instruction set's rows, by what it was made for."""
    objects = sorted((build / "CMakeFiles" / f"rows_{isa}.dir").rglob("*.o"))
    command = [OBJDUMP, "--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text", str(objects[0])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: [[i.text for i in loop] for loop in innermost_loops(body)]
        for name, body in functions(text)
        if f"::{function}<" in name
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "function", "instruction"),
    [
        ("neon_dotprod", "hot_tile", "sdot"),
        ("neon_i8mm", "hot_tile", "smmla"),
        ("neon_i8mm", "hot_bf16", "bfdot"),
    ],
)
def test_hot_loops_of_arm_use_its_dot_products_and_keep_their_sums_in_registers(build, isa, function, instruction):
    loops = loops_of(build, isa, function)
    assert loops
    for name, found in loops.items():
        products = [text for loop in found for text in loop if text.startswith(f"{instruction} ")]
        assert products, name
        on_stack = [text for loop in found for text in loop if text.startswith(("ldr q", "str q")) and "[sp" in text]
        assert 10 * len(on_stack) < len(products), (name, on_stack)  # gcc 12 moves one operand of the largest tiles
