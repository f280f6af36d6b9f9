"""What activations and caches lose, and the options that come of it."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import Decoder, read_config
from halve.search.settings import Setting, SettingLosses, measure_losses, settings_of
from halve.search.swaps import Swaps
from tests.tools import StateDictSource

NUM_LAYERS = 4
LOSSES = SettingLosses(
    activations={"int8": 1e-3, "bf16": 1e-5},
    caches={"bf16": (0.0,) * NUM_LAYERS, "int8": (1e-5,) * NUM_LAYERS, "int4": (1e-3, 8e-3, 2e-3, 4e-3)},
)


def test_layers_that_lose_most_by_int4_keep_int8():
    found = settings_of(LOSSES, ["int8"], ["bf16", "int8", "int4"], NUM_LAYERS)
    assert [one.caches for one in found] == [
        ("bf16",) * 4,
        ("int8",) * 4,
        ("int4",) * 4,
        ("int4", "int8", "int4", "int4"),
        ("int4", "int8", "int4", "int8"),
    ]
    assert found[0].loss == 1e-3
    assert found[3].loss == pytest.approx(1e-3 + 1e-3 + 1e-5 + 2e-3 + 4e-3)
    assert found[3].loss < found[2].loss


def test_every_cache_comes_with_every_kind_of_activations_the_usual_first():
    found = settings_of(LOSSES, ["int8", "bf16"], ["int8", "bf16"], NUM_LAYERS)
    assert [(one.activations, one.caches[0]) for one in found] == [
        ("int8", "int8"),
        ("int8", "bf16"),
        ("bf16", "int8"),
        ("bf16", "bf16"),
    ]
    assert settings_of(LOSSES, ["int8"], ["int8", "int4"], 1)[1:] == [
        Setting(activations="int8", caches=("int4",), loss=1e-3 + 1e-3)
    ]


def test_what_is_not_as_usual_is_in_the_name():
    usual = Setting(activations="int8", caches=("bf16",) * 4)
    assert usual.beside(usual) == ""
    assert Setting(activations="bf16", caches=("int8",) * 4).beside(usual) == "-a16-kv8"
    assert Setting(activations="int8", caches=("int4", "int8", "int4", "int4")).beside(usual) == "-kv4.8-1"


@pytest.fixture(scope="module", name="swaps")
def _swaps():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=90,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    source = StateDictSource(LlamaForCausalLM(config).eval().state_dict())
    read = read_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).with_kv_format("fp32")
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, 90, 48).astype(np.int32) for _ in range(8)]
    return Swaps(Decoder(read, TorchOps(), source), source, windows, device="cpu")


def test_a_caches_loss_is_the_kl_of_the_model_that_keeps_it_and_leaves_the_original_as_it_was(swaps):
    config = swaps.decoder.config
    other = Decoder(config.with_kv_format(["fp32", "int4", "int8"]), TorchOps(), swaps.source)
    assert swaps.kl_of_caches({1: "int4", 2: "int8"}) == pytest.approx(swaps.kl_of(other), rel=1e-3)
    assert swaps.kl_of(swaps.decoder) < 1e-9
    batch = TokenBatch.whole([swaps.batch.token_ids[:10]])
    plain = Decoder(config, TorchOps(), swaps.source)
    assert torch.equal(swaps.decoder.hidden(batch), plain.hidden(batch))


def test_activations_loss_is_the_kl_of_the_model_whose_inputs_are_rounded(swaps):
    class Rounded(TorchOps):
        def project(self, linear, x):
            return super().project(linear, x.bfloat16().float())

    other = Decoder(swaps.decoder.config, Rounded(), swaps.source)
    assert swaps.kl_of_activations("bf16") == pytest.approx(swaps.kl_of(other), rel=1e-2)
    assert swaps.kl_of_activations("fp32") < 1e-9
    assert all(projection.ops is swaps.decoder.ops for projection in swaps.decoder.projections())


def test_losses_are_measured_by_format_and_by_layer(swaps):
    seen = []
    found = measure_losses(
        swaps,
        swaps.decoder.config,
        ["int8", "bf16"],
        ["bf16", "int8", "int4"],
        by_layer=True,
        progress=lambda *at: seen.append(at),
    )
    assert 0 <= found.activations["bf16"] < found.activations["int8"]
    whole = {name: sum(of) for name, of in found.caches.items()}
    assert whole["fp32"] == 0 < whole["bf16"] < whole["int8"] < whole["int4"]
    assert whole["int4"] == pytest.approx(swaps.kl_of_caches(dict.fromkeys(range(3), "int4")))
    assert len(set(found.caches["int4"])) == 3
    assert len(set(found.caches["int8"])) == 1  # what is small is shared out evenly
    assert seen[-1] == (8, 8)
    assert not found.missing(["int8", "fp32"], ["int4"])
    assert found.missing(["fp8"], [])


def test_what_is_not_rounded_loses_nothing_and_takes_no_time(swaps):
    found = measure_losses(swaps, swaps.decoder.config, ["fp32"], ["fp32"], by_layer=True)
    assert found == SettingLosses(activations={"fp32": 0.0}, caches={"fp32": (0.0,) * 3})
