"""Each operation of TorchOps, the definition, against float64 numpy."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.core.errors import ConfigError, KernelError
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.activations import activations_for, fp8_rows, int8_rows
from halve.formats.base import BF16
from halve.kernels import reference
from halve.kernels.ops import AttentionSpec, TokenBatch
from halve.kernels.reference import (
    QUERY_CHUNK,
    TorchOps,
    hadamard,
    round_fp8,
    round_keys_int4,
    round_kv_int4,
    round_kv_int8,
    round_rows_fp8,
    round_rows_int8,
    torch_device,
)

ATOL = 2e-5  # of float32 sums of at most a few hundred products of size one


@pytest.fixture(name="ops")
def _ops():
    return TorchOps()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def int8(x):
    """One bf16 scale for each last dimension, in the arithmetic of float32 that decides ties."""
    scale = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.float64) * scale


def make_weight(name, shape, seed=0):
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    scale = rng.uniform(0.01, 0.03, fmt.scale_shape(shape)).astype(BF16) if fmt.scaled else None
    if fmt.kind == "float":
        return Weight(format=fmt, shape=shape, codes=rng.standard_normal(shape).astype(fmt.dtype), scale=scale)
    codes = rng.integers(-(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1), shape).astype(np.int8)
    return Weight(format=fmt, shape=shape, codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits), scale=scale)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_dequantized_matrix(ops, name, bias):
    weight, x = make_weight(name, (7, 128)), normal(3, 128, seed=1)
    vector = normal(7, seed=2) if bias else None
    out = ops.to_host(ops.project(ops.linear(weight, vector), ops.from_host(x)))
    expected = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T + (vector if bias else 0)
    np.testing.assert_allclose(out, expected, atol=10 * ATOL)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_table_are_its_dequantized_values_exactly(ops, name):
    weight, ids = make_weight(name, (9, 128)), np.array([8, 0, 3, 3], np.int32)
    np.testing.assert_array_equal(ops.to_host(ops.embed(ops.table(weight), ids)), weight.dequantize()[ids])


def test_the_chosen_kernels_are_known_by_operation_and_format(ops):
    ops.linear(make_weight("int4-g32", (4, 32)))
    ops.table(make_weight("bf16", (4, 32)))
    assert ops.kernels == {"linear int4-g32": "torch_reference", "embed bf16": "torch_reference"}


def test_bf16_activations_round_the_input_and_nothing_else():
    ops = TorchOps(activations="bf16")
    weight, x = make_weight("fp32", (7, 64)), normal(3, 64, seed=1)
    out = ops.to_host(ops.project(ops.linear(weight), ops.from_host(x)))
    np.testing.assert_allclose(out, bf16(x) @ weight.codes.astype(np.float64).T, atol=ATOL)


def rows_of_every_kind():
    """Rows of very different sizes, of ties, zeros, subnormal numbers, and with NaN or infinity."""
    x = normal(12, 64, seed=2) * np.float32(10.0) ** np.arange(-6, 6, dtype=np.float32)[:, None]
    ties = (np.arange(64, dtype=np.float32) - 32) / 2
    ties[0] = 127
    kinds = [ties, np.zeros(64), np.full(64, 1e-40), np.full(64, 9e-37), np.full(64, 2e-36), np.full(64, 3e38)]
    x = np.vstack([x, *kinds, *normal(3, 64, seed=3)]).astype(np.float32)
    x[-3, 5], x[-2, 6], x[-1, 7] = np.nan, np.inf, -np.inf
    return x


@pytest.mark.parametrize("with_gradient", [False, True])
def test_int8_activations_are_to_the_bit_what_their_definition_says(with_gradient):
    x = rows_of_every_kind()
    codes, scale = int8_rows(x)
    rounded = round_rows_int8(torch.tensor(x, requires_grad=with_gradient)).detach().numpy()
    expected = codes * scale[:, None]
    assert expected.dtype == rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, expected)
    assert np.isnan(rounded[-3:]).all()
    assert np.isfinite(rounded[:-3]).all()


@given(st.integers(1, 5), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 2**32 - 1))
def test_int8_activations_of_any_shape_and_size_are_what_their_definition_says(rows, width, power, seed):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32) * np.float32(2.0**power)
    codes, scale = int8_rows(x)
    np.testing.assert_array_equal(round_rows_int8(torch.tensor(x)).numpy(), codes * scale[:, None])


def test_int8_activations_meet_integer_weights_and_leave_floats_alone():
    ops, exact, x = TorchOps(activations="int8"), TorchOps(), normal(3, 64, seed=1)
    codes, scale = int8_rows(x)
    rounded = codes * scale[:, None]
    for name, taken in [("int8", rounded), ("int4-g32", rounded), ("fp8", x), ("bf16", x), ("fp32", x)]:
        weight = make_weight(name, (7, 64))
        out = ops.project(ops.linear(weight), ops.from_host(x))
        torch.testing.assert_close(out, exact.project(exact.linear(weight), exact.from_host(taken)), rtol=0, atol=0)


def test_int8_keys_have_a_scale_of_16_bits_for_each_head_and_int8_activations_one_of_32_for_each_row():
    x = torch.from_numpy(normal(4, 64, seed=4))
    keys, rows = round_kv_int8(x.view(4, 2, 32)), round_rows_int8(x)
    scales = x.view(4, 2, 32).abs().amax(-1, keepdim=True) / 127
    codes = keys / scales.to(torch.bfloat16).float()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert not torch.equal(keys.view(4, 64), rows)


def test_activations_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"activations: 'int4' is not one of \['fp32', 'bf16', 'int8', 'fp8'\]"):
        TorchOps(activations="int4")


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_divides_by_the_root_of_the_mean_square(ops, eps):
    x, gain = normal(5, 33) * 0.1, normal(33, seed=1)
    out = ops.to_host(ops.rms_norm(ops.from_host(x), ops.vector(gain), eps))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * gain
    np.testing.assert_allclose(out, expected, atol=ATOL)


def test_a_row_of_zeros_keeps_its_norm_of_zero(ops):
    assert not ops.to_host(
        ops.rms_norm(ops.from_host(np.zeros((1, 8), np.float32)), ops.vector(np.ones(8)), 1e-6)
    ).any()


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 6), (4, 64)])
def test_rope_turns_half_split_pairs(ops, heads, head_dim):
    x, angle = normal(5, heads * head_dim), normal(5, head_dim // 2, seed=1) * 3
    cos, sin = np.cos(angle), np.sin(angle)
    out = ops.to_host(ops.rope(ops.from_host(x), cos, sin, head_dim)).reshape(5, heads, head_dim)
    pairs = x.reshape(5, heads, head_dim).astype(np.float64)
    z = (pairs[..., : head_dim // 2] + 1j * pairs[..., head_dim // 2 :]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(out, np.concatenate((z.real, z.imag), -1), atol=ATOL)


def attend(q_THD, k_TGD, v_TGD, window, sinks):
    out = np.zeros_like(q_THD)
    for t, h in np.ndindex(*q_THD.shape[:2]):
        g = h * k_TGD.shape[1] // q_THD.shape[1]
        first = 0 if window is None else max(0, t + 1 - window)
        powers = np.exp(k_TGD[first : t + 1, g] @ q_THD[t, h] / np.sqrt(q_THD.shape[2]))
        extra = 0 if sinks is None else np.exp(sinks[h])
        out[t, h] = powers @ v_TGD[first : t + 1, g] / (powers.sum() + extra)
    return out


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_over_whole_sequences_is_its_definition(ops, heads, kv_heads, window, with_sinks, kv_format):
    dim, lengths = 10, (1, 9, 4)
    q, k, v = (normal(14, n * dim, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    sinks = normal(heads, seed=5) if with_sinks else None
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, window=window, kv_format=kv_format)
    batch = TokenBatch.whole([[0] * n for n in lengths])
    out = ops.attention(*map(ops.from_host, (q, k, v)), batch, spec, None, None if sinks is None else ops.vector(sinks))
    rounded = {"fp32": np.float64, "bf16": bf16, "int8": int8}[kv_format]
    start = 0
    for n in lengths:
        at = slice(start, start + n)
        expected = attend(
            q[at].reshape(n, heads, dim).astype(np.float64),
            rounded(k[at].reshape(n, kv_heads, dim)),
            rounded(v[at].reshape(n, kv_heads, dim)),
            window,
            sinks,
        )
        np.testing.assert_allclose(ops.to_host(out)[at], expected.reshape(n, -1), atol=ATOL)
        start += n


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_steps_over_a_paged_cache_equals_the_whole(ops, window, with_sinks):
    heads, kv_heads, dim, block_size, n = 4, 2, 8, 4, 18
    q, k, v = (normal(n, m * dim, seed=i) for i, m in enumerate((heads, kv_heads, kv_heads)))
    sinks = ops.vector(normal(heads, seed=5)) if with_sinks else None
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, window=window)
    expected = ops.attention(*map(ops.from_host, (q, k, v)), TokenBatch.whole([[0] * n]), spec, None, sinks)
    cache, table, parts = ops.kv_cache(7, block_size, spec), np.array([6, 2, 4, 0, 5]), []
    for first, last in ((0, 7), (7, 8), (8, 16), (16, 18)):
        positions = np.arange(first, last, dtype=np.int32)
        batch = TokenBatch(
            token_ids=np.zeros(last - first, np.int32),
            positions=positions,
            cu_seqlens=np.array([0, last - first], np.int32),
            slot_mapping=(table[positions // block_size] * block_size + positions % block_size).astype(np.int32),
            block_tables=table[None].astype(np.int32),
        )
        parts.append(ops.attention(*(ops.from_host(x[first:last]) for x in (q, k, v)), batch, spec, cache, sinks))
    np.testing.assert_allclose(ops.to_host(torch.cat(parts)), ops.to_host(expected), atol=ATOL)
    assert not cache[0][[1, 3]].any(), "blocks of others were written"


def test_attention_is_the_same_beyond_one_chunk_of_queries(ops):
    n = QUERY_CHUNK + 9
    q, k, v = (normal(n, 8, seed=i) for i in range(3))
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8, window=QUERY_CHUNK - 3, kv_format="fp32")
    out = ops.attention(*map(ops.from_host, (q, k, v)), TokenBatch.whole([[0] * n]), spec, None)
    wide = [x.reshape(n, 1, 8).astype(np.float64) for x in (q, k, v)]
    np.testing.assert_allclose(ops.to_host(out), attend(*wide, spec.window, None).reshape(n, 8), atol=ATOL)


@pytest.mark.parametrize(
    ("kv_format", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.float32), ("int4", torch.float32)],
)
def test_a_cache_is_stored_in_its_format(ops, kv_format, dtype):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, kv_format=kv_format)
    for part in ops.kv_cache(3, 5, spec):
        assert (part.shape, part.dtype) == ((3, 5, 2, 8), dtype)
        assert not part.any()


def test_int8_rounds_to_127_steps_of_a_bf16_scale_with_ties_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.6], [0.0] * 5, [1e-41] * 5, [-3e38, 1.0, 0.0, 0.0, 0.0]])
    expected = [[127, 0, 2, -2, -127], [0] * 5, [0] * 5]
    rounded = round_kv_int8(x)
    assert rounded[:3].tolist() == expected
    step = float(np.float32(3e38 / 127).astype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(rounded[3].tolist(), [-round(3e38 / step) * step, 0, 0, 0, 0], rtol=1e-7)
    assert torch.isnan(round_kv_int8(torch.tensor([1.0, torch.nan]))).any()


def test_int4_rounds_to_16_steps_of_a_bf16_scale_for_each_32_dims_with_ties_to_even():
    x = torch.zeros(1, 80)
    x[0, :5] = torch.tensor([-8.0, 7.9, 0.5, 1.5, -2.5])
    x[0, 32:35] = torch.tensor([8.0, -8.0, -4.4])  # of both signs the positive one is kept whole
    x[0, 64:67] = torch.tensor([1e-41, -3e38, 1.0])  # a shorter group
    rounded = round_kv_int4(x)
    assert rounded[0, :6].tolist() == [-8, 7, 0, 2, -2, 0]
    assert rounded[0, 32:36].tolist() == [8, -7, -4, 0]
    step = float(np.float32(3e38 / 8).astype(ml_dtypes.bfloat16))
    np.testing.assert_allclose(rounded[0, 64:68].tolist(), [0, -8 * step, 0, 0], rtol=1e-7)
    assert not round_kv_int4(torch.full((1, 32), 1e-41)).any()
    assert torch.isnan(round_kv_int4(torch.tensor([1.0, torch.nan]))).any()


@pytest.mark.parametrize("dim", [1, 2, 33, 64, 80, 128])
def test_the_rotation_of_keys_is_orthonormal_its_own_inverse_and_within_runs(dim):
    x = torch.from_numpy(normal(5, dim, seed=1))
    turned = hadamard(x)
    torch.testing.assert_close(hadamard(turned), x, atol=1e-6, rtol=0)
    run = dim & -dim
    matrix = hadamard(torch.eye(dim))
    assert torch.equal(matrix.abs() > 0, torch.block_diag(*[torch.ones(run, run)] * (dim // run)) > 0)
    torch.testing.assert_close(turned, x @ matrix, atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-6, rtol=0)


def test_a_dim_that_is_large_in_every_key_costs_less_after_the_rotation():
    keys = torch.from_numpy(normal(50, 64, seed=2))
    keys[:, 7] += 20
    lost = {name: (way(keys) - keys).square().mean() for name, way in (("as", round_kv_int4), ("by", round_keys_int4))}
    assert lost["by"] < 0.6 * lost["as"]


def test_blocks_are_copied_whole(ops):
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=4, kv_format="fp32")
    cache = ops.kv_cache(4, 2, spec)
    for i, part in enumerate(cache):
        part[:] = torch.from_numpy(normal(*part.shape, seed=i))
    before = [part.clone() for part in cache]
    ops.copy_blocks(cache, np.array([[0, 2], [1, 3]], np.int32))
    for part, old in zip(cache, before, strict=True):
        assert torch.equal(part, old[[0, 1, 0, 1]])


def test_elementwise_operations_and_rows(ops):
    x, y = normal(4, 6) * 5, normal(4, 6, seed=1)
    wide = x.astype(np.float64)
    gated = ops.to_host(ops.silu_mul(ops.from_host(x), ops.from_host(y)))
    np.testing.assert_allclose(gated, wide / (1 + np.exp(-wide)) * y, atol=ATOL)
    np.testing.assert_array_equal(ops.to_host(ops.add(ops.from_host(x), ops.from_host(y))), x + y)
    np.testing.assert_array_equal(ops.to_host(ops.take_rows(ops.from_host(x), np.array([3, 1, 1]))), x[[3, 1, 1]])


def test_buffers_go_to_the_host_and_back_unchanged(ops):
    x = normal(3, 5)
    back = ops.to_host(ops.from_host(x))
    np.testing.assert_array_equal(back, x)
    assert back.dtype == np.float32


def test_a_buffer_does_not_change_with_the_array_it_came_from(ops):
    x = normal(3, 5)
    buffer = ops.from_host(x)
    kept = x.copy()
    x[:] = 0
    np.testing.assert_array_equal(ops.to_host(buffer), kept)


def gradient_of(function, *shapes):
    """The gradient of a square of `function` in each input, drawn at random."""
    inputs = [torch.from_numpy(normal(*shape, seed=i)).requires_grad_() for i, shape in enumerate(shapes)]
    function(*inputs).square().sum().backward()
    return [x.grad for x in inputs]


SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, kv_format="bf16")
BATCH = TokenBatch.whole([[0] * 5, [0] * 3])
ANGLES = normal(8, 4)
DIFFERENTIABLE = {
    "project": (lambda ops: lambda x: ops.project(ops.linear(make_weight("int4-g32", (7, 32))), x), [(8, 32)]),
    "rms_norm": (lambda ops: lambda x, gain: ops.rms_norm(x, gain, 1e-5), [(8, 32), (32,)]),
    "rope": (lambda ops: lambda x: ops.rope(x, np.cos(ANGLES), np.sin(ANGLES), 8), [(8, 32)]),
    "attention": (lambda ops: lambda q, k, v: ops.attention(q, k, v, BATCH, SPEC, None), [(8, 32), (8, 16), (8, 16)]),
    "attention_with_sinks": (
        lambda ops: lambda q, k, v, s: ops.attention(q, k, v, BATCH, SPEC, None, s),
        [(8, 32), (8, 16), (8, 16), (4,)],
    ),
    "silu_mul": (lambda ops: ops.silu_mul, [(8, 32), (8, 32)]),
    "add": (lambda ops: ops.add, [(8, 32), (8, 32)]),
    "take_rows": (lambda ops: lambda x: ops.take_rows(x, np.array([1, 3])), [(8, 32)]),
}


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_reaches_every_input(name, activations):
    make, shapes = DIFFERENTIABLE[name]
    for gradient in gradient_of(make(TorchOps(activations=activations)), *shapes):
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


def test_the_gradient_of_a_product_is_the_dequantized_matrix(ops):
    weight = make_weight("int4-g32", (7, 32))
    x = torch.zeros(1, 32, requires_grad=True)
    ops.project(ops.linear(weight), x)[0, 3].backward()
    np.testing.assert_array_equal(x.grad[0].numpy(), weight.dequantize()[3])


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xpu"])
def test_a_device_that_torch_does_not_reach_is_refused_with_a_way_out(name):
    if torch.get_device_module(name.split(":")[0]).is_available():
        pytest.skip(f"torch reaches {name} here")
    with pytest.raises(KernelError, match=rf"device '{name}': torch .* reaches no {name[:3]}\w* device here; use cpu"):
        TorchOps(name)


def test_the_cpu_is_described_as_this_machine():
    device = torch_device("cpu")
    assert (device.name, device.kind) == ("cpu", "cpu")
    assert TorchOps().device == device


def test_rows_in_fp8_are_the_bits_of_the_definition_and_near_what_they_stand_for():
    x = normal(64, 48, seed=8) * np.exp2(np.arange(64) - 32).astype(np.float32)[:, None]
    x[3] = 0
    codes, scale = fp8_rows(x)
    np.testing.assert_array_equal(round_rows_fp8(torch.tensor(x)).numpy(), codes.astype(np.float32) * scale[:, None])
    assert np.abs(codes.astype(np.float32)[np.arange(64) != 3]).max(1).min() == 448
    error = np.abs(codes.astype(np.float64) * scale[:, None] - x)
    assert (error <= np.abs(x) / 15.9 + scale[:, None] * 2.0**-10).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_in_fp8_that_holds_nan_or_infinity_is_seen(bad):
    x = normal(2, 16)
    x[1, 5] = bad
    codes, scale = fp8_rows(x)
    assert np.isnan(scale[1])
    assert np.isfinite(scale[0])
    assert round_rows_fp8(torch.tensor(x))[1].isnan().all()
    np.testing.assert_array_equal(round_rows_fp8(torch.tensor(x))[0].numpy(), codes.astype(np.float32)[0] * scale[0])


def test_fp8_activations_meet_fp8_weights_and_leave_others_alone():
    met = {name: activations_for(FORMATS[name], "fp8") for name in ("fp8", "int8", "int4-g32", "bf16")}
    assert met == {"fp8": "fp8", "int8": "fp32", "int4-g32": "fp32", "bf16": "fp32"}


def test_fp8_beyond_448_is_cut_off_and_rounds_to_nearest_even():
    x = torch.tensor([448.0, 463.9, 1e9, -1e9, 17.0, 19.0, 0.0009765625])
    assert round_fp8(x).tolist() == [448.0, 448.0, 448.0, -448.0, 16.0, 20.0, 0.0]


@pytest.mark.parametrize("name", ["int4-g32", "bf16"])
def test_a_matrix_too_large_to_widen_at_once_is_multiplied_in_parts(name, monkeypatch):
    fmt, shape = FORMATS[name], (70, 64)
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(70).astype(np.float32)
    if fmt.scaled:
        codes = pack_codes(rng.integers(-8, 8, shape).astype(np.int8), 4)
        weight = Weight(format=fmt, shape=shape, codes=codes, scale=np.full(fmt.scale_shape(shape), 0.5, BF16))
    else:
        weight = Weight(format=fmt, shape=shape, codes=rng.standard_normal(shape).astype(BF16))
    ops = TorchOps()
    x = ops.from_host(rng.standard_normal((5, 64)).astype(np.float32))
    whole = ops.project(ops.linear(weight, bias), x)
    monkeypatch.setattr(reference, "DENSE_VALUES", 33 * 64)
    parts = ops.project(ops.linear(weight, bias), x)
    assert parts.shape == (5, 70)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
