"""Experts on disk: the same bits as with all of them in memory, whatever fits; and what is refused."""

import logging
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest

from halve.checkpoint import Checkpoint, open_checkpoint
from halve.checkpoint import packed as packed_file
from halve.checkpoint.packed import read_index
from halve.compress import apply_plan
from halve.core.errors import CheckpointError, ConfigError, OutputError
from halve.core.plan import WeightRule
from halve.formats import format_named
from halve.kernels import native_library
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.models import Decoder, OffloadSource, ReadySource, load_config, load_decoder, ready, stored_formats
from halve.search import plan_for
from tests.models.test_moe import FAMILIES, IDS, sparse_model

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")
BATCHES = ([IDS], [IDS[:3], IDS[4:13]], [IDS[:1]], [IDS[::-1].copy()])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    monkeypatch.setenv("HALVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    sparse_model(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    sparse_model("mixtral").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(mixtral, tmp_path_factory):
    """It in int4-g32, as `halve optimize` writes it, but experts of the last layer and one of the first in int8."""
    path = tmp_path_factory.mktemp("bundle")
    with open_checkpoint(mixtral) as checkpoint:
        config = load_config(checkpoint)
        formats = stored_formats(checkpoint, config)
        plan = plan_for(config, format_named("int4-g32"), "rtn", portable=False, source=formats)
        last = WeightRule(pattern="model.layers.1.block_sparse_moe.experts.*", format="int8", method="rtn")
        one = WeightRule(pattern="model.layers.0.block_sparse_moe.experts.1.*", format="int8", method="rtn")
        plan = replace(plan, weights=replace(plan.weights, rules=(one, last, *plan.weights.rules)))
        apply_plan(checkpoint, config, plan, path)
    return path


def needed(path, **options):
    """Bytes that the refusal of a cache of one byte asks for, and the error's words."""
    with open_checkpoint(path) as checkpoint, pytest.raises(ConfigError) as error:
        OffloadSource(checkpoint, load_config(checkpoint), NativeOps(), cache_bytes=1, version="1", **options)
    words = str(error.value)
    return int(re.search(r"give ([\d,]+) bytes", words)[1].replace(",", "")), words


def offloaded(path, cache_bytes, *, activations="fp32", **options):
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint).with_kv_format("fp32")
    ops = NativeOps(activations=activations)
    return Decoder(config, ops, OffloadSource(checkpoint, config, ops, cache_bytes=cache_bytes, version="1", **options))


def logits(decoder, sequences):
    return decoder.logits(decoder.hidden(TokenBatch.whole(sequences)))


def in_memory(path, activations="fp32"):
    with open_checkpoint(path) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        return load_decoder(checkpoint, config, NativeOps(activations=activations))


def test_every_family_gives_the_same_bits_with_the_least_cache(saved):
    least, _ = needed(saved)
    decoder, whole = offloaded(saved, least), in_memory(saved)
    for sequences in BATCHES:
        np.testing.assert_array_equal(logits(decoder, sequences), logits(whole, sequences))
    use = decoder.expert_cache()
    assert use.size_bytes == least < use.expert_bytes
    assert use.misses > 0
    assert use.read_bytes > least


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_formats_of_several_sizes_share_a_cache_and_hits_rise_with_its_size(bundle, activations):
    least, _ = needed(bundle)
    whole, rates, reads = in_memory(bundle, activations), [], []
    for size in (least, 2 * least, 100 * least):
        decoder = offloaded(bundle, size, activations=activations)
        for sequences in BATCHES * 2:
            np.testing.assert_array_equal(logits(decoder, sequences), logits(whole, sequences))
        rates.append(decoder.expert_cache().hit_rate)
        reads.append(decoder.expert_cache().read_bytes)
    assert rates[0] < rates[1] <= rates[2]
    assert reads[0] > reads[1] >= reads[2]
    use = decoder.expert_cache()
    assert use.size_bytes == use.expert_bytes == use.read_bytes  # each once, and nothing is guessed
    assert use.num_ahead == 0


def test_experts_of_the_next_layer_are_read_ahead(mixtral):
    least, _ = needed(mixtral)
    decoder = offloaded(mixtral, 2 * least)
    for token in IDS:
        logits(decoder, [[int(token)]])
    use = decoder.expert_cache()
    assert 0 < use.num_ahead_right <= use.num_ahead
    assert decoder.layers[0].following is decoder.layers[1]
    assert decoder.layers[1].following is None
    assert [count.tokens.sum() for count in decoder.expert_counts()] == [len(IDS) * 2] * 2  # guesses are not counted


