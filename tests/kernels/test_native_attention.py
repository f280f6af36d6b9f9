"""Attention of every row of the C++ that this machine runs, against float64 numpy and against itself cut otherwise."""

import ctypes
from dataclasses import replace
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import KernelError
from halve.hardware import detect_cpu
from halve.kernels import native
from halve.kernels.native import NativeOps
from halve.kernels.native_cache import AttentionRecord, KvWriteRecord, Step, in_own_blocks
from halve.kernels.native_checks import check_batch
from halve.kernels.native_library import library
from halve.kernels.ops import KV_FORMATS, KV_GROUP, AttentionSpec, TokenBatch, kv_block_bytes
from halve.kernels.reference import TorchOps

EPS = 2.0**-24
TINY = 2.0**-100  # below it a kernel of whole numbers takes a query or a weighted value for zero
RUNNABLE = [isa for isa in native.ISAS if set(isa.features) <= detect_cpu().features]
every_isa = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
every_format = pytest.mark.parametrize("kv_format", KV_FORMATS)


@cache
def ops_for(isa, num_threads=1):
    return NativeOps(replace(detect_cpu(), features=frozenset(isa.features)), num_threads=num_threads)


def normal(rows, width, *, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def qkv(tokens, spec, seed=0):
    widths = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return [normal(tokens, n * spec.head_dim, seed=seed + i) for i, n in enumerate(widths)]


def rotated(x):
    """[..., D] by the Walsh-Hadamard matrix, in x's own type and in stages, so that float32 has the kernels' bits."""
    size, apart, shape = x.shape[-1] & -x.shape[-1], 1, x.shape
    while apart < size:
        pairs = x.reshape(*shape[:-1], -1, 2, apart)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack((first + second, first - second), axis=-2).reshape(shape)
        apart *= 2
    return x * x.dtype.type(1 / np.sqrt(size))


def rounded(x, spec, keys=False):
    """Keys or values [T, G * D] as the cache holds them, float64 [T, G, D]; keys of int4 rotated."""
    x = x.reshape(len(x), -1, spec.head_dim)
    if spec.kv_format == "int4":
        x = rotated(x) if keys else x
        groups = []
        for start in range(0, spec.head_dim, KV_GROUP):
            group = x[..., start : start + KV_GROUP]
            high, low = group.max(-1, keepdims=True), group.min(-1, keepdims=True)
            scale = np.where(high >= -low, high, low) / np.float32(-8)
            scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
            scale[np.abs(scale) < 2.0**-126] = 0
            codes = np.clip(np.rint(group / np.where(scale == 0, np.float32(1), scale)), -8, 7)
            groups.append(codes.astype(np.float64) * scale)
        return np.concatenate(groups, axis=-1)
    if spec.kv_format == "bf16":
        x = x.astype(ml_dtypes.bfloat16)
    if spec.kv_format == "int8":
        scale = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float32)
        scale[scale < 2.0**-126] = 0
        codes = np.clip(np.rint(x / np.where(scale == 0, np.float32(1), scale)), -127, 127)
        return codes.astype(np.float64) * scale
    return x.astype(np.float64)


