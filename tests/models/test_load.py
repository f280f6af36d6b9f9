"""Checkpoints on disk to decoders: names, shapes and values are checked, and every refusal names the tensor."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from halve.checkpoint import open_checkpoint
from halve.core.errors import CheckpointError
from halve.core.plan import KVCache, Plan
from halve.formats import FORMATS
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import load_config, load_decoder, stored_formats
from halve.models.names import modules

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def save_model(directory, dtype=torch.float32, shard_size="1GB", **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        **changes,
    )
    model = LlamaForCausalLM(config).eval().to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory):
    """Directories of saved models, untied and tied; copied before they are changed."""
    root = tmp_path_factory.mktemp("saved")
    save_model(root / "untied")
    save_model(root / "tied", tie_word_embeddings=True)
    return root


@pytest.fixture(name="changed")
def _changed(saved, tmp_path):
    """changed(kind, change): a copy of a saved model whose state dict went through `change`."""

    def make(kind, change):
        directory = tmp_path / "model"
        shutil.copytree(saved / kind, directory)
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


def load(directory):
    with open_checkpoint(directory) as checkpoint:
        config = load_config(checkpoint, Plan(kv_cache=KVCache(format="fp32")))
        return load_decoder(checkpoint, config, TorchOps())


def logits(decoder):
    return decoder.ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([TOKENS]))))


def reference(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float().numpy()


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_computes_what_transformers_computes(tmp_path, shard_size, tied):
    model = save_model(tmp_path, shard_size=shard_size, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    np.testing.assert_allclose(logits(load(tmp_path)), reference(model), atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_a_stored_format_is_known_from_headers_and_its_values_are_exact(tmp_path, dtype, name):
    model = save_model(tmp_path, dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        config = load_config(checkpoint)
        assert set(stored_formats(checkpoint, config).values()) == {FORMATS[name]}
        weight = checkpoint.read_weight(Q_PROJ, (32, 32))
    np.testing.assert_array_equal(weight.dequantize(), model.state_dict()[f"{Q_PROJ}.weight"].float().numpy())
    fresh = LlamaForCausalLM(model.config).float().eval()  # rotary frequencies of `model` were rounded with the rest
    fresh.load_state_dict(model.float().state_dict())
    np.testing.assert_allclose(logits(load(tmp_path)), reference(fresh), atol=1e-4)


def test_progress_counts_layers(saved):
    seen = []
    with open_checkpoint(saved / "tied") as checkpoint:
        load_decoder(checkpoint, load_config(checkpoint), TorchOps(), lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


def test_the_cache_format_comes_from_the_plan(saved):
    with open_checkpoint(saved / "tied") as checkpoint:
        assert {layer.kv_format for layer in load_config(checkpoint).layers} == {"bf16"}
        fp32 = load_config(checkpoint, Plan(kv_cache=KVCache(format="fp32")))
        assert {layer.kv_format for layer in fp32.layers} == {"fp32"}


@pytest.mark.parametrize(
    "name", [f"{Q_PROJ}.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(changed, name):
    directory = changed("untied", lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=f"model: 1 tensors are missing: {name}$"):
        load(directory)


def test_of_many_missing_tensors_five_are_named(changed):
    def drop(state):
        for name in [n for n in state if ".layers.1." in n]:
            del state[name]

    with pytest.raises(CheckpointError, match=r"9 tensors are missing: model\.layers\.1\.\S+, .* and 4 more$"):
        load(changed("untied", drop))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_proj.weight",
        f"{Q_PROJ}.bias",
        f"{Q_PROJ}.weight_scale",
        f"{Q_PROJ}.weight_packed",
        f"{Q_PROJ}.lora_A.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "score.weight",
    ],
)
def test_a_surplus_tensor_is_named(changed, name):
    directory = changed("untied", lambda state: state.update({name: torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=f"1 tensors are not part of a LlamaForCausalLM with 2 layers: {name}; "):
        load(directory)


@pytest.mark.parametrize("name", [f"{Q_PROJ}.weight", "model.layers.1.input_layernorm.weight"])
def test_a_tensor_of_another_shape_is_named(changed, name):
    def cut(state):
        state[name] = state[name][:-1].contiguous()

    with pytest.raises(
        CheckpointError, match=rf"{name}: shape \[31.*\]; the model needs \[32.*config.json and weights"
    ):
        load(changed("untied", cut))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{Q_PROJ}.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_not_finite_is_named_with_the_place(changed, name, value):
    def damage(state):
        state[name].view(-1)[5] = value

    with pytest.raises(CheckpointError, match=rf"{name}: (nan|inf) at \[(0, )?5\]; weights must be finite"):
        load(changed("untied", damage))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_a_matrix_of_another_type_is_named(changed, dtype):
    def cast(state):
        state[f"{Q_PROJ}.weight"] = state[f"{Q_PROJ}.weight"].to(dtype)

    directory = changed("untied", cast)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ}.weight: (I8|F64|F8_E4M3)"):
        load(directory)
    with open_checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match=f"{Q_PROJ}.weight: stored as"):
        stored_formats(checkpoint, load_config(checkpoint))


def test_a_tied_table_may_be_stored_twice(saved, changed):
    def copy(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    np.testing.assert_array_equal(logits(load(changed("tied", copy))), logits(load(saved / "tied")))


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t[:-1].clone(), lambda t: t.bfloat16()])
def test_two_tied_tables_that_differ_are_refused(changed, change):
    def differ(state):
        state["lm_head.weight"] = change(state["model.embed_tokens.weight"])

    message = r"lm_head\.weight differs from model\.embed_tokens\.weight, but config\.json says tie_word_embeddings"
    with pytest.raises(CheckpointError, match=message):
        load(changed("tied", differ))


def test_rotary_buffers_of_old_conversions_are_ignored(saved, changed):
    def add(state):
        for layer in range(2):
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 99.0)

    np.testing.assert_array_equal(logits(load(changed("untied", add))), logits(load(saved / "untied")))


def quantized(directory, module):
    """Say in config.json that `module` is packed int4 in groups of 32."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": [module],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
            }
        },
    }
    (directory / "config.json").write_text(json.dumps(config))


