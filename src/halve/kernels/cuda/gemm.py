# ruff: noqa: PLR0912, PLR0915 -- branches on constants are chosen when a kernel is compiled
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The product of a tile: weights as the left operand of the tensor cores, tokens as the right one.

`product` computes out[t, n] = sum_k x[t, k] * weight[n, k] turned around: the weights fill the 64 or 128 rows that a
tensor-core instruction has anyway, and tokens fill its columns, of which it takes as few as 8. One kernel thus serves
one token and thousands. Weights below 16 bits become bf16 in registers, where the left operand may lie, so that they
cross shared memory in as few bytes as they are stored in.

Codes below 8 bits become bf16 by two instructions for two codes: code | 0x4300 is the bf16 of 128 + code, and
subtracting 128 and the offset is exact (arXiv:2211.10017, section 4). Products are exact in the float32 sums; a group's
scale multiplies its own sum. So the only roundings are those of the sums and of the output.

Few tokens: what bounds the product is memory. The inputs are split among programs until the device is full; each
writes its sums to a workspace, and the one that comes last to a tile adds them, in order, so that the result does not
depend on who came last. Shapes: N outputs, T tokens, K inputs.
"""

import triton
import triton.language as tl

from halve.kernels.cuda.ahead import follow


@triton.jit
def _whole(
    low, high, LOW: tl.constexpr, LOW_AT: tl.constexpr, HIGH: tl.constexpr, HIGH_AT: tl.constexpr, PTX: tl.constexpr
):
    """Integer codes below 8 bits as bf16, exactly: the LOW bits at LOW_AT of cells, HIGH more at HIGH_AT of others.

    PTX: say it in the machine's words, two cells at once; the interpreter knows only the other way.
    """
    LOW_MASK: tl.constexpr = (1 << LOW) - 1
    HIGH_MASK: tl.constexpr = ((1 << HIGH) - 1) << LOW
    OFFSET: tl.constexpr = 1 << (LOW + HIGH - 1)
    RIGHT: tl.constexpr = HIGH_AT - LOW  # from where the high bits lie to where they belong
    if PTX:
        # low bits of code | bf16 of 128, then the high bits, then minus 128 and the offset (sm_80 has fma only)
        if HIGH > 0:
            DOWN: tl.constexpr = RIGHT if RIGHT > 0 else 0
            UP: tl.constexpr = 0 if RIGHT > 0 else -RIGHT
            return tl.inline_asm_elementwise(
                f"""{{
                .reg .b32 t, u, one;
                mov.b32 one, 0x3f803f80;
                shr.b32 t, $1, {LOW_AT};
                lop3.b32 t, t, {LOW_MASK * 65537}, 0x43004300, 0xea;
                shr.b32 u, $2, {DOWN};
                shl.b32 u, u, {UP};
                lop3.b32 t, u, {HIGH_MASK * 65537}, t, 0xea;
                mov.b32 u, {(0xC300 | OFFSET) * 65537};
                fma.rn.bf16x2 $0, t, one, u;
                }}""",
                "=r,r,r",
                [low, high],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t, u, one;
            mov.b32 one, 0x3f803f80;
            shr.b32 t, $1, {LOW_AT};
            lop3.b32 t, t, {LOW_MASK * 65537}, 0x43004300, 0xea;
            mov.b32 u, {(0xC300 | OFFSET) * 65537};
            fma.rn.bf16x2 $0, t, one, u;
            }}""",
            "=r,r",
            [low],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    code = (low.to(tl.int32) >> LOW_AT) & LOW_MASK
    if HIGH > 0:
        moved = high.to(tl.int32) >> RIGHT if RIGHT > 0 else high.to(tl.int32) << -RIGHT
        code = code | (moved & HIGH_MASK)
    return (code - OFFSET).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _int8(cells, F: tl.constexpr, PTX: tl.constexpr):
    """Int8 codes, byte F of each cell, as bf16: (128 + the seven low bits) - (128, or 256 below zero), exactly."""
    if PTX:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 a, p, q, one;
            mov.b32 one, 0x3f803f80;
            shr.b32 a, $1, {8 * F};
            lop3.b32 p, a, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 q, a, 0x00800080, 0xc300c300, 0xea;
            fma.rn.bf16x2 $0, p, one, q;
            }}""",
            "=r,r",
            [cells],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    byte = (cells.to(tl.int32) >> (8 * F)) & 0xFF
    return (byte - 2 * (byte & 0x80)).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _fp8(cells, F: tl.constexpr, PTX: tl.constexpr):
    """E4m3 codes, byte F of each cell, as bf16: the same bits, times 2^120, exactly; NaN becomes 480."""
    if PTX:
        return tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 a, p, scale, zero;
            mov.b32 scale, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            shl.b32 a, $1, {8 - 8 * F};
            shr.b32 p, a, 4;
            and.b32 p, p, 0x07f007f0;
            lop3.b32 p, a, 0x80008000, p, 0xea;
            fma.rn.bf16x2 $0, p, scale, zero;
            }}""",
            "=r,r",
            [cells],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    byte = (cells.to(tl.int32) >> (8 * F)) & 0xFF
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)  # of a float32 that is 2^120 times too small
    return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(tl.bfloat16)


