"""Model weights in safetensors files: one file or shards with an index, memory-mapped to read, streamed to write.

Everything that can be wrong with a file is found when it is opened, before any tensor is read: these files come from
the internet, and a tensor that lies outside its file would be read as whatever is there.
Source: https://github.com/huggingface/safetensors; index as transformers writes it.
"""

import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from halve.checkpoint.files import AGAIN, read_object, shown
from halve.checkpoint.header import DTYPES, Entry, TensorInfo, header_length, lay_out, parse_header, spec_bytes
from halve.core.errors import CheckpointError, OutputError
from halve.core.record import to_json
from halve.core.units import format_bytes

__all__ = ["TensorInfo", "TensorReader", "TensorWriter"]

Array = np.ndarray[Any, np.dtype[Any]]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HASH_CHUNK_BYTES = 16 * 2**20


class TensorReader:
    """Tensors of a model directory by name, read-only views on the mapped files.

    Raises CheckpointError when made, naming file, tensor, value and rule, unless every file is whole and the index
    and the shards name the same tensors. Pickle weights are never opened.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        weight_map = _weight_map(directory)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        self.files: tuple[Path, ...] = tuple(directory / name for name in names)
        self._maps: dict[str, Array] = {}
        self._mapped: list[mmap.mmap] = []
        self._entries: dict[str, Entry] = {}
        for path in self.files:
            self._open(path)
        if weight_map is not None:
            self._check_index(weight_map)
        self.names: tuple[str, ...] = tuple(sorted(self._entries))
        self.size_bytes = sum(array.nbytes for array in self._maps.values())  # headers included

    def _open(self, path: Path) -> None:
        try:
            file_bytes = path.stat().st_size
            with path.open("rb") as file:
                length = header_length(file.read(8), file_bytes, str(path))
                raw = file.read(length)
                entries = parse_header(raw, file_bytes - 8 - len(raw), str(path), path.name)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._mapped.append(mapped)
            self._maps[path.name] = np.frombuffer(mapped, np.uint8)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: missing; download the rest of the model") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the permissions") from error
        for name, entry in entries.items():
            if name in self._entries:
                other = self._entries[name].info.file
                raise CheckpointError(
                    f"{self.directory}: tensor {shown(name)} is in both {other} and {path.name}; {AGAIN}"
                )
            self._entries[name] = entry

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self._entries or self._entries[name].info.file != file:
                raise CheckpointError(
                    f"{self.directory / file}: tensor {shown(name)} is missing, though {INDEX} names it; {AGAIN}"
                )
        if surplus := sorted(self._entries.keys() - weight_map.keys()):
            file = self._entries[surplus[0]].info.file
            raise CheckpointError(
                f"{self.directory / file}: tensor {shown(surplus[0])} is not in {INDEX} ({len(surplus)} such tensors); "
                "index and shards do not belong together, download both again"
            )

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and file of a tensor. Raises CheckpointError when there is none of that name."""
        return self._entry(name).info

    def read(self, name: str) -> Array:
        """A tensor as a read-only view on the map; copied only where its file leaves it unaligned in memory.

        bf16 and float8 come as their ml_dtypes. Values are not looked at. Raises CheckpointError as `info` does.
        """
        entry = self._entry(name)
        raw = self._maps[entry.info.file][entry.start : entry.stop]
        array = raw.view(DTYPES[entry.info.dtype]).reshape(entry.info.shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            why = "the reader is closed" if not self._maps else "no such tensor; the model may be of another kind"
            raise CheckpointError(f"{self.directory}: tensor {shown(name)}: {why}")
        return self._entries[name]

    def sha256(self, progress: Progress | None = None) -> str:
        """SHA-256 in hex over name, length and content of every weight file, in order of name."""
        digest, done, total = hashlib.sha256(), 0, self.size_bytes
        for name in sorted(self._maps):
            content = self._maps[name]
            digest.update(f"{name}\0{content.nbytes}\0".encode())
            for start in range(0, content.nbytes, HASH_CHUNK_BYTES):
                chunk = content[start : start + HASH_CHUNK_BYTES]
                digest.update(chunk.data)
                done += chunk.nbytes
                if progress is not None:
                    progress(done, total)
        self.forget()
        return digest.hexdigest()

    def forget(self) -> None:
        """Give the pages that were read back to the system, so that a streamed model does not fill this process.

        Views stay valid: what they touch again comes from the page cache or the disk.
        """
        for mapped in self._mapped:
            if hasattr(mmap, "MADV_DONTNEED"):  # Linux and macOS; elsewhere the system decides alone
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the files. Views that were read stay valid: each keeps its map until it is dropped."""
        self._maps, self._entries, self._mapped, self.names = {}, {}, [], ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard from the index, or None for a single file. Raises CheckpointError when there is neither."""
    try:
        found = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be listed: {error.strerror}; check the path and permissions"
        ) from error
    index = directory / INDEX
    if INDEX not in found:
        if SINGLE not in found:
            raise CheckpointError(_no_weights(directory, sorted(found)))
        return None
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to files, got {shown(weight_map)}; {AGAIN}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"{index}: tensor {shown(name)} is in {shown(file)}; "
                "a shard must be a .safetensors file beside the index"
            )
    if SINGLE in found and SINGLE not in weight_map.values():
        raise CheckpointError(f"{directory}: holds both {SINGLE} and {INDEX}; remove the one that is not the model")
    return weight_map


