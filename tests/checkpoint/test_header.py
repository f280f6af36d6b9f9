import json

import pytest

from halve.checkpoint.header import MAX_HEADER_BYTES, header_length, lay_out, parse_header, spec_bytes
from halve.core.errors import CheckpointError

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def parse(header, data_bytes=8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(raw, data_bytes, "dir/model.safetensors", "model.safetensors")


def test_a_header_gives_each_tensor_its_place_in_the_file():
    raw = json.dumps({"__metadata__": {"format": "pt"}, "a": GOOD}).encode()
    entry = parse(raw)["a"]
    assert (entry.info.name, entry.info.dtype, entry.info.shape) == ("a", "F32", (2,))
    assert (entry.start, entry.stop) == (8 + len(raw), 16 + len(raw))


def test_scalars_and_empty_tensors_are_allowed():
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [4, 4]},
    }
    assert parse(header, 4)["empty"].info.shape == (0, 7)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "header starts with b''"),
        (b" {}", "not with an object"),
        (b'["a"]', "not with an object"),
        (b"{", r"dir/model.safetensors \(header\): not JSON"),
        (b'{"a": \xff}', "not UTF-8 at byte 6"),
        (b'{"a": 1, "a": 2}', r"duplicate keys \['a'\]"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        ({"__metadata__": {"format": 1}, "a": GOOD}, "__metadata__ must map strings to strings"),
        ({"__metadata__": [], "a": GOOD}, "__metadata__ must map strings to strings"),
        ({"a": None}, "tensor 'a': expected exactly dtype, shape and data_offsets, got None"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "expected exactly dtype, shape and data_offsets"),
        ({"a": {**GOOD, "extra": 1}}, "expected exactly dtype, shape and data_offsets"),
        ({"a": {**GOOD, "dtype": "F33"}}, "unknown dtype 'F33'; known are BOOL"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, "unknown dtype"),
        ({"a": {**GOOD, "shape": [-2]}}, r"shape \[-2\] must be up to 8 whole numbers, zero or more"),
        ({"a": {**GOOD, "shape": [2.0]}}, "must be up to 8 whole numbers"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "must be up to 8 whole numbers"),
        ({"a": {**GOOD, "shape": 2}}, "must be up to 8 whole numbers"),
        ({"a": {**GOOD, "shape": ["2"]}}, "must be up to 8 whole numbers"),
        ({"a": {**GOOD, "shape": [1] * 9}}, "must be up to 8 whole numbers"),
        ({"a": {**GOOD, "shape": [2**62, 4]}}, "that memory can hold"),
        ({"a": {**GOOD, "shape": [0, 2**70], "data_offsets": [0, 0]}}, "that memory can hold"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "data_offsets .* must be two rising whole numbers"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "must be two rising whole numbers"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "must be two rising whole numbers"),
        ({"a": {**GOOD, "data_offsets": [0.0, 8.0]}}, "must be two rising whole numbers"),
        ({"a": {**GOOD, "data_offsets": None}}, "must be two rising whole numbers"),
        ({"a": {**GOOD, "shape": [3]}}, r"F32 \[3\] needs 12 bytes, not 8"),
        ({"a": {**GOOD, "data_offsets": [0, 2**63]}}, "needs 8 bytes, not 9223372036854775808"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, "'a' starts at byte 4 of the data and leaves a gap before it"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "'b' starts at byte 4 .* overlaps the tensor before it"),
        (
            {"a": GOOD, "b": {**GOOD, "data_offsets": [8, 16]}},
            "truncated: 8 bytes of data where the header promises 16",
        ),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}}, "4 bytes after the last tensor belong to none"),
        ({}, "8 bytes after the last tensor belong to none"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "not valid Unicode"),
        ({"x" * 1000: None}, r"tensor 'x{116}\.\.\.: expected"),
    ],
)
def test_a_hostile_header_is_refused_with_its_rule(header, words):
    with pytest.raises(CheckpointError, match=words):
        parse(header)


@pytest.mark.parametrize(
    ("length", "file_bytes", "words"),
    [
        (0, 0, "0 bytes, too short for a safetensors file"),
        (0, 7, "7 bytes, too short"),
        (2, 9, "header of 2 bytes in a file of 9 bytes"),
        (MAX_HEADER_BYTES + 1, 2**40, "over the limit of 100000000"),
        (2**64 - 1, 2**40, "over the limit"),
    ],
)
def test_a_header_length_that_cannot_be_is_refused(length, file_bytes, words):
    with pytest.raises(CheckpointError, match=words):
        header_length(length.to_bytes(8, "little"), file_bytes, "f")


def test_layout_reads_back_and_aligns_every_tensor():
    specs = {
        "scale": ("BF16", (3, 1)),
        "odd": ("U8", (3,)),
        "shape": ("I64", (2,)),
        "weight": ("I32", (16, 4)),
        "empty": ("F32", (0,)),
        "scalar": ("F32", ()),
    }
    head, entries = lay_out(specs, {"format": "pt"}, "f")
    assert len(head) % 64 == 0
    assert parse_header(head[8:], sum(map(spec_bytes, specs.values())), "f", "f") == entries
    assert entries["weight"].start % 64 == 0
    assert entries["shape"].start % 8 == 0
    assert entries["scale"].start % 2 == 0


def test_unknown_dtype_of_a_spec_is_refused():
    with pytest.raises(CheckpointError, match="unknown dtype 'F4'"):
        spec_bytes(("F4", (2,)))