@triton.jit
def _expert_of(tile, offsets_ptr, EXPERTS: tl.constexpr, POW2: tl.constexpr, BT: tl.constexpr):
    """The expert of a tile of tokens, its first row and the row after its last one; expert EXPERTS beyond all."""
    index = tl.arange(0, POW2)
    starts = tl.load(offsets_ptr + index, mask=index < EXPERTS, other=0)
    ends = tl.load(offsets_ptr + index + 1, mask=index < EXPERTS, other=0)
    tiles = (ends - starts + BT - 1) // BT
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum(((upto <= tile) & (index < EXPERTS)).to(tl.int32), 0)
    before = tl.sum(tl.where(index < expert, tiles, 0), 0)
    first = tl.sum(tl.where(index == expert, starts, 0), 0) + (tile - before) * BT
    last = tl.sum(tl.where(index == expert, ends, 0), 0)
    return expert, first, last


@triton.jit(do_not_specialize=["T", "tiles_t", "splits"])
def product(
    codes_ptr,
    scale_ptr,
    bias_ptr,
    x_ptr,
    token_scale_ptr,
    add_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    offsets_ptr,
    T,
    N,
    K,
    code_row,
    x_row,
    add_row,
    out_row,
    tiles_t,
    splits,
    expert_codes,
    expert_scales,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    ACT: tl.constexpr,
    EXPERTS: tl.constexpr,
    POW2: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    COLS: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTE: tl.constexpr,
    PTX: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One tile of BN outputs by BT tokens, or the part of its inputs that this program has.

    KIND: "int_cells" (of BITS), "fp8_cells", or "plain" for whole elements of one type. GROUP: inputs under one scale,
    0 for rows. EXPERTS: matrices, 0 without; rows are then sorted by expert and offsets_ptr says where each begins.
    COLS: inputs of one tensor-core step, 32 with cells. SWIZZLE: tiles of tokens that go together through the outputs,
    so that they share weights in the L2 cache. splits: programs that share one tile's inputs. EVEN_K: no tail to mask.
    PROMOTE: fp8 sums leave the tensor cores' short accumulator after every UNROLL * COLS inputs.
    """
    follow(AHEAD)
    CELLS: tl.constexpr = KIND != "plain"
    LOW: tl.constexpr = 8 if BITS == 8 else 2 if BITS <= 3 else 4  # bits of the low plane
    HIGH: tl.constexpr = BITS - LOW
    FIELDS: tl.constexpr = 16 // LOW if CELLS else 1  # tensor-core steps of one load of the low plane
    LOADS: tl.constexpr = LOW // HIGH if HIGH > 0 else 1  # loads of the low plane to one of the high plane
    STEP: tl.constexpr = LOADS * FIELDS * COLS
    NOTHING_W: tl.constexpr = 0 if ACT == "int8" else 0.0
    NOTHING_X: tl.constexpr = 0 if ACT == "int8" else 0.0
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(N, BN)
    if SWIZZLE > 1:
        width = SWIZZLE * tiles_n
        begin = (pid // width) * SWIZZLE
        size = tl.minimum(tiles_t - begin, SWIZZLE)
        tile_t = begin + (pid % width) % size
        tile_n = (pid % width) // size
    else:
        tile_n = pid % tiles_n
        tile_t = pid // tiles_n

    first = tile_t * BT
    last = T
    expert = 0
    if EXPERTS > 0:
        expert, first, last = _expert_of(tile_t, offsets_ptr, EXPERTS, POW2, BT)
        if expert >= EXPERTS:
            return
        codes_ptr += expert.to(tl.int64) * expert_codes
        if HAS_SCALE:
            scale_ptr += expert.to(tl.int64) * expert_scales

    row = tile_n * BN + tl.arange(0, BN)
    row_in = tl.minimum(row, N - 1)  # beyond the end: read the last row again, write nothing
    token = first + tl.arange(0, BT)
    live = token < last
    column = tl.arange(0, COLS)
    x_at = x_ptr + token[None, :].to(tl.int64) * x_row + column[:, None]
    low_at = codes_ptr + row_in[:, None].to(tl.int64) * code_row + column[None, :]
    if CELLS:
        low_at = low_at.to(tl.pointer_type(tl.uint16))

    steps = tl.cdiv(K, STEP)
    rounds = tl.cdiv(steps, UNROLL)
    share = tl.cdiv(rounds, splits)
    # Sums of int8 products are whole numbers until a scale meets them.
    SUM: tl.constexpr = tl.int32 if ACT == "int8" and GROUP == 0 else tl.float32
    acc = tl.zeros((BN, BT), SUM)
    for r in range(split * share, tl.minimum(split * share + share, rounds)):
        if PROMOTE:
            part = tl.zeros((BN, BT), tl.float32)
        for u in tl.static_range(UNROLL):
            step = r * UNROLL + u
            if HIGH > 0:
                if EVEN_K:
                    high = tl.load(low_at + (steps * LOADS + step) * COLS)
                else:
                    high = tl.load(low_at + (steps * LOADS + step) * COLS, mask=step < steps, other=0)
            for load in tl.static_range(LOADS):
                at = step * LOADS + load
                if EVEN_K:
                    low = tl.load(low_at + at * COLS)
                elif CELLS:
                    low = tl.load(low_at + at * COLS, mask=step < steps, other=0)
                else:
                    low = tl.load(low_at + at * COLS, mask=(at * COLS + column < K)[None, :], other=NOTHING_W)
                for f in tl.static_range(FIELDS):
                    k = (at * FIELDS + f) * COLS
                    if EVEN_K:
                        x = tl.load(x_at + k, mask=live[None, :], other=NOTHING_X)
                    else:
                        inside = live[None, :] & (k + column < K)[:, None]
                        x = tl.load(x_at + k, mask=inside, other=NOTHING_X)
                    if KIND == "fp8_cells":
                        w = _fp8(low, f, PTX)
                    elif not CELLS:
                        w = low
                    elif BITS == 8:
                        w = _int8(low, f, PTX)
                    elif HIGH > 0:
                        w = _whole(low, high, LOW, LOW * f, HIGH, HIGH * (load * FIELDS + f), PTX)
                    else:
                        w = _whole(low, low, LOW, LOW * f, 0, 0, PTX)
                    if GROUP > 0:
                        if ACT == "int8":
                            of_group = tl.dot(w, x, out_dtype=tl.int32).to(tl.float32)
                        elif ((load * FIELDS + f) * COLS) % GROUP == 0:
                            of_group = tl.dot(w, x)
                        else:
                            of_group = tl.dot(w, x, of_group)
                        if load * FIELDS + f == LOADS * FIELDS - 1 or ((load * FIELDS + f + 1) * COLS) % GROUP == 0:
                            if EVEN_K:
                                s = tl.load(scale_ptr + (k // GROUP) * N + row_in)
                            else:
                                s = tl.load(scale_ptr + (k // GROUP) * N + row_in, mask=k < K, other=0)
                            acc += of_group * s.to(tl.float32)[:, None]
                    elif PROMOTE:
                        part = tl.dot(w, x, part)
                    elif ACT == "int8":
                        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
                    else:
                        acc = tl.dot(w, x, acc)
        if PROMOTE:
            acc += part

    value = acc.to(tl.float32)
    if HAS_SPLITS:
        # The parts of one tile lie behind one another, tokens that do not exist are left out.
        cell = tl.arange(0, BT)[None, :] * BN + tl.arange(0, BN)[:, None]
        part_at = partial_ptr + pid.to(tl.int64) * splits * (BN * BT) + cell
        tl.store(part_at + split * (BN * BT), value, mask=live[None, :])
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + pid, 1, sem="acq_rel")
        if arrived < splits - 1:
            return
        value = tl.zeros((BN, BT), tl.float32)
        for s in tl.range(0, splits, loop_unroll_factor=8):  # eight loads on their way at once
            value += tl.load(part_at + s * (BN * BT), mask=live[None, :], other=0, cache_modifier=".cg")
        tl.store(counter_ptr + pid, 0)  # as the next product expects it

    if HAS_SCALE and GROUP == 0:
        value = value * tl.load(scale_ptr + row_in).to(tl.float32)[:, None]
    if ACT != "bf16":
        value = value * tl.load(token_scale_ptr + token, mask=live, other=0)[None, :]
    if HAS_BIAS:
        value = value + tl.load(bias_ptr + expert * N + row_in)[:, None]
    inside = live[None, :] & (row < N)[:, None]
    if HAS_ADD:
        add_at = add_ptr + token[None, :].to(tl.int64) * add_row + row[:, None]
        value = value + tl.load(add_at, mask=inside, other=0).to(tl.float32)
    out_at = out_ptr + token[None, :].to(tl.int64) * out_row + row[:, None]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=inside)
