"""What this machine says of itself, and texts of machines that are not here."""

import os
import platform

import pytest

from halve.hardware import detect_cpu, free_memory_bytes
from halve.hardware.detect import (
    parse_cpu_quota,
    parse_cpuinfo,
    parse_meminfo,
    parse_sysctl,
    tiles_are_lent,
    usable_cores,
)

X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
flags\t\t: fpu vme sse2 fma f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni hypervisor
bugs\t\t: sysret_ss_attrs
vmx flags\t: vnmi amx_tile

processor\t: 1
model name\t: something else
flags\t\t: fpu
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes asimdhp asimddp sve i8mm bf16 svebf16
CPU implementer\t: 0x41
CPU part\t: 0xd40

processor\t: 1
"""


def test_an_x86_text_gives_the_first_processors_name_and_our_words_for_its_features():
    model, features = parse_cpuinfo(X86)
    assert model == "AMD EPYC 9R14"
    assert features == {
        *("fma", "f16c", "avx2", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni")
    }


def test_an_arm_text_without_a_name_gives_features_in_one_spelling():
    assert parse_cpuinfo(ARM) == (None, {"neon", "dotprod", "sve", "i8mm", "bf16"})


def test_a_board_that_names_itself_is_named():
    assert parse_cpuinfo(ARM + "\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n")[0] == "Raspberry Pi 5 Model B Rev 1.0"


def test_macos_gives_a_name_and_features_in_the_same_spelling():
    m2 = "machdep.cpu.brand_string: Apple M2\nhw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_DotProd: 1\n"
    m2 += "hw.optional.arm.FEAT_I8MM: 1\nhw.optional.arm.FEAT_BF16: 1\nhw.optional.arm.FEAT_SME: 0\n"
    assert parse_sysctl(m2) == ("Apple M2", {"neon", "dotprod", "i8mm", "bf16"})
    intel = "hw.optional.avx2_0: 1\nhw.optional.fma: 1\nhw.optional.f16c: 1\nhw.optional.avx512f: 0\n"
    assert parse_sysctl(intel) == (None, {"avx2", "fma", "f16c"})
    assert parse_sysctl("") == (None, set())


class Libc:
    """A C library whose `syscall` keeps what it was asked and answers with `result`."""

    def __init__(self, result):
        self.result, self.asked = result, []

    def syscall(self, *arguments):
        self.asked.append(arguments)
        return self.result


def test_tiles_of_amx_are_asked_for_where_the_processor_has_them():
    tiles = {"avx2", "amx_tile", "amx_int8", "amx_bf16"}
    lent, refused = Libc(0), Libc(-1)
    assert tiles_are_lent(tiles, lent)
    assert lent.asked == [(158, 0x1023, 18)]
    assert not tiles_are_lent(tiles, refused)
    assert not tiles_are_lent(tiles - {"amx_bf16"}, lent)
    assert len(lent.asked) == 1


@pytest.mark.parametrize("text", ["", "\n", "model name\t:\nflags\t:\nbugs : avx2\n"])
def test_a_text_that_says_nothing_gives_no_name_and_no_features(text):
    assert parse_cpuinfo(text) == (None, set())


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", None),
        ("100000 100000\n", 1),
        ("150000 100000\n", 2),
        ("200000 100000\n", 2),
        ("1000 100000", 1),
        ("50000 25000", 2),
        ("", None),
        ("100000", None),
        ("100000 0", None),
        ("-1 100000", None),
    ],
)
def test_a_cgroup_quota_is_rounded_up_to_whole_cores(text, cores):
    assert parse_cpu_quota(text) == cores


def test_available_memory_is_read_in_bytes():
    assert parse_meminfo("MemTotal:  16000000 kB\nMemFree: 1 kB\nMemAvailable:    9000000 kB\n") == 9_000_000 * 1024
    assert parse_meminfo("MemTotal:  16000000 kB\nMemFree: 1 kB\n") is None


def test_this_machine_describes_itself():
    device = detect_cpu()
    assert (device.name, device.kind, device.machine) == ("cpu", "cpu", platform.machine())
    assert device.model
    assert 1 <= device.num_cores <= os.cpu_count()
    assert device.memory_bytes > 2**28
    assert hash(device) == hash(detect_cpu())


def test_no_more_cores_are_counted_than_this_process_may_use():
    assert usable_cores() <= len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True


def test_free_memory_is_a_part_of_all_memory():
    free = free_memory_bytes()
    assert free is None or 0 < free <= detect_cpu().memory_bytes
