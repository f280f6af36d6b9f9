"""Sparse families against transformers on small random checkpoints, and the router by hand."""

import json

import numpy as np
import pytest
import torch
import transformers

from halve.checkpoint import open_checkpoint
from halve.core.errors import CheckpointError, ConfigError
from halve.formats import FORMATS, Weight
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models.config import Experts, read_config
from halve.models.decoder import DecoderLayer
from halve.models.load import load_config, load_decoder
from halve.models.moe import route, sparse_feed_forward
from halve.models.names import num_active_parameters, num_parameters
from halve.models.rope import RopeTable

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LATENT = {
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
FAMILIES = {
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeForCausalLM,
        transformers.Qwen2MoeConfig,
        {
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 6,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {
            "head_dim": 16,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "olmoe": (
        transformers.OlmoeForCausalLM,
        transformers.OlmoeConfig,
        {"intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": None},
    ),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        {
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 4,
            "sliding_window": 5,
            "rope_parameters": {**YARN, "truncate": False, "rope_theta": 150000.0},
            "swiglu_limit": 1.5,  # so low that it matters
        },
    ),
    "deepseek_v2": (
        transformers.DeepseekV2ForCausalLM,
        transformers.DeepseekV2Config,
        {
            **LATENT,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "deepseek_v3": (
        transformers.DeepseekV3ForCausalLM,
        transformers.DeepseekV3Config,
        {
            **LATENT,
            "q_lora_rank": 32,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "llama4": (
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig,
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 32,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 7,
            "floor_scale": 4,
            "attn_scale": 0.3,
        },
    ),
}
IDS = np.random.default_rng(0).integers(3, 96, 23).astype(np.int32)


def sparse_model(family, seed=0, **more):
    """A random model whose router has clear wishes."""
    torch.manual_seed(seed)
    kind, config, sizes = FAMILIES[family]
    model = kind(config(**{**BASE, **sizes, **more})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    model = sparse_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, path


def loaded(path, ops):
    with open_checkpoint(path) as checkpoint:
        return load_decoder(checkpoint, load_config(checkpoint).with_kv_format("fp32"), ops)


@pytest.mark.parametrize("ops", [TorchOps("cpu"), NativeOps(activations="fp32")], ids=["torch", "native"])
def test_logits_are_those_of_transformers(saved, ops):
    model, path = saved
    decoder = loaded(path, ops)
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    hidden = decoder.hidden(TokenBatch.whole([IDS]))
    found = decoder.ops.to_host(decoder.logits(hidden))
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_the_experts_are_those_of_transformers(saved):
    model, path = saved
    chosen, name = {}, type(model).__name__

    def look(index):
        def hook(module, arguments, outputs):
            # The last of what a router gives are its choices; Llama 4's tells the logits there, and chooses one.
            chosen[index] = outputs[-1].argmax(-1, keepdim=True).numpy() if "Llama4" in name else outputs[-1].numpy()

        return hook

    for index, layer in enumerate(model.model.layers):
        block = next(getattr(layer, n) for n in ("block_sparse_moe", "mlp", "feed_forward") if hasattr(layer, n))
        if hasattr(block, "experts"):
            getattr(block, "gate", getattr(block, "router", None)).register_forward_hook(look(index))
    with torch.no_grad():
        model(torch.from_numpy(IDS.astype(np.int64))[None])
    decoder = loaded(path, TorchOps("cpu"))
    routings = {}
    for index, layer in enumerate(decoder.layers):
        if layer.router is not None:
            original = layer.router.logits

            def logits(x, index=index, original=original, router=layer.router):
                found = original(x)
                routing = route(found, experts := router.experts, router.correction)
                numbers = np.repeat(np.arange(experts.num_experts), np.diff(routing.offsets))
                pairs = sorted(zip(routing.rows.tolist(), numbers.tolist(), strict=True))
                routings[index] = np.array([e for _, e in pairs]).reshape(len(found), experts.top_k)
                return found

            layer.router.logits = logits
    decoder.hidden(TokenBatch.whole([IDS]))
    assert routings.keys() == chosen.keys()
    assert routings
    for index, found in routings.items():
        np.testing.assert_array_equal(found, np.sort(chosen[index], axis=1))


def test_a_cache_and_steps_give_what_whole_sequences_give(saved):
    _, path = saved
    decoder = loaded(path, NativeOps(activations="fp32"))
    whole = decoder.ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([IDS]))))
    cache = decoder.new_cache(4, 16)
    for i, token in enumerate(IDS):
        batch = TokenBatch(
            token_ids=np.array([token], np.int32),
            positions=np.array([i], np.int32),
            cu_seqlens=np.array([0, 1], np.int32),
            slot_mapping=np.array([i], np.int32),
            block_tables=np.array([[0, 1, 2, 3]], np.int32),
        )
        step = decoder.step(batch, cache, np.array([0]))
        np.testing.assert_allclose(step[0], whole[i], atol=1e-4 * np.abs(whole).max())


def test_parameters_are_counted_active_and_in_all(saved):
    model, path = saved
    with open_checkpoint(path) as checkpoint:
        config = load_config(checkpoint)
    corrections = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert num_parameters(config) == sum(p.numel() for p in model.parameters()) + corrections
    idle = 0
    for experts in (layer.experts for layer in config.layers if layer.experts):
        width, hidden = experts.intermediate_size, config.hidden_size
        biases = 2 * width + hidden if experts.bias else 0
        idle += (experts.num_experts - experts.top_k) * (3 * width * hidden + biases)
    assert num_active_parameters(config) == num_parameters(config) - idle


def test_routing_by_hand():
    """Two tokens, three experts, two each: softmax of (0, ln 2, ln 4) is (1/7, 2/7, 4/7)."""
    logits = np.log(np.array([[1, 2, 4], [8, 1, 1]], np.float32))
    plain = route(logits, Experts(num_experts=3, top_k=2, intermediate_size=8, renormalize=False))
    assert plain.offsets.tolist() == [0, 1, 3, 4]
    assert plain.rows.tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(plain.weights, [0.8, 2 / 7, 0.1, 4 / 7], rtol=1e-6)
    normed = route(logits, Experts(num_experts=3, top_k=2, intermediate_size=8, renormalize=True))
    np.testing.assert_allclose(normed.weights, [8 / 9, 1 / 3, 1 / 9, 2 / 3], rtol=1e-6)


def raw(family="mixtral", **changes):
    kind, config, sizes = FAMILIES[family]
    found = json.loads(config(**{**BASE, **sizes}, architectures=[kind.__name__]).to_json_string())
    return {**found, **changes}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is above num_local_experts 4"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers is"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmoe", {"moe_intermediate_size": 8}, "unknown keys ['moe_intermediate_size']"),
    ],
)
def test_a_configuration_that_is_not_run_is_refused_by_name(family, changes, said):
    with pytest.raises(ConfigError) as error:
        read_config(raw(family, **changes))
    assert said in str(error.value)


def test_an_expert_that_is_missing_and_one_too_many_are_named(tmp_path):
    sparse_model("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for count, said in ((5, "experts.4.w1.weight"), (3, "experts.3.w1.weight")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": count}))
        with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError) as error:
            load_config(checkpoint)
        assert said in str(error.value)


