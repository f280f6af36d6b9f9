"""Energies of projection inputs against hooks on transformers' own model."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halve.compress import Energies, Hessians, calibrate
from halve.compress.calibrate import BATCH_TOKENS, flat_batches
from halve.core.errors import CheckpointError, DataError
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import Decoder, read_config
from tests.tools import StateDictSource

GROUPS = {"self_attn.q_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_proj": "gate_up", "mlp.down_proj": "down"}


def random_model(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        max_position_embeddings=256,
        initializer_range=0.2,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", name="model")
def _model():
    return random_model()


def config_of(model):
    return read_config({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}).with_kv_format("fp32")


def run(model, documents, window_tokens=64, **options):
    return calibrate(
        config_of(model), StateDictSource(model.state_dict()), documents, window_tokens=window_tokens, **options
    )


def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 60, n).astype(np.int32) for n in lengths]


def direct(model, windows):
    """E[x^2] of each group's input, in float64, by forward hooks."""
    sums, handles = {}, []

    def tap(name):
        def hook(module, inputs, output):
            sums[name] = sums.get(name, 0) + inputs[0].double().square().sum((0, 1))

        return hook

    for i, layer in enumerate(model.model.layers):
        for path, kind in GROUPS.items():
            handles.append(layer.get_submodule(path).register_forward_hook(tap(f"layers.{i}.{kind}")))
    handles.append(model.lm_head.register_forward_hook(tap("lm_head")))
    with torch.no_grad():
        for window in windows:
            model(torch.from_numpy(window[None].astype(np.int64)))
    for handle in handles:
        handle.remove()
    total = sum(len(w) for w in windows)
    return {name: (value / total).numpy() for name, value in sums.items()}


def assert_same(energies, expected):
    assert energies.by_group.keys() == expected.keys()
    for name, value in expected.items():
        assert energies.by_group[name].dtype == np.float64
        np.testing.assert_allclose(energies.by_group[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_energies_are_the_mean_squares_that_hooks_on_transformers_see(changes):
    model, texts = random_model(**changes), documents(40, 3, 17, 1)
    energies = run(model, texts)
    assert energies.num_tokens == 61
    assert_same(energies, direct(model, texts))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_second_moments_are_those_of_each_groups_inputs(changes, tmp_path):
    model, texts, inputs = random_model(**changes), documents(*[90] * 30), {}
    decoder = Decoder(config_of(model), TorchOps(), StateDictSource(model.state_dict()))

    def tap(group, x, outputs):
        inputs[group.name] = x.double()
        return outputs

    for projection in decoder.projections():
        projection.hook = tap
    decoder.logits(decoder.hidden(TokenBatch.whole(texts)))
    hessians = Hessians(folder=tmp_path)
    energies = run(model, texts, window_tokens=100, hessians=hessians)
    assert len(flat_batches(texts, 100)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.npy" for name in inputs)
    for name, x in inputs.items():
        found = hessians.of(name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, (x.T @ x / len(x)).numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.diag(found), energies.by_group[name], rtol=1e-4)
    assert Hessians.size_bytes(config_of(model)) == sum(hessians.of(name).nbytes for name in inputs)


def test_a_long_document_is_cut_into_windows_that_do_not_see_each_other(model):
    (text,) = documents(50)
    expected = direct(model, [text[:16], text[16:32], text[32:48], text[48:]])
    assert_same(run(model, [text], window_tokens=16), expected)
    assert not np.allclose(run(model, [text]).by_group["layers.1.o"], expected["layers.1.o"], rtol=1e-3)


def test_streamed_layer_by_layer_equals_the_whole_model_at_once(model):
    texts, sums = documents(30, 20), {}
    decoder = Decoder(config_of(model), TorchOps(), StateDictSource(model.state_dict()))

    def tap(group, x, outputs):
        sums[group.name] = x.double().square().sum(0)
        return outputs

    for projection in decoder.projections():
        projection.hook = tap
    decoder.logits(decoder.hidden(TokenBatch.whole(texts)))
    assert_same(run(model, texts), {name: (value / 50).numpy() for name, value in sums.items()})


def test_texts_of_many_batches_are_averaged_over_all_tokens(model):
    texts = documents(*[100] * (BATCH_TOKENS // 100 + 5))
    assert len(flat_batches(texts, 100)) == 2
    assert_same(run(model, texts, window_tokens=100), direct(model, texts))


@pytest.mark.parametrize("window", [1, 7, 100, 5000])
def test_batches_hold_every_window_once_and_no_more_than_fit(window):
    texts = documents(3000, 1, 0, 2047, 4999)
    batches = flat_batches(texts, window)
    windows = [w for batch in batches for w in batch]
    assert all(0 < len(w) <= window for w in windows)
    np.testing.assert_array_equal(np.concatenate(windows), np.concatenate(texts))
    assert all(sum(map(len, batch)) <= max(BATCH_TOKENS, window) for batch in batches)


def test_the_order_of_documents_hardly_matters(model):
    texts = documents(10, 20, 30)
    forward, backward = run(model, texts), run(model, texts[::-1])
    for name, value in forward.by_group.items():
        np.testing.assert_allclose(value, backward.by_group[name], rtol=1e-5)


def test_progress_counts_layers(model):
    seen = []
    run(model, documents(5), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("texts", [[], documents(0), documents(0, 0)])
def test_a_text_without_tokens_is_refused(model, texts):
    with pytest.raises(DataError, match="the calibration text holds no tokens; give documents that are not empty"):
        run(model, texts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_nan_is_refused_with_its_layer(value):
    model = random_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(
        CheckpointError, match="layer 1: the original model computes NaN or infinity on the calibration"
    ):
        run(model, documents(5))


def test_energies_survive_a_file(model, tmp_path):
    energies = run(model, documents(9))
    energies.save(tmp_path / "energies.npz")
    loaded = Energies.load(tmp_path / "energies.npz")
    assert loaded.num_tokens == 9
    assert loaded.by_group.keys() == energies.by_group.keys()
    for name, value in energies.by_group.items():
        np.testing.assert_array_equal(loaded.by_group[name], value)
