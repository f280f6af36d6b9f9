"""The header of a safetensors file: read with every rule checked, and laid out for writing.

The file is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gap or overlap.
Source: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from halve.checkpoint.files import AGAIN, parse_object, shown
from halve.core.errors import CheckpointError

# The words of the file format and what numpy calls them.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_RANK = 8
ALIGNMENT = 64  # a cache line, and what wide vector loads like best


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype is the format's word (`BF16`), file the name of the file that holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and where its bytes are, from the start of the file."""

    info: TensorInfo
    start: int
    stop: int


def header_length(first: bytes, file_bytes: int, where: str) -> int:
    """Bytes of the JSON header from a file's first 8 bytes. Raises CheckpointError on a length that can't be."""
    if file_bytes < 8:
        raise CheckpointError(f"{where}: {file_bytes} bytes, too short for a safetensors file; {AGAIN}")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: header of {length} bytes is over the limit of {MAX_HEADER_BYTES}; "
            f"this is no safetensors file, or {AGAIN}"
        )
    if length > file_bytes - 8:
        raise CheckpointError(f"{where}: header of {length} bytes in a file of {file_bytes} bytes; {AGAIN}")
    return length


def parse_header(raw: bytes, data_bytes: int, where: str, file: str) -> dict[str, Entry]:
    """Tensors of one file by name.

    raw: the JSON header. data_bytes: what the file holds after it. where: the path for messages.
    Raises CheckpointError naming file, tensor, value and rule on whatever the format does not allow.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: header starts with {shown(raw[:8])}, not with an object; {AGAIN}")
    header = parse_object(raw, f"{where} (header)")
    _check_metadata(header.pop("__metadata__", {}), where)
    offset = 8 + len(raw)
    entries: dict[str, Entry] = {}
    for name, value in header.items():
        place = f"{where}: tensor {shown(name)}"
        dtype, shape, begin, end = _read_tensor(name, value, place)
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != needed:
            raise CheckpointError(f"{place}: {dtype} {list(shape)} needs {needed} bytes, not {end - begin}; {AGAIN}")
        entries[name] = Entry(TensorInfo(name, dtype, shape, file), offset + begin, offset + end)
    _check_contiguous(entries, offset, data_bytes, where)
    return entries


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map strings to strings, got {shown(metadata)}; {AGAIN}")


def _read_tensor(name: str, value: Any, place: str) -> tuple[str, tuple[int, ...], int, int]:
    if not _is_text(name):
        raise CheckpointError(f"{place}: the name is not valid Unicode; {AGAIN}")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{place}: expected exactly dtype, shape and data_offsets, got {shown(value)}; {AGAIN}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{place}: unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) >= 2**59:
        raise CheckpointError(
            f"{place}: shape {shown(shape)} must be up to {MAX_RANK} whole numbers, zero or more, "
            f"that memory can hold; {AGAIN}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{place}: data_offsets {shown(offsets)} must be two rising whole numbers; {AGAIN}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_contiguous(entries: Mapping[str, Entry], offset: int, data_bytes: int, where: str) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    position = offset
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{where}: tensor {shown(entry.info.name)} starts at byte {entry.start - offset} of the data "
                f"and {what} (expected {position - offset}); {AGAIN}"
            )
        position = entry.stop
    if position - offset > data_bytes:
        raise CheckpointError(
            f"{where}: truncated: {data_bytes} bytes of data where the header promises {position - offset}; {AGAIN}"
        )
    if position - offset < data_bytes:
        raise CheckpointError(
            f"{where}: {data_bytes - position + offset} bytes after the last tensor belong to none; {AGAIN}"
        )


def lay_out(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], file: str
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file (length and header) and where each of its tensors goes.

    Tensors whose size is a multiple of 64 bytes come first, then of 32 and so on, so that with a padded header each
    starts on a multiple of its own size's alignment, and a mapped weight needs no copy.
    """

    def order(name: str) -> tuple[int, str]:
        return -math.gcd(spec_bytes(specs[name]) or ALIGNMENT, ALIGNMENT), name

    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in sorted(specs, key=order):
        dtype, shape = specs[name]
        stop = position + spec_bytes(specs[name])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    entries = {
        name: Entry(TensorInfo(name, *specs[name], file), *(start + n for n in header[name]["data_offsets"]))
        for name in specs
    }
    return len(text).to_bytes(8, "little") + text, entries


def spec_bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of a tensor of this dtype word and shape. Raises CheckpointError on an unknown word."""
    dtype, shape = spec
    if dtype not in DTYPES:
        raise CheckpointError(f"unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    return math.prod(shape) * DTYPES[dtype].itemsize