def exact_attention(q, k, v, spec, sinks=None):
    """One sequence, float64: the last len(q) of len(k) positions ask. Output, and how far off it may be, per row.

    The bound of `NativeOps.attention`: d on the logarithm of every weight.
    """
    group, dim = spec.num_heads // spec.num_kv_heads, spec.head_dim
    q, k, v = q.astype(np.float64).reshape(len(q), -1, dim), rounded(k, spec, keys=True), rounded(v, spec)
    size, given = dim & -dim, q
    if spec.kv_format == "int4":
        q = rotated(q)
    out, bound, first = np.empty_like(q), np.empty((*q.shape[:2], 1)), len(k) - len(q)
    for t in range(len(q)):
        own = first + t
        start = 0 if spec.window is None else max(0, own - spec.window + 1)
        start = start if spec.chunk is None else max(start, own // spec.chunk * spec.chunk)
        for h in range(spec.num_heads):
            keys, values = k[start : own + 1, h // group], v[start : own + 1, h // group]
            scores = keys @ q[t, h] / np.sqrt(dim)
            scores = np.append(scores, sinks[h]) if sinks is not None else scores
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, h] = weights[: len(keys)] @ values
            sizes = (np.abs(keys) @ np.abs(q[t, h])).max() / np.sqrt(dim)
            d = (dim + 16) * EPS * sizes + 16 * EPS
            share = (2 * len(keys) + 16) * EPS
            if spec.kv_format == "int8":
                d += max(np.abs(q[t, h]).max() / 65534, TINY) * np.abs(keys).sum(-1).max() / np.sqrt(dim)
                share += 2e-3
            if spec.kv_format == "int4":
                stages = np.log2(size) + 2  # of float32, each of sums of `size` numbers of the query over its root
                turned = stages * EPS * np.abs(given[t, h]).sum() / np.sqrt(size)
                d += (max(np.abs(q[t, h]).max() / 254, TINY) + turned) * np.abs(keys).sum(-1).max() / np.sqrt(dim)
                share += 2e-3
            bound[t, h] = (np.expm1(2 * d) + share) * np.abs(values).max() + 128 * 127 * TINY
    return out.reshape(len(q), -1), np.broadcast_to(bound, q.shape).reshape(len(q), -1)


def assert_within_bound(got, q, k, v, spec, sinks=None):
    exact, bound = exact_attention(q, k, v, spec, sinks)
    assert (np.abs(got - exact) <= bound).all(), (np.abs(got - exact) / bound).max()


SPECS = [
    AttentionSpec(num_heads=4, num_kv_heads=4, head_dim=16),
    AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, kv_format="int8"),
    AttentionSpec(num_heads=20, num_kv_heads=1, head_dim=20, kv_format="fp32"),
    AttentionSpec(num_heads=5, num_kv_heads=5, head_dim=33, kv_format="int8"),
    AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=80, window=5, kv_format="int8"),
    AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=80, window=37),
    AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=1, kv_format="fp32", window=1),
    AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=1024, window=70),
    AttentionSpec(num_heads=7, num_kv_heads=1, head_dim=256, kv_format="int8"),
    AttentionSpec(num_heads=70, num_kv_heads=1, head_dim=32, kv_format="fp32", window=66),
    AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=80, chunk=37),
    AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, kv_format="int8", chunk=16),
    AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=20, kv_format="fp32", chunk=1),
    AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, kv_format="int4"),
    AttentionSpec(num_heads=5, num_kv_heads=5, head_dim=33, kv_format="int4"),
    AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=80, window=5, kv_format="int4"),
    AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=96, window=37, kv_format="int4"),
    AttentionSpec(num_heads=7, num_kv_heads=1, head_dim=256, chunk=37, kv_format="int4"),
]
every_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"H{s.num_heads}-G{s.num_kv_heads}-D{s.head_dim}-w{s.window}-c{s.chunk}-{s.kv_format}"
)


@every_isa
@every_spec
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_over_whole_sequences_stays_within_the_derived_bound(isa, spec, with_sinks):
    lengths = [1, 90, 17]
    batch = TokenBatch.whole([[0] * n for n in lengths])
    q, k, v = qkv(sum(lengths), spec)
    sinks = normal(1, spec.num_heads, seed=9)[0] if with_sinks else None
    got = ops_for(isa, 2).attention(q, k, v, batch, spec, None, sinks)
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        assert_within_bound(got[start:end], q[start:end], k[start:end], v[start:end], spec, sinks)


@settings(deadline=None, max_examples=40)
@given(
    kv_format=st.sampled_from(list(KV_FORMATS)),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    dim=st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48, 96, 112, 128, 144, 240, 256])),
    tokens=st.integers(1, 150),
    window=st.one_of(st.none(), st.integers(1, 160)),
    chunk=st.one_of(st.none(), st.integers(1, 160)),
    seed=st.integers(0, 1000),
)
def test_attention_of_any_shape_stays_within_the_bound(kv_format, heads, kv_heads, dim, tokens, window, chunk, seed):
    spec = AttentionSpec(
        num_heads=heads * kv_heads, num_kv_heads=kv_heads, head_dim=dim, window=window, chunk=chunk, kv_format=kv_format
    )
    q, k, v = qkv(tokens, spec, seed)
    for isa in RUNNABLE:
        got = ops_for(isa).attention(q, k, v, TokenBatch.whole([[0] * tokens]), spec, None)
        assert_within_bound(got[-5:], q[-5:], k, v, spec)