def test_logits_that_are_no_numbers_are_told_with_their_layer(tmp_path):
    model = sparse_model("olmoe")
    model.save_pretrained(tmp_path)
    decoder = loaded(tmp_path, TorchOps("cpu"))
    broken = Weight(format=FORMATS["fp32"], shape=(6, 32), codes=np.full((6, 32), np.nan, np.float32))
    decoder.layers[1].router.linear = decoder.ops.linear(broken)
    with pytest.raises(CheckpointError, match="layer 1: the router's logits hold NaN"):
        decoder.hidden(TokenBatch.whole([IDS]))


def test_experts_are_counted(saved):
    _, path = saved
    decoder = loaded(path, NativeOps(activations="fp32"))
    decoder.hidden(TokenBatch.whole([IDS]))
    decoder.hidden(TokenBatch.whole([IDS[:1]]))
    sparse = [layer.router.experts for layer in decoder.layers if layer.router]
    counts = decoder.expert_counts()
    assert len(counts) == len(sparse)
    for count, experts in zip(counts, sparse, strict=True):
        assert count.tokens.sum() == 24 * experts.top_k
        assert count.steps == 2
        assert experts.top_k * 2 <= count.reads <= experts.num_experts + experts.top_k


def test_experts_without_tokens_are_shown_those_they_like_best():
    """Of four tokens none goes to expert 2, which sees the two whose logits for it are largest."""
    seen = []
    ops = TorchOps("cpu")
    torch.manual_seed(0)

    class Made:
        def weight(self, name, shape):
            values = torch.randn(shape).numpy()
            return Weight(format=FORMATS["fp32"], shape=shape, codes=values)

        def vector(self, name, shape):
            return np.eye(3, 8, dtype=np.float32) if name.endswith("gate.weight") else np.ones(shape, np.float32)

    config = read_config(raw("mixtral", hidden_size=8, num_attention_heads=2, num_local_experts=3, num_hidden_layers=1))
    layer = DecoderLayer(config, 0, ops, Made(), RopeTable(config.head_dim))
    for kind in ("gate_up", "down"):
        layer.projections[kind].hook = lambda group, x, outputs: seen.append((group.name, len(x))) or outputs
    x = torch.zeros(4, 8)
    x[:, 0], x[:, 1], x[:, 2] = 4, 3, torch.tensor([0.0, 1.0, 2.0, -1.0])
    out = sparse_feed_forward(ops, layer.router, layer.projections, x, forced=2)
    plain = sparse_feed_forward(ops, layer.router, layer.projections, x)
    assert torch.equal(out, plain)
    names = dict(seen[:6])
    assert names["layers.0.gate_up.2"] == names["layers.0.down.2"] == 2
    assert names["layers.0.gate_up.0"] == 4
