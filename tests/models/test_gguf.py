"""A model of ours as a file of llama.cpp: the same logits, whatever the order of rows and the type."""

import gguf
import numpy as np
import pytest
import torch

from halve.checkpoint import open_checkpoint
from halve.checkpoint.gguf import GGUFFile, is_gguf
from halve.core.errors import CheckpointError, ConfigError
from halve.formats import FORMATS, Weight
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import Decoder, load_config, load_decoder
from halve.models.config import Rope
from halve.models.gguf import GGUFSource, gguf_name, read_gguf_config
from halve.models.rope import inverse_frequencies
from tests.api.tiny import make_model
from tests.ggufs import write_gguf
from tests.tools import ops_under_test

IDS = np.arange(40, dtype=np.int32) * 7 % 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.05)


def logits(decoder):
    return decoder.ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([IDS]))))


def of_checkpoint(path):
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        return logits(load_decoder(checkpoint, load_config(checkpoint).with_kv_format("fp32"), TorchOps("cpu")))


def of_file(path, make=lambda: TorchOps("cpu"), kind=GGUFFile):
    file = kind(path)
    config = read_gguf_config(file)
    with torch.inference_mode():
        return logits(Decoder(config, make(), GGUFSource(file, config), None))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_have_the_logits_of_the_model_that_was_converted(tiny, tmp_path, kind):
    # The converter's float16 rounds what bf16 holds below 6e-8.
    assert np.abs(of_file(write_gguf(tiny, tmp_path / "x.gguf", kind)) - of_checkpoint(tiny)).max() < 1e-5


class Undone(GGUFFile):
    """Every matrix as float32, by gguf's own code."""

    def weight(self, name, shape):
        return Weight(format=FORMATS["fp32"], shape=shape, codes=self.values(name, shape))


@pytest.mark.parametrize("make", ops_under_test())
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q4_1"])
def test_other_types_compute_what_ggufs_own_numbers_do(tiny, tmp_path, kind, make):
    path = write_gguf(tiny, tmp_path / "x.gguf", kind)
    assert np.abs(of_file(path, make) - of_file(path, kind=Undone)).max() < 1e-4


def test_types_with_the_bits_of_our_formats_stay_packed(tiny, tmp_path):
    stored = {}
    for kind in ("Q4_0", "Q8_0", "Q5_0"):
        file = GGUFFile(write_gguf(tiny, tmp_path / f"{kind}.gguf", kind))
        weight = GGUFSource(file, read_gguf_config(file)).weight("model.layers.0.self_attn.q_proj", (64, 64))
        stored[kind] = weight.format.name
    assert stored == {"Q4_0": "int4-g32", "Q8_0": "int8-g32", "Q5_0": "fp32"}


def test_k_types_are_undone_by_gguf(tmp_path):
    """A block of Q6_K by hand: 256 weights of 210 bytes, the scale of the block last."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 210), np.uint8)
    blocks[:, -2:] = np.array([0.01, 0.02], np.float16).view(np.uint8).reshape(2, 2)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q6_K
    writer.add_tensor("w", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "x.gguf").weight("w", (2, 256))
    np.testing.assert_array_equal(found.codes, gguf.quants.dequantize(blocks, kind))


def test_the_factors_of_llama_3_become_its_positions(tiny, tmp_path):
    plain, scaled = Rope(theta=500000.0), Rope(theta=500000.0, kind="llama3", factor=32.0)
    factors = inverse_frequencies(plain, 16) / inverse_frequencies(scaled, 16)
    made = make_model(tmp_path / "m", max_position_embeddings=64, rope_theta=500000.0)
    path = write_gguf(made, tmp_path / "x.gguf", extra={"rope_freqs.weight": factors.astype(np.float32)})
    rope = read_gguf_config(GGUFFile(path)).layers[0].rope
    assert (rope.kind, rope.factor) == ("llama3", pytest.approx(32.0))
    path = write_gguf(made, tmp_path / "y.gguf", extra={"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)})
    with pytest.raises(ConfigError, match=r"not the factors of Llama 3\.1 or 3\.2"):
        read_gguf_config(GGUFFile(path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.attention.scale": 2.0}, r"unknown metadata \['llama\.attention\.scale'\]"),
        ({"llama.rope.scaling.type": "yarn"}, "of type 'yarn' misses"),
    ],
)
def test_metadata_that_changes_the_computation_is_refused(tiny, tmp_path, keys, message):
    path = write_gguf(tiny, tmp_path / "x.gguf", keys=keys)
    with pytest.raises(ConfigError, match=message):
        read_gguf_config(GGUFFile(path))


def test_a_part_of_a_model_is_refused(tiny, tmp_path):
    path = write_gguf(tiny, tmp_path / "x.gguf", keys={"split.count": 3})
    with pytest.raises(ConfigError, match="one of 3 parts of a model; join them"):
        read_gguf_config(GGUFFile(path))


def test_tensors_of_another_model_are_named(tiny, tmp_path):
    path = write_gguf(tiny, tmp_path / "x.gguf", extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"1 tensors are not part of a dense llama, such as blk\.0\.attn_sinks"):
        read_gguf_config(GGUFFile(path))


def test_what_is_no_whole_gguf_file_is_refused(tiny, tmp_path):
    path = write_gguf(tiny, tmp_path / "x.gguf")
    whole = path.read_bytes()
    for size in (3, 30, 2000, len(whole) - 5000):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"x\.gguf: (a broken|no) GGUF file"):
            read_gguf_config(GGUFFile(path))
    (tmp_path / "text").write_text("GGU, but no more than text that says so, at some length")
    assert not is_gguf(tmp_path / "text")
    assert not is_gguf(tmp_path)


def test_names_are_llama_cpps():
    assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"
    assert gguf_name("model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
