"""A file of prompts in, a file of answers out: any number of them, in bounded memory, and a killed run goes on.

A line of the source is one JSON object:

    {"id": "a", "prompt": "Once upon a time"}
    {"id": "b", "prompt": [1, 15, 7], "sampling": {"max_tokens": 8, "n": 2}, "priority": 1}

id: a string that no other line has. prompt: text, or token ids. sampling: fields of `SamplingParams` that differ from
the run's. Empty lines are passed over. A line of the output is one object too, in the order in which answers end:

    {"id": "a", "line": 1, "completions": [{"text": "...", "token_ids": [...], ...}], "error": null}

A line that can't be served gets a record with its `error`, its `id` null where it has none, and does not stop the run.
An error of the engine does: it is no answer, and the next run takes those lines up again.

What is kept per line is 8 bytes: a hash of its id, found beforehand, so that an id that occurs twice is refused before
anything runs. Records are written whole as they come and forced to disk about once a second, so after a crash the end
of the output may be torn; the next run cuts off the torn line, passes over what is answered, and goes on.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from halve.core.errors import DataError, OutputError, RequestError, UserError
from halve.core.record import parse_json, to_dict
from halve.engine.engine import Engine
from halve.engine.request import Completion, Request, SamplingParams
from halve.kernels.ops import Array

log = logging.getLogger("halve.engine")

SYNC_S = 1.0
_KEYS = frozenset({"id", "prompt", "sampling", "priority"})
_SAMPLING = frozenset(f.name for f in fields(SamplingParams)) - {"version"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineRun:
    """What a run did. num_lines: prompts of the source. num_resumed: answered by an earlier run.

    num_completed, num_errors: lines answered now, and lines that can't be served.
    """

    num_lines: int
    num_resumed: int
    num_completed: int
    num_errors: int


def run_file(
    engine: Engine,
    source: str | Path,
    out: str | Path,
    sampling: SamplingParams | None = None,
    *,
    max_in_flight: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OfflineRun:
    """Answer every line of `source` into `out`; an `out` of an earlier run of the same source is completed.

    sampling: of lines that do not say otherwise. max_in_flight: as `Engine.complete`. progress: lines done, lines in
    all. Raises DataError for a source that can't be read or names an id twice, OutputError for an `out` that can't be
    written, is being written by another run, or was not made by one; EngineError when the engine fails.
    """
    source, out = Path(source), Path(out)
    names = _names(source)
    with ExitStack() as stack:
        file = stack.enter_context(_opened(out))
        stack.callback(os.fsync, file.fileno())
        done = _Done(names, _answered(file, out))
        run = _Run(engine, source, sampling or SamplingParams(), file, done)
        for _ in run.records(max_in_flight):
            if progress:
                progress(done.num_resumed + run.num_completed + run.num_errors, len(names))
        return OfflineRun(
            num_lines=len(names),
            num_resumed=done.num_resumed,
            num_completed=run.num_completed,
            num_errors=run.num_errors,
        )


class _Run:
    """One pass over the source."""

    def __init__(self, engine: Engine, source: Path, sampling: SamplingParams, file: BinaryIO, done: "_Done") -> None:
        self.engine, self.source, self.sampling = engine, source, sampling
        self.num_completed = self.num_errors = 0
        self._file, self._done = file, done
        self._synced = time.monotonic()
        self._lines: dict[str, tuple[str, int]] = {}  # of requests in flight: id and line

    def records(self, max_in_flight: int | None) -> Iterator[None]:
        """Write a record for each line that is still to do; yields after each answer."""
        for completions in self.engine.complete(self._requests(), max_in_flight=max_in_flight):
            name, number = self._lines.pop(completions[0].request_id)
            if any(completion.finish_reason == "abort" for completion in completions):
                self._write(name, number, error="the request was aborted")
            else:
                self._write(name, number, completions=completions)
            yield

    def _requests(self) -> Iterator[Request]:
        for number, line in _lines(self.source):
            name = _name_of(line)
            if self._done.holds(name, number):
                continue
            try:
                request = self._request(line)
                self.engine.check(request)
            except UserError as error:
                self._write(name, number, error=str(error))
                continue
            assert name is not None
            self._lines[request.request_id] = name, number
            yield request

    def _request(self, line: bytes) -> Request:
        raw = parse_json(line.decode(errors="strict"), "line") if _is_utf8(line) else None
        if not isinstance(raw, dict):
            raise RequestError("line: not a JSON object in UTF-8; give id and prompt")
        if unknown := sorted(raw.keys() - _KEYS):
            raise RequestError(f"line: unknown keys {unknown}; known keys are {sorted(_KEYS)}")
        if not isinstance(raw.get("id"), str) or not raw["id"]:
            raise RequestError(f"id: {raw.get('id')!r:.80} must be a string, not empty")
        if not isinstance(raw.get("prompt"), str | list):
            raise RequestError(f"prompt: {raw.get('prompt')!r:.80} must be text or a list of token ids")
        return self.engine.request(raw["prompt"], self._sampling(raw.get("sampling")), priority=raw.get("priority", 0))

    def _sampling(self, changes: Any) -> SamplingParams:
        if changes is None:
            return self.sampling
        if not isinstance(changes, Mapping):
            raise RequestError(f"sampling: {changes!r:.80} must be an object of sampling parameters")
        if unknown := sorted(changes.keys() - _SAMPLING):
            raise RequestError(f"sampling: unknown keys {unknown}; known keys are {sorted(_SAMPLING)}")
        base = {name: getattr(self.sampling, name) for name in _SAMPLING}
        return SamplingParams.of(**{**base, **changes})

    def _write(
        self, name: str | None, number: int, *, completions: list[Completion] | None = None, error: str | None = None
    ) -> None:
        record = {"id": name, "line": number, "completions": _told(completions), "error": error}
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()  # whole lines survive this process; those of the last second may not survive the machine
        if time.monotonic() - self._synced > SYNC_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        self.num_errors += error is not None
        self.num_completed += error is None


class _Done:
    """Which lines an earlier run has answered, by the hashes of their names."""

    def __init__(self, names: Array, answered: Array) -> None:
        self._answered = np.unique(answered)
        strangers = np.setdiff1d(self._answered, names)
        if len(strangers):
            raise OutputError(
                f"{len(strangers)} records of the output belong to no line of the source; it was made from another "
                "source, or that has changed: write to a new file"
            )
        self.num_resumed = len(self._answered)

    def holds(self, name: str | None, number: int) -> bool:
        """Whether a line needs no answer any more."""
        key = _key(name, number)
        at = int(np.searchsorted(self._answered, key))
        return at < len(self._answered) and bool(self._answered[at] == key)


def _told(completions: list[Completion] | None) -> list[dict[str, Any]]:
    return [{k: v for k, v in to_dict(one).items() if k != "request_id"} for one in completions or ()]


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and bytes of the lines that are not empty."""
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{source}: can't be read: {error.strerror}") from error


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _name_of(line: bytes) -> str | None:
    """A line's id, None where it has none."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    name = raw.get("id") if isinstance(raw, dict) else None
    return name if isinstance(name, str) and name else None


def _key(name: str | None, number: int) -> np.uint64:
    """64 bits that stand for a line: of its id, or of its number where it has none."""
    text = f"#{number}" if name is None else f"={name}"
    return np.uint64(int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little"))


def _names(source: Path) -> Array:
    """The keys of all lines, sorted. Raises DataError for an id that occurs twice."""
    keys = np.fromiter((_key(_name_of(line), number) for number, line in _lines(source)), np.uint64)
    keys.sort()
    twice = keys[1:][keys[1:] == keys[:-1]]
    if not len(twice):
        return keys
    # Among a million ids two have one hash by accident once in 40 million files; they are told as well.
    found = [(number, _name_of(line)) for number, line in _lines(source) if _key(_name_of(line), number) == twice[0]]
    where = ", ".join(f"{name!r:.80} in line {number}" for number, name in found[:3])
    raise DataError(f"{source}: an id must occur once, there are {where}; rename all but one")


def _opened(out: Path) -> BinaryIO:
    """The output, for this run alone."""
    try:
        file = out.open("a+b")
    except OSError as error:
        raise OutputError(f"{out}: can't be written: {error.strerror}; choose another file") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OutputError(f"{out}: another run is writing it just now; wait for it or choose another file") from error
    return file


def _answered(file: BinaryIO, out: Path) -> Array:
    """Keys of the records that are there; a torn line at the end is cut off."""
    file.seek(0)
    end = 0

    def keys() -> Iterator[np.uint64]:
        nonlocal end
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                log.warning("%s: line %d is torn, its answer is made again", out, number)
                return
            end += len(line)
            yield _record_key(line, number, out)

    found = np.fromiter(keys(), np.uint64)
    file.truncate(end)
    file.seek(0, os.SEEK_END)
    return found


def _record_key(line: bytes, number: int, out: Path) -> np.uint64:
    try:
        record = json.loads(line)
        return _key(record["id"], record["line"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise OutputError(f"{out}: line {number} is no record of a run; choose another file") from error