def test_the_file_is_made_once_and_serves_starts_with_all_in_memory_too(bundle, cache, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "halve.models")
    least, _ = needed(bundle)
    offloaded(bundle, least)
    (file,) = cache.rglob(f"*{ready.SUFFIX}")
    assert caplog.text.count("packing weights once") == 1
    offloaded(bundle, least)
    assert caplog.text.count("packing weights once") == 1
    packed = []
    monkeypatch.setattr(ReadySource, "_pack", lambda _, module, __: packed.append(module))
    with open_checkpoint(bundle) as checkpoint, ReadySource(checkpoint, NativeOps(), version="1") as source:
        Decoder(load_config(checkpoint), NativeOps(), source)
    assert not packed
    assert list(cache.rglob(f"*{ready.SUFFIX}")) == [file]


def test_packing_holds_one_matrix_at_a_time(bundle, monkeypatch):
    held, most = [], []
    original = NativeOps.pack

    def pack(self, weight, allocate=None):
        made = original(self, weight, allocate)
        held.append(weakref.ref(made.blob))
        most.append(sum(one() is not None for one in held))
        return made

    least, _ = needed(bundle)
    monkeypatch.setattr(NativeOps, "pack", pack)
    offloaded(bundle, least)
    assert len(held) > 20
    assert max(most) <= 2


def test_a_damaged_expert_is_told_and_packed_again(bundle, cache, caplog):
    least, _ = needed(bundle)
    offloaded(bundle, least)
    (file,) = cache.rglob(f"*{ready.SUFFIX}")
    blob = read_index(file).blobs["model.layers.1.block_sparse_moe.experts.2.w2"]
    with file.open("r+b") as opened:
        opened.seek(blob.start + 5)
        opened.write(b"\x55\xaa\x55\xaa")
    decoder, whole = offloaded(bundle, least), in_memory(bundle)
    for sequences in BATCHES:
        np.testing.assert_array_equal(logits(decoder, sequences), logits(whole, sequences))
    assert caplog.text.count("experts.2.w2 is packed again") == 1
    assert not file.exists()  # so that the next start makes it anew


def test_an_expert_that_is_damaged_everywhere_fails_its_step(bundle, cache, monkeypatch):
    least, _ = needed(bundle)
    decoder = offloaded(bundle, least)
    (file,) = cache.rglob(f"*{ready.SUFFIX}")

    def broken(*_):
        raise CheckpointError("the checkpoint is broken")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read_weight", broken)
        patched.setattr(packed_file.Blobs, "read", broken)
        with pytest.raises(CheckpointError, match="the checkpoint is broken"):
            logits(decoder, [IDS])
    assert np.isfinite(logits(decoder, [IDS])).all()
    assert not file.exists()


def test_a_cache_smaller_than_the_experts_of_a_token_is_refused_with_the_size_it_needs(saved):
    least, words = needed(saved)
    assert words.startswith("expert_cache: 1 bytes hold fewer than the ")
    assert f"give {least:,} bytes or more" in words
    with pytest.raises(ConfigError, match=f"{least - 1:,} bytes hold fewer than"):
        offloaded(saved, least - 1)


def test_it_is_refused_before_anything_is_packed(mixtral, cache):
    needed(mixtral)
    assert not list(cache.rglob("*"))


def test_a_dense_model_is_refused(tmp_path):
    from halve.models.embedded import embedded_model_path

    with (
        open_checkpoint(embedded_model_path()) as checkpoint,
        pytest.raises(ConfigError, match="LlamaForCausalLM with"),
    ):
        OffloadSource(checkpoint, load_config(checkpoint), NativeOps(), cache_bytes=1, version="1")


def test_where_nothing_may_be_kept_it_is_refused(mixtral, monkeypatch):
    least, _ = needed(mixtral)
    monkeypatch.setenv("HALVE_CACHE", "off")
    with pytest.raises(ConfigError, match="HALVE_CACHE=off keeps none; name a directory"):
        offloaded(mixtral, least)


def test_where_nothing_can_be_written_it_is_refused(mixtral, monkeypatch, tmp_path):
    least, _ = needed(mixtral)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"can't be kept .*Not a directory.*name another directory in HALVE_CACHE"):
        offloaded(mixtral, least)
