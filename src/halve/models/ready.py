"""Kernel-ready weights: packed at the first start, kept in a file, read straight into huge pages at the next.

A file belongs to one content of one checkpoint and one layout; its name says both, `LAYOUT.CONTENT.weights`. CONTENT
is a hash over this Halve's version, config.json, and of every weight file its name, size, time of change (ns), header
and sixteen stretches of 4 KiB. To hash all the bytes would take longer than all the rest of a start; what goes unseen
is a weight changed in place, between the stretches, with the time of change set back. A copy that keeps times keeps
its cache.

Beside a bundle of ours the file lies in `.halve`. Another's checkpoint, and a bundle that can't be written to, has it
in the user's cache: $HALVE_CACHE, else $XDG_CACHE_HOME/halve, else ~/.cache/halve. With HALVE_CACHE set everything
lies there, and HALVE_CACHE=off keeps nothing. Weights stored as plain floats are not kept: to pack them is to copy
them, and reading a copy is no faster.

Nothing here stops a start: what can't be read is packed, what can't be written is said in the log. Only `kept_file`,
for those that read experts from the file while the model runs, refuses where there can be none. It writes matrix by
matrix, so that a model larger than memory is packed in the memory of one; plain floats too.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from halve.checkpoint import Checkpoint
from halve.checkpoint.packed import PackedWriter, Reading, read_index
from halve.core.errors import CheckpointError, ConfigError, OutputError
from halve.core.units import format_bytes
from halve.formats import FORMATS, Format
from halve.kernels.arena import Arena
from halve.kernels.ops import Array, Packed, PackingOps
from halve.kernels.packed import aligned_bytes

log = logging.getLogger("halve.models")

BESIDE = ".halve"
SUFFIX = ".weights"
LOCK = "lock"
SAMPLES, SAMPLE_BYTES = 16, 4096
ROOM = 1.1  # of the weights' bytes must be free on the disk before anything is written


class ReadySource:
    """`WeightSource` of matrices packed for `ops`, in memory of its own; leaving it as a context keeps what it packed.

    Reading begins when it is made, in threads. A matrix that the file lacks or holds damaged is packed from the
    checkpoint, and then the whole file is written anew.
    version: this Halve's; files of another are not read. keep: whether to look for a file and to write one.
    """

    def __init__(self, checkpoint: Checkpoint, ops: PackingOps, *, version: str, keep: bool = True) -> None:
        self.checkpoint, self.ops = checkpoint, ops
        self._arena = Arena()
        self._packed: dict[str, Packed] = {}
        self._places = places(checkpoint) if keep and _worth_keeping(checkpoint) else []
        self._name = f"{ops.layout}.{fingerprint(checkpoint, version)}{SUFFIX}" if self._places else ""
        self._reading = self._open()
        self._complete = self._reading is not None  # no matrix had to be packed

    def _open(self) -> Reading | None:
        """Begin to read the first file that is whole."""
        for place in self._places:
            path = place / self._name
            try:
                if path.exists():
                    index = read_index(path)
                    if index.key != self._name:
                        raise CheckpointError(f"{path}: holds {index.key}")
                    log.debug("reading packed weights from %s", path)
                    return Reading(path, index, self._arena.take)
            except CheckpointError as error:
                log.warning("%s; its weights are packed again", error)
            except OSError as error:
                log.debug("%s: %s", path, error)
        return None

    def weight(self, module: str, shape: tuple[int, int]) -> Packed:
        """The packed matrix; CheckpointError when the checkpoint's is missing, of another shape, or holds NaN."""
        if module not in self._packed:
            self._packed[module] = self._read(module, shape) or self._pack(module, shape)
        return self._packed[module]

    def _read(self, module: str, shape: tuple[int, int]) -> Packed | None:
        if self._reading is None:
            return None
        try:
            blob = self._reading.index.blobs.get(module)
            if blob is None or blob.format not in FORMATS or blob.shape != shape:
                raise CheckpointError(f"{self._reading.path}: holds no {module} {shape}")
            content = self._reading.blob(module)
            packed = Packed(format=FORMATS[blob.format], shape=shape, record=blob.record, blob=content)
            if reason := self.ops.refusal(packed):
                raise CheckpointError(f"{self._reading.path}: {module}: {reason}")
        except CheckpointError as error:
            level = logging.WARNING if self._complete else logging.DEBUG  # one warning a file
            log.log(level, "%s; what is damaged is packed again", error)
            self._complete = False
            return None
        return packed

    def _pack(self, module: str, shape: tuple[int, int]) -> Packed:
        packed = self.ops.pack(self.checkpoint.read_weight(module, shape), self._arena.take)
        self.forget()
        return packed

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """The stored vector as float32; CheckpointError as above."""
        return self.checkpoint.read_vector(name, shape)

    def forget(self) -> None:
        """Give the checkpoint's mapped pages back to the system."""
        self.checkpoint.reader.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None and self._places and not self._complete:
            self._keep()

    def _keep(self) -> None:
        """Write the file in the first place that takes it."""
        for place in self._places:
            try:
                with _alone(place) as alone:
                    if alone:
                        self._write(place)
                    else:
                        log.debug("%s: another process is writing there", place)
                return
            except OSError as error:
                log.info("packed weights can't be kept in %s: %s", place, error.strerror)
        log.warning(
            "packed weights are not kept, so that the next start packs them again; HALVE_CACHE names another "
            "directory, or off"
        )

    def _write(self, place: Path) -> None:
        path = place / self._name
        if self._reading is None and _is_whole(path):
            return  # another process was faster
        size_bytes = sum(packed.blob.size for packed in self._packed.values())
        _write_file(path, self.checkpoint, self._packed.items(), size_bytes)


