"""The file of packed matrices: what is written comes back, and what is damaged anywhere is found."""

import os
import threading

import numpy as np
import pytest

from halve.checkpoint import packed
from halve.checkpoint.packed import PAGE, PackedWriter, Reading, checksum, read_index
from halve.core.errors import CheckpointError

SIZES = {"empty": 0, "a": 1, "page": PAGE, "b": 200_003, "sums": 3 * packed.CHECKED_BYTES + 8}


def blobs(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, size, dtype=np.uint8) for name, size in SIZES.items()}


def write(path, contents=None):
    with PackedWriter(path, key="key", origin="/model") as writer:
        for name, blob in (contents or blobs()).items():
            writer.add(name, blob, format="int8", shape=(3, blob.size), record={"kind": 4, "size": blob.size})
    return path


def memory(size):
    return np.zeros(size, np.uint8)


def read(path, **options):
    reading = Reading(path, read_index(path), memory, **options)
    return {name: reading.blob(name) for name in reading.index.blobs}


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "file")


@pytest.mark.parametrize("part_bytes", [PAGE, 5 * PAGE, 2**30])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_what_was_written_comes_back(path, part_bytes, num_threads, monkeypatch):
    monkeypatch.setattr(packed, "PART_BYTES", part_bytes)
    found = read(path, num_threads=num_threads)
    assert found.keys() == SIZES.keys()
    for name, blob in blobs().items():
        np.testing.assert_array_equal(found[name], blob)


def test_the_index_says_what_was_said_of_each_blob(path):
    index = read_index(path)
    assert (index.key, index.origin) == ("key", "/model")
    for name, blob in index.blobs.items():
        assert (blob.format, blob.shape, blob.size) == ("int8", (3, SIZES[name]), SIZES[name])
        assert blob.record == {"kind": 4, "size": SIZES[name]}
        assert blob.start % PAGE == 0


def test_all_blobs_come_into_one_piece_of_memory_that_is_asked_for_once(path):
    taken = []

    def take(size):
        taken.append(np.zeros(size, np.uint8))
        return taken[-1]

    reading = Reading(path, read_index(path), take)
    found = [reading.blob(name) for name, size in SIZES.items() if size]
    assert len(taken) == 1
    assert all(np.shares_memory(blob, taken[0]) for blob in found)


def test_its_threads_end_with_the_reading(path):
    before = threading.active_count()
    for _ in range(3):
        read(path, num_threads=3)
    for thread in threading.enumerate():
        if thread.name.startswith("halve-read"):
            thread.join(timeout=10)
    assert threading.active_count() == before


def test_an_empty_file_of_packed_weights_is_one(tmp_path):
    assert read(write(tmp_path / "none", {"nothing": np.empty(0, np.uint8)}))["nothing"].size == 0


def test_a_changed_byte_is_found_wherever_it_lies_and_padding_alone_may_change(path):
    whole = path.read_bytes()
    index = read_index(path)
    used = {name: range(blob.start, blob.start + blob.size) for name, blob in index.blobs.items()}
    rng = np.random.default_rng(1)
    places = {*range(packed.PREAMBLE.size), *rng.integers(0, len(whole), 300).tolist(), len(whole) - 1}
    places |= {edge for span in used.values() if span for edge in (span[0], span[-1])}
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        hit = [name for name, span in used.items() if place in span]
        text = place < packed.PREAMBLE.size or place >= max(span.stop for span in used.values() if span) + PAGE
        try:
            reading = Reading(path, read_index(path), memory)
        except CheckpointError:
            assert not hit, place
            continue
        assert not text, place
        for name in used:
            if name in hit:
                with pytest.raises(CheckpointError, match="not those that were written"):
                    reading.blob(name)
            else:
                reading.blob(name)


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in (0, 1, 7, packed.PREAMBLE.size - 1, packed.PREAMBLE.size, PAGE, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_index(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="bytes where its beginning says"):
        read_index(path)


def test_a_file_that_is_cut_while_it_is_read_is_refused(path):
    index = read_index(path)
    os.truncate(path, 2 * PAGE)
    reading = Reading(path, index, memory)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+, before its last blob"):
        reading.blob("sums")


def test_a_file_that_goes_before_it_is_read_is_refused(path):
    index = read_index(path)
    path.unlink()
    reading = Reading(path, index, memory)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        reading.blob("b")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_index(path)


def test_another_kind_of_file_is_refused(path):
    path.write_bytes(b"x" * 2 * PAGE)
    with pytest.raises(CheckpointError, match="does not begin as a file of packed weights"):
        read_index(path)


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "VERSION", 2)
    path = write(tmp_path / "newer")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 2; this Halve reads 1"):
        read_index(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"start": PAGE + 64}, "lies at byte"),
        ({"start": 0}, "lies at byte"),
        ({"size": -1}, "lies at byte"),
        ({"size": 2**40}, "blobs end at byte"),
        ({"more": 1}, "unknown keys"),
        ({"record": {"kind": "x"}}, "expected int"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, monkeypatch, change, reason):
    def changed(index):
        raw = to_dict(index)
        raw["blobs"]["sums"] |= change
        return raw

    to_dict = packed.to_dict
    monkeypatch.setattr(packed, "to_dict", changed)
    path = write(tmp_path / "wrong", {"sums": blobs()["sums"]})
    with pytest.raises(CheckpointError, match=reason):
        read_index(path)


def test_a_writer_left_by_an_exception_leaves_nothing(tmp_path):
    def fail():
        with PackedWriter(tmp_path / "half", key="", origin="") as writer:
            writer.add("a", blobs()["b"], format="int8", shape=(1, 1), record={})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_writer_takes_no_file_that_exists(path):
    with pytest.raises(FileExistsError):
        PackedWriter(path, key="", origin="")


def test_the_checksum_sees_zeroed_pages_swapped_stretches_and_the_tail():
    blob = blobs()["sums"]
    n = packed.CHECKED_BYTES
    zeroed, swapped, tail = blob.copy(), blob.copy(), blob.copy()
    zeroed[n : n + PAGE] = 0
    swapped[:n], swapped[n : 2 * n] = blob[n : 2 * n], blob[:n]
    tail[-1] ^= 1
    assert len({checksum(each) for each in (blob, zeroed, swapped, tail)}) == 4
    assert checksum(blob) == checksum(blob.copy())
