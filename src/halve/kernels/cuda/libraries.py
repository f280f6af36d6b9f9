"""Products by torch's own kernels (cuBLAS, CUTLASS), where many tokens share the weights.

`widened` brings compressed weights to bf16 in slabs that fit the L2 cache and multiplies slab by slab. The others take
the weights as they lie. All but `widened` allocate what they need between their kernels; torch's allocator makes that
fit into a captured graph.
"""

import torch
import triton
from torch import Tensor

from halve.kernels.cuda import widen
from halve.kernels.cuda.configs import inputs_a_step
from halve.kernels.cuda.launching import INTERPRETED, Activations
from halve.kernels.cuda.packing import COLUMNS, CudaMatrix
from halve.kernels.cuda.workspace import SLAB_ELEMENTS, workspace

ROWS = 32  # outputs that one program widens
SLAB_ROWS = 256  # slabs have a multiple of so many outputs, so that where each begins suits every kernel of torch's


def widen_rows(matrix: CudaMatrix, first: int, rows: int, out: Tensor) -> Tensor:
    """Rows first .. first + rows of a matrix in cells as bf16 [rows, in], in `out`."""
    assert matrix.scale is not None
    steps = -(-matrix.in_features // inputs_a_step(matrix, COLUMNS))
    widen.widen[(steps, -(-rows // ROWS))](
        matrix.codes,
        matrix.scale,
        out,
        matrix.out_features,
        matrix.in_features,
        first,
        rows,
        matrix.codes.stride(-2),
        KIND="fp8_cells" if matrix.format.kind == "float" else "int_cells",
        BITS=matrix.format.bits,
        GROUP=matrix.group_size,
        BN=ROWS,
        PTX=not INTERPRETED,
        num_warps=4,
    )
    return out


def widened(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None) -> None:
    """Weights to bf16 slab by slab, and torch's bf16 product of each."""
    buffer = workspace(x.values.device).slab
    rows = SLAB_ELEMENTS // matrix.in_features
    rows = rows // SLAB_ROWS * SLAB_ROWS or rows
    for first in range(0, matrix.out_features, rows):
        last = min(first + rows, matrix.out_features)
        view = buffer[: (last - first) * matrix.in_features].view(last - first, matrix.in_features)
        weights = widen_rows(matrix, first, last - first, view)
        _multiply(
            x.values,
            weights,
            None if matrix.bias is None else matrix.bias[first:last],
            None if add is None else add[:, first:last],
            out[:, first:last],
        )


def bf16(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None) -> None:
    """torch's bf16 product."""
    _multiply(x.values, matrix.codes, matrix.bias, add, out)


def _multiply(x: Tensor, weights: Tensor, bias: Tensor | None, add: Tensor | None, out: Tensor) -> None:
    if add is not None:
        torch.addmm(add, x, weights.T, out=out)
    else:
        torch.mm(x, weights.T, out=out)
    if bias is not None:
        out += bias


def scaled_fp8(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None) -> None:
    """torch._scaled_mm with one scale a token and one a row, in the tensor cores' short accumulator."""
    assert x.scale is not None
    assert matrix.scale is not None
    direct = out if add is None and out.is_contiguous() else None
    result = torch._scaled_mm(
        x.values,
        matrix.codes.T,
        scale_a=x.scale[:, None],
        scale_b=matrix.scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=direct,
    )
    if matrix.bias is not None:
        result += matrix.bias
    if add is not None:
        torch.add(result, add, out=out)
    elif direct is None:
        out.copy_(result)


def int8(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None) -> None:
    """torch._int_mm, and one kernel for scales, bias and residual."""
    sums = torch._int_mm(x.values, matrix.codes.T)
    block = 1024
    widen.rescale[(len(sums), triton.cdiv(matrix.out_features, block))](
        sums,
        x.scale,
        matrix.scale,
        matrix.bias,
        add,
        out,
        matrix.out_features,
        0 if add is None else add.stride(0),
        out.stride(0),
        HAS_BIAS=matrix.bias is not None,
        HAS_ADD=add is not None,
        BLOCK=block,
        num_warps=4,
    )
