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
JUMP = re.compile(r"^(?:j\w+ |b(?:\.\w+)? |cbn?z \w+, |tbn?z \w+, #\d+, )([0-9a-f]+)\b")  # of x86, of ARM
ON_VECTORS = re.compile(r"^v|\bv\d+\.\d*[bhsd]\b")  # of x86, of ARM
VECTOR_ON_STACK = re.compile(r"^v\w+ (?=.*%[xyz]mm)(?=.*\(%r[sb]p\b)")
PINNED = "GCC: (Debian 12"


@dataclass(frozen=True)
class Instruction:
    """One line of objdump."""

    address: int
    text: str


def functions(disassembly: str) -> list[tuple[str, list[Instruction]]]:
    """Demangled names and instructions; each instruction set has functions of the same names."""
    found: list[tuple[str, list[Instruction]]] = []
    for line in disassembly.splitlines():
        if named := FUNCTION.match(line):
            found.append((named[1], []))
        elif instruction := INSTRUCTION.match(line):
            text = re.sub(r"\s+", " ", instruction[2]).strip()
            found[-1][1].append(Instruction(int(instruction[1], 16), text))
    return found


def successors(body: list[Instruction]) -> dict[int, list[int]]:
    """Where each instruction of a function may go on, by address."""
    inside = {i.address for i in body}
    following: dict[int, list[int]] = {}
    for instruction, after in zip(body, [*body[1:], None], strict=True):
        jump = JUMP.match(instruction.text)
        targets = [int(jump[1], 16)] if jump else []
        if after is not None and not instruction.text.startswith(("jmp ", "ret", "b ")):
            targets.append(after.address)
        following[instruction.address] = [t for t in targets if t in inside]
    return following


def reached(edges: dict[int, list[int]], start: int, avoided: int | None = None) -> set[int]:
    """What lies on the ways on from `start` that do not cross `avoided`."""
    found, ahead = {start}, [start]
    while ahead:
        for to in edges[ahead.pop()]:
            if to not in found and to != avoided:
                found.add(to)
                ahead.append(to)
    return found


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """Natural loops that work on vectors and hold no other such loop.

    A jump back makes a loop where every way to it leads over its target.

    Source: Aho, Lam, Sethi, Ullman, Compilers, section 9.6.
    """
    onward = successors(body)
    backward: dict[int, list[int]] = {i.address: [] for i in body}
    for start, targets in onward.items():
        for target in targets:
            backward[target].append(start)
    loops: dict[int, set[int]] = {}
    for start, targets in onward.items():
        for head in targets:
            entry = body[0].address
            if head <= start and (head == entry or start not in reached(onward, entry, head)):
                loops.setdefault(head, {head}).update({head} if start == head else reached(backward, start, head))
    on_vectors = {i.address for i in body if ON_VECTORS.search(i.text)}
    loops = {head: loop for head, loop in loops.items() if loop & on_vectors}
    inner = [loop for head, loop in loops.items() if not any(other in loop for other in loops if other != head)]
    return [[i for i in body if i.address in loop] for loop in sorted(inner, key=min)]


def spills(body: list[Instruction]) -> list[str]:
    """Moves of vectors to and from the stack in the innermost loops that work on vectors."""
    return [f"{i.address:x}: {i.text}" for loop in innermost_loops(body) for i in loop if VECTOR_ON_STACK.match(i.text)]


def disassemble(path: Path) -> str:
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# A loop within a loop, the inner one guarded by a jump whose target lies between them and before it.
SNIPPET = """\
0000000000001000 <void halve::hot_tile<4, false>(float*)>:
    1000:	push   %rbp
    1001:	vmovups %zmm1,-0x50(%rbp)
    1008:	test   %rcx,%rcx
    100b:	je     1040 <void halve::hot_tile<4, false>(float*)+0x8>
    1010:	vmovdqu32 (%rsi),%zmm2
    1018:	{inside}
    1020:	vpdpbusd (%rdi,%rax,4){{1to16}},%zmm2,%zmm0
    1028:	jne    1010 <void halve::hot_tile<4, false>(float*)+0x8>
    1030:	vmovups -0x50(%rbp),%zmm1
    1038:	jne    1008 <void halve::hot_tile<4, false>(float*)+0x8>
    103a:	ret
    1040:	test   %rdx,%rdx
    1044:	jmp    1030 <void halve::hot_tile<4, false>(float*)+0x8>

0000000000001050 <halve::cold(float*)>:
    1050:	vmovaps %ymm1,0x40(%rsp)
    1058:	jne    1050 <halve::cold(float*)>
"""


@pytest.mark.parametrize(
    "inside",
    ["vmovups %zmm0,0x40(%rsp)", "vmovdqa -0x70(%rbp),%ymm3", "vpaddd 0x40(%rsp),%zmm1,%zmm0", "vmovaps %xmm5,(%rsp)"],
)
def test_a_vector_on_the_stack_in_an_innermost_loop_is_found(inside):
    (name, body), _ = functions(SNIPPET.format(inside=inside))
    assert HOT.search(name)
    assert spills(body) == [f"1018: {inside}"]


@pytest.mark.parametrize(
    "inside", ["vpaddd %zmm1,%zmm0,%zmm0", "mov 0x40(%rsp),%rax", "vmovups %zmm0,(%rdx)", "vpbroadcastd (%rbx),%zmm4"]
)
def test_what_is_outside_of_the_innermost_loop_or_no_vector_is_no_spill(inside):
    (name, body), _ = functions(SNIPPET.format(inside=inside))
    assert HOT.search(name)
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
    hot = [(name, body) for name, body in functions(disassemble(path)) if HOT.search(name)]
    if not hot:
        pytest.skip("the library was stripped of its symbols")
    found = [f"{name}\n    " + "\n    ".join(lines) for name, body in hot if (lines := spills(body))]
    assert not found, "\n".join(found)