@every_isa
@every_format
@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize(
    ("of_q", "of_k", "of_v"), [(1e-30, 1e30, 1), (1e30, 1e-30, 1e30), (1, 1e-41, 1e-41), (1e-41, 1, 1e-25), (0, 1, 1)]
)
def test_extreme_scales_stay_within_the_bound(isa, kv_format, dim, of_q, of_k, of_v):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=dim, kv_format=kv_format)
    q, k, v = (x * np.float32(size) for x, size in zip(qkv(70, spec), (of_q, of_k, of_v), strict=True))
    got = ops_for(isa).attention(q, k, v, TokenBatch.whole([[0] * 70]), spec, None)
    assert np.isfinite(got).all()
    assert_within_bound(got, q, k, v, spec)


@every_isa
@every_format
@pytest.mark.parametrize("dim", [24, 64])
def test_outliers_and_keys_and_values_of_zero_stay_within_the_bound(isa, kv_format, dim):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=dim, kv_format=kv_format)
    q, k, v = qkv(130, spec)
    k[5], k[60:70], v[64:] = 0, 0, 0
    k[::7, 3] *= 100
    v[::11, 5] *= 1e4
    v[0] *= 1e-6  # the first token takes much weight and says little
    got = ops_for(isa).attention(q, k, v, TokenBatch.whole([[0] * 130]), spec, None)
    assert_within_bound(got, q, k, v, spec)
    zero = ops_for(isa).attention(q, np.zeros_like(k), v, TokenBatch.whole([[0] * 130]), spec, None)
    assert_within_bound(zero, q, np.zeros_like(k), v, spec)


@every_isa
@every_format
@pytest.mark.parametrize("dim", [24, 64])
def test_large_scores_do_not_overflow_and_a_sink_of_minus_infinity_is_no_sink(isa, kv_format, dim):
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=dim, kv_format=kv_format)
    q, k, v = qkv(80, spec)
    q, k = q * 1e3, k * 1e3
    batch, none = TokenBatch.whole([[0] * 80]), np.full(2, -np.inf, np.float32)
    got = ops_for(isa).attention(q, k, v, batch, spec, None)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(ops_for(isa).attention(q, k, v, batch, spec, None, none), got)


@every_isa
@every_format
@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_reaches_the_tokens_that_see_it_and_no_other(isa, kv_format, dim, bad):
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=dim, kv_format=kv_format)
    batch = TokenBatch.whole([[0] * 100, [0] * 5])
    good = qkv(105, spec)
    clean = ops_for(isa).attention(*good, batch, spec, None)
    for which in range(3):
        inputs = [x.copy() for x in good]
        inputs[which][70, 3] = bad
        got = ops_for(isa).attention(*inputs, batch, spec, None)
        spoilt = np.arange(105) == 70 if which == 0 else (np.arange(105) >= 70) & (np.arange(105) < 100)
        np.testing.assert_array_equal(got[~spoilt], clean[~spoilt])
        if which == 0:
            assert not np.isfinite(got[70, :dim]).any()
            np.testing.assert_array_equal(got[70, dim:], clean[70, dim:])
        elif np.isnan(bad):  # the weight of a key of infinity may be 0
            assert not np.isfinite(got[spoilt]).all(-1).any()


@every_format
def test_int8_and_all_other_formats_are_those_of_the_reference(kv_format):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, kv_format=kv_format)
    q, k, v = qkv(1, spec)
    k[:], torch_ops = np.abs(k), TorchOps()
    batch = TokenBatch.whole([[0]])
    expected = torch_ops.to_host(torch_ops.attention(*map(torch_ops.from_host, (q, k, v)), batch, spec, None))
    np.testing.assert_array_equal(expected.reshape(2, 2, 64)[:, 0], rounded(v, spec)[0])
    for isa in RUNNABLE:  # one position: its value, in whole numbers but for the scale
        np.testing.assert_allclose(ops_for(isa).attention(q, k, v, batch, spec, None), expected, rtol=4 * EPS)


# Cut otherwise


