"""Weights kept as kernels read them: the second start reads what the first packed, and nothing stops a start."""

import errno
import fcntl
import gc
import json
import logging
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halve.checkpoint import TensorWriter, open_checkpoint
from halve.checkpoint import packed as packed_file
from halve.checkpoint.packed import PAGE, PackedWriter, read_index
from halve.compress import apply_plan
from halve.core.errors import CheckpointError
from halve.formats import format_named
from halve.formats.base import BF16
from halve.hardware import detect_cpu
from halve.kernels import arena, native, native_library
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, Decoder, ReadySource, load_config, read_config, ready, stored_formats
from halve.models.names import EMBEDDING, modules, vectors
from halve.search import plan_for

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")

SOURCE = Path(__file__).resolve().parents[2] / "src"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TOKENS = list(range(3, 90, 7))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A random model in bf16."""
    path = tmp_path_factory.mktemp("plain")
    config, rng = read_config(CONFIG), np.random.default_rng(0)
    specs = {f"{m.name}.weight": ("BF16", m.shape) for m in modules(config)}
    specs |= {name: ("BF16", shape) for name, shape in vectors(config)}
    with TensorWriter(path, specs) as writer:
        for name, (_, shape) in specs.items():
            writer.write(name, rng.normal(0 if len(shape) == 2 else 1, 0.1, shape).astype(BF16))
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """A bundle of it in int4-g32, never loaded."""
    path = tmp_path_factory.mktemp("made")
    with open_checkpoint(plain) as checkpoint:
        config = load_config(checkpoint)
        formats = stored_formats(checkpoint, config)
        plan = plan_for(config, format_named("int4-g32"), "rtn", portable=False, source=formats)
        apply_plan(checkpoint, config, plan, path)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    monkeypatch.delenv("HALVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "halve"


@pytest.fixture
def bundle(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "bundle"))  # with its times


def logits(decoder):
    return decoder.ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([TOKENS]))))


def start(path, ops=None, **options):
    """Load as `halve.load` does; returns logits and how many matrices had to be packed."""
    ops, packed = ops or native.NativeOps(), []
    with open_checkpoint(path) as checkpoint:
        config = load_config(checkpoint)
        with ReadySource(checkpoint, ops, version="1", **options) as source:
            monitored = source._pack
            source._pack = lambda module, shape: packed.append(module) or monitored(module, shape)
            decoder = Decoder(config, ops, source)
        return logits(decoder), len(packed)


@pytest.fixture
def expected(made):
    with open_checkpoint(made) as checkpoint:
        return logits(Decoder(load_config(checkpoint), native.NativeOps(), CheckpointSource(checkpoint)))


def kept(path):
    return sorted(path.rglob(f"*{ready.SUFFIX}"))


NUM_MATRICES = 1 + 2 * 7


def test_the_second_start_packs_nothing_and_computes_the_same(bundle, expected):
    first, packed = start(bundle)
    assert packed == NUM_MATRICES
    second, packed = start(bundle)
    assert packed == 0
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert [path.parent for path in kept(bundle)] == [bundle / ".halve"]


def test_a_kept_matrix_is_the_packed_one_byte_for_byte(bundle):
    start(bundle)
    ops = native.NativeOps()
    with open_checkpoint(bundle) as checkpoint:
        config = load_config(checkpoint)
        source = ReadySource(checkpoint, ops, version="1")
        for module in modules(config):
            found = source.weight(module.name, module.shape)
            fresh = ops.pack(checkpoint.read_weight(module.name, module.shape), arena.Arena().take)
            assert (found.format, found.shape, dict(found.record)) == (fresh.format, fresh.shape, dict(fresh.record))
            np.testing.assert_array_equal(found.blob, fresh.blob)


def test_a_tied_table_is_stored_once_and_shared(bundle):
    start(bundle)
    (path,) = kept(bundle)
    with open_checkpoint(bundle) as checkpoint:
        config = load_config(checkpoint)
        assert sorted(read_index(path).blobs) == sorted(m.name for m in modules(config))
        source, shape = (
            ReadySource(checkpoint, native.NativeOps(), version="1"),
            (config.vocab_size, config.hidden_size),
        )
        assert source.weight(EMBEDDING, shape) is source.weight(EMBEDDING, shape)


def test_the_first_start_says_where_it_keeps_them(bundle, caplog):
    caplog.set_level("INFO", "halve.models")
    start(bundle)
    assert f"kept packed weights for the next start: {bundle / '.halve'}" in caplog.text
    caplog.clear()
    start(bundle)
    assert not caplog.text


def test_a_start_without_keeping_reads_and_writes_no_file(bundle):
    start(bundle, keep=False)
    assert not (bundle / ".halve").exists()
    start(bundle)
    assert start(bundle, keep=False)[1] == NUM_MATRICES


# Damage


def places_of_damage(path):
    """Bytes in every part of a file: its beginning, the first, middle and last blob, and the index."""
    blobs = sorted(read_index(path).blobs.values(), key=lambda blob: blob.start)
    middle = blobs[len(blobs) // 2]
    return [0, 8, 14, 40, PAGE, middle.start + middle.size // 2, blobs[-1].start + blobs[-1].size - 1, -2]


@pytest.mark.parametrize("part", range(8))
def test_a_damaged_file_is_told_packed_again_and_written_anew(bundle, expected, caplog, part):
    start(bundle)
    (path,) = kept(bundle)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[places_of_damage(path)[part]] ^= 0x10
    path.write_bytes(damaged)
    found, packed = start(bundle)
    np.testing.assert_array_equal(found, expected)
    assert packed >= 1
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert str(path) in caplog.text
    assert path.read_bytes() == whole
    assert start(bundle)[1] == 0


def test_only_what_is_damaged_is_packed_again(bundle, expected):
    start(bundle)
    (path,) = kept(bundle)
    damaged = bytearray(path.read_bytes())
    damaged[PAGE] ^= 1
    path.write_bytes(damaged)
    found, packed = start(bundle)
    assert packed == 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("length", [0, 10, PAGE + 10, -1])
def test_a_cut_file_is_packed_again(bundle, expected, length):
    start(bundle)
    (path,) = kept(bundle)
    path.write_bytes(path.read_bytes()[:length])
    np.testing.assert_array_equal(start(bundle)[0], expected)
    assert start(bundle)[1] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"format": "int8"},
        {"format": "int9"},
        {"shape": [1, 1]},
        {"record": {}},
        {"record": {"out_features": 96, "in_features": 64, "group": 32, "block_bytes": 2**40, "kind": 0, "bits": 4}},
    ],
)
def test_a_file_whose_words_do_not_fit_its_blobs_is_packed_again(bundle, expected, monkeypatch, change):
    """Such a file may come with a bundle from anywhere; nothing in it makes a kernel read outside a blob."""
    to_dict = packed_file.to_dict

    def changed(index):
        raw = to_dict(index)
        for blob in raw["blobs"].values():
            blob.update(change)
        return raw

    monkeypatch.setattr(packed_file, "to_dict", changed)
    start(bundle)
    monkeypatch.setattr(packed_file, "to_dict", to_dict)
    found, packed = start(bundle)
    assert packed == NUM_MATRICES
    np.testing.assert_array_equal(found, expected)


def test_a_file_of_other_weights_under_our_name_is_packed_again(bundle, expected, caplog):
    start(bundle)
    (path,) = kept(bundle)
    path.unlink()
    with PackedWriter(path, key="another", origin=""):
        pass
    np.testing.assert_array_equal(start(bundle)[0], expected)
    assert "holds another" in caplog.text
    assert read_index(path).key == path.name


# Which weights a file belongs to


def fingerprint(path, version="1"):
    with open_checkpoint(path) as checkpoint:
        return ready.fingerprint(checkpoint, version)


def test_a_copy_that_keeps_times_keeps_its_weights(bundle, tmp_path):
    start(bundle)
    assert start(shutil.copytree(bundle, tmp_path / "copy"))[1] == 0


def test_a_later_time_of_change_is_another_content(bundle):
    before = fingerprint(bundle)
    file = bundle / "model.safetensors"
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    assert fingerprint(bundle) != before


def test_other_weights_of_the_same_size_and_time_are_another_content(bundle):
    """Archives that set all times to one are unpacked over each other."""
    before, file = fingerprint(bundle), bundle / "model.safetensors"
    times, raw = file.stat(), bytearray(file.read_bytes())
    raw[-3000:] = bytes(byte ^ 1 for byte in raw[-3000:])
    file.write_bytes(raw)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(bundle) != before


def test_another_header_of_the_same_length_is_another_content(bundle):
    before, file = fingerprint(bundle), bundle / "model.safetensors"
    times, raw = file.stat(), file.read_bytes()
    changed = raw.replace(b'"model.norm.weight"', b'"model.n0rm.weight"', 1)
    assert len(changed) == len(raw) != 0
    assert changed != raw
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(bundle) != before


def test_another_configuration_or_halve_is_another_content(bundle):
    before = fingerprint(bundle)
    assert fingerprint(bundle, "1.1") != before
    raw = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-3}))
    assert fingerprint(bundle) != before


def test_a_changed_bundle_is_packed_again_and_the_old_file_goes(bundle):
    start(bundle)
    (old,) = kept(bundle)
    os.utime(bundle / "model.safetensors")
    assert start(bundle)[1] == NUM_MATRICES
    (new,) = kept(bundle)
    assert new != old


def test_machines_with_other_features_share_a_file(bundle):
    plain = native.NativeOps(replace(detect_cpu(), features=frozenset()))
    start(bundle)
    found, packed = start(bundle, plain)
    assert packed == 0
    with open_checkpoint(bundle) as checkpoint:
        decoder = Decoder(load_config(checkpoint), plain, CheckpointSource(checkpoint))
    np.testing.assert_array_equal(found, logits(decoder))


def test_another_version_of_the_layout_has_a_file_of_its_own(bundle, monkeypatch):
    start(bundle)
    monkeypatch.setattr(native, "LAYOUT_VERSION", native.LAYOUT_VERSION + 1)
    assert start(bundle)[1] == NUM_MATRICES


def test_torch_takes_no_packed_weights(bundle):
    with open_checkpoint(bundle) as checkpoint:
        source = ReadySource(checkpoint, native.NativeOps(), version="1", keep=False)
        with pytest.raises(Exception, match="packed for other kernels can't run on torch"):
            TorchOps("cpu").table(source.weight(EMBEDDING, (96, 64)))


# Where it lies


def test_a_bundle_that_cannot_be_written_to_uses_the_users_cache(bundle, cache):
    (bundle / ".halve").touch()  # nothing can be made below a file, not even by root
    start(bundle)
    (path,) = kept(cache)
    assert path.parent.parent == cache / "weights"
    assert path.parent.name.startswith("bundle-")
    assert start(bundle)[1] == 0


def test_what_lies_beside_a_read_only_bundle_is_read(bundle):
    start(bundle)
    folders = (bundle / ".halve", bundle)
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert start(bundle)[1] == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_anothers_checkpoint_is_kept_in_the_users_cache(bundle, cache):
    shutil.rmtree(bundle / "halve")
    before = sorted(bundle.iterdir())
    start(bundle)
    assert sorted(bundle.iterdir()) == before
    assert len(kept(cache)) == 1
    assert start(bundle)[1] == 0


def test_plain_floats_are_not_kept(plain, cache):
    with open_checkpoint(plain) as checkpoint:
        config = load_config(checkpoint)
        expected = logits(Decoder(config, native.NativeOps(), CheckpointSource(checkpoint)))
    np.testing.assert_array_equal(start(plain)[0], expected)
    assert not kept(plain)
    assert not cache.exists()


def test_halve_cache_names_the_directory(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("HALVE_CACHE", str(tmp_path / "mine"))
    start(bundle)
    assert not kept(bundle)
    assert len(kept(tmp_path / "mine" / "weights")) == 1
    assert start(bundle)[1] == 0


def test_halve_cache_off_keeps_nothing(bundle, cache, monkeypatch):
    monkeypatch.setenv("HALVE_CACHE", "off")
    start(bundle)
    assert not kept(bundle)
    assert not cache.exists()


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ready._user_cache() == tmp_path / ".cache" / "halve"


def test_a_user_without_a_home_has_no_cache_and_starts(bundle, monkeypatch, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(ready.Path, "home", homeless)
    (bundle / ".halve").touch()
    assert start(bundle)[1] == NUM_MATRICES
    assert "packed weights are not kept" in caplog.text


def test_weights_of_checkpoints_that_are_gone_leave_the_users_cache(bundle, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HALVE_CACHE", str(cache))
    other = shutil.copytree(bundle, tmp_path / "other")
    start(other)
    shutil.rmtree(other)
    start(bundle)
    (path,) = kept(cache)
    assert read_index(path).origin == str(bundle.resolve())


# Others at work, and disks


def test_a_directory_that_another_process_writes_to_is_left_to_it(bundle, expected):
    (bundle / ".halve").mkdir()
    with (bundle / ".halve" / ready.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found, _ = start(bundle)
    np.testing.assert_array_equal(found, expected)
    assert not kept(bundle)
    start(bundle)
    assert kept(bundle)


def test_a_file_that_another_process_finished_meanwhile_stays(bundle):
    ops = native.NativeOps()
    with open_checkpoint(bundle) as checkpoint:
        with ReadySource(checkpoint, ops, version="1") as slow:
            start(bundle)
            (path,) = kept(bundle)
            before = path.stat().st_ino
            Decoder(load_config(checkpoint), ops, slow)
        assert path.stat().st_ino == before


WORKER = """
import sys, time
from halve.checkpoint import open_checkpoint, packed
from halve.kernels.native import NativeOps
from halve.models import Decoder, ReadySource, load_config
if sys.argv[2] == "stall":
    def stall(self):
        print("written", flush=True)
        time.sleep(60)
    packed.PackedWriter.close = stall
