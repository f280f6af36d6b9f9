"""The step as one program says what the decoder says, operation by operation."""

import gc
import weakref
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest

from halve.core.errors import CheckpointError, HalveError, KernelError
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.base import BF16
from halve.kernels import native_library
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.kernels.program import MOST_CANDIDATES
from halve.kernels.sampling import SamplingBatch
from halve.models import Decoder, LayerSpec, ModelConfig
from halve.models.compiled import LEAST_TOKENS
from halve.models.config import Experts, Rope

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")

BLOCK = 16
VOCAB, HIDDEN, INNER = 200, 64, 160  # no multiple of 64: blocks of outputs are cut
ROPE = Rope(theta=10000.0)


def config_of(*layers):
    return ModelConfig(
        architecture="test",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        context=512,
        rms_norm_eps=1e-5,
        tied=False,
        attention_bias=True,
        mlp_bias=False,
        layers=layers,
    )


PLAIN = config_of(LayerSpec(rope=ROPE), LayerSpec(rope=ROPE))


class Random:
    """A `WeightSource` of random matrices, each in the format that `formats` names for the end of its name."""

    def __init__(self, **formats):
        self.formats = formats
        self.scale = 1.0

    def weight(self, module, shape):
        fmt = FORMATS[next((f for end, f in self.formats.items() if module.endswith(end)), "int4-g32")]
        rng = np.random.default_rng(crc32(module.encode()))
        if fmt.kind == "float":
            return Weight(format=fmt, shape=shape, codes=(rng.standard_normal(shape) * 0.1).astype(fmt.dtype))
        codes = rng.integers(-(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1), shape).astype(np.int8)
        scale = rng.uniform(0.01, 0.03, fmt.scale_shape(shape)).astype(BF16)
        return Weight(
            format=fmt, shape=shape, codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits), scale=scale
        )

    def vector(self, name, shape):
        return (np.random.default_rng(len(name)).uniform(0.5, 1.5, shape) * self.scale).astype(np.float32)

    def forget(self):
        pass


def batch(*sequences):
    """Sequences of (first position, tokens, blocks) as one step over a cache."""
    parts = [(np.arange(first, first + n), np.array(blocks)) for first, n, blocks in sequences]
    widest = max(len(blocks) for _, blocks in parts)
    return TokenBatch(
        token_ids=np.concatenate([(p * 7 + 3) % VOCAB for p, _ in parts]).astype(np.int32),
        positions=np.concatenate([p for p, _ in parts]).astype(np.int32),
        cu_seqlens=np.cumsum([0, *(len(p) for p, _ in parts)]).astype(np.int32),
        slot_mapping=np.concatenate([b[p // BLOCK] * BLOCK + p % BLOCK for p, b in parts]).astype(np.int32),
        block_tables=np.array([[*b, *[-1] * (widest - len(b))] for _, b in parts], np.int32),
    )


def eagerly(decoder, step, cache, rows):
    hidden = decoder.ops.take_rows(decoder.hidden(step, cache), rows)
    return decoder.logits(hidden)


STEPS = [batch((0, 40, [0, 1, 2, 3]), (0, 5, [4])), batch((40, 1, [0, 1, 2, 3]), (5, 9, [4]))]
ROWS = [np.array([39, 44], np.int32), np.array([0, 9, 3], np.int32)]


@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    "formats",
    [{}, {"": "int8"}, {"": "bf16"}, {"up_proj": "int8", "k_proj": "int6-g32", "lm_head": "fp32"}],
    ids=["int4", "int8", "bf16", "mixed"],
)
def test_logits_are_those_of_single_operations(formats, activations):
    decoder = Decoder(PLAIN, NativeOps(activations=activations), Random(**formats))
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    for step, rows in zip(STEPS, ROWS, strict=True):
        expected = eagerly(decoder, step, other, rows)
        # Angles come from another cosine, which differs in its last bit and may move a key in bf16 or a code by one.
        tolerance = {"fp32": 1e-2, "bf16": 2e-2, "int8": 5e-2}[activations] * np.abs(expected).max()
        np.testing.assert_allclose(decoder.step(step, one, rows), expected, atol=tolerance)


@pytest.mark.parametrize(
    "layer",
    [LayerSpec(rope=ROPE, window=9), LayerSpec(rope=None), LayerSpec(rope=ROPE, sinks=True)],
    ids=["window", "no_rope", "sinks"],
)
@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "int8", "int4"])
def test_every_kind_of_attention_is_compiled(layer, kv_format):
    config = config_of(replace(layer, kv_format=kv_format), LayerSpec(rope=ROPE))
    decoder = Decoder(config, NativeOps(), Random())
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    for step, rows in zip(STEPS, ROWS, strict=True):
        expected = eagerly(decoder, step, other, rows)
        tolerance = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2, "int4": 2e-1}[kv_format] * np.abs(expected).max()
        np.testing.assert_allclose(decoder.step(step, one, rows), expected, atol=tolerance)


