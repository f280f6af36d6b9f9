"""Read the processor's name, features and memory from the operating system; nothing here loads torch."""

import ctypes
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Linux's words for the features our kernels ask for, to one spelling on every system.
_LINUX_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512dq": "avx512dq",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_vbmi": "avx512_vbmi",
    "avx_vnni": "avx_vnni",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
# macOS's, below hw.optional.
_MAC_FEATURES = {
    "AdvSIMD": "neon",
    "arm.FEAT_DotProd": "dotprod",
    "arm.FEAT_I8MM": "i8mm",
    "arm.FEAT_BF16": "bf16",
    "avx2_0": "avx2",
    "fma": "fma",
    "f16c": "f16c",
}
_TILES = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # Linux on x86-64


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One place where a model can run."""

    name: str  # "cpu", "cuda:0"
    kind: str  # "cpu", "cuda", "mps", "xpu", "mtia"
    model: str  # "AMD EPYC", "NVIDIA H200"
    features: frozenset[str]
    num_cores: int  # that this process may use
    memory_bytes: int
    machine: str  # "x86_64", "aarch64"
    version: int = 1


def detect_cpu() -> Device:
    """Describe this machine's processor as this process may use it."""
    model, flags = _cpu_model_and_flags()
    return Device(
        name="cpu",
        kind="cpu",
        model=model,
        features=frozenset(flags),
        num_cores=usable_cores(),
        memory_bytes=_total_memory_bytes(),
        machine=platform.machine(),
    )


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut to the cgroup's CPU quota (rounded up)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    quota = parse_cpu_quota(quota_file.read_text()) if quota_file.exists() else None
    return cores if quota is None else min(cores, quota)


def parse_cpu_quota(text: str) -> int | None:
    """Cores of a cgroup's cpu.max (`150000 100000`: one and a half, so 2), None for `max` or words unknown."""
    quota, _, period = text.strip().partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return max(1, -(-int(quota) // int(period)))


def free_memory_bytes() -> int | None:
    """Memory that can be taken without swapping, None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return parse_meminfo(text)


def parse_meminfo(text: str) -> int | None:
    """Bytes of MemAvailable in the text of /proc/meminfo, None on kernels that do not say it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model_and_flags() -> tuple[str, set[str]]:
    if platform.system() == "Darwin":
        return _mac_model_and_flags()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    model, flags = parse_cpuinfo(text)
    return model or platform.machine(), flags if tiles_are_lent(flags) else flags - _TILES


def tiles_are_lent(flags: set[str], libc: Any = None) -> bool:
    """Ask Linux for the tile registers of AMX, where the processor has them: it lends them to processes that asked.

    A system that is older than 5.16, or does not let this process have them, runs it without.
    """
    if not flags >= _TILES:
        return False
    libc = libc or ctypes.CDLL(None)
    return bool(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def parse_cpuinfo(text: str) -> tuple[str | None, set[str]]:
    """The first processor's name, if it has one, and the features that kernels ask for, of /proc/cpuinfo (x86, ARM)."""
    model = re.search(r"^(?:model name|Model)[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)
    words = re.search(r"^(?:flags|Features)[ \t]*:[ \t]*(.+)$", text, re.MULTILINE)
    flags = {_LINUX_FEATURES[w] for w in (words[1].split() if words else []) if w in _LINUX_FEATURES}
    return (model[1].strip() if model else None), flags


def _mac_model_and_flags() -> tuple[str, set[str]]:
    result = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, check=False)
    model, flags = parse_sysctl(result.stdout)
    return model or platform.machine(), flags


def parse_sysctl(text: str) -> tuple[str | None, set[str]]:
    """The processor's name, if it has one, and the features that kernels ask for, of `sysctl -a` on macOS."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    flags = {flag for key, flag in _MAC_FEATURES.items() if values.get(f"hw.optional.{key}") == "1"}
    return values.get("machdep.cpu.brand_string"), flags