class Paged:
    """Sequences over a paged cache whose blocks lie in a shuffled order, fed in steps."""

    def __init__(self, ops, spec, lengths, block_size=4, seed=0):
        self.ops, self.spec, self.block_size = ops, spec, block_size
        per = [-(-n // block_size) for n in lengths]
        order = np.random.default_rng(seed).permutation(sum(per) + 3).astype(np.int32)
        self.tables = np.full((len(lengths), max(per) + 1), -1, np.int32)
        for s, n in enumerate(per):
            self.tables[s, :n], order = order[:n], order[n:]
        self.cache = ops.kv_cache(sum(per) + 3, block_size, spec)

    def batch(self, spans):
        """Spans (sequence, first, end) of one step."""
        positions = np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in spans])
        owner = np.concatenate([np.full(b - a, s) for s, a, b in spans])
        return TokenBatch(
            token_ids=np.zeros(len(positions), np.int32),
            positions=positions,
            cu_seqlens=np.cumsum([0, *(b - a for _, a, b in spans)]).astype(np.int32),
            slot_mapping=self.tables[owner, positions // self.block_size] * self.block_size
            + positions % self.block_size,
            block_tables=self.tables[[s for s, _, _ in spans]].copy(),
        )

    def run(self, inputs, steps, sinks=None):
        """Outputs of each sequence [T, H * D], fed in steps of spans."""
        got = [np.full_like(q, np.nan) for q, _, _ in inputs]
        for spans in steps:
            q, k, v = (np.concatenate([inputs[s][i][a:b] for s, a, b in spans]) for i in range(3))
            out = self.ops.attention(q, k, v, self.batch(spans), self.spec, self.cache, sinks)
            for (s, a, b), end in zip(spans, np.cumsum([b - a for _, a, b in spans]), strict=True):
                got[s][a:b] = out[end - (b - a) : end]
        return got


@every_isa
@every_spec
@pytest.mark.parametrize("block_size", [1, 4, 7, 16])
def test_chunks_single_tokens_neighbours_and_threads_change_no_bit(isa, spec, block_size):
    lengths = (75, 9)
    inputs = [qkv(n, spec, seed=10 * n) for n in lengths]
    sinks = normal(1, spec.num_heads, seed=9)[0]
    alone = [
        Paged(ops_for(isa, 2), spec, (n,), block_size, seed=n).run([x], [[(0, 0, n)]], sinks)[0]
        for n, x in zip(lengths, inputs, strict=True)
    ]
    steps = [[(0, 0, 7)], [(1, 0, 3), (0, 7, 70)], [(0, 70, 71), (1, 3, 3), (1, 3, 9)], [(0, 71, 75)]]
    for threads in (1, 2):
        together = Paged(ops_for(isa, threads), spec, lengths, block_size).run(inputs, steps, sinks)
        for mine, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(mine.view(np.uint32), theirs.view(np.uint32))


@every_isa
@every_format
@pytest.mark.parametrize("window", [None, 2060])
@pytest.mark.parametrize("block_size", [5, 16])
def test_a_context_that_threads_share_gives_the_bits_of_one_that_they_do_not(isa, kv_format, window, block_size):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, kv_format=kv_format, window=window)
    n, ops = 4170, ops_for(isa, 3)
    inputs, sinks = [qkv(n, spec), qkv(20, spec, seed=5)], normal(1, 4, seed=9)[0]
    whole = Paged(ops, spec, (n,), block_size).run(inputs[:1], [[(0, 0, n)]], sinks)[0]
    steps = [[(0, 0, 2040)], [(0, 2040, 2050), (1, 0, 20)], [(0, 2050, 4090)]]
    steps += [[(0, 4090, 4100)], [(0, 4100, 4101)], [(0, 4101, n)]]
    got = Paged(ops, spec, (n, 20), block_size).run(inputs, steps, sinks)[0]
    np.testing.assert_array_equal(got.view(np.uint32), whole.view(np.uint32))
    assert_within_bound(got[-2:], inputs[0][0][-2:], inputs[0][1], inputs[0][2], spec, sinks)


@every_isa
@every_spec
def test_what_a_block_held_before_changes_no_bit(isa, spec):
    inputs, spans = [qkv(70, spec)], [[(0, 0, 33)], [(0, 33, 34)], [(0, 34, 70)]]
    for block_size in (4, 16):
        clean, used = (Paged(ops_for(isa), spec, (70,), block_size) for _ in "ab")
        used.cache.data[:] = 0xFF  # no numbers, in every format
        for mine, theirs in zip(used.run(inputs, spans), clean.run(inputs, spans), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("block_size", [4, 16])
def test_copied_blocks_hold_what_they_were_copied_from(kv_format, block_size):
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=16, kv_format=kv_format)
    n = 3 * block_size
    paged, inputs = Paged(NativeOps(num_threads=2), spec, (n, n), block_size), qkv(n, spec)
    whole = paged.run([inputs], [[(0, 0, n)]])[0]
    paged.ops.copy_blocks(paged.cache, np.stack((paged.tables[0, :3], paged.tables[1, :3]), 1))
    q, k, v = (x[-1:] for x in inputs)
    got = paged.ops.attention(q, k, v, paged.batch([(1, n - 1, n)]), spec, paged.cache)
    np.testing.assert_array_equal(got[0], whole[-1])
    for pairs, message in (
        ([[0, 99]], "block 99"),
        ([[0, 1], [2, 1]], "written twice"),
        ([[0, 1], [1, 2]], "or read too"),
    ):
        with pytest.raises(KernelError, match=message):
            paged.ops.copy_blocks(paged.cache, np.array(pairs, np.int32))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize(("dim", "block_size"), [(64, 16), (1, 1), (33, 5), (80, 16), (1024, 3)])
