"""Experts in memory of a given size, the rest on disk: least recently used ones make room, likely ones come ahead.

What bounds it: a step can't be faster than the bytes of the experts it misses over the rate at which they are read,
and that is one to two orders below memory's. So a step asks for all its experts of a layer at once, computes with those
that are there while threads read the others, and has what the next layer probably asks for read behind them. Such
guesses never wait in front of what is needed; while less than a quarter of them are right, none is read.

Peers: llama.cpp maps the file and leaves it to the system what stays, in pages, without knowing of experts; a cache of
least recently used experts and guesses by the next layer's router are arXiv:2312.17238. Experts are read into memory of
our own, in huge pages, because products from a mapped file run at half their speed (`kernels/arena.py`); the system's
page cache stays behind it, as long as nobody else needs that memory.
"""

import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halve.core.errors import KernelError
from halve.kernels.arena import ALIGNMENT, Arena
from halve.kernels.ops import Array

Key = tuple[int, int]  # layer, expert
# Reads an expert into memory, uint8 of its size, and returns what to compute with; called from the cache's threads.
Read = Callable[[Key, Array], Any]

NUM_READERS = 2
LEAST_RIGHT = 0.25  # of guesses, for them to be read
MEMORY_OF_GUESSES = 0.95  # of what guesses were right before, kept at each layer


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCacheUse:
    """What a cache of experts has done since it was made.

    size_bytes: of the cache; expert_bytes: of all experts. hits: experts that lay in memory when a step asked for them;
    misses: those it waited for, read ahead but not there yet among them. hit_rate: None before the first step.
    num_ahead: experts read ahead; num_ahead_right: of them, those that the layer asked for. read_bytes: from disk,
    ahead or not. wait_s: seconds in which steps had nothing to compute with.
    """

    size_bytes: int
    expert_bytes: int
    hits: int
    misses: int
    hit_rate: float | None
    num_ahead: int
    num_ahead_right: int
    read_bytes: int
    wait_s: float


@dataclass(slots=True, eq=False)
class _Entry:
    """An expert that has a place. It is queued, then a thread reads it, then it is ready or has an error."""

    key: Key
    start: int
    memory: Array
    ahead: bool  # nobody asked for it yet
    state: str = "queued"
    content: Any = None
    error: BaseException | None = None
    pinned: bool = False