def test_weights_do_not_wait_for_the_garbage_collector():
    decoder = Decoder(PLAIN, NativeOps(), Random())
    decoder.step(STEPS[0], decoder.new_cache(8, BLOCK), ROWS[0])
    assert decoder._compiled is not None
    gone, enabled = weakref.ref(decoder), gc.isenabled()
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        if enabled:
            gc.enable()


@pytest.mark.parametrize("qk_norm", ["head", "row"])
def test_queries_and_keys_are_normed(qk_norm):
    config = config_of(LayerSpec(rope=ROPE, qk_norm=qk_norm, kv_format="fp32"), LayerSpec(rope=ROPE, kv_format="fp32"))
    decoder = Decoder(config, NativeOps(), Random())
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    for step, rows in zip(STEPS, ROWS, strict=True):
        expected = eagerly(decoder, step, other, rows)
        np.testing.assert_allclose(decoder.step(step, one, rows), expected, atol=1e-4 * np.abs(expected).max())
    assert decoder._compiled is not None


def test_angles_are_multiplied_by_what_yarn_asks():
    rope = Rope(theta=10000.0, kind="yarn", factor=4.0, original_context=64, attention_factor=1.14)
    decoder = Decoder(config_of(*[LayerSpec(rope=rope, kv_format="fp32")] * 2), NativeOps(), Random())
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    for step, rows in zip(STEPS, ROWS, strict=True):
        expected = eagerly(decoder, step, other, rows)
        np.testing.assert_allclose(decoder.step(step, one, rows), expected, atol=1e-4 * np.abs(expected).max())
    assert decoder._compiled is not None


EXPERTS = Experts(num_experts=6, top_k=3, intermediate_size=96, renormalize=True)
KINDS = {
    "mixtral": EXPERTS,
    "olmoe": replace(EXPERTS, renormalize=False, top_k=1, scale=1.5),
    "qwen2": replace(EXPERTS, renormalize=False, shared_size=160),
    "shared": replace(EXPERTS, shared_size=160, shared_gate=False),
    "gpt_oss": replace(EXPERTS, top_k=4, router_bias=True, bias=True, clamp=(1.7, 0.4)),
    "all": replace(EXPERTS, top_k=6),
}


class Routed(Random):
    """The same, with routers that have clear wishes."""

    def vector(self, name, shape):
        if len(shape) == 2:
            return np.random.default_rng(crc32(name.encode())).standard_normal(shape).astype(np.float32)
        return super().vector(name, shape)


def sparse(experts, kv_format="fp32"):
    layer = LayerSpec(rope=ROPE, kv_format=kv_format)
    return config_of(layer, replace(layer, experts=experts), replace(layer, experts=experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("weights", ["int4-g32", "int8", "bf16"])
def test_experts_of_a_step_are_those_of_single_operations(kind, activations, weights):
    decoder = Decoder(sparse(KINDS[kind]), NativeOps(activations=activations), Routed(**{"": weights}))
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    for step, rows in zip(STEPS, ROWS, strict=True):
        for count in decoder.expert_counts():
            count.tokens[:], count.totals[:] = 0, 0
        expected = eagerly(decoder, step, other, rows)
        asked = [(count.tokens.tolist(), count.totals.tolist()) for count in decoder.expert_counts()]
        found = decoder.step(step, one, rows)
        tolerance = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2}[activations] * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=tolerance)
        for count, (tokens, totals) in zip(decoder.expert_counts(), asked, strict=True):
            assert count.totals.tolist() == [2 * one for one in totals]
            assert (np.abs(count.tokens - 2 * np.array(tokens)) <= (0 if activations == "fp32" else 1)).all()
    assert decoder._compiled is not None