PACKED = {
    "weight_packed": torch.zeros(32, 4, dtype=torch.int32),
    "weight_scale": torch.ones(32, 1, dtype=torch.bfloat16),
    "weight_shape": torch.tensor([32, 32]),
}


def pack(state, parts=PACKED):
    del state[f"{Q_PROJ}.weight"]
    state |= {f"{Q_PROJ}.{part}": PACKED[part] for part in parts}


def test_a_packed_matrix_that_the_configuration_names_is_loaded(changed):
    directory = changed("untied", pack)
    quantized(directory, Q_PROJ)
    with open_checkpoint(directory) as checkpoint:
        config = load_config(checkpoint)
        assert stored_formats(checkpoint, config)[Q_PROJ] == FORMATS["int4-g32"]
        assert (checkpoint.read_weight(Q_PROJ, (32, 32)).unpacked_codes() == -8).all()
    assert np.isfinite(logits(load(directory))).all()


def test_a_packed_matrix_that_the_configuration_does_not_name_is_refused(changed):
    message = f"missing: {Q_PROJ}.weight; quantization_config of config.json does not name {Q_PROJ}.weight_packed"
    with pytest.raises(CheckpointError, match=message):
        load(changed("untied", pack))


@pytest.mark.parametrize("part", PACKED)
def test_a_missing_part_of_a_packed_matrix_is_named_before_anything_is_read(changed, part):
    directory = changed("untied", lambda state: pack(state, [p for p in PACKED if p != part]))
    quantized(directory, Q_PROJ)
    message = f"1 tensors are missing: {Q_PROJ}.{part}$"
    with open_checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match=message):
        load_config(checkpoint)


def test_a_packed_matrix_beside_a_plain_one_is_refused(changed):
    def add(state):
        state |= {f"{Q_PROJ}.{part}": tensor for part, tensor in PACKED.items()}

    directory = changed("untied", add)
    quantized(directory, Q_PROJ)
    with pytest.raises(CheckpointError, match=f"1 tensors are not part of .*: {Q_PROJ}.weight; "):
        load(directory)


def test_modules_are_read_whole_from_shards(tmp_path):
    model = save_model(tmp_path, shard_size="20KB")
    state = model.state_dict()
    with open_checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.reader.files) > 1
        for module in modules(load_config(checkpoint)):
            stored = checkpoint.read_weight(module.name, module.shape)
            np.testing.assert_array_equal(stored.codes, state[f"{module.name}.weight"].numpy())
