"""gpt-oss, DeepSeek and Llama 4 beyond what tests/models/test_moe.py asks of every sparse family."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from halve.api.describe import inspect
from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan, uniform_plan
from halve.compress.shrink import shrunk_config
from halve.core.errors import CheckpointError, ConfigError, PlanError
from halve.core.plan import ExpertGroup, ExpertPlan, LayerExperts, Plan
from halve.engine import EngineCore, ModelRunner
from halve.formats import FORMATS
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models.config import Experts, read_config
from halve.models.load import load_config
from halve.models.moe import route
from halve.search.expert_moves import expert_moves
from tests.engine.toy import finish, request
from tests.models.test_moe import FAMILIES, IDS, loaded, raw, sparse_model

NEW = [name for name in FAMILIES if name in ("gpt_oss", "deepseek_v2", "deepseek_v3", "llama4")]


def logits(path, ops):
    decoder = loaded(path, ops)
    return decoder.ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([IDS]))))


@pytest.mark.parametrize("family", NEW)
def test_greedy_answers_of_the_engine_are_those_of_transformers(family, tmp_path):
    model = sparse_model(family, seed=3)
    model.save_pretrained(tmp_path)
    core = EngineCore(ModelRunner(loaded(tmp_path, NativeOps(activations="fp32")), num_blocks=16, block_size=16))
    prompts = [IDS[:9].tolist(), IDS[9:12].tolist()]
    done = finish(core, [request(str(i), prompt, max_tokens=30, ignore_eos=True) for i, prompt in enumerate(prompts)])
    for prompt, completion in zip(prompts, done, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(30):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(completion.token_ids) == ids[len(prompt) :]


def mxfp4_model(path):
    """A gpt-oss whose experts are stored in mxfp4; the float model that means the same."""
    model = sparse_model("gpt_oss", intermediate_size=64, hidden_size=64)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 125, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator)
        blocks[0, 0, 0], scales[0, 0, 0] = 0x80, 0  # zeros of either sign, under a scale that is none
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        state[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    model.load_state_dict(state)
    return model, tensors


@pytest.mark.parametrize("ops", [TorchOps("cpu"), NativeOps(activations="fp32")], ids=["torch", "native"])
def test_mxfp4_is_read_without_loss(ops, tmp_path):
    model, _ = mxfp4_model(tmp_path)
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(logits(tmp_path, ops), expected, atol=1e-4 * max(1, np.abs(expected).max()))
    with open_checkpoint(tmp_path) as checkpoint:
        found = checkpoint.read_weight("model.layers.1.mlp.experts.2.up_proj", (64, 64)).dequantize()
    exact = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][2, :, 1::2].T.numpy()
    np.testing.assert_array_equal(found, exact)


def test_a_bundle_of_mxfp4_keeps_experts_exactly_where_the_plan_leaves_them(tmp_path):
    mxfp4_model(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        apply_plan(checkpoint, load_config(checkpoint), Plan(), tmp_path / "made")
    np.testing.assert_array_equal(
        logits(tmp_path / "made", TorchOps("cpu")), logits(tmp_path / "model", TorchOps("cpu"))
    )
    shutil.rmtree(tmp_path / "made" / "halve")  # a certificate belongs in there, and only `halve optimize` writes one
    facts = inspect(tmp_path / "made")
    assert facts.experts == (6, 4)
    assert {g.format for g in facts.groups if "experts" in g.pattern} == {"int5-g32"}
    assert facts.active_parameters < facts.parameters == inspect(tmp_path / "model").parameters


def damaged(path, change):
    _, tensors = mxfp4_model(path)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        loaded(path, TorchOps("cpu"))
    return str(error.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [(255, "stands for no number"), (252, "stands for 2^125"), (1, "stands for 2^-126")],
)
def test_a_scale_of_mxfp4_out_of_range_is_named(value, said, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"][3, 5, 1] = 0x11
        tensors["model.layers.1.mlp.experts.gate_up_proj_scales"][3, 5, 1] = value

    message = damaged(tmp_path, change)
    assert f"gate_up_proj_scales: {value} at [3, 5, 1] {said}" in message
    assert "scales of mxfp4 that are run are 2 to 251" in message
    assert "download or write it again" in message


EXPERTS = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{EXPERTS}down_proj_scales"), "down_proj_scales is missing, beside"),
        (lambda t: t.pop(f"{EXPERTS}down_proj_blocks"), "down_proj_scales [6, 64, 2] has no blocks beside it"),
        (
            lambda t: t.update({f"{EXPERTS}down_proj_scales": t[f"{EXPERTS}down_proj_scales"][:, :, :1]}),
            "down_proj_scales: U8 [6, 64, 1]; the blocks beside it need U8 [6, 64, 2]",
        ),
        (
            lambda t: t.update({f"{EXPERTS}down_proj_blocks": t[f"{EXPERTS}down_proj_blocks"][..., :8]}),
            "blocks of mxfp4 are U8 with 16 bytes for 32 numbers",
        ),
        (
            lambda t: t.update({f"{EXPERTS}gate_up_proj_bias": t[f"{EXPERTS}gate_up_proj_bias"][:, :127]}),
            "127 outputs are not as many gates as ups",
        ),
        (lambda t: t.update({f"{EXPERTS}down_proj_bias": torch.zeros(6)}), "stacked experts have 2 sizes"),
        (
            lambda t: t.update({n: t[n][:5] for n in list(t) if n.startswith(EXPERTS)}),
            "experts.5.down_proj.bias",
        ),
        (lambda t: t.pop("model.layers.1.mlp.router.bias"), "model.layers.1.mlp.router.bias"),
        (
            lambda t: t["model.layers.1.mlp.router.weight"].fill_(torch.nan),
            "model.layers.1.mlp.router.weight: nan at [0, 0]",
        ),
    ],
)
def test_damage_to_stacked_experts_is_named(change, said, tmp_path):
    assert said in damaged(tmp_path, change)


def test_mxfp4_of_other_families_and_with_unknown_keys_is_refused(tmp_path):
    mxfp4_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, said in (
        ({"architectures": ["MixtralForCausalLM"]}, "mxfp4 is read for GptOssForCausalLM, not 'MixtralForCausalLM'"),
        ({"quantization_config": {"quant_method": "mxfp4", "rows": 2}}, r"unknown keys \['rows'\] for mxfp4"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(tmp_path)


def test_a_portable_bundle_of_stacked_experts_is_refused(tmp_path):
    sparse_model("gpt_oss").save_pretrained(tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        config = load_config(checkpoint)
        plan = uniform_plan(config, FORMATS["int8-g32"], "rtn", portable=True, source_bits=16)
        with pytest.raises(PlanError, match="GptOssForCausalLM stacked in one tensor; leave out --portable"):
            apply_plan(checkpoint, config, plan, tmp_path / "made")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt_oss", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is above num_local_experts 6"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "expected one of sliding_attention, full_attention for each"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, "layer_types is"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit is 0"),
        ("gpt_oss", {"sliding_window": 0}, "sliding_window is 0"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; only greedy and group_limited"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias is True without q_lora_rank"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"n_group": 3}, "n_group 3 must divide n_routed_experts 8"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group 5 be no more than n_group"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, "leaves one of 8 experts to a group"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok 3 is above the 2 experts of topk_group 1"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above n_routed_experts 8"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "first_k_dense_replace 2 leaves none of 2 layers"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2 differs from num_attention_heads 4"),
        ("deepseek_v3", {"v_head_dim": 24}, "v_head_dim 24 is above the 20"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        ("llama4", {"moe_layers": [4]}, "moe_layers is [4]; expected some of layers 0 to 3"),
        ("llama4", {"moe_layers": []}, "moe_layers is []"),
        ("llama4", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]; expected one of 0, 1 for each of 4 layers"),
        ("llama4", {"layer_types": ["sliding_attention"] * 4}, "expected one of chunked_attention, full_attention"),
        ("llama4", {"attention_chunk_size": None}, "attention_chunk_size is missing"),
        ("llama4", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is above num_local_experts 4"),
        ("gpt_oss", {"num_experts": 5, "num_local_experts": None, "swiglu": 1}, "unknown keys ['swiglu']"),
    ],
)
def test_a_configuration_that_is_not_run_is_refused_by_name(family, changes, said):
    with pytest.raises(ConfigError) as error:
        read_config(raw(family, **changes))
    assert said in str(error.value)


VARIANTS = [
    ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": 16, "n_group": None, "topk_group": None}),
    ("deepseek_v2", {"attention_bias": True, "q_lora_rank": 16, "n_shared_experts": 1, "rope_parameters": None}),
    ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "q_lora_rank": None, "v_head_dim": 20}),
    ("deepseek_v3", {"num_hidden_layers": 3, "first_k_dense_replace": 0, "topk_group": 4, "attention_bias": True}),
    ("llama4", {"num_experts_per_tok": 2, "use_qk_norm": False, "interleave_moe_layer_step": 1}),
    ("llama4", {"moe_layers": [0, 3], "no_rope_layers": [0, 1, 1, 0], "attn_temperature_tuning": False}),
    ("gpt_oss", {"num_experts_per_tok": 1, "layer_types": ["full_attention", "sliding_attention"]}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=lambda one: one if isinstance(one, str) else "")
def test_variants_of_a_family_are_those_of_transformers(family, changes, tmp_path):
    model = sparse_model(family, **changes)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    found = logits(tmp_path, NativeOps(activations="fp32"))
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    sparse_model("deepseek_v3").save_pretrained(tmp_path)
    before = logits(tmp_path, TorchOps("cpu"))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(logits(tmp_path, TorchOps("cpu")), before)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        loaded(tmp_path, TorchOps("cpu"))


def test_groups_and_corrections_by_hand():
    """Sigmoids 1/2, 3/4, 4/5, 2/3 in two groups; a correction of 1/2 sends the choice to the first expert."""
    odds = np.array([[1, 3, 4, 2]], np.float32)
    experts = Experts(
        num_experts=4, top_k=1, intermediate_size=8, renormalize=False, scores="sigmoid", scale=2.0, num_groups=2,
        top_groups=1, group_score="two",
    )  # fmt: skip
    plain = route(np.log(odds), experts)  # groups count 5/4 and 22/15
    assert np.diff(plain.offsets).tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(plain.weights, [1.6], rtol=1e-6)
    corrected = route(np.log(odds), experts, np.array([0.5, 0, 0, 0], np.float32))
    assert np.diff(corrected.offsets).tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(corrected.weights, [1.0], rtol=1e-6)  # twice the score, without its correction


def test_attention_from_latents_and_experts_are_not_spread_over_ranks():
    from halve.models.parallel import Shard

    with pytest.raises(ConfigError, match="DeepseekV3ForCausalLM over 2 ranks"):
        Shard(read_config(raw("deepseek_v3")), 0, 2)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_experts_with_biases_or_in_groups_are_kept_whole(family):
    config = read_config(raw(family))
    kept = tuple(ExpertGroup(members=(e,), weights=(1.0,)) for e in range(4))
    sparse = [i for i, layer in enumerate(config.layers) if layer.experts]
    plan = ExpertPlan(layers=tuple(LayerExperts(layer=i, groups=kept) for i in sparse))
    with pytest.raises(PlanError, match="has biases or groups of experts, which are kept whole; change top_k alone"):
        shrunk_config(config, plan)
    assert {move.kind for move in expert_moves(config, {})} == {"top_k"}
    assert shrunk_config(config, ExpertPlan(top_k=2)).layers[-1].experts.top_k == 2
