"""CUDA C++ compiled on this machine by NVRTC, the compiler library that comes with torch's CUDA builds.

It is loaded by ctypes when something asks for it. What it made is kept in memory and on disk (`disk.folder()`, under
`compiled`), under the hash of all that it was made from; a file that is not whole is compiled again.
"""

import ctypes
import hashlib
import logging
import os
import site
import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from halve.core.errors import KernelError
from halve.kernels.cuda import disk

log = logging.getLogger("halve.kernels")

DIGEST_BYTES = 32  # of SHA-256, before the code in a file
Made = TypeVar("Made")


class Once(Generic[Made]):
    """Values made once for each key; a thread that asks while another makes one waits for it."""

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: dict[Hashable, Future[Made]] = {}

    def __call__(self, *key: Any) -> Made:
        """The value. Raises what making it raised; the next to ask tries again."""
        with self._lock:
            known = self._made.get(key)
            future: Future[Made] = Future() if known is None else known
            self._made[key] = future
        if known is None:
            try:
                future.set_result(self._make(*key))
            except BaseException as error:
                with self._lock:
                    del self._made[key]
                future.set_exception(error)
        return future.result()

    def forget(self) -> None:
        """Make everything anew."""
        with self._lock:
            self._made.clear()


@dataclass(frozen=True)
class Compiler:
    """NVRTC. version: major and minor. architectures: what it compiles for, 90 for sm_90."""

    library: Any
    version: tuple[int, int]
    architectures: tuple[int, ...]

    def architecture(self, reached: int) -> int | None:
        """The newest that a device which reaches sm_`reached` runs, or None."""
        return max((a for a in self.architectures if a // 10 == reached // 10 and a <= reached), default=None)


def refusal(reached: int) -> str | None:
    """Why nothing is compiled here for a device that reaches sm_`reached`, or None."""
    compiler = find()
    if isinstance(compiler, str):
        return compiler
    if compiler.architecture(reached) is None:
        major, minor = compiler.version
        return f"NVRTC {major}.{minor} compiles for {list(compiler.architectures)}, not for sm_{reached}"
    return None


@cache
def find() -> Compiler | str:
    """NVRTC of the CUDA that torch was built for, or where it was looked for in vain."""
    tried = []
    for path in _paths():
        try:
            for beside in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if os.path.isabs(path) else []:
                ctypes.CDLL(str(beside))  # which NVRTC asks for by its name alone
            return _opened(ctypes.CDLL(path))
        except (OSError, AttributeError) as error:
            tried.append(f"{path} ({error})")
    folders = ", ".join(str(f / "*" / "lib") for f in _folders())
    return f"no NVRTC in {folders}, nor {'; '.join(tried)}: install torch's CUDA build, or set CUDA_HOME"


def compiled(source: bytes, name: str, options: tuple[str, ...], reached: int) -> bytes:
    """The machine code of a source for a device that reaches sm_`reached`. Safe in threads.

    Raises KernelError where NVRTC is missing or refuses the source.
    """
    return _compiled(source, name, options, reached)


def _compile_or_read(source: bytes, name: str, options: tuple[str, ...], reached: int) -> bytes:
    if reason := refusal(reached):
        raise KernelError(f"{name} can't be compiled: {reason}")
    compiler = find()
    assert isinstance(compiler, Compiler)
    architecture = compiler.architecture(reached)
    options = (f"--gpu-architecture=sm_{architecture}", "--std=c++17", *options)
    made_from = repr((source, options, compiler.version)).encode()
    home = disk.folder()
    stem = f"{Path(name).stem}-sm_{architecture}-nvrtc{compiler.version[0]}.{compiler.version[1]}"
    path = home and home / "compiled" / f"{stem}-{hashlib.sha256(made_from).hexdigest()[:32]}.cubin"
    if path is not None and (kept := _read(path)) is not None:
        return kept
    binary = _compile(compiler.library, source, name, options)
    if path is not None:
        try:
            disk.write(path, hashlib.sha256(binary).digest() + binary)
        except OSError as error:
            log.warning("compiled kernels can't be kept in %s: %s", path, error.strerror)
    return binary


_compiled = Once(_compile_or_read)


def _read(path: Path) -> bytes | None:
    """The machine code that a file holds; None where there is none, or it is not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, binary = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if binary and hashlib.sha256(binary).digest() == digest:
        return binary
    log.warning("%s: not a whole compiled kernel; it is compiled anew", path)
    return None


def _compile(nvrtc: Any, source: bytes, name: str, options: tuple[str, ...]) -> bytes:
    program = ctypes.c_void_p()
    _check("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None))
    try:
        words = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), words):
            size = ctypes.c_size_t()
            _check("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            text = ctypes.create_string_buffer(size.value)
            _check("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, text))
            raise KernelError(f"NVRTC does not compile {name} with {options}: {text.value.decode()}")
        size = ctypes.c_size_t()
        _check("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        _check("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


def _opened(library: Any) -> Compiler:
    """What a loaded library is. Raises OSError for one that does not answer."""
    major, minor, count = (ctypes.c_int() for _ in range(3))
    if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        raise OSError("nvrtcVersion failed")
    if library.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
        raise OSError("nvrtcGetNumSupportedArchs failed")
    architectures = (ctypes.c_int * count.value)()
    if library.nvrtcGetSupportedArchs(architectures):
        raise OSError("nvrtcGetSupportedArchs failed")
    return Compiler(library, (major.value, minor.value), tuple(architectures))


def _check(what: str, code: int) -> None:
    if code:
        raise KernelError(f"{what} failed with code {code}")


def _folders() -> list[Path]:
    """Where packages of CUDA's libraries lie."""
    return list(dict.fromkeys(Path(p) / "nvidia" for p in (*sys.path, *site.getsitepackages()) if p))


def _paths() -> list[str]:
    """Where NVRTC may be: in packages, where the loader looks, in a toolkit."""
    name = f"libnvrtc.so.{(torch.version.cuda or '13').split('.')[0]}"
    found = [str(path) for folder in _folders() for path in sorted(folder.glob(f"*/lib/{name}"))]
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return [*found, name, str(toolkit / "lib64" / name)]