def test_a_block_has_the_bytes_that_both_languages_say(kv_format, dim, block_size):
    spec = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=dim, kv_format=kv_format)
    cache_ = NativeOps(num_threads=1).kv_cache(2, block_size, spec)
    assert cache_.data.shape == (2, kv_block_bytes(spec, block_size))
    assert library().halve_kv_block_bytes(cache_.address) == kv_block_bytes(spec, block_size)
    assert cache_.data.ctypes.data % 64 == 0


def test_int8_takes_a_little_more_than_half_of_bf16_and_int4_of_int8():
    of = {
        f: kv_block_bytes(AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=64, kv_format=f), 16) for f in KV_FORMATS
    }
    assert of == {
        "fp32": 8 * 16 * 512,
        "bf16": 8 * 16 * 256,
        "int8": 8 * 16 * (128 + 4),
        "int4": 8 * 16 * (64 + 2 * 2 * 2),
    }


def test_a_large_cache_is_zero_and_aligned():
    cache_ = NativeOps(num_threads=1).kv_cache(200, 16, SPECS[1])
    assert cache_.data.ctypes.data % 64 == 0
    assert not cache_.data.any()


@every_isa
@every_format
@pytest.mark.parametrize("dim", [20, 64])
def test_rotation_inside_and_rows_of_a_wider_buffer_give_the_bits_of_separate_operations(isa, kv_format, dim):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=dim, kv_format=kv_format)
    tokens, ops = 40, ops_for(isa)
    both = normal(tokens, 8 * dim)  # q, k and v side by side
    angles = normal(tokens, dim // 2, seed=3)
    cos, sin = np.cos(angles), np.sin(angles)
    q, k, v = (np.ascontiguousarray(x) for x in np.split(both, [4 * dim, 6 * dim], axis=1))
    batch = TokenBatch.whole([[0] * tokens])
    expected = ops.attention(ops.rope(q, cos, sin, dim), ops.rope(k, cos, sin, dim), v, batch, spec, None)
    over_blocks, num_blocks = in_own_blocks(batch)
    step, cache_ = Step(over_blocks), ops.kv_cache(num_blocks, 16, spec)
    out = np.full((tokens, 5 * dim), np.nan, np.float32)
    at, shared = both.ctypes.data, {"cos": cos.ctypes.data, "sin": sin.ctypes.data}
    shared |= {"cache": cache_.address, "batch": step.address}
    write = KvWriteRecord(k=at + 16 * dim, v=at + 24 * dim, k_stride=8 * dim, v_stride=8 * dim, **shared)
    ask = AttentionRecord(
        q=at, q_stride=8 * dim, out=out.ctypes.data, out_stride=5 * dim, num_heads=4, window=0, **shared
    )
    assert library().halve_kv_write(isa.number, ctypes.addressof(write), 1) == 0
    assert library().halve_attention(isa.number, ctypes.addressof(ask), 1) == 0
    np.testing.assert_array_equal(out[:, : 4 * dim], expected)
    assert np.isnan(out[:, 4 * dim :]).all()


def test_blocks_before_the_window_may_be_gone_and_empty_sequences_are_allowed():
    spec = replace(SPECS[0], window=3)
    ops = NativeOps(num_threads=1)
    paged = Paged(ops, spec, (12, 1))
    q, k, v = qkv(12, spec)
    whole = Paged(ops, spec, (12,)).run([(q, k, v)], [[(0, 0, 12)]])[0]
    ops.attention(q[:11], k[:11], v[:11], paged.batch([(0, 0, 11)]), spec, paged.cache)
    paged.tables[0, :2] = -1  # positions 0..7; position 11 sees 9, 10, 11
    last = ops.attention(q[11:], k[11:], v[11:], paged.batch([(1, 0, 0), (0, 11, 12), (1, 0, 0)]), spec, paged.cache)
    np.testing.assert_array_equal(last[0], whole[11])
    nothing = TokenBatch(
        token_ids=np.zeros(0, np.int32), positions=np.zeros(0, np.int32), cu_seqlens=np.zeros(2, np.int32)
    )
    assert ops.attention(q[:0], k[:0], v[:0], nothing, spec, None).shape == (0, 64)


def wrong_batches():
    spec = SPECS[0]
    paged = Paged(NativeOps(num_threads=1), spec, (6, 5))
    good = paged.batch([(0, 2, 6), (1, 4, 5)])

    def changed(field, index, value):
        array = getattr(good, field).copy()
        array[index] = value
        return replace(good, **{field: array})

    return (
        spec,
        paged,
        [
            (changed("slot_mapping", 1, -1), r"slot -1 \(1 of 5\) is not in 0\.\."),
            (changed("slot_mapping", 0, 4 * paged.cache.num_blocks), "slot .* is not in"),
            (changed("block_tables", (0, 0), -1), "block -1 .*name a block for every position"),
            (changed("block_tables", (1, 1), paged.cache.num_blocks), "block .* is not in"),
            (replace(good, block_tables=good.block_tables[:, :1].copy()), "block -1"),
            (changed("positions", 1, 9), "must count up by one"),
            (replace(good, positions=good.positions - 3), "must count up by one from 0 or more"),
            (changed("cu_seqlens", 1, 7), "must rise from 0 to the 5 tokens"),
            (changed("cu_seqlens", 0, 1), "must rise from 0"),
            (changed("cu_seqlens", 2, 4), "must rise from 0"),
            (replace(good, slot_mapping=None), "needs slot_mapping and block_tables"),
            (replace(good, block_tables=None), "needs slot_mapping and block_tables"),
            (
                replace(good, slot_mapping=good.slot_mapping.astype(np.int64)),
                "slot_mapping: expected a numpy array of int32",
            ),
            (replace(good, block_tables=good.block_tables[:1]), r"block_tables: expected shape \[2, 'any'\]"),
        ],
    )


def test_a_batch_that_would_leave_the_cache_is_refused_before_anything_is_written():
    spec, paged, wrong = wrong_batches()
    q, k, v = qkv(5, spec)
    for batch, message in wrong:
        with pytest.raises(KernelError, match=message):
            paged.ops.attention(q, k, v, batch, spec, paged.cache)
    assert not paged.cache.data.any()


def test_a_batch_changed_in_place_after_it_was_accepted_is_checked_again():
    spec, ops = SPECS[0], NativeOps(num_threads=1)
    paged, (q, k, v) = Paged(ops, spec, (6,)), qkv(2, spec)
    batch = paged.batch([(0, 4, 6)])
    ops.attention(q, k, v, batch, spec, paged.cache)
    batch.slot_mapping[0] = 1 << 30
    with pytest.raises(KernelError, match="slot 1073741824"):
        ops.attention(q, k, v, batch, spec, paged.cache)


def test_a_batch_without_a_cache_must_start_at_position_zero():
    batch = replace(TokenBatch.whole([[0] * 3]), positions=np.arange(1, 4, dtype=np.int32))
    with pytest.raises(KernelError, match=r"sequences start at position 0, got \[1\]; give a cache"):
        check_batch(batch, SPECS[0], None)


def test_a_cache_of_another_layer_is_refused():
    ops = NativeOps(num_threads=1)
    paged = Paged(ops, SPECS[0], (6,))
    for other in (replace(SPECS[0], kv_format="fp32"), replace(SPECS[0], num_heads=2, num_kv_heads=2)):
        with pytest.raises(KernelError, match="make one with kv_cache"):
            ops.attention(*qkv(6, other), paged.batch([(0, 0, 6)]), other, paged.cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads 3 must divide num_heads 4"),
        ({"num_kv_heads": 0}, "num_kv_heads 0 must divide"),
        ({"head_dim": 1025}, "head_dim 1025 is not between 1 and 1024"),
        ({"window": 0}, "window 0 must be 1 or more"),
        ({"kv_format": "int3"}, "kv_format 'int3' is not one of"),
    ],
)
def test_attention_that_is_not_computed_is_refused(change, message):
    with pytest.raises(KernelError, match=message):
        NativeOps(num_threads=1).kv_cache(1, 4, replace(SPECS[0], **change))


def test_sinks_are_one_for_each_head():
    with pytest.raises(KernelError, match="sinks: expected shape"):
        NativeOps(num_threads=1).attention(
            *qkv(1, SPECS[0]), TokenBatch.whole([[0]]), SPECS[0], None, np.zeros(3, np.float32)
        )
