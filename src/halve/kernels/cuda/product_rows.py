"""The rows of CUDA products: which code multiplies tokens with a packed matrix, and where each one refuses."""

from collections.abc import Sequence
from typing import Any

import torch

from halve.hardware import Device
from halve.kernels.cuda import configs, gemv, libraries
from halve.kernels.cuda.configs import Config
from halve.kernels.cuda.launching import INTERPRETED, launch, launch_persistent
from halve.kernels.cuda.packing import CudaMatrix, activations_refusal
from halve.kernels.dispatch import Kernel, Spec

CAPABILITIES = (80, 89, 90, 100, 120)  # that a row asks for: sm_80 Ampere, sm_89 Ada, sm_90 Hopper
MANY = 64  # tokens below which a library's product is not tried


def cuda_device(device: str | torch.device) -> Device:
    """Describe a CUDA device; features are `sm_80` and so on, all that it reaches.

    Under Triton's interpreter the CPU stands in for an sm_90 device, without torch's own CUDA kernels.
    """
    where = torch.device(device)
    if where.type != "cuda":
        features = {f"sm_{c}" for c in CAPABILITIES if c <= 90} | {"interpreter"} if INTERPRETED else set()
        return Device(
            name=str(where),
            kind=where.type,
            model="Triton interpreter" if INTERPRETED else where.type,
            features=frozenset(features),
            num_cores=1,
            memory_bytes=0,
            machine=where.type,
        )
    properties = torch.cuda.get_device_properties(where)
    reached = properties.major * 10 + properties.minor
    return Device(
        name=str(where),
        kind="cuda",
        model=properties.name,
        features=frozenset(f"sm_{c}" for c in CAPABILITIES if c <= reached),
        num_cores=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        machine="cuda",
    )


def _triton_refusal(device: Device, spec: Spec) -> str | None:
    if "sm_80" not in device.features:
        return "needs a CUDA device of sm_80 or later"
    if spec.activations == "fp8" and "sm_89" not in device.features:
        return "needs sm_89 or later for fp8 activations"
    return None if spec.format is None else activations_refusal(spec.format, spec.activations)


def _library_refusal(device: Device, spec: Spec, multiple: int) -> str | None:
    """What all of torch's rows ask for: a device, tokens enough, and sizes that its kernels take."""
    if device.kind != "cuda":
        return "needs a CUDA device"
    return _sizes_refusal(spec, multiple)


def _sizes_refusal(spec: Spec, multiple: int) -> str | None:
    if spec.num_tokens is not None and spec.num_tokens < MANY:
        return f"needs {MANY} tokens or more"
    for name, size in (("out_features", spec.out_features), ("in_features", spec.in_features)):
        if size is not None and size % multiple:
            return f"needs {name} in multiples of {multiple}, not {size}"
    return None


def _persistent_refusal(device: Device, spec: Spec) -> str | None:
    if "sm_90" not in device.features:
        return "needs sm_90 or later, for its tensor memory accelerator"
    if reason := _triton_refusal(device, spec):
        return reason
    if spec.format is not None and spec.format.group_size:
        return "knows one scale a row"
    if spec.format is not None and spec.format.scaled and spec.activations == "bf16":
        return "multiplies elements as they are stored"
    return _sizes_refusal(spec, 16)


def _scaled_mm_refusal(device: Device, spec: Spec) -> str | None:
    if spec.activations != "fp8":
        return "multiplies fp8 with fp8"
    if "sm_89" not in device.features:
        return "needs sm_89 or later"
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no _scaled_mm"
    return _library_refusal(device, spec, 16)


def _int_mm_refusal(device: Device, spec: Spec) -> str | None:
    if spec.activations != "int8":
        return "multiplies int8 with int8"
    if spec.format is not None and spec.format.group_size:
        return "knows one scale a row"
    if not hasattr(torch, "_int_mm"):
        return f"torch {torch.__version__} has no _int_mm"
    return _library_refusal(device, spec, 8)


def _widened_refusal(device: Device, spec: Spec) -> str | None:
    if spec.activations != "bf16" or spec.format is None or not spec.format.scaled:
        return "widens compressed weights for bf16 activations"
    return _library_refusal(device, spec, 8)


def _bf16_refusal(device: Device, spec: Spec) -> str | None:
    if spec.format is None or spec.format.scaled or spec.activations != "bf16":
        return "multiplies bf16 with bf16"
    return _library_refusal(device, spec, 8)


def _row(name: str, refusal: Any, run: Any) -> Kernel:
    """A row that has nothing to cut."""
    return Kernel(
        name=name,
        op="project",
        refusal=refusal,
        run=lambda matrix, x, out, add, config: run(matrix, x, out, add),
    )


TABLE = [
    Kernel(name="cuda_gemv", op="project", refusal=gemv.refusal, run=gemv.launch),
    Kernel(name="triton", op="project", refusal=_triton_refusal, run=launch),
    Kernel(name="triton_persistent", op="project", refusal=_persistent_refusal, run=launch_persistent),
    _row("torch_scaled_mm", _scaled_mm_refusal, libraries.scaled_fp8),
    _row("torch_int_mm", _int_mm_refusal, libraries.int8),
    _row("torch_mm", _bf16_refusal, libraries.bf16),
    _row("widen_torch_mm", _widened_refusal, libraries.widened),
]


def spec_of(matrix: CudaMatrix, num_tokens: int) -> Spec:
    """What a product asks of a row."""
    return Spec(
        op="project",
        format=matrix.format,
        activations=matrix.activations,
        out_features=matrix.out_features,
        in_features=matrix.in_features,
        num_tokens=num_tokens,
    )


def runnable(matrix: CudaMatrix, num_tokens: int, device: Device, out_dtype: torch.dtype) -> list[Kernel]:
    """Rows that do not refuse a product, in the order of the table.

    Outputs in float32 and blocks under scales of their own are not for torch's rows; a persistent program keeps its
    output tile in shared memory, where float32 does not fit beside the inputs.
    """
    rows = [row for row in TABLE if row.refusal(device, spec_of(matrix, num_tokens)) is None]
    if out_dtype != torch.bfloat16:
        rows = [row for row in rows if row.name in ("cuda_gemv", "triton")]
    if matrix.group_size and matrix.activations == "fp8":
        rows = [row for row in rows if row.name in ("cuda_gemv", "triton")]
    return rows


def cuts(row: Kernel, matrix: CudaMatrix, num_tokens: int) -> Sequence[Config | None]:
    """How a row may cut a product, the default first; None alone where it has nothing to choose."""
    if row.name == "cuda_gemv":
        return gemv.candidates(matrix, num_tokens)
    if row.name == "triton":
        return configs.candidates(matrix, configs.token_class(num_tokens))
    return configs.persistent_candidates(matrix) if row.name == "triton_persistent" else [None]
