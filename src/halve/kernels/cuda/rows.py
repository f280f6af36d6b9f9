"""Which Triton kernel multiplies which format on which GPU, and why others do not. Nothing here loads torch or triton.

    fp8_fp8     fp8 weights with fp8 activations, one scale a token, on the tensor cores of sm_89 and newer
    int8_int8   int8 weights with int8 activations, one scale a token
    bf16        any format with bf16 activations; weights are widened in registers

A plan's activations `fp32` and `bf16` are both bf16 here, since the stream between operations is bf16. Where a plan
says int8 and weights have less than 8 bits, activations stay bf16: that is nearer to the original, and as fast, because
what such products wait for is weights.
"""

import importlib.util
from typing import Any

from halve.formats import FORMATS, Format
from halve.formats.activations import activations_for
from halve.hardware import Device
from halve.kernels.dispatch import Kernel, Spec

ACTIVATIONS = ("fp32", "bf16", "int8", "fp8")  # what a plan may say
CACHES = ("fp32", "bf16", "int8", "fp8")  # of its formats of keys and values, what runs here; fp32 as bf16


def unavailable() -> str | None:
    """Why no Triton kernel can be compiled by this Python, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


def refusal(device: str) -> str | None:
    """Why a model on `device` ("cuda", "cuda:1") can't run on these kernels, or None. Loads torch to see the card."""
    if reason := unavailable():
        return reason
    import torch

    if torch.version.hip is not None:
        return "torch is built for ROCm"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} reaches no CUDA device"
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return None if (major, minor) >= (8, 0) else f"needs sm_80, the card is sm_{major}{minor}"


def met_by(weight: Format, activations: str) -> str:
    """What products with a format are multiplied with where a plan says `activations`: "bf16", "int8" or "fp8"."""
    wanted = activations_for(weight, activations)
    if wanted == "int8" and weight.bits == 8:
        return "int8"
    return "fp8" if wanted == "fp8" else "bf16"


def _project(*arguments: Any, **options: Any) -> Any:
    from halve.kernels.cuda.products import project

    return project(*arguments, **options)


def _row(name: str, activations: str, level: int) -> Kernel:
    def refusal(device: Device, spec: Spec) -> str | None:
        if device.kind != "cuda" and "interpreter" not in device.features:
            return "needs an NVIDIA GPU"
        if reason := unavailable():
            return reason
        if f"sm_{level}" not in device.features:
            return f"needs sm_{level}"
        assert spec.format is not None
        if activations != "bf16" and met_by(spec.format, spec.activations) != activations:
            return f"multiplies {activations} activations; these weights meet {met_by(spec.format, spec.activations)}"
        return None

    return Kernel(name=name, op="linear", refusal=refusal, run=_project)


TABLE = [
    _row("triton_fp8_fp8", "fp8", 89),
    _row("triton_int8_int8", "int8", 80),
    _row("triton_bf16", "bf16", 80),
]
KERNEL_ACTIVATIONS = {"triton_fp8_fp8": "fp8", "triton_int8_int8": "int8", "triton_bf16": "bf16"}


def format_report(device: Device | None, absent: str | None) -> list[dict[str, Any]]:
    """For every format, the row that runs its products with activations of its own width, and why others don't.

    absent: why there is no device; every row then refuses with it.
    """
    report = []
    for fmt in FORMATS.values():
        chosen, refused = None, []
        spec = Spec(op="linear", format=fmt, activations="fp8" if fmt.name == "fp8" else "int8")
        for row in TABLE:
            reason = absent or "no card" if device is None else row.refusal(device, spec)
            if reason is None:
                chosen = row.name
                break
            refused.append({"kernel": row.name, "reason": reason})
        report.append({"op": "linear", "format": fmt.name, "kernel": chosen, "refused": refused})
    return report