# Experts of a layer in formats of their own; gate and up of one are alike.
MIXED = {
    **{f"experts.{e}.gate_proj": f for e, f in ((0, "int8"), (2, "int3-g32"), (3, "bf16"))},
    **{f"experts.{e}.up_proj": f for e, f in ((0, "int8"), (2, "int3-g32"), (3, "bf16"))},
    **{f"experts.{e}.down_proj": f for e, f in ((1, "int6-g32"), (4, "int8"), (5, "bf16"))},
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "gpt_oss", "all"])
@pytest.mark.parametrize("activations", ["fp32", "bf16", "int8"])
def test_experts_of_a_layer_may_be_stored_in_formats_of_their_own(kind, activations):
    decoder = Decoder(sparse(KINDS[kind]), NativeOps(activations=activations), Routed(**MIXED))
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    for step, rows in zip(STEPS, ROWS, strict=True):
        expected = eagerly(decoder, step, other, rows)
        tolerance = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2}[activations] * np.abs(expected).max()
        np.testing.assert_allclose(decoder.step(step, one, rows), expected, atol=tolerance)
    assert decoder._compiled is not None


@pytest.mark.parametrize("formats", [{}, MIXED])
def test_a_token_of_a_sparse_step_is_the_same_to_the_bit_whoever_is_beside_it(formats):
    decoder = Decoder(sparse(KINDS["qwen2"], "bf16"), NativeOps(activations="int8"), Routed(**formats))
    alone, beside = decoder.new_cache(40, BLOCK), decoder.new_cache(40, BLOCK)
    others = [(0, 11 + i, [4 * i + 4, 4 * i + 5]) for i in range(8)]
    rows = np.array([39], np.int32)
    found = decoder.step(batch((0, 40, [0, 1, 2, 3]), *others), beside, rows)
    np.testing.assert_array_equal(decoder.step(batch((0, 40, [0, 1, 2, 3])), alone, rows), found)
    parts = decoder.new_cache(40, BLOCK)
    for first, n in ((0, 17), (17, 1), (18, 22)):
        cut = decoder.step(batch((first, n, [0, 1, 2, 3])), parts, np.array([n - 1], np.int32))
    np.testing.assert_array_equal(cut, found)


def test_equal_logits_go_to_the_lower_experts():
    decoder = Decoder(sparse(EXPERTS), NativeOps(), Routed())
    flat = decoder.ops.linear(Weight(format=FORMATS["fp32"], shape=(6, HIDDEN), codes=np.zeros((6, HIDDEN), "f4")))
    decoder.layers[1].router.linear = flat
    decoder.step(STEPS[0], decoder.new_cache(8, BLOCK), ROWS[0])
    assert decoder.expert_counts()[0].tokens.tolist() == [45, 45, 45, 0, 0, 0]
    assert decoder.expert_counts()[0].totals.tolist() == [1, 3]


def test_a_router_that_gives_no_numbers_is_named():
    decoder = Decoder(sparse(EXPERTS), NativeOps(), Routed())
    broken = Weight(format=FORMATS["fp32"], shape=(6, HIDDEN), codes=np.full((6, HIDDEN), np.nan, np.float32))
    decoder.layers[2].router.linear = decoder.ops.linear(broken)
    cache = decoder.new_cache(8, BLOCK)
    with pytest.raises(CheckpointError, match="layer 2: the router's logits hold NaN"):
        decoder.step(STEPS[0], cache, ROWS[0])


def test_greedy_tokens_without_full_logits_are_the_argmax_of_the_logits():
    decoder = Decoder(PLAIN, NativeOps(activations="int8"), Random())
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    for step, rows in zip(STEPS, ROWS, strict=True):
        sampled = decoder.sample(step, one, rows, SamplingBatch.greedy(len(rows)))
        assert sampled.token_ids.tolist() == decoder.step(step, other, rows).argmax(axis=1).tolist()