def _is_plain_name(file: str) -> bool:
    return file.endswith(".safetensors") and file.isprintable() and not set(file) & set("/\\:")


def _no_weights(directory: Path, found: list[str]) -> str:
    if pickles := [name for name in found if name.lower().endswith(PICKLE_SUFFIXES)]:
        return (
            f"{directory}: only pickle weights ({', '.join(pickles[:3])}); loading them can run any code, so Halve "
            "never opens them. Someone who trusts their source can convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(source).save_pretrained(target), which writes safetensors"
        )
    if others := [name for name in found if name.lower().endswith((".safetensors", ".gguf"))]:
        return f"{directory}: neither {SINGLE} nor {INDEX}, but {', '.join(others[:3])}; rename or convert to {SINGLE}"
    return f"{directory}: neither {SINGLE} nor {INDEX}; give a directory of a Hugging Face model"


class TensorWriter:
    """Writes a model tensor by tensor: shapes first, headers at once, then the data in any order.

    specs: tensor -> (dtype word, shape), in the order of the model; shards are filled in that order.
    The same specs and tensors give the same bytes. Files that exist are never overwritten, and those that this writer
    made go when it is left by an exception. Raises OutputError naming the path and the bytes that were needed when the
    system refuses, CheckpointError on a tensor that does not fit its spec.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._files: dict[str, BinaryIO] = {}
        self._made: list[Path] = []
        self._entries: dict[str, Entry] = {}
        self._pending = set(specs)
        self._needed = sum(spec_bytes(spec) for spec in specs.values())
        self._check_space()
        try:
            self._create(_shards(specs, shard_bytes), specs, {"format": "pt"} if metadata is None else metadata)
        except BaseException:
            self.abort()
            raise

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were made, in the order they were made."""
        return tuple(self._made)

    def _create(
        self,
        shards: Mapping[str, list[str]],
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        for file, names in shards.items():
            head, entries = lay_out({name: specs[name] for name in names}, metadata, file)
            self._entries |= entries
            end = max((entry.stop for entry in entries.values()), default=len(head))
            with _writing(self.directory / file, self._needed):
                self._files[file] = self._new(file)
                self._files[file].write(head)
                self._files[file].truncate(end)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": self._needed},
                "weight_map": {name: file for file, names in shards.items() for name in names},
            }
            with _writing(self.directory / INDEX, self._needed), self._new(INDEX) as handle:
                handle.write(to_json(index).encode())
                _sync(handle)

    def _new(self, file: str) -> BinaryIO:
        path = self.directory / file
        handle = path.open("xb", buffering=0)
        self._made.append(path)
        return handle

    def _check_space(self) -> None:
        with _writing(self.directory, self._needed):
            free = shutil.disk_usage(self.directory).free
        if free < self._needed:
            raise OutputError(
                f"{self.directory}: the model needs {format_bytes(self._needed)} and {format_bytes(free)} are free; "
                "free some space or choose another directory"
            )

    def write(self, name: str, array: Array) -> None:
        """Write one tensor. Raises CheckpointError unless it is in the specs, fits them, and is written once."""
        if name not in self._entries:
            raise CheckpointError(f"{self.directory}: tensor {shown(name)} was not announced")
        entry = self._entries[name]
        if name not in self._pending:
            raise CheckpointError(f"{self.directory / entry.info.file}: tensor {shown(name)} was written already")
        if array.dtype != DTYPES[entry.info.dtype] or array.shape != entry.info.shape:
            raise CheckpointError(
                f"{self.directory / entry.info.file}: tensor {shown(name)} is {array.dtype} {list(array.shape)}; "
                f"announced was {entry.info.dtype} {list(entry.info.shape)}"
            )
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        with _writing(self.directory / entry.info.file, self._needed):
            file = self._files[entry.info.file]
            file.seek(entry.start)
            while data:
                data = data[file.write(data) :]
        self._pending.remove(name)

    def close(self) -> None:
        """Flush everything to the disk. Raises CheckpointError, and removes the files, when a tensor is missing."""
        if self._pending:
            missing = sorted(self._pending)
            self.abort()
            raise CheckpointError(
                f"{self.directory}: {len(missing)} tensors were not written, first {shown(missing[0])}"
            )
        try:
            for name, file in self._files.items():
                with _writing(self.directory / name, self._needed):
                    _sync(file)
                    file.close()
            with _writing(self.directory, self._needed):
                _sync_directory(self.directory)
        except BaseException:
            self.abort()
            raise
        self._files = {}

    def abort(self) -> None:
        """Remove the files that this writer made."""
        for file in self._files.values():
            file.close()
        for path in self._made:
            path.unlink(missing_ok=True)
        self._files, self._made = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


@contextmanager
def _writing(path: Path, needed: int) -> Iterator[None]:
    """Turns what the system refuses into an OutputError with the path and the bytes needed."""
    try:
        yield
    except FileExistsError as error:
        raise OutputError(f"{path}: exists already; choose an empty directory") from error
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}; the model needs {format_bytes(needed)}, "
            "check free space and permissions"
        ) from error


def _shards(specs: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, filled in order; a tensor larger than `shard_bytes` gets a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = spec_bytes(spec)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
