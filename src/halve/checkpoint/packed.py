"""Matrices as kernels read them, in one file: written tensor by tensor, read into memory that the caller gives.

`Reading` reads a whole file, `Blobs` one matrix after the other as they are asked for.

    0      magic, version, bytes of the file, place and bytes of the index, SHA-256 of all that and of the index
    4096   blobs, each on a multiple of 4096
    ...    the index: JSON, `Index`

It is a cache and never the only copy, so a file is either whole or worth nothing: what is wrong anywhere in it is a
CheckpointError, and the weights are packed again. Checksums of blobs are there against disks and torn writes, not
against people: they are sums of words, at memory speed, where SHA-256 would take as long as all the rest of a start.
"""

import contextlib
import hashlib
import json
import os
import struct
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Self

import numpy as np

from halve.core.errors import CheckpointError, ConfigError
from halve.core.record import from_json, to_dict

Array = np.ndarray[Any, np.dtype[Any]]

MAGIC = b"HALVEPKD"
VERSION = 1
PAGE = 4096
PREAMBLE = struct.Struct("<8sIQQQ32s")  # magic, version, file bytes, index at, index bytes, SHA-256
MAX_INDEX_BYTES = 100_000_000
CHECKED_BYTES = 64 * 1024  # that share a sum
PART_BYTES = 512 * 2**20  # read in one call, which holds no lock of Python's


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """One matrix: its format's name, its shape [out, in], what the kernels say of the layout, and where it lies."""

    format: str
    shape: tuple[int, ...]
    record: Mapping[str, int]
    start: int
    size: int
    checksum: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What a file holds. key: says of which weights, packed how, for the reader to compare. origin: their path."""

    key: str
    origin: str
    blobs: Mapping[str, Blob]


class PackedWriter:
    """Writes a file that must not exist yet. Raises OSError as the system does; `abort` removes what was written."""

    def __init__(self, path: Path, *, key: str, origin: str) -> None:
        self.path, self._key, self._origin = path, key, origin
        self._blobs: dict[str, Blob] = {}
        self._file = path.open("xb", buffering=0)
        self._position = PAGE

    def add(self, name: str, blob: Array, *, format: str, shape: tuple[int, ...], record: Mapping[str, int]) -> None:  # noqa: A002
        """Append a blob, uint8 [bytes]."""
        self._write(blob.data, self._position)
        self._blobs[name] = Blob(
            format=format,
            shape=shape,
            record=record,
            start=self._position,
            size=blob.size,
            checksum=checksum(blob),
        )
        self._position += -(-blob.size // PAGE) * PAGE

    def close(self) -> None:
        """Write the index, then the beginning that makes the file one, and bring both to the disk."""
        text = json.dumps(to_dict(Index(key=self._key, origin=self._origin, blobs=self._blobs))).encode()
        self._write(memoryview(text), self._position)
        facts = (self._position + len(text), self._position, len(text))
        os.fsync(self._file.fileno())
        self._write(memoryview(_preamble(facts, text)), 0)
        os.fsync(self._file.fileno())
        self._file.close()

    def abort(self) -> None:
        """Remove the file."""
        self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, data: memoryview, position: int) -> None:
        while data:
            written = os.pwrite(self._file.fileno(), data[:PART_BYTES], position)
            data, position = data[written:], position + written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def read_index(path: Path) -> Index:
    """What a file holds, all of it but the blobs' bytes checked. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            first = file.read(PREAMBLE.size)
            if len(first) < PREAMBLE.size or not first.startswith(MAGIC):
                raise CheckpointError(f"{path}: does not begin as a file of packed weights")
            _, version, *facts, digest = PREAMBLE.unpack(first)
            if version != VERSION:
                raise CheckpointError(f"{path}: version {version}; this Halve reads {VERSION}")
            if facts[0] != file_bytes:
                raise CheckpointError(f"{path}: {file_bytes} bytes where its beginning says {facts[0]}")
            if facts[2] > MAX_INDEX_BYTES or facts[1] + facts[2] != file_bytes:
                raise CheckpointError(f"{path}: the index can't be {facts[2]} bytes at byte {facts[1]}")
            file.seek(facts[1])
            text = file.read(facts[2])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if _preamble((facts[0], facts[1], facts[2]), text) != PREAMBLE.pack(MAGIC, version, *facts, digest):
        raise CheckpointError(f"{path}: the index is damaged")
    try:
        index = from_json(Index, text.decode(), "index")
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_places(index, facts[1], path)
    return index


