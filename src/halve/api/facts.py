"""What a figure depends on beside the model: the machine and the versions of everything that computed it."""

import platform
from importlib.metadata import PackageNotFoundError, version

from halve import __version__
from halve.checkpoint.compressed_tensors import VERSION as COMPRESSED_TENSORS_LAYOUT
from halve.hardware import detect_cpu

PACKAGES = ("torch", "numpy", "tokenizers", "ml_dtypes")


def versions() -> dict[str, str]:
    """Versions of Halve, Python, and the packages whose arithmetic or text handling enters a figure."""
    found = {"halve": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found | {"compressed-tensors layout": COMPRESSED_TENSORS_LAYOUT}


def environment(device: str) -> str:
    """The machine in words: processor, cores, and the torch device if it is another."""
    cpu = detect_cpu()
    words = f"{cpu.model}, {cpu.num_cores} cores, {cpu.machine}"
    return words if device in ("cpu", "auto") else f"{device} on {words}"
