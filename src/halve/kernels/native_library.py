"""Where the C++ library lies, and its interface: one table of signatures, one version number."""

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from halve.core.errors import KernelError

ABI_VERSION = 9
LIBRARY = "libhalve_kernels.so"

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_SIGNATURES: Mapping[str, list[Any]] = {
    "abi_version": [],
    "isas": [],
    "grow_team": [_I32],
    "pin_team": [_P, _I64],
    "plan_packing": [_P, _P],
    "pack": [_P, _P, _P, _I32],
    "ceiling": [_I32, _P, _I64, _I32],
    "prepare": [_I32, _P, _I64, _I32],
    "product": [_I32, _P, _I32],
    "grouped": [_I32, _P, _I64, _I32],
    "embed": [_I32, _P, _P, _P, _I64, _I32],
    "rms_norm": [_I32, _P, _P, _P, _I64, _I64, _F32, _I32],
    "rope": [_I32, _P, _P, _P, _P, _I64, _I64, _I64, _I32],
    "add": [_I32, _P, _P, _P, _I64, _I32],
    "silu_mul": [_I32, _P, _P, _P, _I64, _I32],
    "round_bf16": [_I32, _P, _P, _I64, _I32],
    "kv_block_bytes": [_P],
    "kv_write": [_I32, _P, _I32],
    "copy_blocks": [_I32, _P, _P, _I64, _I32],
    "attention_scratch": [_P],
    "attention": [_I32, _P, _I32],
    "sampling_kib": [_I64],
    "sample": [_I32, _P, _I32],
    "run": [_I32, _P, _I64, _P, _I32],
}
_SIZES = ("plan_packing", "kv_block_bytes", "attention_scratch")  # what returns a number of bytes, int64


def available() -> str | None:
    """Why `NativeOps` cannot be made here, or None when it can."""
    try:
        library()
    except KernelError as error:
        return str(error)
    return None


def library_paths() -> list[Path]:
    """Where the library may lie: beside this file, or where the installer put it (an editable install)."""
    paths = [Path(__file__).with_name(LIBRARY)]
    with suppress(metadata.PackageNotFoundError):  # a source tree that was never installed has the first place only
        paths.append(Path(str(metadata.distribution("halve").locate_file(f"halve/kernels/{LIBRARY}"))))
    return paths


@cache
def library() -> Any:
    """The library, loaded once. Raises KernelError where it was not built or is not ours."""
    paths = library_paths()
    path = next((p for p in paths if p.exists()), None)
    if path is None:
        raise KernelError(
            f"halve was built without its C++ part: {LIBRARY} is not at {' or '.join(map(str, paths))}; "
            "reinstall halve with a C++20 compiler at hand (apt-get install g++), or use the torch kernels"
        )
    return open_library(path)


def open_library(path: Path) -> Any:
    """Load the C++ library. Raises KernelError when it cannot be loaded or speaks another version of the interface."""
    way_out = "reinstall halve, so that its Python and C++ parts come from one build"
    try:
        library = ctypes.CDLL(str(path))
        version = library.halve_abi_version()
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} is not a library of halve's kernels: {error}; {way_out}") from error
    if version != ABI_VERSION:
        raise KernelError(f"{path} has interface version {version}, this halve needs {ABI_VERSION}; {way_out}")
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, f"halve_{name}")
        function.argtypes, function.restype = arguments, _I64 if name in _SIZES else _I32
    return library