def kept_file(
    checkpoint: Checkpoint,
    ops: PackingOps,
    weights: Mapping[str, tuple[tuple[int, int], Format]],
    *,
    version: str,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The file of a checkpoint's packed weights; one that is missing is made, matrix by matrix.

    weights: each matrix's shape and stored format. progress: matrices packed, matrices in all. Raises ConfigError with
    HALVE_CACHE=off, OutputError where none can be written, CheckpointError for weights that can't be read.
    """
    found = places(checkpoint)
    if not found:
        raise ConfigError(
            "expert_cache: experts are read from packed weights on disk, and HALVE_CACHE=off keeps none; name a "
            "directory in HALVE_CACHE, or leave the expert cache out"
        )
    name = f"{ops.layout}.{fingerprint(checkpoint, version)}{SUFFIX}"
    size_bytes = sum(fmt.size_bytes(shape) for shape, fmt in weights.values())  # about

    def packed() -> Iterator[tuple[str, Packed]]:
        for i, (module, (shape, _)) in enumerate(weights.items()):
            yield module, ops.pack(checkpoint.read_weight(module, shape), aligned_bytes)  # gone with the next
            checkpoint.reader.forget()
            if progress:
                progress(i + 1, len(weights))

    refused = []
    for place in found:
        path = place / name
        if _is_whole(path):
            return path
        try:
            with _alone(place, wait=True):
                if not _is_whole(path):  # another process may have been faster
                    log.info("packing weights once, to read experts from them: %s", path)
                    _write_file(path, checkpoint, packed(), size_bytes)
            return path
        except OSError as error:
            refused.append(f"{place}: {error.strerror}")
    raise OutputError(
        f"expert_cache: experts are read from packed weights on disk, about {format_bytes(size_bytes)}, and they can't "
        f"be kept ({'; '.join(refused)}); make room, or name another directory in HALVE_CACHE"
    )


def _write_file(path: Path, checkpoint: Checkpoint, weights: Iterable[tuple[str, Packed]], size_bytes: int) -> None:
    """Write a file beside its name and bring it there whole. Raises OSError, also for a disk without room for it."""
    disk = os.statvfs(path.parent)
    if disk.f_bavail * disk.f_frsize < ROOM * size_bytes:
        raise OSError(errno.ENOSPC, f"{format_bytes(size_bytes)} and a tenth more are not free on that disk")
    for left in path.parent.glob("*.new"):  # by a process that was killed: whoever writes now holds the lock
        left.unlink(missing_ok=True)
    new = path.with_name(f"{path.name}.new")
    with PackedWriter(new, key=path.name, origin=str(checkpoint.path.resolve())) as writer:
        for name, packed in weights:
            writer.add(name, packed.blob, format=packed.format.name, shape=packed.shape, record=dict(packed.record))
    new.replace(path)
    _remove_older(path)
    log.info("kept packed weights for the next start: %s (%s)", path, format_bytes(size_bytes))


def places(checkpoint: Checkpoint) -> list[Path]:
    """Directories where packed weights of a checkpoint may lie, the preferred first; none with HALVE_CACHE=off."""
    chosen = os.environ.get("HALVE_CACHE", "")
    if chosen.lower() == "off":
        return []
    found = [checkpoint.path / BESIDE] if checkpoint.is_bundle and not chosen else []
    home = Path(chosen) if chosen else _user_cache()
    if home is not None:
        path = checkpoint.path.resolve()
        found.append(home / "weights" / f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}")
    return found


def _user_cache() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the standard has relative ones ignored
        return Path(base) / "halve"
    with suppress(RuntimeError):  # a user without a home
        return Path.home() / ".cache" / "halve"
    return None


def fingerprint(checkpoint: Checkpoint, version: str) -> str:
    """24 hex digits that change with a checkpoint's content and Halve's version; the top says what they cover."""
    digest = hashlib.sha256(json.dumps([version, checkpoint.config], sort_keys=True).encode())
    for path in checkpoint.reader.files:
        with path.open("rb", buffering=0) as file:
            state = os.fstat(file.fileno())
            digest.update(f"\0{path.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
            header_bytes = 8 + int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
            digest.update(os.pread(file.fileno(), header_bytes, 0))
            step = max(SAMPLE_BYTES, (state.st_size - header_bytes) // SAMPLES)
            for start in range(header_bytes, state.st_size, step):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, start))
    return digest.hexdigest()[:24]


def _worth_keeping(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("quantization_config") is not None


def _is_whole(path: Path) -> bool:
    """Whether a file that belongs under its name lies there; its blobs are not looked at."""
    try:
        return read_index(path).key == path.name
    except CheckpointError:
        return False


@contextmanager
def _alone(place: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone may write in a directory, which is made; the system lets go when a process ends.

    wait: until it may.
    """
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _remove_older(kept: Path) -> None:
    """Remove what was packed from other contents of this checkpoint; other layouts stay.

    In a user's cache, also what was packed from checkpoints that are gone.
    """
    content = kept.name.rpartition(".")[0].rpartition(".")[2]
    for other in kept.parent.glob(f"*{SUFFIX}"):
        if not other.name.endswith(f".{content}{SUFFIX}"):
            other.unlink(missing_ok=True)
    if kept.parent.name == BESIDE:
        return
    for other in kept.parent.parent.glob(f"*/*{SUFFIX}"):
        with suppress(CheckpointError):
            if not Path(read_index(other).origin).exists():
                other.unlink(missing_ok=True)
