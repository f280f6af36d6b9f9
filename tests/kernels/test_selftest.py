"""The rows without Python (tests/kernels/selftest): natively, and in an emulator for what is lacking here."""

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halve.hardware import detect_cpu
from halve.kernels import native_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "emulate_cpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("emulate_cpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build(script, tmp_path_factory):
    if shutil.which("cmake") is None and not Path(sys.executable).with_name("cmake").exists():
        pytest.skip("CMake is not installed")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("the self-test is built statically for Linux on x86-64")
    return tmp_path_factory.mktemp("selftest")


def test_the_initramfs_is_what_cpio_reads(script, tmp_path):
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    archive = script.cpio({"init": b"abc", "selftest": b"12345"})
    subprocess.run(["cpio", "-i", "--quiet"], cwd=tmp_path, input=archive, check=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"init": b"abc", "selftest": b"12345"}


def test_the_parameters_name_where_everything_lies(script):
    kernel = bytearray(1024 * 3)
    kernel[0x1F1], kernel[0x201], kernel[0x202:0x206] = 1, 0x6A, b"HdrS"
    kernel[1024:] = b"k" * 2048
    image, kernel_at = script.boot_image(bytes(kernel), b"initramfs", "console=ttyS0")
    assert kernel_at % 0x200000 == 0
    assert image[kernel_at - script.IMAGE_AT :] == b"k" * 2048
    assert int.from_bytes(image[0x218:0x21C], "little") - script.IMAGE_AT == image.index(b"initramfs")
    assert int.from_bytes(image[0x228:0x22C], "little") - script.IMAGE_AT == image.index(b"console=ttyS0\0")


def test_without_an_emulator_the_reason_is_told(script, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("BOCHS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(script, "TOOLS", tmp_path)
    assert script.main([]) == script.SKIPPED
    assert "Bochs is not installed" in capsys.readouterr().out


def test_an_instruction_set_that_is_not_emulated_is_refused(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["neon_i8mm"])
    assert ended.value.code == 2
    assert "'neon_i8mm' is not one of avx2, avxvnni, avx512, avx512bf16, amx" in capsys.readouterr().err


def test_an_old_bochs_is_refused(script, monkeypatch, tmp_path):
    old = tmp_path / "bochs"
    old.write_text("#!/bin/sh\necho Bochs x86 Emulator 2.7\n")
    old.chmod(0o755)
    monkeypatch.setenv("BOCHS", str(old))
    with pytest.raises(script.MissingError, match=r"2\.7 has no AVX-512 BF16"):
        script.find_emulator()


@pytest.mark.slow
def test_rows_agree_with_the_baseline_natively_and_touch_no_page_beyond_their_buffers(script, build):
    program, _ = script.build(build)
    features = detect_cpu().features
    for isa in native_rows.ISAS:
        if not set(isa.features) <= features:
            continue
        for side in ([], ["--before"]):
            done = subprocess.run([str(program), *side, isa.name], capture_output=True, text=True, check=False)
            assert done.returncode == 0, failures(done)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avxvnni", "avx512", "avx512bf16", "amx"])
def test_rows_agree_with_the_baseline_on_an_emulated_processor(script, build, isa):
    command = [sys.executable, str(SCRIPT), isa, "--build", str(build)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == script.SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, (
        "\n".join(li for li in done.stdout.splitlines() if not li.startswith("ok")) + done.stderr
    )


def build_selftest(directory, *settings):
    """Build the self-test for this machine with these CMake settings; its path."""
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(directory), "-DHALVE_SELFTEST_STATIC=OFF", *settings],
        ["cmake", "--build", str(directory), "--target", "halve_selftest", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory / "tests" / "kernels" / "selftest" / "halve_selftest"


def failures(done):
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok")) + done.stderr


@pytest.mark.slow
def test_rows_touch_no_memory_but_their_own_and_do_nothing_undefined(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    program = build_selftest(tmp_path, "-DHALVE_ISAS=baseline;avx2", "-DHALVE_SANITIZE=address,undefined")
    features = detect_cpu().features
    for isa in ("baseline", "avx2"):
        if isa == "avx2" and not {"avx2", "fma", "f16c"} <= features:
            continue
        for side in ([], ["--before"]):
            done = subprocess.run([str(program), *side, isa], capture_output=True, text=True, check=False)
            assert done.returncode == 0, failures(done)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_rows_compute_with_nothing_that_was_never_written(tmp_path, isa):
    if shutil.which("valgrind") is None or shutil.which("cmake") is None:
        pytest.skip("valgrind or cmake is not installed")
    program = build_selftest(tmp_path, "-DHALVE_ISAS=baseline;avx2")
    command = ["valgrind", "--quiet", "--error-exitcode=9", str(program), isa, "prepare", "product", "embed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, failures(done)