@pytest.mark.parametrize("top_k", [2, 40, 64, 65])
def test_rows_of_top_k_and_greedy_rows_draw_from_few_candidates_what_they_draw_from_all_logits(top_k, monkeypatch):
    decoder = Decoder(PLAIN, NativeOps(activations="int8"), Random())
    one, other = decoder.new_cache(8, BLOCK), decoder.new_cache(8, BLOCK)
    sample, widths = decoder.ops.sample, []
    monkeypatch.setattr(decoder.ops, "sample", lambda z, s: widths.append(z.shape[1]) or sample(z, s))
    for step, rows in zip(STEPS, ROWS, strict=True):
        logits = decoder.step(step, other, rows)
        for seed in range(20):
            sampling = SamplingBatch.of(
                len(rows),
                temperature=np.resize([5.0, 0.0, 0.7], len(rows)),
                top_k=top_k - np.arange(len(rows)) % 2,
                top_p=0.95,
                min_p=0.001,
                seed=seed,
            )
            found = decoder.sample(step, one, rows, sampling)
            assert found.token_ids.tolist() == sample(logits, sampling).token_ids.tolist()
    assert set(widths) == {top_k if top_k <= MOST_CANDIDATES else VOCAB}


def test_a_step_that_outgrows_the_memory_gets_more_and_loses_nothing():
    decoder = Decoder(PLAIN, NativeOps(activations="int8"), Random())
    blocks = list(range(2 * LEAST_TOKENS // BLOCK + 2))
    one, other = decoder.new_cache(len(blocks), BLOCK), decoder.new_cache(len(blocks), BLOCK)
    long = 2 * LEAST_TOKENS + 3
    rows = np.array([long - 1], np.int32)
    whole = decoder.step(batch((0, long, blocks)), one, rows)
    decoder.step(batch((0, 5, blocks)), other, np.array([4], np.int32))
    in_parts = decoder.step(batch((5, long - 5, blocks)), other, rows - 5)
    np.testing.assert_array_equal(whole, in_parts)


def test_no_wanted_rows_is_a_step_that_only_writes():
    decoder = Decoder(PLAIN, NativeOps(), Random())
    cache = decoder.new_cache(4, BLOCK)
    assert decoder.step(batch((0, 5, [0])), cache, np.zeros(0, np.int32)).shape == (0, VOCAB)
    sampled = decoder.sample(batch((5, 5, [0])), cache, np.zeros(0, np.int32), SamplingBatch.greedy(0))
    assert len(sampled.token_ids) == 0


def test_a_hook_sees_every_group_since_the_step_is_not_compiled_then():
    decoder = Decoder(PLAIN, NativeOps(), Random())
    cache, seen = decoder.new_cache(4, BLOCK), []
    for projection in decoder.projections():
        projection.hook = lambda group, x, outputs: seen.append(group.name) or outputs
    decoder.step(batch((0, 5, [0])), cache, np.array([4], np.int32))
    assert seen == [p.group.name for p in decoder.projections()]


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_broken_weights_are_told_and_not_sampled_from(activations):
    source = Random()
    source.scale = np.float32(np.nan)
    decoder = Decoder(PLAIN, NativeOps(activations=activations), source)
    with pytest.raises(HalveError, match="row 0 of the sampling batch: its logits hold NaN"):
        decoder.sample(
            batch((0, 5, [0])), decoder.new_cache(4, BLOCK), np.array([4], np.int32), SamplingBatch.greedy(1)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.array([VOCAB] * 5, np.int32)}, f"token id {VOCAB} .* is not in 0..{VOCAB - 1}"),
        ({"slot_mapping": np.array([0, 1, 2, 3, 64], np.int32)}, r"slot 64 .* is not in 0..63"),
        ({"block_tables": np.array([[4]], np.int32)}, r"block 4 .* is not in 0..3"),
    ],
)
def test_what_lies_outside_is_refused_before_anything_runs(change, message):
    decoder = Decoder(PLAIN, NativeOps(), Random())
    with pytest.raises(KernelError, match=message):
        decoder.step(replace(batch((0, 5, [0])), **change), decoder.new_cache(4, BLOCK), np.array([4], np.int32))


def test_rows_outside_the_batch_are_refused():
    decoder = Decoder(PLAIN, NativeOps(), Random())
    with pytest.raises(KernelError, match=r"row 5 .* is not in 0..4"):
        decoder.step(batch((0, 5, [0])), decoder.new_cache(4, BLOCK), np.array([5], np.int32))
