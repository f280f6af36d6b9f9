"""A result directory that appears whole or not at all, and the work beside it that a killed run leaves to resume.

The work lies in `.NAME.partial` beside the result. It is locked while a run holds it, removed when the run succeeds
or fails with an error of the user's, and kept when the run is killed or interrupted; a later run takes it up only
when asked to, and only for the very same inputs.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from halve.core.errors import HalveError, OutputError

log = logging.getLogger("halve")

STATE_FILE = "state.json"
EARLIER_STATE_FILE = "state.before.json"
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
        self.worth_keeping = False  # through an error: what it holds was certified
        self.state: dict[str, Any] = {}
        self.made_here: set[str] = set()  # directories that this process wrote or has checked
        self._lock: IO[str] | None = None
        self._made_parents: list[Path] = []
        refuse_existing(self.out, force=force)

    def __enter__(self) -> Self:
        """Lock the work directory; start afresh, or take up a killed run's work."""
        try:
            self._make_parents()
            self.path.mkdir(exist_ok=True)
            self._take_lock()
            state_file = self.path / STATE_FILE
            before = self._read_state() if self.resume and state_file.exists() else None
            if before is not None:
                self._take_up(before)
            else:
                self._clear()
                self.state = {"key": self.key}
                self.save_state()
        except OSError as error:
            self._release()
            self._remove_parents()
            raise OutputError(f"{self.path}: can't be written: {error.strerror}; choose another --out") from error
        except BaseException:
            self._release()
            raise
        return self

    def _make_parents(self) -> None:
        """Make what is missing above the result, remembered so that a run that fails leaves none of it."""
        missing = [folder for folder in self.path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made_parents.append(folder)

    def _remove_parents(self) -> None:
        with contextlib.suppress(OSError):  # someone else has put something there
            while self._made_parents:
                self._made_parents.pop().rmdir()

    def _take_lock(self) -> None:
        file = self.path / LOCK_FILE
        self._lock = file.open("w")
        busy = OutputError(f"{self.out}: another run is writing it just now; wait for it or choose another output")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise busy from error
        # A run that ended between our `open` and our lock took its directory, and the file we locked, with it.
        if not file.exists() or not os.path.samestat(os.fstat(self._lock.fileno()), file.stat()):
            raise busy

    def _read_state(self) -> dict[str, Any] | None:
        """The newest state that can be read: the last one, else the one before it; None, and that is said, for none."""
        for name in (STATE_FILE, EARLIER_STATE_FILE):
            try:
                state = json.loads((self.path / name).read_text(encoding="utf-8"))
                if isinstance(state, dict) and isinstance(state.get("key"), dict):
                    if name == EARLIER_STATE_FILE:
                        log.warning("going on from the step before it: %s", self.path / name)
                    return state
                reason = "holds no state of a run"
            except (OSError, ValueError) as error:
                reason = f"can't be read ({error})"
            log.warning("%s: %s", self.path / name, reason)
        log.warning("%s: what was done can't be told any more; the run begins afresh", self.path)
        return None

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
        """Write the state so that a kill at any moment leaves the old or the new one; the old one stays beside it.

        Should a disk damage the new one, only the last step is lost.
        """
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(self.path / STATE_FILE, self.path / EARLIER_STATE_FILE)
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
        replaced = self.path / "replaced"
        if replaced.exists():  # left by a run that was killed just after its own replacement
            shutil.rmtree(replaced)
        refuse_existing(self.out, force=self.force)
        try:
            if self.out.exists():
                os.rename(self.out, replaced)
            os.rename(directory, self.out)
        except OSError as error:
            if replaced.exists() and not self.out.exists():
                os.rename(replaced, self.out)
            raise OutputError(f"{self.out}: can't be put in place: {error.strerror}; choose another --out") from error
        _sync(self.out.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the work when the run is over, by success or by an error; keep it when the run was interrupted, or
        failed behind its certificate.
        """
        failed = isinstance(error, HalveError | OSError)
        if error is None or (failed and not self.worth_keeping):
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()
        if failed and self.worth_keeping:
            log.warning("%s: what was certified is kept; the same command with --resume takes it up", self.path)
        elif failed:
            self._remove_parents()
        if isinstance(error, OSError) and error.errno in FULL:
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
