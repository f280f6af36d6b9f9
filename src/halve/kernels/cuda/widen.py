# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Packed weights as bf16 [out, in], for products of so many tokens that a library's bf16 product is fastest.

Each weight is code * scale, rounded once to bf16 (the fused kernel has no such rounding; 2^-9 of a weight, at most).
"""

import triton
import triton.language as tl

from halve.kernels.cuda.gemm import _fp8, _int8, _whole


@triton.jit
def widen(
    codes_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    first,
    rows,
    code_row,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rows first .. first + rows of the matrix, BN of them and one step of inputs by each program."""
    LOW: tl.constexpr = 8 if BITS == 8 else 2 if BITS <= 3 else 4
    HIGH: tl.constexpr = BITS - LOW
    FIELDS: tl.constexpr = 16 // LOW
    LOADS: tl.constexpr = LOW // HIGH if HIGH > 0 else 1
    step = tl.program_id(0)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    live = row < rows
    row_in = first + tl.minimum(row, rows - 1)
    column = tl.arange(0, 32)
    at = (codes_ptr + row_in[:, None].to(tl.int64) * code_row + column[None, :]).to(tl.pointer_type(tl.uint16))
    out_at = out_ptr + row[:, None].to(tl.int64) * K + column[None, :]
    if HIGH > 0:
        high = tl.load(at + (tl.num_programs(0) * LOADS + step) * 32)
    for load in tl.static_range(LOADS):
        low = tl.load(at + (step * LOADS + load) * 32)
        for f in tl.static_range(FIELDS):
            k = ((step * LOADS + load) * FIELDS + f) * 32
            if KIND == "fp8_cells":
                w = _fp8(low, f, PTX)
            elif BITS == 8:
                w = _int8(low, f, PTX)
            elif HIGH > 0:
                w = _whole(low, high, LOW, LOW * f, HIGH, HIGH * (load * FIELDS + f), PTX)
            else:
                w = _whole(low, low, LOW, LOW * f, 0, 0, PTX)
            group = k // GROUP if GROUP > 0 else 0
            s = tl.load(scale_ptr + group * N + row_in, mask=live & (k < K), other=0)
            value = w.to(tl.float32) * s.to(tl.float32)[:, None]
            tl.store(out_at + k, value.to(tl.bfloat16), mask=live[:, None] & (k + column < K)[None, :])


@triton.jit
def rescale(
    sums_ptr,
    token_scale_ptr,
    scale_ptr,
    bias_ptr,
    add_ptr,
    out_ptr,
    N,
    add_row,
    out_row,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = sums * token_scale * scale + bias + add, for one token and BLOCK outputs a program; sums int32 [T, N]."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    value = tl.load(sums_ptr + token * N + n, mask=live, other=0).to(tl.float32)
    value = value * tl.load(scale_ptr + n, mask=live, other=0).to(tl.float32) * tl.load(token_scale_ptr + token)
    if HAS_BIAS:
        value += tl.load(bias_ptr + n, mask=live, other=0)
    if HAS_ADD:
        value += tl.load(add_ptr + token * add_row + n, mask=live, other=0).to(tl.float32)
    tl.store(out_ptr + token * out_row + n, value.to(out_ptr.dtype.element_ty), mask=live)
