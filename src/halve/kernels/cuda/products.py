"""Products of tokens with packed matrices on a CUDA device: `project`, and `grouped_project` for experts.

Which row of `product_rows.TABLE` runs, and how it is cut, comes from `tuning` where something was measured, else it is
a fixed default. Nothing here waits for the device or, where `out` is given and the row is ours, allocates: a product
can be captured in a CUDA graph. Products of one device share a workspace: run them in one stream, or one after another.
"""

import torch
from torch import Tensor

from halve.core.errors import KernelError
from halve.kernels.cuda import configs, elementwise, gemv, tuning
from halve.kernels.cuda.launching import Activations, Norm, launch
from halve.kernels.cuda.packing import CudaMatrix, concatenate, pack, pack_fp8

__all__ = ["Activations", "CudaMatrix", "Norm", "concatenate", "grouped_project", "pack", "pack_fp8", "project"]

VALUE_TYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def project(matrix: CudaMatrix, x: Activations, out: Tensor | None = None, *, add: Tensor | None = None) -> Tensor:
    """x @ matrix.T + bias + add: [T, out] in bf16, or what `out` is (float32 for logits).

    add: [T, out], the residual, added before the one rounding; it may be `out`. Raises KernelError for operands that
    do not fit each other.
    """
    if matrix.num_experts:
        raise KernelError(f"a stack of {matrix.num_experts} matrices is multiplied by grouped_project")
    out = _checked(matrix, x, out, add)
    if not len(x.values):
        return out
    choice = tuning.chosen(matrix, len(x.values), out.dtype)
    if x.norm is not None and not (choice.kernel.name == "cuda_gemv" and gemv.takes_norm(matrix, x, out, add)):
        x = Activations(*elementwise.rms_norm(x.values, x.norm.gain, x.norm.eps))
    choice.kernel.run(matrix, x, out, add, choice.config)
    return out


def grouped_project(experts: CudaMatrix, x: Activations, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """y[r] = x[r] @ expert(r).T + its bias: expert e owns rows offsets[e] .. offsets[e + 1].

    experts: [E, out, in]. x: rows sorted by expert. offsets: int32 [E + 1] on the device, rising from 0 to T (not
    checked: that would wait for the device); an expert without rows is not read. Returns [T, out]. Raises KernelError
    for operands that do not fit each other.
    """
    if not experts.num_experts:
        raise KernelError(f"grouped_project takes a stack [experts, out, in], got {list(experts.shape)}; use project")
    if offsets.dtype != torch.int32 or offsets.shape != (experts.num_experts + 1,):
        raise KernelError(
            f"offsets must be int32 [{experts.num_experts + 1}], got {offsets.dtype} {list(offsets.shape)}"
        )
    out = _checked(experts, x, out, None)
    if len(x.values):
        each = -(-len(x.values) // experts.num_experts)
        launch(experts, x, out, None, configs.default(experts, each, grouped=True), offsets)
    return out


def _checked(matrix: CudaMatrix, x: Activations, out: Tensor | None, add: Tensor | None) -> Tensor:
    """The output, made where none is given. Raises KernelError for operands that do not fit each other."""
    values, expected = x.values, VALUE_TYPES[matrix.activations]
    if values.dim() != 2 or values.shape[1] != matrix.in_features or values.dtype != expected or values.stride(1) != 1:
        raise KernelError(
            f"a {matrix.format.name} matrix {list(matrix.shape)} takes {expected} rows of {matrix.in_features} "
            f"values side by side, got {values.dtype} {list(values.shape)} with strides {list(values.stride())}"
        )
    if (x.scale is None) != (matrix.activations == "bf16") or (
        x.scale is not None and (x.scale.shape != values.shape[:1] or x.scale.dtype != torch.float32)
    ):
        wanted = "no scale" if matrix.activations == "bf16" else f"float32 scales [{len(values)}]"
        got = None if x.scale is None else (x.scale.dtype, list(x.scale.shape))
        raise KernelError(f"{matrix.activations} activations come with {wanted}, got {got}")
    shape = (len(values), matrix.out_features)
    for name, tensor in (("out", out), ("add", add)):
        if tensor is not None and (tensor.shape != shape or tensor.stride(1) != 1):
            raise KernelError(
                f"{name} must be {list(shape)}, rows contiguous, got {list(tensor.shape)} "
                f"with strides {list(tensor.stride())}"
            )
    return torch.empty(shape, dtype=torch.bfloat16, device=values.device) if out is None else out
