"""A result directory that appears whole or not at all, and the work beside it that a killed run leaves to resume.

The work lies in `.NAME.partial` beside the result. It is locked while a run holds it, removed when the run succeeds
or fails with an error of the user's, and kept when the run is killed or interrupted; a later run takes it up only
when asked to, and only for the very same inputs.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from halve.core.errors import HalveError, OutputError, UserError

STATE_FILE = "state.json"
LOCK_FILE = "lock"
BUNDLE_MARK = "halve/plan.json"


class Workspace:
    """The work directory of one run, as a context manager."""

    def __init__(self, out: Path, key: Mapping[str, Any], *, force: bool, resume: bool) -> None:
        """Check that `out` may be written; nothing is touched before `with`.

        key: everything the result depends on; a partial run is resumed only if its key is the same.
        Raises OutputError when out exists without force, or is not a bundle, or its parent can't be written.
        """
        self.out = Path(os.path.abspath(out))
        self.path = self.out.parent / f".{self.out.name}.partial"
        self.key = json.loads(json.dumps(dict(key)))
        self.force, self.resume = force, resume
        self.resumed = False
        self.state: dict[str, Any] = {}
        self._lock: IO[str] | None = None
        refuse_existing(self.out, force=force)

    def __enter__(self) -> Self:
        """Lock the work directory; start afresh, or take up a killed run's work."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            state_file = self.path / STATE_FILE
            if self.resume and state_file.exists():
                self._take_up(json.loads(state_file.read_text()))
            else:
                self._clear()
                self.state = {"key": self.key}
                self.save_state()
        except OSError as error:
            self._release()
            raise OutputError(f"{self.path}: can't be written: {error.strerror}; choose another --out") from error
        except BaseException:
            self._release()
            raise
        return self

    def _take_lock(self) -> None:
        self._lock = (self.path / LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"{self.out}: another run is writing it just now; wait for it or choose another"
            ) from error

    def _take_up(self, state: dict[str, Any]) -> None:
        if state.get("key") != self.key:
            old = state.get("key", {})
            changed = sorted(k for k in self.key.keys() | old.keys() if self.key.get(k) != old.get(k))
            raise OutputError(
                f"{self.path}: holds an unfinished run with other {', '.join(changed)}; "
                "repeat that run's options, or start afresh without --resume"
            )
        self.state, self.resumed = state, True

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == LOCK_FILE:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def save_state(self) -> None:
        """Write the state so that a kill at any moment leaves the old or the new one."""
        write_atomic(self.path / STATE_FILE, json.dumps(self.state, indent=1))

    def fresh_directory(self, name: str) -> Path:
        """An empty directory in the workspace; what a killed run left in it is removed."""
        path = self.path / name
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
        return path

    def publish(self, directory: Path) -> None:
        """Rename a finished directory of the workspace to the result's name, in one step on disk."""
        sync_tree(directory)
        if self.out.exists():
            refuse_existing(self.out, force=self.force)
            replaced = self.path / "replaced"
            os.rename(self.out, replaced)
        try:
            os.rename(directory, self.out)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.rename(self.path / "replaced", self.out)
            raise OutputError(f"{self.out}: can't be put in place: {error.strerror}") from error
        _sync(self.out.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the work when the run is over, by success or by an error; keep it when the run was interrupted."""
        if error is None or isinstance(error, HalveError | OSError):
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()
        if isinstance(error, OSError) and not isinstance(error, UserError) and error.errno in FULL:
            raise OutputError(f"{self.path}: {error.strerror}; nothing was written") from error

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Refuse to write over what is there: anything without force, and with force anything but a bundle."""
    if not os.path.lexists(out):
        return
    if not force:
        raise OutputError(f"{out}: exists already; choose another output or replace it with --force")
    if not out.is_dir() or (any(out.iterdir()) and not (out / BUNDLE_MARK).exists()):
        raise OutputError(f"{out}: is not a bundle of Halve ({BUNDLE_MARK} is missing), so --force does not replace it")


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole: to a neighbour first, then renamed."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_tree(directory: Path) -> None:
    """Bring every file and directory below to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
