"""Norms, gated units and gathers on CUDA in Triton, each one pass over memory, its result rounded for the next product.

Rounding (`activations`): bf16; int8 as `halve.formats.activations.int8_rows`, to the bit; fp8 e4m3, scale = absmax /
448 and code = x * (448 / absmax) rounded to nearest, otherwise by the same rules. A row with NaN or infinity gets the
scale NaN. A row that is rounded to 8 bits is one kernel instance and is held in registers, so its maximum costs no
second read.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from halve.core.errors import KernelError
from halve.kernels.cuda.ahead import follow, launched

VALUES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
SHARED_ROW = 2048  # elements of a row that an instance has where it need not see all
WIDEST_ROW = 65536  # elements that an instance holds; 64 a thread of 32 warps
VOCABULARY_TILE = 4096  # logits that an instance of the first pass of argmax reads


class Activations(NamedTuple):
    """Input of a product: values [T, K] bf16, int8 or fp8 e4m3; scale float32 [T] for the latter two, None for bf16."""

    values: torch.Tensor
    scale: torch.Tensor | None


def rms_norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    activations: str = "bf16",
    out: Activations | None = None,
) -> Activations:
    """x / sqrt(mean(x^2) + eps) * gain over each row of x [T, K], rounded. Source: arXiv:1910.07467.

    x: bf16 or float32, rows at any stride. gain: [K]. residual: bf16 or float32 [T, K]; x is added to it in place, and
    the norm is of the sum, before it is rounded to the residual's type.
    """
    rows, width = x.shape
    out = _room(out, rows, width, activations, x.device)
    if rows:
        _norm_kernel[(rows,)](
            x, gain, residual, out.values, out.scale,
            x.stride(0), 0 if residual is None else residual.stride(0), out.values.stride(0), eps,
            K=width, **_launch(width, activations, x.device),
        )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor, *, activations: str = "bf16", out: Activations | None = None) -> Activations:
    """silu(gate) * up, rounded: gate_up bf16 or float32 [T, 2 I], gate first -> [T, I]. Source: arXiv:2002.05202."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = _room(out, rows, width, activations, gate_up.device)
    if rows:
        # Rounding to 8 bits asks for the largest of a row; bf16 does not, and several instances share a row.
        tile = SHARED_ROW if activations == "bf16" else width
        _silu_kernel[(rows, triton.cdiv(width, tile))](
            gate_up, out.values, out.scale, gate_up.stride(0), out.values.stride(0),
            K=width, **_launch(tile, activations, gate_up.device),
        )  # fmt: skip
    return out


def quantize(x: torch.Tensor, activations: str, *, out: Activations | None = None) -> Activations:
    """Round rows of x, bf16 or float32 [T, K]."""
    rows, width = x.shape
    out = _room(out, rows, width, activations, x.device)
    if rows:
        _quantize_kernel[(rows,)](
            x,
            out.values,
            out.scale,
            x.stride(0),
            out.values.stride(0),
            K=width,
            **_launch(width, activations, x.device),
        )
    return out


