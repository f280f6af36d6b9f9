"""What no shipped family uses yet: windows, layers without positions, sinks, cache formats by layer, hooks.

Each is put into a LayerSpec by hand, and the whole decoder is computed again in float64 numpy below.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from halve.formats import FORMATS, Weight
from halve.formats.activations import int8_rows
from halve.kernels import native, native_library
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import Decoder, LayerSpec, ModelConfig
from halve.models.config import Rope
from halve.models.names import modules, vectors
from halve.models.rope import inverse_frequencies
from tests.tools import ops_under_test

ROPE = Rope(theta=10000.0)
HEADS, KV_HEADS, DIM, HIDDEN, EPS = 4, 2, 8, 32, 1e-5
TOKENS = np.random.default_rng(7).integers(0, 50, 23)


def bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def make(layers):
    """A configuration of these layers, and random tensors for it."""
    config = ModelConfig(
        architecture="test",
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        vocab_size=50,
        context=64,
        rms_norm_eps=EPS,
        tied=False,
        attention_bias=False,
        mlp_bias=False,
        layers=layers,
    )
    rng = np.random.default_rng(0)
    tensors = {f"{m.name}.weight": rng.normal(0, 0.3, m.shape).astype(np.float32) for m in modules(config)}
    tensors |= {name: rng.normal(1, 0.3, shape).astype(np.float32) for name, shape in vectors(config)}
    return config, tensors


class Arrays:
    """A `WeightSource` over numpy arrays by name."""

    def __init__(self, tensors):
        self.tensors = tensors

    def weight(self, module, shape):
        return Weight(format=FORMATS["fp32"], shape=shape, codes=self.tensors[f"{module}.weight"])

    def vector(self, name, shape):
        assert self.tensors[name].shape == shape
        return self.tensors[name]

    def forget(self):
        """Arrays stay."""


def int8(x):
    """One bf16 scale for each token and head; float64 [T, G, D]."""
    scale = bf16(np.abs(x).max(-1, keepdims=True) / 127)
    return np.clip(np.rint(x / scale), -127, 127) * scale


def int4(x, *, keys=False):
    """As the reference tells it; DIM is one group, a power of two."""
    hadamard = np.array([[(-1) ** (i & j).bit_count() for i in range(DIM)] for j in range(DIM)]) / np.sqrt(DIM)
    x = (x @ hadamard if keys else x).astype(np.float32)
    high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    scale = bf16(np.where(high >= -low, high, low) / np.float32(-8))
    rounded = np.clip(np.rint(x / scale), -8, 7) * scale
    return rounded @ hadamard if keys else rounded


ROUNDED = {"fp32": lambda x: x, "bf16": bf16, "int8": int8, "int4": int4}


def norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * gain


def turn(x_THD, rope):
    angles = np.arange(len(x_THD))[:, None] * inverse_frequencies(rope, DIM).astype(np.float64)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x_THD[..., : DIM // 2], x_THD[..., DIM // 2 :]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)


def attend(q_THD, k_TGD, v_TGD, spec, sinks):
    """One token and head at a time, straight from the definition."""
    out = np.zeros_like(q_THD)
    for t in range(len(q_THD)):
        first = 0 if spec.window is None else max(0, t + 1 - spec.window)
        for h in range(HEADS):
            g = h // (HEADS // KV_HEADS)
            scores = k_TGD[first : t + 1, g] @ q_THD[t, h] / np.sqrt(DIM)
            powers = np.exp(scores)
            out[t, h] = powers @ v_TGD[first : t + 1, g] / (powers.sum() + (np.exp(sinks[h]) if spec.sinks else 0))
    return out


def expected_logits(config, tensors, tokens, rounded=lambda x: x):
    """The definition in float64. rounded: what becomes of each projection's input."""

    def project(name, x):
        return rounded(x) @ tensors[f"{name}.weight"].astype(np.float64).T

    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64)
    for i, spec in enumerate(config.layers):
        at = f"model.layers.{i}"
        normed = norm(x, tensors[f"{at}.input_layernorm.weight"])
        q, k, v = (project(f"{at}.self_attn.{n}_proj", normed).reshape(len(tokens), -1, DIM) for n in "qkv")
        if spec.rope is not None:
            q, k = turn(q, spec.rope), turn(k, spec.rope)
        k = int4(k, keys=True) if spec.kv_format == "int4" else ROUNDED[spec.kv_format](k)
        v = ROUNDED[spec.kv_format](v)
        attended = attend(q, k, v, spec, tensors.get(f"{at}.self_attn.sinks"))
        x = x + project(f"{at}.self_attn.o_proj", attended.reshape(len(tokens), -1))
        normed = norm(x, tensors[f"{at}.post_attention_layernorm.weight"])
        gate, up = project(f"{at}.mlp.gate_proj", normed), project(f"{at}.mlp.up_proj", normed)
        x = x + project(f"{at}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    return project("lm_head", norm(x, tensors["model.norm.weight"]))


@pytest.fixture(params=ops_under_test(), ids=lambda make: make.__name__, name="ops")
def _ops(request):
    return request.param()


def whole(decoder, tokens=TOKENS):
    return decoder.ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([tokens]))))


