"""Ops that other packages bring."""

import logging
import sys

import pytest

from halve.api.model import make_ops
from halve.core.errors import KernelError, RequestError
from halve.kernels import native_library
from halve.kernels.backends import backend
from halve.kernels.reference import TorchOps


@pytest.fixture(name="install")
def _install(tmp_path, monkeypatch):
    """Put packages with entry points on the path, as pip would."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def install(name, points, code=""):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[halve.backends]\n" + points)
        (tmp_path / f"{name}.py").write_text(code)
        made.append(name)

    yield install
    for name in made:
        sys.modules.pop(name, None)


GOOD = """
from halve.kernels.reference import TorchOps

class FastOps(TorchOps):
    name = "fast"

def make_ops(device, *, activations):
    ops = FastOps("cpu", activations=activations)
    ops.asked_for = device
    return ops
"""


def test_a_package_brings_ops_for_a_device_of_its_name(install, caplog):
    install("halve_fast", "fast = halve_fast:make_ops\n", GOOD)
    with caplog.at_level(logging.INFO, "halve.kernels"):
        ops = make_ops("fast:1", "int8")
    assert (ops.name, ops.asked_for, ops.activations) == ("fast", "fast:1", "int8")
    assert "device fast is run by halve_fast:make_ops" in caplog.text


def test_a_device_of_torch_that_a_package_offers_is_the_packages(install):
    install("halve_fast", "xpu = halve_fast:make_ops\n", GOOD)
    assert make_ops("xpu", "fp32").name == "fast"


def test_halves_own_devices_stay_its_own_and_nothing_foreign_is_imported(install):
    install("halve_fast", "cpu = halve_fast:make_ops\ncuda = halve_fast:make_ops\nother = halve_fast:make_ops\n", GOOD)
    assert backend("cpu") is backend("cuda") is backend("auto") is None
    assert "halve_fast" not in sys.modules


def test_a_package_that_refuses_says_why(install):
    code = "from halve.core.errors import KernelError\n"
    code += "def make_ops(device, *, activations):\n    raise KernelError('no card')\n"
    install("halve_fast", "fast = halve_fast:make_ops\n", code)
    with pytest.raises(RequestError, match="device 'fast' can't be used: no card"):
        make_ops("fast", "fp32")


def test_a_package_that_can_not_be_imported_is_named(install):
    install("halve_fast", "fast = halve_fast:make_ops\n", "raise ImportError('libfast.so is missing')")
    with pytest.raises(KernelError, match=r"halve_fast:make_ops can't be imported: libfast\.so is missing"):
        backend("fast")


def test_two_packages_that_offer_one_device_are_named(install):
    install("halve_one", "fast = halve_one:make_ops\n", GOOD)
    install("halve_two", "fast = halve_two:make_ops\n", GOOD)
    with pytest.raises(KernelError, match="device 'fast': halve_one and halve_two both offer it"):
        backend("fast")


def test_a_device_that_nobody_offers_is_torchs_to_refuse():
    with pytest.raises(RequestError, match=r"device 'abacus' can't be used: .*; take cpu"):
        make_ops("abacus", "fp32")


def test_cuda_without_triton_or_a_card_is_torchs_with_the_reason_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr("halve.kernels.cuda.rows.refusal", lambda device: "the package triton is not installed")
    monkeypatch.setattr(
        "halve.api.model.torch_ops", lambda device, activations: TorchOps("cpu", activations=activations)
    )
    with caplog.at_level(logging.WARNING, "halve"):
        ops = make_ops("cuda", "int8")
    assert (ops.name, ops.activations) == ("torch", "int8")
    assert "running on torch instead of the Triton kernels: the package triton is not installed" in caplog.text


def test_threads_are_for_the_cpu_alone():
    with pytest.raises(RequestError, match=r"num_threads and cores are of the C\+\+ kernels"):
        make_ops("cuda", "fp32", num_threads=2)
    assert native_library.available() is None or make_ops("cpu", "fp32").name == "torch"
