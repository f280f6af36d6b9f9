"""The rows as clang compiles them for macOS, without its headers: nothing of them was ever run there."""

import re
import shutil
import subprocess

import pytest

from tests.kernels.test_selftest import ROOT

TARGETS = {
    "arm64-apple-macos11": ("baseline", "neon_dotprod", "neon_i8mm"),
    "x86_64-apple-macos11": ("baseline", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"),
}
# All that rows.cpp takes from headers other than the compiler's.
STRING_H = """\
#include <stddef.h>
extern "C" void *memcpy(void*, const void*, size_t), *memset(void*, int, size_t);
"""


def flags_of_instruction_sets() -> dict[str, list[str]]:
    """What CMakeLists.txt gives the compiler for each instruction set."""
    found: dict[str, list[str]] = {"baseline": ["-DHALVE_BASELINE"]}
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for name, words in re.findall(r"^(?:set\(|list\(APPEND )flags_(\w+) (.+)\)$", text, re.MULTILINE):
        flags = found.setdefault(name, [])
        for word in words.split():
            other = re.fullmatch(r"\$\{flags_(\w+)\}", word)
            flags += found[other[1]] if other else [word]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_clang_takes_the_rows_and_their_flags_for_macos(target, tmp_path):
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed (apt-get install clang)")
    (tmp_path / "string.h").write_text(STRING_H)
    (tmp_path / "cstdint").write_text("#include <stdint.h>\n")
    flags = flags_of_instruction_sets()
    for isa in TARGETS[target]:
        command = [
            "clang++",
            "-target",
            target,
            "-std=c++20",
            "-ffreestanding",
            "-nostdinc++",
            "-isystem",
            str(tmp_path),
        ]
        command += ["-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=fast", f"-DHALVE_ISA={isa}", *flags[isa]]
        command += ["-c", str(ROOT / "src/halve/kernels/csrc/rows.cpp"), "-o", str(tmp_path / "rows.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{isa}: {done.stderr}"


def test_flags_of_an_instruction_set_include_those_of_the_ones_it_builds_on():
    flags = flags_of_instruction_sets()
    assert {"-mavx2", "-mavxvnni"} <= set(flags["avxvnni"])
    assert {"-mavx2", "-mavx512vnni", "-mavx512bf16", "-mamx-int8"} <= set(flags["amx"])
    assert flags["neon_i8mm"] == ["-march=armv8.2-a+dotprod+i8mm+bf16"]
