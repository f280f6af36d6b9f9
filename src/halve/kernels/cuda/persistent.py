# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Products of many tokens with whole elements of one type, on sm_90: tiles fetched by the tensor memory accelerator.

One program for each multiprocessor goes from tile to tile, and fetches the first inputs of the next while it writes
the last one's outputs. Descriptors say where the matrices lie, so that fetching takes no registers and edges need no
masks: what lies outside reads as zero.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def persistent(
    x_descriptor,
    codes_descriptor,
    scale_ptr,
    bias_ptr,
    token_scale_ptr,
    add_ptr,
    out_ptr,
    T,
    N,
    K,
    add_row,
    out_row,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    ACT: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    COLS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out = x @ codes.T * scale * token_scale + bias + add, tiles of BT tokens by BN outputs.

    FLATTEN: the loops over tiles and inputs become one, so that fetching does not stop between tiles.
    """
    tiles_t, tiles_n = tl.cdiv(T, BT), tl.cdiv(N, BN)
    steps = tl.cdiv(K, COLS)
    width = SWIZZLE * tiles_n
    SUM: tl.constexpr = tl.int32 if ACT == "int8" else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        begin = (tile // width) * SWIZZLE
        size = tl.minimum(tiles_t - begin, SWIZZLE)
        first_t = (begin + (tile % width) % size) * BT
        first_n = ((tile % width) // size) * BN
        acc = tl.zeros((BT, BN), SUM)
        for step in range(steps):
            x = x_descriptor.load([first_t, step * COLS])
            w = codes_descriptor.load([first_n, step * COLS])
            acc = tl.dot(x, w.T, acc, out_dtype=SUM)
        # In two halves, because all of it beside the sums does not fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BT, 2, BN // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _finish(
                left if half == 0 else right,
                first_t + tl.arange(0, BT),
                first_n + half * (BN // 2) + tl.arange(0, BN // 2),
                scale_ptr,
                bias_ptr,
                token_scale_ptr,
                add_ptr,
                out_ptr,
                T,
                N,
                add_row,
                out_row,
                HAS_SCALE,
                HAS_BIAS,
                HAS_ADD,
                ACT,
            )


@triton.jit
def _finish(
    acc,
    token,
    n,
    scale_ptr,
    bias_ptr,
    token_scale_ptr,
    add_ptr,
    out_ptr,
    T,
    N,
    add_row,
    out_row,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    ACT: tl.constexpr,
):
    """Scale the sums of some tokens and outputs, add to them, round and store them."""
    value = acc.to(tl.float32)
    if HAS_SCALE:
        value = value * tl.load(scale_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    if ACT != "bf16":
        value = value * tl.load(token_scale_ptr + token, mask=token < T, other=0)[:, None]
    if HAS_BIAS:
        value = value + tl.load(bias_ptr + n, mask=n < N, other=0)[None, :]
    inside = (token < T)[:, None] & (n < N)[None, :]
    if HAS_ADD:
        add_at = add_ptr + token[:, None].to(tl.int64) * add_row + n[None, :]
        value = value + tl.load(add_at, mask=inside, other=0).to(tl.float32)
    out_at = out_ptr + token[:, None].to(tl.int64) * out_row + n[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=inside)
