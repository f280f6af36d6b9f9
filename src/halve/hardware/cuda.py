"""NVIDIA GPUs, asked of the driver by ctypes, so that looking takes milliseconds and loads no torch."""

import ctypes
from collections.abc import Callable
from typing import Any

from halve.hardware.detect import Device

DRIVERS = ("libcuda.so.1", "nvcuda.dll")
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76  # CUdevice_attribute of cuda.h
LEVELS = (70, 75, 80, 86, 89, 90, 100, 103, 110, 120, 121)  # compute capabilities, each with all that is below it


def cuda_features(major: int, minor: int) -> frozenset[str]:
    """`sm_80`, `sm_89`, ...: every level up to a compute capability."""
    own = 10 * major + minor
    return frozenset(f"sm_{level}" for level in (*LEVELS, own) if level <= own)


def detect_cuda(load: Callable[[str], Any] = ctypes.CDLL) -> tuple[list[Device], str | None]:
    """The GPUs that the driver shows to this process, and why there is none, where there is none."""
    driver = None
    for name in DRIVERS:
        try:
            driver = load(name)
            break
        except OSError:
            continue
    if driver is None:
        return [], "no NVIDIA driver is installed"
    if code := driver.cuInit(0):
        return [], f"the NVIDIA driver shows no GPU (cuInit says {code})"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return [], "the NVIDIA driver shows no GPU"
    return [_device(driver, index) for index in range(count.value)], None


def _device(driver: Any, index: int) -> Device:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
        return value.value

    return Device(
        name=f"cuda:{index}",
        kind="cuda",
        model=name.value.decode(errors="replace"),
        features=cuda_features(attribute(MAJOR), attribute(MINOR)),
        num_cores=attribute(MULTIPROCESSORS),
        memory_bytes=memory.value,
        machine="cuda",
    )