class Reading:
    """The blobs of a file on their way into memory, by threads that began when this was made.

    take: gives the memory, uint8 of the asked bytes; it is asked once, and blobs lie in it as in the file.
    The threads need Python's lock only between calls of half a gigabyte, so that other work goes on beside them, even
    work that does not let go of the lock (reading a tokenizer).
    """

    def __init__(self, path: Path, index: Index, take: Callable[[int], Array], *, num_threads: int = 2) -> None:
        self.path, self.index = path, index
        stop = max((blob.start + blob.size for blob in index.blobs.values()), default=PAGE)
        self._memory = take(stop - PAGE)
        self._step = -(-min(PART_BYTES, max(1, (stop - PAGE) // num_threads)) // PAGE) * PAGE
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="halve-read")
        starts = range(PAGE, stop, self._step)
        begun = [Event() for _ in starts][:num_threads]
        self._parts = [
            self._pool.submit(self._read, start, min(start + self._step, stop), event)
            for start, event in zip_longest(starts, begun)
        ]
        # A blob waits for parts that were handed out before it, so that no thread waits for one behind it.
        self._blobs = {name: self._pool.submit(self._checked, blob) for name, blob in index.blobs.items()}
        self._pool.shutdown(wait=False)  # nothing more comes
        for event in begun:
            event.wait()

    def _read(self, start: int, stop: int, begun: Event | None) -> None:
        """Bytes start..stop of the file, through a descriptor of its own: read-ahead follows one reader each."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        finally:
            if begun is not None:
                begun.set()
        try:
            while start < stop:
                got = os.preadv(descriptor, [self._memory[start - PAGE : stop - PAGE].data], start)
                if not got:
                    raise CheckpointError(f"{self.path}: ends at byte {start}, before its last blob")
                start += got
        finally:
            os.close(descriptor)

    def _checked(self, blob: Blob) -> Array:
        first, last = (blob.start - PAGE) // self._step, (blob.start - PAGE + max(blob.size, 1) - 1) // self._step
        for part in self._parts[first : last + 1]:
            part.result()
        content = self._memory[blob.start - PAGE : blob.start - PAGE + blob.size]
        if checksum(content) != blob.checksum:
            raise CheckpointError(f"{self.path}: the bytes at {blob.start} are not those that were written")
        return content

    def blob(self, name: str) -> Array:
        """Wait for a blob. Raises CheckpointError when it can't be read or is not what was written."""
        try:
            return self._blobs[name].result()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error


class Blobs:
    """The blobs of a file, one at a time and as often as they are asked for, from any thread.

    Each is checked when it is first read. Raises CheckpointError for a file that can't be opened.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        self._checked: set[str] = set()
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, name: str, memory: Array) -> None:
        """A blob into memory, uint8 of its size. Raises CheckpointError when it is not what was written."""
        blob = self.index.blobs[name]
        assert memory.shape == (blob.size,)
        at = 0
        while at < blob.size:
            try:
                got = os.preadv(self._descriptor, [memory[at : at + PART_BYTES].data], blob.start + at)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not got:
                raise CheckpointError(f"{self.path}: ends at byte {blob.start + at}, before its last blob")
            at += got
        if name not in self._checked:
            if checksum(memory) != blob.checksum:
                raise CheckpointError(f"{self.path}: the bytes at {blob.start} are not those that were written")
            self._checked.add(name)


def checksum(blob: Array) -> str:
    """SHA-256 in hex over the sums of the blob's 64-bit words, one sum for every 64 KiB, and over what is left."""
    whole = blob.size // CHECKED_BYTES * CHECKED_BYTES
    sums = blob[:whole].view("<u8").reshape(-1, CHECKED_BYTES // 8).sum(axis=1, dtype=np.uint64)
    digest = hashlib.sha256(sums.astype("<u8").data)
    digest.update(blob[whole:].data)
    return digest.hexdigest()


def _preamble(facts: tuple[int, int, int], index: bytes) -> bytes:
    plain = PREAMBLE.pack(MAGIC, VERSION, *facts, b"")
    return PREAMBLE.pack(MAGIC, VERSION, *facts, hashlib.sha256(plain + index).digest())


def _check_places(index: Index, stop: int, path: Path) -> None:
    """Every blob lies in pages of its own between the beginning and the index."""
    position = PAGE
    for name, blob in sorted(index.blobs.items(), key=lambda item: item[1].start):
        if blob.start != position or blob.size < 0:
            raise CheckpointError(f"{path}: {name} lies at byte {blob.start}, expected {position}")
        position += -(-blob.size // PAGE) * PAGE
    if position != stop:
        raise CheckpointError(f"{path}: blobs end at byte {position}, and the index begins at {stop}")