ops = NativeOps()
with open_checkpoint(sys.argv[1]) as checkpoint, ReadySource(checkpoint, ops, version="1") as source:
    Decoder(load_config(checkpoint), ops, source)
print("done", flush=True)
"""


def worker(path, how="go"):
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), how], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_processes_that_start_at_once_leave_one_whole_file(bundle, expected):
    started = [worker(bundle) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in started] == ["done\n"] * 4
    assert [path.name for path in kept(bundle)] == [path.name for path in (bundle / ".halve").glob("native*")]
    found, packed = start(bundle)
    assert packed == 0
    np.testing.assert_array_equal(found, expected)


def test_a_process_that_is_killed_while_it_writes_harms_nobody(bundle, expected):
    with worker(bundle, "stall") as process:
        assert process.stdout.readline() == "written\n"
        (left,) = (bundle / ".halve").glob("*.new")
        np.testing.assert_array_equal(start(bundle)[0], expected)  # beside it, while it still writes
        assert not kept(bundle)
        process.send_signal(signal.SIGKILL)
    assert left.exists()
    start(bundle)
    assert not left.exists()
    assert start(bundle)[1] == 0


def test_a_disk_without_room_is_not_filled(bundle, expected, monkeypatch, caplog):
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(ready.os, "statvfs", lambda _: Full)
    caplog.set_level(logging.INFO, "halve.models")
    np.testing.assert_array_equal(start(bundle)[0], expected)
    assert "are not free on that disk" in caplog.text
    assert "packed weights are not kept" in caplog.text
    assert not kept(bundle)


def test_a_disk_that_fills_while_it_is_written_is_left_as_it_was(bundle, cache, expected, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed_file.os, "pwrite", full)
    np.testing.assert_array_equal(start(bundle)[0], expected)
    assert "packed weights are not kept" in caplog.text
    for folder in (bundle / ".halve", cache):
        assert {path.name for path in folder.rglob("*") if path.is_file()} == {ready.LOCK}


def test_a_start_that_fails_keeps_nothing(bundle):
    ops = native.NativeOps()
    with open_checkpoint(bundle) as checkpoint:
        source = ReadySource(checkpoint, ops, version="1")
        with pytest.raises(CheckpointError), source:
            source.weight(EMBEDDING, (1, 2))
    assert not kept(bundle)


# Memory


def test_the_memory_goes_with_the_decoder(bundle, monkeypatch):
    class Mapped(mmap.mmap):
        """A mapping that can be watched."""

    alive = []

    def watched(*arguments, **options):
        made = Mapped(*arguments, **options)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(arena.mmap, "mmap", watched)
    for _ in range(2):
        ops = native.NativeOps()
        with open_checkpoint(bundle) as checkpoint:
            with ReadySource(checkpoint, ops, version="1") as source:
                decoder = Decoder(load_config(checkpoint), ops, source)
            del source
        mapped = [each for each in alive if each() is not None]
        assert mapped
        logits(decoder)
        del decoder, ops
        deadline = time.monotonic() + 10  # a thread that read may take a moment to let go of its last result
        while any(each() is not None for each in alive) and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        assert all(each() is None for each in alive)
        alive.clear()
