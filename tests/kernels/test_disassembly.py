"""The innermost loops of the products keep their sums in registers: no vector goes to the stack and back in them.

A sum that is spilled in a hot loop costs more than what the loop does, and nothing else shows it: results stay right.
Looked at is what the compiler of the releases makes, gcc 12; other compilers allocate registers in other ways.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from halve.kernels import native_library

HOT = re.compile(r"\bhot_\w+")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S.*)$")
JUMP = re.compile(r"^j\w+\s+([0-9a-f]+)\b")
VECTOR_ON_STACK = re.compile(r"^v\w+ (?=.*%[xyz]mm)(?=.*\(%r[sb]p\b)")
PINNED = "GCC: (Debian 12"


@dataclass(frozen=True)
class Instruction:
    """One line of objdump."""

    address: int
    text: str


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """Instructions of each function, by its demangled name."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in disassembly.splitlines():
        if named := FUNCTION.match(line):
            body = found.setdefault(named[1], [])
        elif instruction := INSTRUCTION.match(line):
            body.append(Instruction(int(instruction[1], 16), re.sub(r"\s+", " ", instruction[2]).strip()))
    return found


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """What lies between the target of a jump back and the jump, where no smaller such stretch lies inside."""
    first = body[0].address if body else 0
    spans = set()
    for instruction in body:
        jump = JUMP.match(instruction.text)
        if jump and first <= int(jump[1], 16) <= instruction.address:
            spans.add((int(jump[1], 16), instruction.address))
    inner = [s for s in spans if not any(s != other and s[0] <= other[0] and other[1] <= s[1] for other in spans)]
    return [[i for i in body if start <= i.address <= end] for start, end in sorted(inner)]


def spills(body: list[Instruction]) -> list[str]:
    """Moves of vectors to and from the stack in the innermost loops that work on vectors."""
    return [f"{i.address:x}: {i.text}" for loop in innermost_loops(body) for i in loop if VECTOR_ON_STACK.match(i.text)]


def disassemble(path: Path) -> str:
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


SNIPPET = """\
0000000000001000 <void halve::hot_tile<4, false>(float*)>:
    1000:	push   %rbp
    1001:	vmovups %zmm1,-0x50(%rbp)
    1008:	vpxor  %xmm0,%xmm0,%xmm0
    1010:	vmovdqu32 (%rsi),%zmm2
    1018:	{inside}
    1020:	vpdpbusd (%rdi,%rax,4){{1to16}},%zmm2,%zmm0
    1028:	jne    1010 <void halve::hot_tile<4, false>(float*)+0x10>
    1030:	vmovups -0x50(%rbp),%zmm1
    1038:	jmp    1008 <void halve::hot_tile<4, false>(float*)+0x8>
    1040:	ret

0000000000001050 <halve::cold(float*)>:
    1050:	vmovaps %ymm1,0x40(%rsp)
    1058:	jne    1050 <halve::cold(float*)>
"""


@pytest.mark.parametrize(
    "inside",
    ["vmovups %zmm0,0x40(%rsp)", "vmovdqa -0x70(%rbp),%ymm3", "vpaddd 0x40(%rsp),%zmm1,%zmm0", "vmovaps %xmm5,(%rsp)"],
)
def test_a_vector_on_the_stack_in_an_innermost_loop_is_found(inside):
    body = functions(SNIPPET.format(inside=inside))["void halve::hot_tile<4, false>(float*)"]
    assert spills(body) == [f"1018: {inside}"]


@pytest.mark.parametrize(
    "inside", ["vpaddd %zmm1,%zmm0,%zmm0", "mov 0x40(%rsp),%rax", "vmovups %zmm0,(%rdx)", "vpbroadcastd (%rbx),%zmm4"]
)
def test_what_is_outside_of_the_innermost_loop_or_no_vector_is_no_spill(inside):
    body = functions(SNIPPET.format(inside=inside))["void halve::hot_tile<4, false>(float*)"]
    assert [i.address for i in innermost_loops(body)[0]] == [0x1010, 0x1018, 0x1020, 0x1028]
    assert spills(body) == []


def library_or_skip() -> Path:
    if native_library.available() is not None:
        pytest.skip("halve's C++ part was not built")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed (apt-get install binutils)")
    return next(path for path in native_library.library_paths() if path.exists())


def test_hot_loops_keep_their_sums_in_registers():
    path = library_or_skip()
    comment = subprocess.run(
        ["readelf", "-p", ".comment", str(path)], capture_output=True, text=True, check=True
    ).stdout
    if PINNED not in comment:
        pytest.skip(
            f"looked at with gcc 12 only; this library comes from {comment.split(']')[-1].strip() or 'another'}"
        )
    hot = {name: body for name, body in functions(disassemble(path)).items() if HOT.search(name)}
    if not hot:
        pytest.skip("the library was stripped of its symbols")
    found = {name: lines for name, body in hot.items() if (lines := spills(body))}
    assert not found, "\n".join(f"{name}\n    " + "\n    ".join(lines) for name, lines in found.items())
