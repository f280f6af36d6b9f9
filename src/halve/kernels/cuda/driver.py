"""Machine code loaded into a device's context and launched through CUDA's driver, by ctypes."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from halve.core.errors import KernelError

MAX_SHARED, CARVEOUT = 8, 9  # CUfunction_attribute
PROGRAMMATIC = 6  # CUlaunchAttributeID: programmatic stream serialization


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: which one, and 64 bytes of value."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@contextmanager
def context(device: int) -> Iterator[None]:
    """Make a device's primary context, which torch uses, this thread's; a thread of its own may have none yet."""
    library = driver()
    check("cuCtxPushCurrent", library.cuCtxPushCurrent_v2(_primary(device)))
    try:
        yield
    finally:
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def load(binary: bytes, name: str, shared: int) -> ctypes.c_void_p:
    """A kernel of a module, in the current context, that may have so many bytes of shared memory."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    library = driver()
    check("cuModuleLoadData", library.cuModuleLoadData(ctypes.byref(module), binary))
    check("cuModuleGetFunction", library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    check("cuFuncSetAttribute", library.cuFuncSetAttribute(function, MAX_SHARED, shared))
    check("cuFuncSetAttribute", library.cuFuncSetAttribute(function, CARVEOUT, 100))
    return function


def launch(
    function: ctypes.c_void_p,
    programs: int,
    threads: int,
    shared: int,
    stream: int,
    values: Sequence[Any],
    *,
    ahead: bool,
) -> None:
    """Launch in the current context. values: the kernel's parameters as ctypes objects.

    ahead: it may begin before the kernel before it ends (programmatic dependent launch), and waits by itself.
    """
    parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    attribute = Attribute(id=PROGRAMMATIC)
    attribute.value[0] = 1
    config = LaunchConfig(
        grid=(programs, 1, 1),
        block=(threads, 1, 1),
        shared=shared,
        stream=stream,
        attributes=ctypes.pointer(attribute),
        num_attributes=int(ahead),
    )
    check("cuLaunchKernelEx", driver().cuLaunchKernelEx(ctypes.byref(config), function, parameters, None))


def check(what: str, code: int) -> None:
    """Raise KernelError for an error of the driver."""
    if code:
        raise KernelError(f"{what} failed with code {code} (CUresult)")


@cache
def driver() -> Any:
    """CUDA's driver, which torch has started already."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def _primary(device: int) -> ctypes.c_void_p:
    """The context that torch and everything else share on a device."""
    handle, found = ctypes.c_int(), ctypes.c_void_p()
    check("cuDeviceGet", driver().cuDeviceGet(ctypes.byref(handle), device))
    check("cuDevicePrimaryCtxRetain", driver().cuDevicePrimaryCtxRetain(ctypes.byref(found), handle))
    return found