def take_rows(x: torch.Tensor, rows: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x[rows] of x [N, K], rows int32 [T], widened or rounded to the type of `out`; row -1 gives zeros."""
    if out is None:
        out = torch.empty(len(rows), x.shape[1], dtype=x.dtype, device=x.device)
    if len(rows):
        width, tile = x.shape[1], min(4096, triton.next_power_of_2(x.shape[1]))
        _take_kernel[(len(rows), triton.cdiv(width, tile))](
            x, rows, out, x.stride(0), out.stride(0), K=width, WIDTH=tile, num_warps=4
        )
    return out


class ArgmaxScratch(NamedTuple):
    """Memory for the first pass of `argmax`: float32 and int32 [R, tiles]."""

    values: torch.Tensor
    ids: torch.Tensor


def argmax_scratch(rows: int, vocab: int, device: torch.device | str) -> ArgmaxScratch:
    """Memory that `argmax` of this many rows needs."""
    shape = (rows, triton.cdiv(vocab, VOCABULARY_TILE))
    return ArgmaxScratch(
        torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int32, device=device)
    )


def argmax(
    logits: torch.Tensor, *, out: torch.Tensor | None = None, scratch: ArgmaxScratch | None = None
) -> torch.Tensor:
    """The largest of each row of logits, bf16 or float32 [R, V]: int32 [R], ties to the lowest.

    -2 for a row that holds NaN or +inf, -4 for one of -inf alone: minus one less a status of `sampling.broken`.
    """
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits.device) if out is None else out
    scratch = scratch or argmax_scratch(rows, vocab, logits.device)
    tiles = triton.cdiv(vocab, VOCABULARY_TILE)
    if rows:
        _argmax_tile_kernel[(rows, tiles)](
            logits, *scratch, logits.stride(0), scratch.ids.stride(0), V=vocab, WIDTH=VOCABULARY_TILE, num_warps=4
        )
        _argmax_join_kernel[(rows,)](
            *scratch, out, scratch.ids.stride(0), tiles, WIDTH=triton.next_power_of_2(tiles), num_warps=1
        )
    return out


def _room(out: Activations | None, rows: int, width: int, activations: str, device: torch.device) -> Activations:
    if activations not in VALUES:
        raise KernelError(f"activations: {activations!r} has no CUDA kernels; choose one of {list(VALUES)}")
    if width > WIDEST_ROW:
        raise KernelError(f"rows of {width} elements are wider than {WIDEST_ROW}; round them part by part")
    if out is not None:
        if out.values.dtype != VALUES[activations] or out.values.shape != (rows, width):
            found = f"{out.values.dtype} {tuple(out.values.shape)}"
            raise KernelError(f"out: {found} does not hold {activations} ({rows}, {width}); make it so")
        return out
    scale = None if activations == "bf16" else torch.empty(rows, dtype=torch.float32, device=device)
    return Activations(torch.empty(rows, width, dtype=VALUES[activations], device=device), scale)


def _launch(width: int, activations: str, device: torch.device) -> dict[str, Any]:
    """How a kernel that holds a row is compiled. Without fused products and sums codes have the definition's bits."""
    block = max(16, triton.next_power_of_2(width))
    warps = min(32, max(1, block // 512))
    return {"WIDTH": block, "TO": activations, "num_warps": warps, "enable_fp_fusion": False, **launched(device)}


@triton.jit
def _round_and_store(y, out, scales, row, out_stride, i, inside, TO: tl.constexpr):
    """Store y float32 [WIDTH], zeros outside, as activations."""
    to = out + row * out_stride + i
    if TO == "bf16":
        tl.store(to, y.to(tl.bfloat16), inside)
    else:
        size = tl.abs(y)
        broken = tl.max(tl.where(size < float("inf"), 0, 1), 0) > 0
        absmax = tl.max(tl.where(size < float("inf"), size, 0.0), 0)
        some = (absmax >= 1e-36) & (broken == 0)
        levels = 127.0 if TO == "int8" else 448.0
        safe = tl.where(some, absmax, 1.0)
        inverse = tl.where(some, tl.math.div_rn(levels, safe), 0.0)
        scale = tl.where(some, tl.math.div_rn(safe, levels), 0.0)
        code = tl.where(size < float("inf"), y, 0.0) * inverse
        if TO == "int8":
            # Adding and taking 1.5 * 2^23 rounds to nearest even.
            tl.store(to, ((code + 12582912.0) - 12582912.0).to(tl.int8), inside)
        else:
            tl.store(to, tl.minimum(tl.maximum(code, -448.0), 448.0).to(tl.float8e4nv), inside)
        tl.store(scales + row, tl.where(broken, float("nan"), scale))


@triton.jit
def _norm_kernel(
    x, gain, residual, out, scales, x_stride, residual_stride, out_stride, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, TO: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    inside = i < K
    gains = tl.load(gain + i, inside, 0.0).to(tl.float32)
    follow(AHEAD)
    values = tl.load(x + row * x_stride + i, inside, 0.0).to(tl.float32)
    if residual is not None:
        stream = residual + row * residual_stride + i
        values += tl.load(stream, inside, 0.0).to(tl.float32)
        tl.store(stream, values.to(residual.dtype.element_ty), inside)
    mean = tl.sum(values * values, 0) / K
    normed = values * tl.rsqrt(mean + eps) * gains
    _round_and_store(normed, out, scales, row, out_stride, i, inside, TO)


@triton.jit
def _silu_kernel(
    gate_up, out, scales, stride, out_stride,
    K: tl.constexpr, WIDTH: tl.constexpr, TO: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    follow(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = i < K
    gate = tl.load(gate_up + row * stride + i, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + K + i, inside, 0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    _round_and_store(y, out, scales, row, out_stride, i, inside, TO)


@triton.jit
def _quantize_kernel(
    x, out, scales, stride, out_stride,
    K: tl.constexpr, WIDTH: tl.constexpr, TO: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    follow(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    y = tl.load(x + row * stride + i, i < K, 0.0).to(tl.float32)
    _round_and_store(y, out, scales, row, out_stride, i, i < K, TO)


@triton.jit
def _take_kernel(x, rows, out, stride, out_stride, K: tl.constexpr, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(rows + t).to(tl.int64)
    values = tl.load(x + row * stride + i, (i < K) & (row >= 0), 0.0)
    tl.store(out + t * out_stride + i, values.to(out.dtype.element_ty), i < K)


@triton.jit
def _argmax_tile_kernel(logits, values, ids, stride, tiles_stride, V: tl.constexpr, WIDTH: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tile * WIDTH + tl.arange(0, WIDTH)
    z = tl.load(logits + row * stride + i, i < V, float("-inf")).to(tl.float32)
    z = tl.where(z < float("inf"), z, float("inf"))  # NaN shows as +inf
    top, at = tl.max(z, 0, return_indices=True)
    tl.store(values + row * tiles_stride + tile, top)
    tl.store(ids + row * tiles_stride + tile, tile * WIDTH + at)


@triton.jit
def _argmax_join_kernel(values, ids, out, stride, tiles, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    z = tl.load(values + row * stride + i, i < tiles, float("-inf"))
    top, at = tl.max(z, 0, return_indices=True)
    chosen = tl.load(ids + row * stride + at)
    chosen = tl.where(top == float("inf"), -2, tl.where(top == float("-inf"), -4, chosen))
    tl.store(out + row, chosen)
