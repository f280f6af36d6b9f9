"""The kernels of `halve.kernels.cuda.attention`, which says what they compute and how they are launched.

Scores are in powers of two: exp(x) = exp2(x * log2(e)). Products over bf16 take bf16 and sum in float32.

Decode over int8 multiplies it as it lies: tensor cores read it from shared memory, and no thread converts one. Queries
and probabilities are two columns each, a value and what rounding left of it, which makes some 15 bits; columns are
free, for tensor cores have more than there are heads. Prefill takes keys in e4m3 likewise. All else widens a tile to
fp16, in which both formats are exact: columns of e4m3 that decode made in registers, as for int8, came out wrong on
sm_90 (Triton 3.6).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl

from halve.kernels.cuda.ahead import follow


@triton.jit
def _fp8(x):
    """float32 to e4m3, to nearest even, saturating, by whole numbers.

    Not by the conversion of sm_90: it makes two bytes at once, and where Triton 3.6 takes them apart for stores of
    single bytes, wrong ones arrived.
    """
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # the exponent's bias is 7, not 127
    # Below 2^-6 codes are multiples of 2^-9. Adding and taking 1.5 * 2^23 rounds to nearest even.
    small = ((tl.abs(x) * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _encode(x1, x2, KV: tl.constexpr):
    """Halves of heads [HEADS, HALF] float32 as stored, and bf16 scales [HEADS]."""
    scale = tl.zeros([x1.shape[0]], tl.float32)
    if KV == "int8":
        absmax = tl.maximum(tl.max(tl.abs(x1), 1), tl.max(tl.abs(x2), 1))
        scale = tl.math.div_rn(absmax, 127.0).to(tl.bfloat16).to(tl.float32)
        scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
        step = tl.where(scale == 0.0, 1.0, scale)[:, None]
        # Adding and taking 1.5 * 2^23 rounds to nearest even.
        c1 = (tl.math.div_rn(x1, step) + 12582912.0) - 12582912.0
        c2 = (tl.math.div_rn(x2, step) + 12582912.0) - 12582912.0
        y1 = tl.minimum(tl.maximum(c1, -127.0), 127.0).to(tl.int8)
        y2 = tl.minimum(tl.maximum(c2, -127.0), 127.0).to(tl.int8)
    elif KV == "fp8":
        y1, y2 = _fp8(x1), _fp8(x2)
    else:
        y1 = x1.to(tl.bfloat16)
        y2 = x2.to(tl.bfloat16)
    return y1, y2, scale.to(tl.bfloat16)


@triton.jit(do_not_specialize=["apart"])
def write_kernel(
    qkv, q_out, keys, values, key_scales, value_scales, positions, slots, table, qkv_stride, q_stride, apart,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, KV: tl.constexpr,
    HEADS: tl.constexpr, ROPE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Some heads of one token. apart: 0."""
    t = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + t).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    pair = i < D // 2
    inside = (head < H + 2 * G)[:, None] & pair[None, :]
    source = qkv + t * qkv_stride + head[:, None] * D + i[None, :]
    if ROPE:
        angle = table + position * D + i
        turns = (head < H + G)[:, None]
        cos = tl.where(turns, tl.load(angle, pair, 0.0)[None, :], 1.0)
        sin = tl.where(turns, tl.load(angle + D // 2, pair, 0.0)[None, :], 0.0)
    follow(AHEAD)
    x1 = tl.load(source, inside, 0.0).to(tl.float32)
    x2 = tl.load(source + D // 2, inside, 0.0).to(tl.float32)
    if ROPE:
        turned = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = turned
    to = q_out + t * q_stride + head[:, None] * D + i[None, :]
    asks = inside & (head < H)[:, None]
    tl.store(to, x1.to(tl.bfloat16), asks)
    tl.store(to + D // 2, x2.to(tl.bfloat16), asks)

    if slot >= 0:
        y1, y2, scale = _encode(x1, x2, KV)
        is_key = (head >= H) & (head < H + G)
        is_value = (head >= H + G) & (head < H + 2 * G)
        g = tl.where(is_key, head - H, head - H - G)
        place = (slot // P) * G + g  # head of a block
        offset = slot % P
        to_key = (place * P + offset)[:, None] * D + i[None, :]
        tl.store(keys + to_key, y1, is_key[:, None] & inside)
        tl.store(keys + to_key + D // 2, y2, is_key[:, None] & inside)
        if KV == "bf16":
            tl.store(values + to_key, y1, is_value[:, None] & inside)
            tl.store(values + to_key + D // 2, y2, is_value[:, None] & inside)
        else:
            # Loaded once more, as threads store them (`apart` hides that they lie side by side): no bytes move
            # between threads.
            to_value = place[:, None] * (D * P) + i[None, :] * P + offset
            again = source + i[None, :] * apart
            v1 = tl.load(again, is_value[:, None] & inside, 0.0).to(tl.float32)
            v2 = tl.load(again + D // 2, is_value[:, None] & inside, 0.0).to(tl.float32)
            z1, z2, value_scale = _encode(v1, v2, KV)
            tl.store(values + to_value, z1, is_value[:, None] & inside)
            tl.store(values + to_value + D // 2 * P, z2, is_value[:, None] & inside)
        if KV == "int8":
            tl.store(key_scales + place * P + offset, scale, is_key)
            tl.store(value_scales + place * P + offset, value_scale, is_value)


@triton.jit
def _read(at, mask, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask, other)
    else:  # noqa: RET505 - a branch at compile time
        return tl.load(at)


@triton.jit
def _widen(x, KV: tl.constexpr, ASM: tl.constexpr):
    """Keys or values as products take them, exactly.

    Codes of int8 would go through the conversion unit one by one; four at a time they become the low bytes of fp16
    1024 + (code + 128), less 1152.
    """
    if KV == "bf16":
        return x
    elif KV == "int8" and ASM:  # noqa: RET505 - a branch at compile time
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, c;
            xor.b32 u, $2, 0x80808080;
            mov.b32 c, 0x64806480;
            prmt.b32 $0, u, 0x64646464, 0x4140;
            prmt.b32 $1, u, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, c;
            sub.f16x2 $1, $1, c;
            }""",
            "=&r,=&r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return x.to(tl.float16)


@triton.jit
def _share(most, total, sinks, head, real, SINKS: tl.constexpr):
    """What to multiply sums of values by, for rows of this maximum and total; 0 takes nothing into an empty row."""
    kept = tl.full(most.shape, 1.0, tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, real, 0.0) * 1.4426950408889634
        top = tl.maximum(most, sink)
        kept = tl.math.exp2(most - top)
        total = total * kept + tl.math.exp2(sink - top)
    return kept / tl.where(total > 0.0, total, 1.0)


@triton.jit
def _parts(length, WINDOW: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """First tile that the last token sees, tiles, and tiles in a part."""
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    first = lowest // N
    tiles = tl.cdiv(length, N) - first
    return lowest, first, tiles, tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)


@triton.jit
def _halves(x):
    """float32 as the sum of two e4m3, to some 8 bits: itself rounded, and what rounding it left."""
    first = x.to(tl.float8e4nv)
    return first, (x - first.to(tl.float32)).to(tl.float8e4nv)


@triton.jit
def _planes(x):
    """float32 [K, HEADS] up to 16256, rounded to whole numbers, as int8 [K, 2 HEADS]: 128 * first + second."""
    # Adding and taking 1.5 * 2^23 rounds to nearest even.
    whole = (x + 12582912.0) - 12582912.0
    high = (whole * 0.0078125 + 12582912.0) - 12582912.0
    low = whole - high * 128.0
    # As fp8 and back: Triton 3.6 fails where it finds a product's operand joined in the type of the product.
    first = high.to(tl.int8).to(tl.float8e4nv, bitcast=True)
    both = tl.join(first, low.to(tl.int8).to(tl.float8e4nv, bitcast=True))
    return tl.reshape(both, [x.shape[0], 2 * x.shape[1]]).to(tl.int8, bitcast=True)


@triton.jit
def _summed(x):
    """Products with `_planes`, int32 [M, 2 HEADS], joined to float32 [M, HEADS]."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return (first * 128 + second).to(tl.float32)


@triton.jit
def _entries(tables, tile, length, lowest, P: tl.constexpr, N: tl.constexpr):
    """Blocks of a tile, int32 [N / P], or one where a block is longer; 0 where nobody sees any of its tokens."""
    if P >= N:
        return tl.load(tables + tile * N // P, (tile * N < length) & (tile * N + N > lowest), 0)
    else:  # noqa: RET505 - a branch at compile time
        i = tile * (N // P) + tl.arange(0, N // P)
        return tl.load(tables + i, (i * P < length) & (i * P + P > lowest), 0)


@triton.jit
def _tokens(entries, tile, g, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Head of a block, and token within it, of each token of a tile [N]."""
    inner = (tile * N + tl.arange(0, N)) % P
    if P >= N:
        place = entries.to(tl.int64) * G + g + tl.zeros([N], tl.int64)
    else:
        spread = tl.reshape(tl.broadcast_to(entries[:, None], [N // P, P]), [N])
        place = tl.max_constancy(spread, 16).to(tl.int64) * G + g
    return place, inner


@triton.jit
def _scales(
    key_scales,
    value_scales,
    entries,
    tile,
    length,
    lowest,
    g,
    G: tl.constexpr,
    P: tl.constexpr,
    KV: tl.constexpr,
    N: tl.constexpr,
):
    """Scales of keys and of values of a tile's tokens, bf16 [N]; 0 for those that nobody sees."""
    if KV == "int8":
        n = tile * N + tl.arange(0, N)
        place, inner = _tokens(entries, tile, g, G, P, N)
        there = (n < length) & (n >= lowest)
        return tl.load(key_scales + place * P + inner, there, 0.0), tl.load(
            value_scales + place * P + inner, there, 0.0
        )
    else:  # noqa: RET505 - a branch at compile time
        return tl.zeros([1], tl.bfloat16), tl.zeros([1], tl.bfloat16)


@triton.jit
def _decode_tile(
    q, scale, acc, most, total, tile, entries, key_scale, value_scale, length, lowest, keys, values, g,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, KV: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take a tile of N tokens into a running softmax: (acc, most, total) afterwards.

    Products have tokens, or elements of a head, for rows and query heads for columns: Hopper's tensor cores take 64
    rows straight from shared memory, and as few as 8 columns.
    """
    n = tile * N + tl.arange(0, N)
    d = tl.arange(0, DIM)
    there = (n < length) & (n >= lowest)
    # Loads go by runs of 16 tokens, never beyond a block, so that masks leave vectors of them whole.
    near = (n // 16 < (length + 15) // 16) & (n // 16 >= lowest // 16)
    real = d < D
    place, inner = _tokens(entries, tile, g, G, P, N)
    key_at = keys + (place * P + inner)[:, None] * D + d[None, :]
    if MASKED:
        k = _read(key_at, near[:, None] & real[None, :], 0.0, True)
    else:
        k = _read(key_at, real[None, :], 0.0, D != DIM)
    if KV == "bf16":
        scores = tl.dot(k, q) * scale
    else:
        scores = _summed(tl.dot(k, q, out_dtype=tl.int32)) * scale[None, :] * key_scale.to(tl.float32)[:, None]
    if MASKED:
        scores = tl.where(there[:, None], scores, float("-inf"))
    top = tl.maximum(most, tl.max(scores, 0))
    kept = tl.math.exp2(most - top)
    p = tl.math.exp2(scores - top[None, :])
    total = total * kept[None, :] + p
    if KV == "bf16":
        value_at = values + (place * P + inner)[:, None] * D + d[None, :]
        v_real = near[:, None] & real[None, :] if MASKED else real[None, :]
    else:
        value_at = values + (place * (D * P) + inner)[None, :] + d[:, None] * P
        v_real = near[None, :] & real[:, None] if MASKED else real[:, None]
    v = _read(value_at, v_real, 0.0, MASKED or D != DIM)
    if KV == "bf16":
        if MASKED:
            v = tl.where(there[:, None], v, 0.0)  # NaN of who had the block before, times 0, would be NaN
        acc = tl.dot(tl.trans(v), p.to(tl.bfloat16), acc * kept[None, :])
    else:
        wide = value_scale.to(tl.float32)
        largest = tl.max(wide, 0)
        steps = tl.where(largest > 0.0, 16256.0 / largest, 0.0)
        weight = _planes(p * (wide * steps)[:, None])
        acc = acc * kept[None, :] + _summed(tl.dot(v, weight, out_dtype=tl.int32)) * (largest / 16256.0)
    return acc, top, total


@triton.jit
def _any_tile(
    q, scale, acc, most, total, tile, entries, key_scale, value_scale, length, lowest, keys, values, g,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, KV: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`_decode_tile`, or over fp8 `_tile`, with a row for each query head."""
    if KV == "fp8":
        last = tl.zeros(most.shape, tl.int32) + (length - 1)
        return _tile(
            q, q, scale, acc, most, total, tile, entries, key_scale, value_scale, length, lowest, last, keys, values, g,
            G, D, DIM, P, 0, KV, N, False, MASKED,
        )  # fmt: skip
    else:  # noqa: RET505 - a branch at compile time
        return _decode_tile(
            q, scale, acc, most, total, tile, entries, key_scale, value_scale, length, lowest, keys, values, g,
            G, D, DIM, P, KV, N, MASKED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(  # noqa: PLR0912, PLR0915 - most branches are at compile time
    q, keys, values, key_scales, value_scales, block_tables, seq_lens, sinks, out, parts, sums, counters,
    q_stride, out_stride, table_stride, scale,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr,
    WINDOW: tl.constexpr, KV: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    LEAST: tl.constexpr, SINKS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The query heads of one key-value head over one part of one sequence; the last part to come joins them.

    counters: int32 [S, G], parts that came, zero between launches.
    """
    g, s, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(seq_lens + s)
    lowest, first, tiles, each = _parts(length, WINDOW, N, SPLITS, LEAST)
    begin = first + part * each
    end = tl.minimum(begin + each, first + tiles)
    tables = block_tables + s * table_stride
    if WINDOW == 0:
        # What a tile's loads need is loaded while tiles before it are multiplied.
        entries = _entries(tables, begin, length, lowest, P, N)
        following = _entries(tables, begin + 1, length, lowest, P, N)
    follow(AHEAD)
    if (begin < end) | (part == 0):
        h = tl.arange(0, HEADS)
        d = tl.arange(0, DIM)
        head = g * GROUP + h
        mask = (h < GROUP)[None, :] & (d < D)[:, None]
        at = head[None, :] * D + d[:, None]
        most = tl.full([HEADS], float("-inf"), tl.float32)
        if KV == "fp8":
            row_at = q + s * q_stride + head[:, None] * D + d[None, :]
            wide = tl.load(row_at, (h < GROUP)[:, None] & (d < D)[None, :], 0.0).to(tl.float32)
            columns = tl.minimum(tl.maximum(wide, -65504.0), 65504.0).to(tl.float16)
            rate = tl.zeros([HEADS], tl.float32) + scale
            acc = tl.zeros([HEADS, DIM], tl.float32)
            totals = tl.zeros([HEADS], tl.float32)
        else:
            columns = tl.load(q + s * q_stride + at, mask, 0.0)
            if KV == "int8":
                wide = columns.to(tl.float32)
                largest = tl.maximum(tl.max(tl.abs(wide), 0), 1e-30)
                columns = _planes(wide * (16256.0 / largest)[None, :])
                rate = largest * (scale / 16256.0)
            else:
                rate = scale
            acc = tl.zeros([DIM, HEADS], tl.float32)
            totals = tl.zeros([N, HEADS], tl.float32)  # summed once, at the end
        whole = begin
        if WINDOW == 0:
            whole = tl.minimum(end, length // N)
            key_scale, value_scale = _scales(key_scales, value_scales, entries, begin, length, lowest, g, G, P, KV, N)
            for tile in range(begin, whole):
                later = _entries(tables, tile + 2, length, lowest, P, N)
                next_key_scale, next_value_scale = _scales(
                    key_scales, value_scales, following, tile + 1, length, lowest, g, G, P, KV, N
                )
                acc, most, totals = _any_tile(
                    columns, rate, acc, most, totals, tile, entries, key_scale, value_scale, length, lowest, keys,
                    values, g, G, D, DIM, P, KV, N, False,
                )  # fmt: skip
                entries = tl.maximum(following, 0)  # the pipeliner wants each carried value computed in the loop
                following = later
                key_scale, value_scale = next_key_scale, next_value_scale
        for tile in range(tl.maximum(begin, whole), end):
            entries = _entries(tables, tile, length, lowest, P, N)
            key_scale, value_scale = _scales(key_scales, value_scales, entries, tile, length, lowest, g, G, P, KV, N)
            acc, most, totals = _any_tile(
                columns, rate, acc, most, totals, tile, entries, key_scale, value_scale, length, lowest, keys, values,
                g, G, D, DIM, P, KV, N, True,
            )  # fmt: skip
        if KV == "fp8":
            total = totals
            acc = tl.trans(acc)
        else:
            total = tl.sum(totals, 0)
        to = out + s * out_stride + at
        if SPLITS == 1 or tiles <= each:
            result = acc * _share(most, total, sinks, head, h < GROUP, SINKS)[None, :]
            tl.store(to, result.to(out.dtype.element_ty), mask)
        else:
            start = (s * (G * GROUP) + head) * SPLITS
            where = start + part
            tl.store(parts + where[None, :] * D + d[:, None], acc, mask)
            tl.store(sums + where * 2, most, h < GROUP)
            tl.store(sums + where * 2 + 1, total, h < GROUP)
            tl.debug_barrier()
            used = tl.cdiv(tiles, each)
            arrived = tl.atomic_add(counters + s * G + g, 1, sem="acq_rel")
            if arrived == used - 1:
                _join(
                    parts, sums, sinks, to, start, used, head, h < GROUP, mask,
                    D, DIM, SINKS, HEADS, PARTS,
                )  # fmt: skip
                tl.store(counters + s * G + g, 0)  # as the next launch expects it


@triton.jit
def _join(
    parts, sums, sinks, to, start, used, head, real, mask,
    D: tl.constexpr, DIM: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All parts of some heads of a sequence, [DIM, HEADS] to `to`. start: where the parts of each head begin."""
    part = tl.arange(0, PARTS)
    d = tl.arange(0, DIM)
    some = (part < used)[:, None] & real[None, :]
    sum_at = sums + (start[None, :] + part[:, None]) * 2
    maxima = tl.load(sum_at, some, float("-inf"), cache_modifier=".cg")
    totals = tl.load(sum_at + 1, some, 0.0, cache_modifier=".cg")
    most = tl.max(maxima, 0)
    top = tl.where(most == float("-inf"), 0.0, most)  # columns without a head
    total = tl.sum(totals * tl.math.exp2(maxima - top[None, :]), 0)
    acc = tl.zeros([DIM, HEADS], tl.float32)
    for i in tl.range(0, used, loop_unroll_factor=4):  # four loads on their way at once
        weight = tl.math.exp2(tl.load(sums + (start + i) * 2, real, float("-inf"), cache_modifier=".cg") - top)
        acc += tl.load(parts + (start + i)[None, :] * D + d[:, None], mask, 0.0, cache_modifier=".cg") * weight[None, :]
    result = acc * _share(top, total, sinks, head, real, SINKS)[None, :]
    tl.store(to, result.to(to.dtype.element_ty), mask)


@triton.jit
def _tile(
    q, q_rest, scale, acc, most, total, tile, entries, key_scale, value_scale, limit, lowest, pos, keys, values, g,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, WINDOW: tl.constexpr, KV: tl.constexpr,
    N: tl.constexpr, ASM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take a tile of N tokens into a running softmax: (acc, most, total) afterwards.

    q: fp16 or bf16; or in fp8 the larger half of the queries, and q_rest the smaller. scale: over fp8 one for each row.
    A row sees tokens up to pos [ROWS] and, with a window, above pos - WINDOW. Tokens from `limit` on or before `lowest`
    are not loaded.
    """
    n = tile * N + tl.arange(0, N)
    d = tl.arange(0, DIM)
    there = (n < limit) & (n >= lowest)
    # Loads go by runs of 16 tokens, never beyond a block, so that masks leave vectors of them whole.
    near = (n // 16 < (limit + 15) // 16) & (n // 16 >= lowest // 16)
    place, inner = _tokens(entries, tile, g, G, P, N)
    token = place * P + inner
    key_at = keys + token[None, :] * D + d[:, None]
    if KV == "bf16":
        value_at = values + token[:, None] * D + d[None, :]
    else:
        value_at = values + (place * (D * P) + inner)[:, None] + d[None, :] * P
    real = d < D
    if MASKED:
        k = _read(key_at, near[None, :] & real[:, None], 0.0, True)
        v_real = near[:, None] & real[None, :]
    else:
        k = _read(key_at, real[:, None], 0.0, D != DIM)
        v_real = real[None, :]
    if q.dtype == tl.float8e4nv:  # noqa: SIM108 - branches have different types
        scores = tl.dot(q_rest, k, tl.dot(q, k))
    else:
        scores = tl.dot(q, _widen(k, KV, ASM))
    if KV == "int8":
        scores *= key_scale.to(tl.float32)[None, :]
    if MASKED:
        seen = (n[None, :] <= pos[:, None]) & there[None, :]
        if WINDOW > 0:
            seen = seen & (n[None, :] > pos[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(most, tl.max(scores, 1) * scale)
    base = top
    if MASKED and WINDOW > 0:
        base = tl.where(top == float("-inf"), 0.0, top)  # a row may see nothing of its first tiles
    kept = tl.math.exp2(most - base)
    p = tl.math.exp2(scores * (scale[:, None] if KV == "fp8" else scale) - base[:, None])
    total = total * kept + tl.sum(p, 1)
    if KV == "int8":
        p *= value_scale.to(tl.float32)[None, :]
    v = _widen(_read(value_at, v_real, 0.0, MASKED or D != DIM), KV, ASM)
    if MASKED and KV != "int8":
        v = tl.where(there[:, None], v, 0.0)  # NaN of who had the block before, times 0, would be NaN
    acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None])
    return acc, top, total


@triton.jit
def _sequence(cu_seqlens, num_sequences, instance, QUERIES: tl.constexpr):
    """Whose queries an instance has: sequence s has its instances from cu_seqlens[s] // QUERIES + s on."""
    low = instance * 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // QUERIES + middle <= instance:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _queries(q, at, mask, scale, KV: tl.constexpr):
    """Queries [ROWS, DIM] in the type of the products, what that leaves of them, and the scale of their scores."""
    x = tl.load(q + at, mask, 0.0)
    if KV == "fp8":
        wide = x.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), 1), 1e-30)
        first, rest = _halves(wide * (448.0 / largest)[:, None])
        return first, rest, largest * (scale / 448.0)
    elif KV == "int8":  # noqa: RET505 - a branch at compile time
        x = tl.minimum(tl.maximum(x.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
        return x, x, scale
    else:
        return x, x, scale


@triton.jit(do_not_specialize=["table_stride", "num_sequences"])
def prefill_kernel(
    q, keys, values, key_scales, value_scales, block_tables, cu_seqlens, seq_lens, sinks, out,
    q_stride, out_stride, table_stride, num_sequences, scale,
    G: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr, WINDOW: tl.constexpr, KV: tl.constexpr, N: tl.constexpr, SINKS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """QUERIES tokens of one sequence times the query heads of one key-value head."""
    g = tl.program_id(0)
    instance = tl.num_programs(1) - 1 - tl.program_id(1)  # late queries see most: they go first
    s = _sequence(cu_seqlens, num_sequences, instance, QUERIES)
    start = tl.load(cu_seqlens + s)
    asked = tl.load(cu_seqlens + s + 1) - start
    own = (instance - (start // QUERIES + s)) * QUERIES  # first query of this tile
    if own < asked:
        length = tl.load(seq_lens + s)
        before = length - asked
        r = tl.arange(0, ROWS)
        d = tl.arange(0, DIM)
        query = own + r // GROUP
        head = g * GROUP + r % GROUP
        pos = before + query
        mask = ((query < asked) & (r // GROUP < QUERIES))[:, None] & (d < D)[None, :]
        row = (start + query).to(tl.int64)
        at = head[:, None] * D + d[None, :]
        rows, rest, rate = _queries(q, row[:, None] * q_stride + at, mask, scale, KV)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        tables = block_tables + s.to(tl.int64) * table_stride
        limit = tl.minimum(length, before + own + QUERIES)
        lowest = 0
        whole = (before + own + 1) // N  # tiles that all queries see to their end
        if WINDOW > 0:
            lowest = tl.maximum(before + own - WINDOW + 1, 0)
            whole = lowest // N
        else:
            # What a tile's loads need is loaded while the tile before it is multiplied.
            entries = _entries(tables, 0, limit, lowest, P, N)
            following = _entries(tables, 1, limit, lowest, P, N)
            key_scale, value_scale = _scales(key_scales, value_scales, entries, 0, limit, lowest, g, G, P, KV, N)
            for tile in range(0, whole):
                later = _entries(tables, tile + 2, limit, lowest, P, N)
                next_key_scale, next_value_scale = _scales(
                    key_scales, value_scales, following, tile + 1, limit, lowest, g, G, P, KV, N
                )
                acc, most, total = _tile(
                    rows, rest, rate, acc, most, total, tile, entries, key_scale, value_scale, limit, lowest, pos, keys,
                    values, g, G, D, DIM, P, WINDOW, KV, N, ASM, False,
                )  # fmt: skip
                entries = tl.maximum(following, 0)  # the pipeliner wants each carried value computed in the loop
                following = later
                key_scale, value_scale = next_key_scale, next_value_scale
        for tile in range(whole, tl.cdiv(limit, N)):
            entries = _entries(tables, tile, limit, lowest, P, N)
            key_scale, value_scale = _scales(key_scales, value_scales, entries, tile, limit, lowest, g, G, P, KV, N)
            acc, most, total = _tile(
                rows, rest, rate, acc, most, total, tile, entries, key_scale, value_scale, limit, lowest, pos, keys,
                values, g, G, D, DIM, P, WINDOW, KV, N, ASM, True,
            )  # fmt: skip
        result = acc * _share(most, total, sinks, head, r < QUERIES * GROUP, SINKS)[:, None]
        tl.store(out + row[:, None] * out_stride + at, result.to(out.dtype.element_ty), mask)