@dataclass(slots=True, eq=False)
class _Queue:
    """What the cache and its threads share; threads hold nothing else, so that they end with the cache."""

    read: Read
    changed: threading.Condition = field(default_factory=threading.Condition)
    asked: deque[_Entry] = field(default_factory=deque)
    ahead: deque[_Entry] = field(default_factory=deque)
    read_bytes: int = 0
    closed: bool = False

    def serve(self) -> None:
        """Read what is asked for, then what is guessed, until closed."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.asked or self.ahead)
                if self.closed:
                    return
                entry = (self.asked or self.ahead).popleft()
                entry.state = "reading"
            try:
                entry.content = self.read(entry.key, entry.memory)
            except BaseException as error:  # the step that asked for it raises it
                entry.error = error
            with self.changed:
                entry.state = "ready"
                self.read_bytes += entry.memory.size if entry.error is None else 0
                self.changed.notify_all()

    def close(self) -> None:
        """End the threads once they have read what they are at."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class ExpertCache:
    """sizes: bytes of each expert. size_bytes: of the cache, which must hold the largest. read: see `Read`."""

    def __init__(
        self, sizes: Mapping[Key, int], size_bytes: int, read: Read, *, num_readers: int = NUM_READERS
    ) -> None:
        self._sizes = {key: _aligned(size) for key, size in sizes.items()}
        self._expert_bytes = sum(self._sizes.values())
        self.size_bytes = min(size_bytes // ALIGNMENT * ALIGNMENT, self._expert_bytes)
        assert max(self._sizes.values()) <= self.size_bytes
        self._memory = Arena(self.size_bytes).take(self.size_bytes)
        self._space = _Space(self.size_bytes)
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # least recently used first
        self._guessed: dict[int, set[Key]] = {}  # of each layer, what was not there when it was guessed
        self._read_ahead: dict[int, set[Key]] = {}
        self._right = 1.0  # of guesses, lately
        self._hits = self._misses = self._num_ahead = self._num_ahead_right = 0
        self._wait_s = 0.0
        self._turn = threading.Lock()  # one layer of one step at a time, since each pins what others may need
        self._queue = _Queue(read)
        for i in range(num_readers):
            threading.Thread(target=self._queue.serve, name=f"halve-expert-{i}", daemon=True).start()
        self.close = weakref.finalize(self, self._queue.close)

    @property
    def holds_all(self) -> bool:
        """Whether no expert ever makes room for another."""
        return self.size_bytes == self._expert_bytes

    def portions(
        self, layer: int, experts: Sequence[int], ahead: Callable[[], None] | None = None
    ) -> Iterator[dict[int, Any]]:
        """What to compute with, for all of a layer's experts, as many at a time as are there; valid until the next.

        ahead: called once, when everything was asked for that there is room for: it may call `expect`. Raises what
        reading an expert raised.
        """
        with self._turn:
            queue, pinned = self._queue, dict[int, _Entry]()
            with queue.changed:
                waiting = self._begin(layer, experts)
                self._ask(layer, waiting, pinned)
            try:
                while waiting or pinned:
                    if ahead is not None and not waiting:
                        ahead()
                        ahead = None
                    ready = self._next(layer, waiting, pinned)
                    yield {expert: entry.content for expert, entry in ready.items()}
                    self._let_go(ready, pinned)
            finally:
                self._let_go(dict(pinned), pinned)

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Read a layer's likely experts ahead, the likeliest first, where there is room that nobody uses."""
        keys = [(layer, expert) for expert in experts]
        with self._queue.changed:
            for key in keys:
                if key in self._entries:
                    self._entries.move_to_end(key)
            missing = [key for key in keys if key not in self._entries]
            self._guessed[layer] = set(missing)
            if self._right < LEAST_RIGHT:
                return
            for key in missing:
                entry = self._place(key, keep=keys, ahead=True)
                if entry is None:
                    break
                self._read_ahead.setdefault(layer, set()).add(key)
                self._queue.ahead.append(entry)
            self._queue.changed.notify_all()

    def use(self) -> ExpertCacheUse:
        """Counts so far."""
        asked = self._hits + self._misses
        return ExpertCacheUse(
            size_bytes=self.size_bytes,
            expert_bytes=self._expert_bytes,
            hits=self._hits,
            misses=self._misses,
            hit_rate=self._hits / asked if asked else None,
            num_ahead=self._num_ahead,
            num_ahead_right=self._num_ahead_right,
            read_bytes=self._queue.read_bytes,
            wait_s=self._wait_s,
        )

    def _begin(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Count what is there, judge what was guessed, and put experts that are there first."""
        keys = {(layer, expert) for expert in experts}
        if guessed := self._guessed.pop(layer, None):
            share = len(guessed & keys) / len(guessed)
            self._right = MEMORY_OF_GUESSES * self._right + (1 - MEMORY_OF_GUESSES) * share
        for key in self._read_ahead.pop(layer, ()):
            entry = self._entries.get(key)
            if entry is not None and entry.state == "queued" and key not in keys:
                self._drop(entry)  # a wrong guess that nobody read yet
                continue
            self._num_ahead += 1
            self._num_ahead_right += key in keys
        there = {e for e in experts if (entry := self._entries.get((layer, e))) and entry.state == "ready"}
        self._hits += len(there)
        self._misses += len(experts) - len(there)
        begun = {e for e in experts if (layer, e) in self._entries} - there
        return sorted(experts, key=lambda e: (e not in there, e not in begun))

    def _ask(self, layer: int, waiting: list[int], pinned: dict[int, _Entry]) -> None:
        """Pin what has a place and queue what gets one, in order, as far as there is room."""
        while waiting:
            key = (layer, waiting[0])
            entry = self._entries.get(key)
            if entry is None:
                entry = self._place(key, keep=(), ahead=False)
                if entry is None:
                    return
                self._queue.asked.append(entry)
                self._queue.changed.notify_all()
            elif entry.ahead and entry.state == "queued":
                self._queue.ahead.remove(entry)
                self._queue.asked.append(entry)
            entry.ahead, entry.pinned = False, True
            self._entries.move_to_end(key)
            pinned[waiting.pop(0)] = entry

    def _next(self, layer: int, waiting: list[int], pinned: dict[int, _Entry]) -> dict[int, _Entry]:
        """Experts that are ready; waits for one. Raises what reading raised."""
        with self._queue.changed:
            started = None
            while True:
                self._ask(layer, waiting, pinned)
                if ready := {e: entry for e, entry in pinned.items() if entry.state == "ready"}:
                    break
                if self._queue.closed:
                    raise KernelError("the cache of experts is closed; load the model again")
                started = started or time.perf_counter()
                self._queue.changed.wait()
            if started is not None:
                self._wait_s += time.perf_counter() - started
            for entry in ready.values():
                if entry.error is not None:
                    raise entry.error
            return ready

    def _let_go(self, entries: Mapping[int, _Entry], pinned: dict[int, _Entry]) -> None:
        with self._queue.changed:
            for expert, entry in entries.items():
                entry.pinned = False
                del pinned[expert]
                if entry.error is not None:
                    self._drop(entry)

    def _place(self, key: Key, *, keep: Collection[Key], ahead: bool) -> _Entry | None:
        """A place for an expert, at the cost of those used least recently; None where all others are in use."""
        size = self._sizes[key]
        while (start := self._space.take(size)) is None:
            oldest = next((entry for entry in self._entries.values() if self._can_go(entry, keep, ahead)), None)
            if oldest is None:
                return None
            self._drop(oldest)
        entry = _Entry(key, start, self._memory[start : start + size], ahead)
        self._entries[key] = entry
        return entry

    def _can_go(self, entry: _Entry, keep: Collection[Key], ahead: bool) -> bool:
        """Whether an expert may make room: a guess that is not read yet only for what is asked for."""
        if entry.pinned or entry.state == "reading" or entry.key in keep:
            return False
        return entry.state == "ready" or (entry.ahead and not ahead)

    def _drop(self, entry: _Entry) -> None:
        if entry.state == "queued":
            self._queue.ahead.remove(entry)
            self._read_ahead.get(entry.key[0], set()).discard(entry.key)
        del self._entries[entry.key]
        self._space.give(entry.start, entry.memory.size)


class _Space:
    """Which stretches of a memory are free; all sizes are multiples of ALIGNMENT."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]  # start and size, by start, none touching the next

    def take(self, size: int) -> int | None:
        """Where the first free stretch of that size begins."""
        for i, (start, there) in enumerate(self._free):
            if there >= size:
                self._free[i : i + 1] = [(start + size, there - size)] if there > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Free a stretch that was taken, and join it with free neighbours."""
        joined: list[tuple[int, int]] = []
        for at, there in sorted([*self._free, (start, size)]):
            if joined and sum(joined[-1]) == at:
                joined[-1] = joined[-1][0], joined[-1][1] + there
            else:
                joined.append((at, there))
        self._free = joined


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
