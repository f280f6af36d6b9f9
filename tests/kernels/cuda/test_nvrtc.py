import ctypes
import importlib.util
import threading

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from halve.core.errors import KernelError
from halve.formats import FORMATS
from halve.kernels.cuda import disk, gemv, nvrtc
from halve.kernels.cuda.packing import CudaMatrix

OPTIONS = ("-DTALL=1",)


class Library:
    """NVRTC that compiles anything to the options it got."""

    def __init__(self, log=b""):
        self.compiled, self.log, self.version = [], log, (13, 0)

    def __getattr__(self, name):
        return lambda *words: 0

    def nvrtcVersion(self, major, minor):  # noqa: N802
        major._obj.value, minor._obj.value = self.version
        return 0

    def nvrtcGetNumSupportedArchs(self, count):  # noqa: N802
        count._obj.value = 2
        return 0

    def nvrtcGetSupportedArchs(self, found):  # noqa: N802
        found[0], found[1] = 80, 90
        return 0

    def nvrtcCompileProgram(self, program, count, options):  # noqa: N802
        self.compiled.append(b" ".join(options[i] for i in range(count)))
        return 6 if self.log else 0

    def nvrtcGetProgramLogSize(self, program, size):  # noqa: N802
        size._obj.value = len(self.log) + 1
        return 0

    def nvrtcGetProgramLog(self, program, text):  # noqa: N802
        text.value = self.log
        return 0

    def nvrtcGetCUBINSize(self, program, size):  # noqa: N802
        size._obj.value = len(self.compiled[-1])
        return 0

    def nvrtcGetCUBIN(self, program, binary):  # noqa: N802
        binary.raw = self.compiled[-1]
        return 0


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A compiler, and a folder of the test's own for what it makes."""
    found = Library()
    monkeypatch.setenv("HALVE_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "find", lambda: nvrtc._opened(found))
    nvrtc._compiled.forget()
    yield found
    nvrtc._compiled.forget()


def compiled(source=b"source", options=OPTIONS, reached=90):
    return nvrtc.compiled(source, "some.cu", options, reached)


def kept(tmp_path):
    return sorted((tmp_path / "cuda" / "compiled").iterdir())


def test_a_source_is_compiled_once_and_found_on_disk_by_the_next_process(library, tmp_path):
    binary = compiled()
    assert binary == b"--gpu-architecture=sm_90 --std=c++17 -DTALL=1"
    assert compiled() == binary
    nvrtc._compiled.forget()
    assert compiled() == binary
    assert len(library.compiled) == 1
    assert [p.name.rsplit("-", 1)[0] for p in kept(tmp_path)] == ["some-sm_90-nvrtc13.0"]


def test_whatever_changes_the_code_changes_its_file(library, tmp_path):
    compiled()
    compiled(source=b"other")
    compiled(options=("-DTALL=2",))
    compiled(reached=89)
    library.version = (13, 1)
    nvrtc._compiled.forget()
    compiled()
    assert len(library.compiled) == len(kept(tmp_path)) == 5
    assert library.compiled[3].startswith(b"--gpu-architecture=sm_80 ")


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_file_that_is_not_whole_is_compiled_anew(library, tmp_path, damage, caplog):
    binary = compiled()
    (path,) = kept(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage is None else damage)
    nvrtc._compiled.forget()
    assert compiled() == binary
    assert len(library.compiled) == 2
    assert "compiled anew" in caplog.text
    assert kept(tmp_path) == [path]
    assert path.read_bytes() == content


def test_nothing_is_kept_where_the_cache_is_off(library, monkeypatch, tmp_path):
    monkeypatch.setenv("HALVE_CACHE", "off")
    assert disk.folder() is None
    assert compiled()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_said(library, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALVE_CACHE", str(tmp_path / "file"))
    assert compiled()
    assert "can't be kept" in caplog.text


def test_a_source_that_does_not_compile_is_told_with_the_compilers_words(library):
    library.log = b"some.cu(3): error: no such thing"
    with pytest.raises(KernelError, match="no such thing"):
        compiled()


def test_a_device_that_the_compiler_does_not_know_is_named(library):
    with pytest.raises(KernelError, match=r"some\.cu can't be compiled: NVRTC 13\.0 compiles for \[80, 90\], not for"):
        compiled(reached=120)


def test_a_library_that_does_not_answer_is_passed_over(library, monkeypatch):
    for name in ("nvrtcVersion", "nvrtcGetNumSupportedArchs", "nvrtcGetSupportedArchs"):
        with monkeypatch.context() as patch:
            patch.setattr(Library, name, lambda *words: 1)
            with pytest.raises(OSError, match=f"{name} failed"):
                nvrtc._opened(library)


def test_an_error_of_the_compilers_interface_is_named(library, monkeypatch):
    monkeypatch.setattr(Library, "nvrtcGetCUBINSize", lambda *words: 2)
    with pytest.raises(KernelError, match="nvrtcGetCUBINSize failed with code 2"):
        compiled()


def test_packages_come_before_the_loader_and_a_toolkit(monkeypatch, tmp_path):
    folder = tmp_path / "nvidia" / "cuda_nvrtc" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvrtc.so.12").touch()
    monkeypatch.setattr(nvrtc.sys, "path", [str(tmp_path)])
    monkeypatch.setattr(nvrtc.site, "getsitepackages", list)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_HOME", "/toolkit")
    assert nvrtc._paths() == [str(folder / "libnvrtc.so.12"), "libnvrtc.so.12", "/toolkit/lib64/libnvrtc.so.12"]


def test_threads_that_ask_for_the_same_wait_for_the_one_that_makes_it():
    asked, going, made = threading.Event(), threading.Event(), []

    def make(key):
        asked.set()
        going.wait(10)
        made.append(key)
        return key * 2

    once, results = nvrtc.Once(make), []
    threads = [threading.Thread(target=lambda: results.append(once(3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    asked.wait(10)
    going.set()
    for thread in threads:
        thread.join()
    assert results == [6] * 4
    assert made == [3]


def test_what_could_not_be_made_is_tried_again():
    answers = iter([ValueError("first"), 5])

    def make():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    once = nvrtc.Once(make)
    with pytest.raises(ValueError, match="first"):
        once()
    assert once() == 5


@pytest.mark.skipif(isinstance(nvrtc.find(), str), reason="no NVRTC on this machine")
@pytest.mark.parametrize("norm", [False, True])
def test_the_real_compiler_makes_code_of_the_few_tokens_kernel(norm, monkeypatch):
    monkeypatch.setenv("HALVE_CACHE", "off")
    matrix = CudaMatrix(
        format=FORMATS["int4-g128"],
        shape=(256, 1024),
        activations="bf16",
        codes=torch.zeros((256, 256), dtype=torch.int16),
        scale=torch.ones((8, 256), dtype=torch.bfloat16),
        group_size=128,
    )
    fixed = gemv.macros(matrix, 1, gemv.OF_PLANES[0], wide=False, add=False, norm=norm)
    assert gemv._binary(tuple(fixed.items()), (9, 0)).startswith(b"\x7fELF")
    assert isinstance(nvrtc.find().library, ctypes.CDLL)