def in_steps(decoder, tokens=TOKENS, block_size=4, lengths=(5, 1, 9, 1, 7)):
    """The same logits over a paged cache of scattered blocks, in chunks."""
    table = np.random.default_rng(3).permutation(-(-len(tokens) // block_size))
    cache, parts, start = decoder.new_cache(len(table), block_size), [], 0
    for length in lengths:
        positions = np.arange(start, start + length, dtype=np.int32)
        batch = TokenBatch(
            token_ids=np.asarray(tokens[start : start + length], np.int32),
            positions=positions,
            cu_seqlens=np.array([0, length], np.int32),
            slot_mapping=(table[positions // block_size] * block_size + positions % block_size).astype(np.int32),
            block_tables=table[None].astype(np.int32),
        )
        parts.append(decoder.step(batch, cache, np.arange(length)))
        start += length
    assert start == len(tokens)
    return np.concatenate(parts)


FP32 = LayerSpec(rope=ROPE, kv_format="fp32")
SEAMS = {
    "plain": (FP32, FP32),
    "window": (replace(FP32, window=5), replace(FP32, window=5)),
    "window_of_one": (replace(FP32, window=1), FP32),
    "window_wider_than_the_text": (replace(FP32, window=100), FP32),
    "window_and_full_in_turn": (replace(FP32, window=3), FP32),
    "no_positions": (replace(FP32, rope=None), FP32),
    "no_positions_anywhere": (replace(FP32, rope=None),) * 2,
    "two_ropes": (FP32, replace(FP32, rope=Rope(theta=500.0, kind="linear", factor=2.0))),
    "sinks": (replace(FP32, sinks=True), FP32),
    "sinks_and_window": (replace(FP32, sinks=True, window=4), replace(FP32, sinks=True, rope=None)),
}


@pytest.mark.parametrize("name", SEAMS)
def test_a_layer_computes_what_its_spec_says_whole_and_in_steps(name, ops):
    config, tensors = make(SEAMS[name])
    decoder = Decoder(config, ops, Arrays(tensors))
    expected = expected_logits(config, tensors, TOKENS)
    np.testing.assert_allclose(whole(decoder), expected, atol=1e-4)
    np.testing.assert_allclose(in_steps(decoder), expected, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in SEAMS if n not in ("plain", "window_wider_than_the_text")])
def test_every_seam_changes_the_result(name):
    config, tensors = make(SEAMS[name])
    plain = replace(config, layers=(FP32, FP32))
    difference = expected_logits(config, tensors, TOKENS) - expected_logits(plain, tensors, TOKENS)
    assert np.abs(difference).max() > 0.01


def test_a_window_over_a_long_text_is_exact_beyond_every_chunk_of_queries(ops):
    tokens = np.random.default_rng(1).integers(0, 50, 600)
    config, tensors = make((replace(FP32, window=300),))
    np.testing.assert_allclose(
        whole(Decoder(config, ops, Arrays(tensors)), tokens), expected_logits(config, tensors, tokens), atol=1e-4
    )


FORMATS_BY_LAYER = [
    ("bf16", "bf16"),
    ("bf16", "fp32"),
    ("fp32", "bf16"),
    ("int8", "bf16"),
    ("fp32", "int8"),
    ("int4", "int8"),
]


@pytest.mark.parametrize("formats", FORMATS_BY_LAYER, ids="-".join)
def test_keys_and_values_are_rounded_to_each_layers_own_cache_format(formats, ops):
    config, tensors = make(tuple(replace(FP32, kv_format=f) for f in formats))
    decoder = Decoder(config, ops, Arrays(tensors))
    expected = expected_logits(config, tensors, TOKENS)
    exact = expected_logits(replace(config, layers=(FP32, FP32)), tensors, TOKENS)
    error = np.abs(whole(decoder) - expected)
    # A key within float32 rounding of the middle of two bf16 values may fall either way; almost none do.
    assert np.median(error) < 1e-5
    assert np.median(np.abs(exact - expected)) > 20 * np.median(error)
    np.testing.assert_allclose(in_steps(decoder), whole(decoder), atol=1e-3)


def test_a_cache_holds_its_layers_own_format(ops):
    config, tensors = make(tuple(replace(FP32, kv_format=f) for f in ("bf16", "fp32")))
    first, second = Decoder(config, ops, Arrays(tensors)).new_cache(3, 4)
    sizes = [
        sum(part.nbytes for part in entry) if isinstance(entry, tuple) else entry.data.nbytes
        for entry in (first, second)
    ]
    assert sizes == [2 * 3 * 4 * KV_HEADS * DIM * size for size in (2, 4)]


class Integers(Arrays):
    """The same arrays rounded to int8 with a scale a row, and what they stand for then."""

    def __init__(self, tensors):
        self.weights = {name: self._rounded(values) for name, values in tensors.items() if values.ndim == 2}
        super().__init__({**tensors, **{name: w.dequantize() for name, w in self.weights.items()}})

    @staticmethod
    def _rounded(values):
        scale = (np.abs(values).max(axis=1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
        codes = np.clip(np.rint(values / scale.astype(np.float32)), -128, 127).astype(np.int8)
        return Weight(format=FORMATS["int8"], shape=values.shape, codes=codes, scale=scale)

    def weight(self, module, shape):
        return self.weights[f"{module}.weight"]


def int8(x):
    codes, scale = int8_rows(np.asarray(x, np.float32))
    return codes * scale[:, None].astype(np.float64)


def torch_ops(activations):
    return TorchOps(activations=activations)


def native_ops(activations):
    return native.NativeOps(activations=activations)


ROUNDING = [torch_ops] + ([native_ops] if native_library.available() is None else [])


@pytest.mark.parametrize("make_ops", ROUNDING)
@pytest.mark.parametrize(("activations", "rounded"), [("bf16", bf16), ("int8", int8)])
def test_rounded_activations_are_the_input_of_every_projection(activations, rounded, make_ops):
    config, tensors = make((FP32, FP32))
    source = Integers(tensors)
    decoder = Decoder(config, make_ops(activations), source)
    expected = expected_logits(config, source.tensors, TOKENS, rounded=rounded)
    exact = expected_logits(config, source.tensors, TOKENS)
    # An input within float32 rounding of the middle of two values may fall either way, which others then carry on.
    for logits in (whole(decoder), in_steps(decoder)):
        assert np.median(np.abs(logits - expected)) < np.median(np.abs(exact - expected)) / 4


def test_int8_activations_leave_the_input_of_float_weights_as_it_is():
    config, tensors = make((FP32, FP32))
    for make_ops in ROUNDING:
        logits = whole(Decoder(config, make_ops("int8"), Arrays(tensors)))
        np.testing.assert_allclose(logits, expected_logits(config, tensors, TOKENS), atol=1e-4)


def test_a_single_projection_with_bf16_activations_is_exactly_that_of_the_rounded_input():
    weight = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    for make_ops in ROUNDING:
        ops = make_ops("bf16")
        linear = ops.linear(Weight(format=FORMATS["fp32"], shape=(5, 32), codes=weight))
        out = ops.to_host(ops.project(linear, ops.from_host(x)))
        np.testing.assert_allclose(out, bf16(x) @ weight.T.astype(np.float64), atol=1e-5)
        assert np.abs(out - x.astype(np.float64) @ weight.T).max() > 1e-3


def test_every_projection_calls_its_hook_once_a_forward_in_order(ops):
    config, tensors = make((FP32, FP32))
    decoder = Decoder(config, ops, Arrays(tensors))
    plain, seen = whole(decoder), []

    def watch(group, x, outputs):
        seen.append((group.name, x.shape, [o.shape for o in outputs]))
        return outputs

    for projection in decoder.projections():
        projection.hook = watch
    np.testing.assert_array_equal(whole(decoder), plain)
    n = len(TOKENS)
    layer = [
        ("qkv", (n, 32), [(n, 32), (n, 16), (n, 16)]),
        ("o", (n, 32), [(n, 32)]),
        ("gate_up", (n, 32), [(n, 48)] * 2),
        ("down", (n, 48), [(n, 32)]),
    ]
    assert seen == [(f"layers.{i}.{kind}", x, outs) for i in (0, 1) for kind, x, outs in layer] + [
        ("lm_head", (n, 32), [(n, 50)])
    ]


def test_what_a_hook_returns_is_what_the_model_goes_on_with(ops):
    config, tensors = make((FP32, FP32))
    decoder = Decoder(config, ops, Arrays(tensors))
    decoder.layers[1].projections["o"].hook = lambda group, x, outputs: [outputs[0] * 0]
    changed = {**tensors, "model.layers.1.self_attn.o_proj.weight": np.zeros((32, 32), np.float32)}
    np.testing.assert_allclose(whole(decoder), expected_logits(config, changed, TOKENS), atol=1e-4)
