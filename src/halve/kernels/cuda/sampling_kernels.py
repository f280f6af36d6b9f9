"""The kernels of `halve.kernels.cuda.sampling`, which says what they do in turn."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["words", "rows"])
def adjust_kernel(
    logits, bias, counts, seen, allowed, penalties, out, stride, words, rows, V: tl.constexpr, WIDTH: tl.constexpr
):
    """A tile of a row of z, each step in float64."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = i < V
    z = tl.load(logits + row * stride + i, inside, 0.0).to(tl.float64)
    if allowed is not None:
        word = tl.load(allowed + row * words + i // 32, inside, 0)
        z = tl.where(((word >> (i % 32)) & 1) != 0, z, float("-inf"))
    if bias is not None:
        z += tl.load(bias + row * V + i, inside, 0.0).to(tl.float64)
    if counts is not None:
        repetition = tl.load(penalties + row)
        frequency = tl.load(penalties + rows + row)
        presence = tl.load(penalties + 2 * rows + row)
        count = tl.load(counts + row * V + i, inside, 0)
        known = (count > 0) | (tl.load(seen + row * V + i, inside, 0) != 0)
        z = tl.where(known, tl.where(z > 0, z / repetition, z * repetition), z)
        z -= frequency * count.to(tl.float64)
        z -= presence * (count > 0).to(tl.float64)
    tl.store(out + row * V + i, z.to(tl.float32), inside)


@triton.jit
def _key(z):
    """Whole numbers in the order of float32 z; -0 and 0 are one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _keys(at, first, V: tl.constexpr, WIDTH: tl.constexpr):
    """Ids, logits and keys of a tile of a row; logits are -inf beyond its end."""
    i = first + tl.arange(0, WIDTH)
    z = tl.load(at + i, i < V, float("-inf")).to(tl.float32)
    return i, z, _key(z)


@triton.jit
def _largest(at, V: tl.constexpr, WIDTH: tl.constexpr):
    """Largest logit, its first id, and whether there is NaN or +inf."""
    top = float("-inf")
    token = 0
    for first in range(0, V, WIDTH):
        _i, z, _key_of = _keys(at, first, V, WIDTH)
        z = tl.where(z < float("inf"), z, float("inf"))  # NaN shows as +inf
        best, where = tl.max(z, 0, return_indices=True)
        token = tl.where(best > top, first + where, token)
        top = tl.maximum(top, best)
    return top, token


@triton.jit
def _candidates(at, groups, first, n, V: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Logits and keys [CHUNK, GROUP] of the candidate groups from `first` on; -inf beyond the n-th."""
    j = first + tl.arange(0, CHUNK)
    i = tl.load(groups + j, j < n, V)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z = tl.load(at + i, (j < n)[:, None] & (i < V), float("-inf")).to(tl.float32)
    return z, _key(z)


@triton.jit
def _holding(
    at, groups, n, floor, top, rate, limit, by_weight, V: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr
):
    """The largest key, `floor` or more, at and above which candidates count, or weigh, `limit`.

    Weight: exp2((z - top) * rate).
    """
    low = floor.to(tl.int64)  # holds enough
    high = _key(top).to(tl.int64) + 1  # holds nothing
    while high - low > 1:
        middle = (low + high) // 2
        held = tl.zeros([CHUNK, GROUP], tl.float64)
        for first in range(0, n, CHUNK):
            z, key = _candidates(at, groups, first, n, V, GROUP, CHUNK)
            worth = tl.where(by_weight, tl.math.exp2((z - top) * rate).to(tl.float64), 1.0)
            held += tl.where((key >= middle) & (z > float("-inf")), worth, 0.0)
        enough = tl.sum(held) >= limit
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _above(at, groups, n, key_limit, top, rate, V: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Weight and count of candidates above a key, and the count of those that equal it."""
    weight = tl.zeros([CHUNK, GROUP], tl.float64)
    count = tl.zeros([CHUNK, GROUP], tl.int32)
    equal = tl.zeros([CHUNK, GROUP], tl.int32)
    for first in range(0, n, CHUNK):
        z, key = _candidates(at, groups, first, n, V, GROUP, CHUNK)
        there = z > float("-inf")
        above = there & (key > key_limit)
        weight += tl.where(above, tl.math.exp2((z - top) * rate).to(tl.float64), 0.0)
        count += above.to(tl.int32)
        equal += (there & (key == key_limit)).to(tl.int32)
    return tl.sum(weight), tl.sum(count), tl.sum(equal)


@triton.jit
def _weight_of(key, top, rate):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return tl.math.exp2((bits.to(tl.float32, bitcast=True) - top) * rate).to(tl.float64)


@triton.jit
def _floor(most, top, rate, top_k, tail, GROUP: tl.constexpr):
    """A key at and above which is every token that top_k, or else top_p, keeps; most: largest logits of all groups.

    top_k groups reach the top_k-th largest of their maxima, so that many tokens do. Tokens below a key z weigh no more
    than GROUP times min(w(z), w(maximum)) a group; while that is no more than the share outside top_p, the tokens from
    z on hold top_p.
    """
    low = tl.full([], -2147483647 - 1, tl.int64)
    high = _key(top).to(tl.int64) + 1
    key = _key(most)
    weight = tl.math.exp2((most - top) * rate)
    while high - low > 1:
        middle = (low + high) // 2
        if top_k > 0:
            low_enough = tl.sum(((key >= middle) & (most > float("-inf"))).to(tl.int32), 0) >= top_k
        else:
            at_middle = _weight_of(middle.to(tl.int32), top, rate).to(tl.float32)
            low_enough = tl.sum(tl.minimum(weight, at_middle).to(tl.float64), 0) * GROUP <= tail
        low = tl.where(low_enough, middle, low)
        high = tl.where(low_enough, high, middle)
    return low.to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def survey_kernel(
    logits, floats, maxima, ids, sums, group_maxima, stride, rows,
    V: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of a tile of a row: its largest logit and that one's first id, the largest of each group, the sum of weights.

    Weights are relative to the tile's largest. NaN shows as +inf.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tile * WIDTH + tl.arange(0, WIDTH)
    z = tl.load(logits + row * stride + i, i < V, float("-inf")).to(tl.float32)
    z = tl.where(z < float("inf"), z, float("inf"))
    top, first = tl.max(z, 0, return_indices=True)
    tl.store(maxima + row * TILES + tile, top)
    tl.store(ids + row * TILES + tile, tile * WIDTH + first)
    temperature = tl.load(floats + row)
    if temperature > 0.0:
        rate = _rate(temperature)
        base = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        tl.store(sums + row * TILES + tile, tl.sum(tl.math.exp2((z - base) * rate).to(tl.float64), 0))
        groups: tl.constexpr = WIDTH // GROUP
        of_group = tl.max(tl.reshape(z, [groups, GROUP]), 1)
        tl.store(group_maxima + (row * TILES + tile) * groups + tl.arange(0, groups), of_group)


@triton.jit
def _rate(temperature):
    return tl.minimum(1.4426950408889634 / temperature, 3e38).to(tl.float32)


@triton.jit
def _top(maxima, row, TILES: tl.constexpr, PADDED: tl.constexpr):
    """Largest logits of a row's tiles, the largest of all, and the row's status."""
    tile = tl.arange(0, PADDED)
    most = tl.load(maxima + row * TILES + tile, tile < TILES, float("-inf"))
    top = tl.max(most, 0)
    return most, top, tl.where(top == float("inf"), 1, tl.where(top == float("-inf"), 3, 0))


@triton.jit(do_not_specialize=["rows"])
def cut_kernel(
    logits, floats, whole, maxima, sums, group_maxima, candidates, limits, lowest, stride, rows,
    V: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """What top_k, top_p and min_p keep of a row: tokens above a key, the first few at it, and none below a logit.

    top_k and top_p look at candidates alone: at groups of tokens whose largest is above a floor.
    """
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    tops, top, state = _top(maxima, row, TILES, PADDED)
    temperature = tl.load(floats + row)
    top_k, top_p, min_p = tl.load(whole + row), tl.load(floats + rows + row), tl.load(floats + 2 * rows + row)
    if (temperature > 0.0) & (state == 0):
        rate = _rate(temperature)
        least = -2147483647 - 1
        key = tl.full([], least, tl.int32)
        equal = tl.full([], V, tl.int32)
        by_count = (top_k > 0) & (top_k < V)
        if by_count | (top_p < 1.0):
            tile = tl.arange(0, PADDED)
            shares = tl.load(sums + row * TILES + tile, tile < TILES, 0.0)
            total = tl.sum(shares * tl.math.exp2((tops - top) * rate).to(tl.float64), 0)
            group = tl.arange(0, GROUPS)
            own = row * TILES * (GROUPS // PADDED)
            most = tl.load(group_maxima + own + group, group < TILES * (GROUPS // PADDED), float("-inf"))
            # A thousandth of the tail is left to rounding.
            floor = _floor(most, top, rate, tl.where(by_count, top_k, 0), (1.0 - top_p) * total * 0.999, GROUP)
            chosen = (_key(most) >= floor) & (most > float("-inf"))
            rank = tl.cumsum(chosen.to(tl.int32), 0)
            groups = candidates + row * GROUPS
            tl.store(groups + rank - 1, group, chosen)
            n = tl.sum(chosen.to(tl.int32), 0)
            tl.debug_barrier()  # other threads' stores are read below
            if by_count:
                key = _holding(at, groups, n, floor, top, rate, top_k.to(tl.float64), False, V, GROUP, CHUNK)
                _weight, count, there = _above(at, groups, n, key, top, rate, V, GROUP, CHUNK)
                equal = tl.minimum((top_k - count).to(tl.int32), there)
            if top_p < 1.0:
                if by_count:
                    above, _count, there = _above(at, groups, n, key, top, rate, V, GROUP, CHUNK)
                    one = tl.where(key == least, 0.0, _weight_of(key, top, rate))
                    total = above + one * tl.minimum(equal, there).to(tl.float64)
                share = top_p * total
                found = _holding(at, groups, n, tl.maximum(key, floor), top, rate, share, True, V, GROUP, CHUNK)
                above, _count, there = _above(at, groups, n, found, top, rate, V, GROUP, CHUNK)
                most_equal = tl.where(found == key, tl.minimum(equal, there), there)
                needed = tl.ceil((share - above) / tl.maximum(_weight_of(found, top, rate), 1e-300)).to(tl.int64)
                equal = tl.minimum(tl.maximum(needed, 1), most_equal.to(tl.int64)).to(tl.int32)
                key = found
        tl.store(limits + row * 2, key)
        tl.store(limits + row * 2 + 1, equal)
        bound = top.to(tl.float64) + temperature * tl.log(tl.where(min_p > 0.0, min_p, 1.0))
        tl.store(lowest + row, tl.where(min_p > 0.0, bound, float("-inf")))


@triton.jit
def _kept(z, key, key_limit, left, lowest):
    """Whether tokens of a tile are kept, of those at the limit the first `left`; and how many equal the limit."""
    same = (key == key_limit) & (z > float("-inf"))
    rank = tl.cumsum(same.to(tl.int32), 0)
    kept = (z > float("-inf")) & ((key > key_limit) | (same & (rank <= left))) & (z.to(tl.float64) >= lowest)
    return kept, tl.sum(same.to(tl.int32), 0)


@triton.jit
def _uniform(seed, step):
    """53 random bits of Philox 4x64-10 as a number in [0, 1), as numpy draws the first one."""
    k0 = seed.to(tl.uint64, bitcast=True)
    k1 = tl.zeros_like(k0)
    c0 = (step + 1).to(tl.uint64, bitcast=True)  # numpy counts up before it draws
    c1 = tl.zeros_like(k0)
    c2 = tl.zeros_like(k0)
    c3 = tl.zeros_like(k0)
    m0 = tl.full([], 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full([], 0xCA5A826395121157, tl.uint64)
    w0 = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    w1 = tl.full([], 0xBB67AE8584CAA73B, tl.uint64)
    for _ in tl.static_range(10):
        h0 = tl.umulhi(m0, c0)
        h1 = tl.umulhi(m1, c2)
        l0 = m0 * c0
        l1 = m1 * c2
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = k0 + w0
        k1 = k1 + w1
    return (c0 >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def weigh_kernel(
    logits, floats, maxima, limits, lowest, weights, equals, stride,
    V: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Weight of a tile's tokens above the limit, and how many tokens equal it."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _tops, top, state = _top(maxima, row, TILES, PADDED)
    temperature = tl.load(floats + row)
    if (temperature > 0.0) & (state == 0):
        key_limit, bound = tl.load(limits + row * 2), tl.load(lowest + row)
        _i, z, key = _keys(logits + row * stride, tile * WIDTH, V, WIDTH)
        there = (z > float("-inf")) & (z.to(tl.float64) >= bound)
        w = tl.where(there & (key > key_limit), tl.math.exp2((z - top) * _rate(temperature)), 0.0)
        tl.store(weights + row * TILES + tile, tl.sum(w.to(tl.float64), 0))
        tl.store(equals + row * TILES + tile, tl.sum((there & (key == key_limit)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["rows"])
def draw_kernel(
    logits, floats, whole, maxima, ids, limits, lowest, weights, equals, chosen, status, stride, rows,
    V: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A token for a row: in which tile it lies, and then which it is."""
    row = tl.program_id(0).to(tl.int64)
    tops, top, state = _top(maxima, row, TILES, PADDED)
    tile = tl.arange(0, PADDED)
    inside = tile < TILES
    token = tl.min(tl.where(inside & (tops == top), tl.load(ids + row * TILES + tile, inside, V), V), 0)
    temperature = tl.load(floats + row)
    if (temperature > 0.0) & (state == 0):
        rate = _rate(temperature)
        key_limit, bound = tl.load(limits + row * 2), tl.load(lowest + row)
        same = tl.load(equals + row * TILES + tile, inside, 0)
        left = tl.load(limits + row * 2 + 1) - (tl.cumsum(same, 0) - same)  # for this tile, of those at the limit
        taken = tl.minimum(tl.maximum(left, 0), same)
        one = tl.where(taken > 0, _weight_of(key_limit, top, rate), 0.0)
        weight = tl.load(weights + row * TILES + tile, inside, 0.0) + taken.to(tl.float64) * one
        running = tl.cumsum(weight, 0)
        goal = _uniform(tl.load(whole + rows + row), tl.load(whole + 2 * rows + row)) * tl.sum(weight, 0)
        some = inside & (weight > 0.0)
        last = tl.max(tl.where(some, tile, 0), 0)  # the last that adds anything, should sums round short of the goal
        where = tl.minimum(tl.min(tl.where(some & (running > goal), tile, PADDED), 0), last)
        before = tl.sum(tl.where(tile < where, weight, 0.0), 0)
        i, z, key = _keys(logits + row * stride, where * WIDTH, V, WIDTH)
        there = (z > float("-inf")) & (z.to(tl.float64) >= bound)
        at_limit = there & (key == key_limit)
        rank = tl.cumsum(at_limit.to(tl.int32), 0)
        kept = (there & (key > key_limit)) | (at_limit & (rank <= tl.sum(tl.where(tile == where, taken, 0), 0)))
        w = tl.where(kept, tl.math.exp2((z - top) * rate).to(tl.float64), 0.0)
        found = tl.min(tl.where((before + tl.cumsum(w, 0) > goal) & (w > 0.0), i, V), 0)
        token = tl.where(found < V, found, tl.max(tl.where(w > 0.0, i, 0), 0))
    tl.store(chosen + row, tl.where(state == 0, token, -1))
    tl.store(status + row, state)


@triton.jit
def keep_kernel(
    logits,
    floats,
    maxima,
    limits,
    lowest,
    out,
    stride,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Logits of the tokens that the cuts keep, -inf for others."""
    row = tl.program_id(0).to(tl.int64)
    _tops, _top_of, state = _top(maxima, row, TILES, PADDED)
    draws = (tl.load(floats + row) > 0.0) & (state == 0)
    key_limit, left, bound = tl.load(limits + row * 2), tl.load(limits + row * 2 + 1), tl.load(lowest + row)
    for first in range(0, V, WIDTH):
        i, z, key = _keys(logits + row * stride, first, V, WIDTH)
        kept, used = _kept(z, key, key_limit, left, bound)
        left -= used
        tl.store(out + row * V + i, tl.where(kept | (draws == 0), z, float("-inf")), i < V)


@triton.jit(do_not_specialize=["most"])
def logprob_kernel(logits, chosen, wanted, logprobs, ids, values, stride, most, V: tl.constexpr, WIDTH: tl.constexpr):
    """Log-probabilities of a row: of its token and of the likeliest."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    want = tl.load(wanted + row).to(tl.int32)
    top, _first = _largest(at, V, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)
    for first in range(0, V, WIDTH):
        _i, z, _key_of = _keys(at, first, V, WIDTH)
        total += tl.math.exp2((z - top) * 1.4426950408889634).to(tl.float64)
    level = top.to(tl.float64) + tl.log(tl.sum(total, 0))
    token = tl.maximum(tl.load(chosen + row), 0)
    own = (tl.load(at + token).to(tl.float64) - level).to(tl.float32)
    tl.store(logprobs + row, tl.where(want >= 0, own, float("nan")))
    last_key = tl.full([], 2147483647, tl.int32)
    last_id = tl.full([], -1, tl.int32)
    for n in range(0, most):
        if n < want:  # the likeliest of those behind the one before, by size and then by id
            best_key = tl.full([], -2147483647 - 1, tl.int32)
            best_id = tl.full([], V, tl.int32)
            for first in range(0, V, WIDTH):
                i, z, key = _keys(at, first, V, WIDTH)
                behind = (i < V) & ((key < last_key) | ((key == last_key) & (i > last_id)))
                k = tl.max(tl.where(behind, key, -2147483647 - 1), 0)
                j = tl.min(tl.where(behind & (key == k), i, V), 0)
                better = (j < V) & ((k > best_key) | (best_id == V))
                best_id = tl.where(better, j, best_id)
                best_key = tl.where(better, k, best_key)
            last_key = best_key
            last_id = best_id
            value = (tl.load(at + best_id).to(tl.float64) - level).to(tl.float32)
            tl.store(ids + row * most + n, best_id)
            tl.store(values + row * most + n, value)
        else:
            tl.store(ids + row * most + n, -1)
            tl.store(values + row * most + n, float("nan"))
