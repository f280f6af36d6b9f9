"""The kernels of `halve.kernels.cuda.sampling`: one instance a row, which reads the row as often as it needs to."""

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
def _holding(at, floor, top, rate, limit, by_weight, V: tl.constexpr, WIDTH: tl.constexpr):
    """The largest key at and above which tokens count, or weigh, `limit`; what lies above it counts and weighs.

    floor: a key that has enough above it or is the least there is. Weight: exp2((z - top) * rate).
    """
    low = floor.to(tl.int64)  # holds enough
    high = _key(top).to(tl.int64) + 1  # holds nothing
    while high - low > 1:
        middle = (low + high) // 2
        held = tl.zeros([WIDTH], tl.float64)
        for first in range(0, V, WIDTH):
            _i, z, key = _keys(at, first, V, WIDTH)
            worth = tl.where(by_weight, tl.math.exp2((z - top) * rate).to(tl.float64), 1.0)
            held += tl.where((key >= middle) & (z > float("-inf")), worth, 0.0)
        enough = tl.sum(held, 0) >= limit
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _above(at, key_limit, top, rate, V: tl.constexpr, WIDTH: tl.constexpr):
    """Weight and count of tokens above a key, and the count of those that equal it."""
    weight = tl.zeros([WIDTH], tl.float64)
    count = tl.zeros([WIDTH], tl.int32)
    equal = tl.zeros([WIDTH], tl.int32)
    for first in range(0, V, WIDTH):
        _i, z, key = _keys(at, first, V, WIDTH)
        there = z > float("-inf")
        above = there & (key > key_limit)
        weight += tl.where(above, tl.math.exp2((z - top) * rate).to(tl.float64), 0.0)
        count += above.to(tl.int32)
        equal += (there & (key == key_limit)).to(tl.int32)
    return tl.sum(weight, 0), tl.sum(count, 0), tl.sum(equal, 0)


@triton.jit
def _weight_of(key, top, rate):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return tl.math.exp2((bits.to(tl.float32, bitcast=True) - top) * rate).to(tl.float64)


@triton.jit
def _cuts(at, top, rate, temperature, top_k, top_p, min_p, V: tl.constexpr, WIDTH: tl.constexpr):
    """What top_k, top_p and min_p keep: tokens above a key, the first few at it, and none below a logit."""
    least = -2147483647 - 1
    key = tl.full([], least, tl.int32)
    equal = tl.full([], V, tl.int32)
    if (top_k > 0) & (top_k < V):
        key = _holding(at, key, top, rate, top_k.to(tl.float64), False, V, WIDTH)
        _weight, count, there = _above(at, key, top, rate, V, WIDTH)
        equal = tl.minimum((top_k - count).to(tl.int32), there)
    if top_p < 1.0:
        above, _count, there = _above(at, key, top, rate, V, WIDTH)
        one = tl.where(key == least, 0.0, _weight_of(key, top, rate))
        share = top_p * (above + one * tl.minimum(equal, there).to(tl.float64))
        found = _holding(at, key, top, rate, share, True, V, WIDTH)
        above, _count, there = _above(at, found, top, rate, V, WIDTH)
        most = tl.where(found == key, tl.minimum(equal, there), there)
        needed = tl.ceil((share - above) / tl.maximum(_weight_of(found, top, rate), 1e-300)).to(tl.int64)
        equal = tl.minimum(tl.maximum(needed, 1), most.to(tl.int64)).to(tl.int32)
        key = found
    lowest = top.to(tl.float64) + temperature * tl.log(tl.where(min_p > 0.0, min_p, 1.0))
    return key, equal, tl.where(min_p > 0.0, lowest, float("-inf"))


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


@triton.jit(do_not_specialize=["rows"])
def draw_kernel(logits, floats, whole, chosen, status, stride, rows, V: tl.constexpr, WIDTH: tl.constexpr):
    """A token for a row."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    top, token = _largest(at, V, WIDTH)
    state = tl.where(top == float("inf"), 1, tl.where(top == float("-inf"), 3, 0))
    temperature = tl.load(floats + row)
    if (temperature > 0.0) & (state == 0):
        rate = tl.minimum(1.4426950408889634 / temperature, 3e38).to(tl.float32)
        key_limit, equal, lowest = _cuts(
            at, top, rate, temperature, tl.load(whole + row), tl.load(floats + rows + row),
            tl.load(floats + 2 * rows + row), V, WIDTH,
        )  # fmt: skip
        total = tl.zeros([WIDTH], tl.float64)
        left = equal
        for first in range(0, V, WIDTH):
            _i, z, key = _keys(at, first, V, WIDTH)
            kept, used = _kept(z, key, key_limit, left, lowest)
            left -= used
            total += tl.where(kept, tl.math.exp2((z - top) * rate).to(tl.float64), 0.0)
        goal = _uniform(tl.load(whole + rows + row), tl.load(whole + 2 * rows + row)) * tl.sum(total, 0)
        running = tl.zeros([], tl.float64)
        left = equal
        last = tl.full([], 0, tl.int32)  # the last token that adds anything, should sums round short of the goal
        found = tl.full([], V, tl.int32)
        for first in range(0, V, WIDTH):
            i, z, key = _keys(at, first, V, WIDTH)
            kept, used = _kept(z, key, key_limit, left, lowest)
            left -= used
            w = tl.where(kept, tl.math.exp2((z - top) * rate).to(tl.float64), 0.0)
            sums = running + tl.cumsum(w, 0)
            found = tl.minimum(found, tl.min(tl.where((sums > goal) & (w > 0.0), i, V), 0))
            last = tl.maximum(last, tl.max(tl.where(w > 0.0, i, 0), 0))
            running += tl.sum(w, 0)
        token = tl.where(found < V, found, last)
    tl.store(chosen + row, tl.where(state == 0, token, -1))
    tl.store(status + row, state)


@triton.jit(do_not_specialize=["rows"])
def cut_kernel(logits, floats, whole, out, stride, rows, V: tl.constexpr, WIDTH: tl.constexpr):
    """Logits of the tokens that top_k, top_p and min_p keep, -inf for others."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    top, _first = _largest(at, V, WIDTH)
    temperature = tl.load(floats + row)
    temperature = tl.where(temperature > 0.0, temperature, 1.0)
    rate = tl.minimum(1.4426950408889634 / temperature, 3e38).to(tl.float32)
    key_limit, left, lowest = _cuts(
        at, top, rate, temperature, tl.load(whole + row), tl.load(floats + rows + row),
        tl.load(floats + 2 * rows + row), V, WIDTH,
    )  # fmt: skip
    for first in range(0, V, WIDTH):
        i, z, key = _keys(at, first, V, WIDTH)
        kept, used = _kept(z, key, key_limit, left, lowest)
        left -= used
        tl.store(out + row * V + i, tl.where(kept, z, float("-inf")), i < V)


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
