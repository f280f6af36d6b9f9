import hashlib
import json
import resource
import shutil
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halve.checkpoint.header import DTYPES
from halve.checkpoint.safetensors import INDEX, SINGLE, TensorReader, TensorWriter
from halve.core.errors import CheckpointError, OutputError

BF16 = np.dtype(ml_dtypes.bfloat16)


def words(array):
    return next(word for word, dtype in DTYPES.items() if dtype == array.dtype)


def write(directory, tensors, **options):
    specs = {name: (words(array), array.shape) for name, array in tensors.items()}
    with TensorWriter(directory, specs, **options) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return writer.files


def by_hand(path, tensors):
    """A file as the format says it, tensors packed in the order given. tensors: name -> (dtype, shape, bytes)."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in tensors.values()))


def sharded(directory, shards, weight_map=None):
    """Shards by hand: file -> tensors, with an index that names them all unless told otherwise."""
    for file, names in shards.items():
        by_hand(directory / file, {name: ("U8", [1], b"\x01") for name in names})
    weight_map = weight_map or {name: file for file, names in shards.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": rng.standard_normal((7, 4)).astype(BF16),
        "model.norm.weight": rng.standard_normal(4).astype(np.float32),
        "q.weight_packed": rng.integers(-(2**31), 2**31, (4, 3)).astype(np.int32),
        "q.weight_shape": np.array([4, 24], np.int64),
        "q.weight_scale": rng.standard_normal((4, 1)).astype(np.float16),
        "k.weight": rng.integers(-128, 128, (3, 5)).astype(np.int8),
        "v.weight": rng.standard_normal((3, 5)).astype(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False]),
    }


def same(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.tobytes() == right.tobytes()


def test_bytes_written_by_hand_are_read_as_what_they_mean(tmp_path):
    by_hand(
        tmp_path / SINGLE,
        {
            "f": ("F32", [2], bytes.fromhex("0000803f 000000c0")),
            "b": ("BF16", [2, 1], bytes.fromhex("803f 00c0")),
            "h": ("F16", [1], bytes.fromhex("003c")),
            "e": ("F8_E4M3", [2], bytes.fromhex("38 c0")),
            "i": ("I8", [2], bytes.fromhex("ff 7f")),
            "l": ("I64", [1], bytes.fromhex("0201000000000000")),
        },
    )
    with TensorReader(tmp_path) as reader:
        assert reader.names == ("b", "e", "f", "h", "i", "l")
        assert reader.read("f").tolist() == [1.0, -2.0]
        assert reader.read("b").astype(float).tolist() == [[1.0], [-2.0]]
        assert reader.read("h").tolist() == [1.0]
        assert reader.read("e").astype(float).tolist() == [1.0, -2.0]
        assert reader.read("i").tolist() == [-1, 127]
        assert reader.read("l").tolist() == [258]
        info = reader.info("b")
        assert (info.name, info.dtype, info.shape, info.file) == ("b", "BF16", (2, 1), SINGLE)


def test_what_we_write_the_safetensors_package_reads(tmp_path, tensors):
    (path,) = write(tmp_path, tensors)
    assert path == tmp_path / SINGLE
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert theirs.keys() == tensors.keys()
    for name, array in tensors.items():
        assert theirs[name]["dtype"] == words(array)
        assert theirs[name]["shape"] == list(array.shape)
        assert bytes(theirs[name]["data"]) == array.tobytes()
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_safetensors_package_writes_we_read(tmp_path, tensors):
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with TensorReader(tmp_path) as reader:
        assert set(reader.names) == tensors.keys()
        for name, array in tensors.items():
            same(reader.read(name), array)


def test_reading_gives_read_only_views_on_the_file(tmp_path, tensors):
    write(tmp_path, tensors)
    with TensorReader(tmp_path) as reader:
        one, two = reader.read("q.weight_packed"), reader.read("q.weight_packed")
        assert np.shares_memory(one, two)
        with pytest.raises(ValueError, match="read-only"):
            one[0, 0] = 1


def test_a_tensor_at_an_odd_byte_is_read_aligned(tmp_path):
    by_hand(tmp_path / SINGLE, {"a": ("U8", [1], b"\x00"), "b": ("F32", [1], bytes.fromhex("0000803f"))})
    for extra in range(4):  # one of these leaves b unaligned in the file
        raw = (tmp_path / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little") + (extra > 0)
        (tmp_path / SINGLE).write_bytes(length.to_bytes(8, "little") + raw[8:-5] + b" " * (extra > 0) + raw[-5:])
        with TensorReader(tmp_path) as reader:
            array = reader.read("b")
            assert array.flags.aligned
            assert not array.flags.writeable
            assert array.tolist() == [1.0]


def test_views_outlive_the_reader_and_a_closed_reader_says_so(tmp_path, tensors):
    write(tmp_path, tensors)
    with TensorReader(tmp_path) as reader:
        array = reader.read("k.weight")
    same(array, tensors["k.weight"])
    with pytest.raises(CheckpointError, match=r"tensor 'k.weight': the reader is closed"):
        reader.read("k.weight")


def test_an_unknown_tensor_is_named(tmp_path, tensors):
    write(tmp_path, tensors)
    with TensorReader(tmp_path) as reader:
        assert "k.weight" in reader
        assert "lm_head.weight" not in reader
        with pytest.raises(CheckpointError, match=r"tensor 'lm_head.weight': no such tensor"):
            reader.info("lm_head.weight")


def test_shards_are_read_as_one_model(tmp_path, tensors):
    files = write(tmp_path, tensors, shard_bytes=64)
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in tensors.values())}
    with TensorReader(tmp_path) as reader:
        assert [path.name for path in reader.files] == sorted(set(index["weight_map"].values()))
        assert reader.size_bytes == sum(path.stat().st_size for path in reader.files)
        for name, array in tensors.items():
            same(reader.read(name), array)
            assert reader.info(name).file == index["weight_map"][name]


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path):
    write(tmp_path, {"a": np.zeros(4, np.int8), "b": np.zeros(100, np.int8), "c": np.zeros(4, np.int8)}, shard_bytes=10)
    with TensorReader(tmp_path) as reader:
        assert [reader.info(name).file[6:11] for name in "abc"] == ["00001", "00002", "00003"]


def test_sha256_covers_names_and_content(tmp_path):
    by_hand(tmp_path / SINGLE, {"a": ("U8", [3], b"abc")})
    raw = (tmp_path / SINGLE).read_bytes()
    seen = []
    with TensorReader(tmp_path) as reader:
        expected = hashlib.sha256(f"{SINGLE}\0{len(raw)}\0".encode() + raw).hexdigest()
        assert reader.sha256(lambda done, total: seen.append((done, total))) == expected
        assert reader.sha256() == expected
    assert seen == [(len(raw), len(raw))]


def test_the_same_tensors_give_the_same_bytes(tmp_path, tensors):
    files = []
    for name, order in (("one", list(tensors)), ("two", list(reversed(tensors)))):
        (tmp_path / name).mkdir()
        specs = {key: (words(array), array.shape) for key, array in tensors.items()}
        with TensorWriter(tmp_path / name, specs, shard_bytes=64) as writer:
            for key in order:
                writer.write(key, tensors[key])
        files.append([(path.name, path.read_bytes()) for path in writer.files])
    assert files[0] == files[1]


def test_strided_arrays_are_written_in_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write(tmp_path, {"a": array})
    with TensorReader(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("a"), array)


# What is refused on opening ------------------------------------------------------------------------------------


def refused(directory, words):
    with pytest.raises(CheckpointError, match=words):
        TensorReader(directory)


def test_a_directory_without_weights_is_refused(tmp_path):
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json; give a directory")
    refused(tmp_path / "no", "cannot be listed: No such file or directory")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickle_weights_are_refused_unopened_with_the_way_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(tmp_path, f"only pickle weights \\({name}\\); .* never opens them.*save_pretrained")


def test_pickle_beside_safetensors_is_ignored(tmp_path, tensors):
    write(tmp_path, tensors)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with TensorReader(tmp_path) as reader:
        assert reader.files == (tmp_path / SINGLE,)


def test_weights_under_another_name_are_said(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "but model.gguf; rename or convert")


@pytest.mark.parametrize("keep", [0, 4, 8, 30, -1])
def test_a_truncated_file_is_refused(tmp_path, tensors, keep):
    (path,) = write(tmp_path, tensors)
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors: .*; the file is damaged or incomplete; download or write it again")


def test_trailing_bytes_are_refused(tmp_path, tensors):
    (path,) = write(tmp_path, tensors)
    path.write_bytes(path.read_bytes() + b"x")
    refused(tmp_path, "1 bytes after the last tensor belong to none")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / SINGLE).mkdir()
    refused(tmp_path, "model.safetensors: cannot be read: Is a directory")


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path, {"a.safetensors": ["a"], "b.safetensors": ["b"]})
    (tmp_path / "b.safetensors").unlink()
    refused(tmp_path, "b.safetensors: missing; download the rest of the model")


def test_a_tensor_that_the_index_names_and_the_shard_lacks_is_named(tmp_path):
    sharded(tmp_path, {"a.safetensors": ["a"]}, {"a": "a.safetensors", "z": "a.safetensors"})
    refused(tmp_path, "a.safetensors: tensor 'z' is missing, though model.safetensors.index.json names it")


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path):
    sharded(
        tmp_path,
        {"a.safetensors": ["a"], "b.safetensors": ["b"]},
        {"a": "b.safetensors", "b": "a.safetensors"},
    )
    refused(tmp_path, "b.safetensors: tensor 'a' is missing")


def test_a_tensor_that_the_index_does_not_name_is_named(tmp_path):
    sharded(tmp_path, {"a.safetensors": ["a", "z"]}, {"a": "a.safetensors"})
    refused(tmp_path, r"a.safetensors: tensor 'z' is not in model.safetensors.index.json \(1 such tensors\)")


def test_a_tensor_in_two_shards_is_named(tmp_path):
    sharded(tmp_path, {"a.safetensors": ["a", "c"], "b.safetensors": ["b", "a"]})
    refused(tmp_path, "tensor 'a' is in both a.safetensors and b.safetensors")


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a.safetensors", "x/a.safetensors", "..\\a.safetensors", "a.bin", 7]
)
def test_a_shard_outside_the_directory_is_refused(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    refused(tmp_path, "tensor 'a' is in .*; a shard must be a .safetensors file beside the index")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "weight_map must map tensors to files")


def test_an_index_that_is_not_json_is_refused(tmp_path):
    (tmp_path / INDEX).write_text("{")
    refused(tmp_path, "model.safetensors.index.json: not JSON")


def test_two_models_in_one_directory_are_refused(tmp_path, tensors):
    sharded(tmp_path, {"a.safetensors": ["a"]})
    write(tmp_path, tensors)
    refused(tmp_path, "holds both model.safetensors and model.safetensors.index.json; remove the one")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused_and_nothing_else(tmp_path, data):
    path = tmp_path / SINGLE
    by_hand(path, {"a": ("F32", [2, 3], bytes(24)), "b": ("BF16", [5], bytes(10)), "c": ("I64", [1], bytes(8))})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), *range(len(raw))]))])
    try:
        reader = TensorReader(tmp_path)
    except CheckpointError:
        return
    for name in reader.names:
        array = reader.read(name)
        assert array.tobytes() in bytes(raw)


# What is refused on writing ------------------------------------------------------------------------------------

SPECS = {"a": ("F32", (2,)), "b": ("F32", (3,))}


def test_a_tensor_that_was_not_written_is_named_and_the_files_go(tmp_path):
    writer = TensorWriter(tmp_path, SPECS)
    writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match="1 tensors were not written, first 'b'"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [8, 100])
def test_leaving_by_an_exception_removes_the_files(tmp_path, shard_bytes):
    def interrupted():
        with TensorWriter(tmp_path, SPECS, shard_bytes=shard_bytes) as writer:
            writer.write("a", np.zeros(2, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("c", np.zeros(2, np.float32), "tensor 'c' was not announced"),
        ("a", np.zeros(2, np.float64), r"tensor 'a' is float64 \[2\]; announced was F32 \[2\]"),
        ("a", np.zeros(3, np.float32), r"tensor 'a' is float32 \[3\]"),
        ("b", np.zeros(3, np.float32), "tensor 'b' was written already"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path, name, array, words):
    writer = TensorWriter(tmp_path, SPECS)
    writer.write("b", np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match=words):
        writer.write(name, array)
    writer.abort()


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / SINGLE).write_text("precious")
    with pytest.raises(OutputError, match=r"model.safetensors: exists already; choose an empty directory"):
        TensorWriter(tmp_path, SPECS)
    assert (tmp_path / SINGLE).read_text() == "precious"


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"no: cannot be written: No such file .* needs 20 B, check free space"):
        TensorWriter(tmp_path / "no", SPECS)


def test_a_model_larger_than_the_disk_is_refused_before_it_is_begun(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=r"the model needs .*TB and .* are free; free some space"):
        TensorWriter(tmp_path, {"a": ("U8", (free + 10**15,))})
    assert list(tmp_path.iterdir()) == []


@contextmanager
def file_size_limit(num_bytes):
    """The system refuses to write files beyond `num_bytes`, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_named_with_the_bytes_needed(tmp_path):
    with file_size_limit(200), pytest.raises(OutputError, match=r"cannot be written: File too large; .* needs 4 kB"):
        TensorWriter(tmp_path, {"a": ("F32", (1000,))})
    assert list(tmp_path.iterdir()) == []
    with TensorWriter(tmp_path, {"a": ("F32", (1000,))}) as writer:
        with file_size_limit(200), pytest.raises(OutputError, match="File too large"):
            writer.write("a", np.ones(1000, np.float32))
        writer.write("a", np.ones(1000, np.float32))
    with TensorReader(tmp_path) as reader:
        assert reader.read("a").sum() == 1000


def test_a_disk_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("halve.checkpoint.safetensors.os.fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path, {"a": np.ones(2, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_pages_given_back_are_read_again_where_they_are_touched(tmp_path):
    values = np.arange(100_000, dtype=np.float32)
    with TensorWriter(tmp_path, {"w": ("F32", values.shape)}) as writer:
        writer.write("w", values)
    reader = TensorReader(tmp_path)
    view = reader.read("w")
    reader.forget()
    np.testing.assert_array_equal(view, values)
    reader.close()
    reader.forget()
    np.testing.assert_array_equal(view, values)
