"""Memory for weights, in huge pages where the system has them.

A matrix is read whole for every token, and with pages of 4 KiB the processor spends a good part of that time finding
out where each page lies: products from a mapped file, or from memory that was not asked to be in huge pages, run at
half to nine tenths of the speed. So weights are copied once, into anonymous memory advised for pages of 2 MiB.
Source: Linux, Documentation/admin-guide/mm/transhuge.rst.
"""

import logging
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from halve.core.errors import KernelError
from halve.core.units import format_bytes
from halve.kernels.ops import Array

log = logging.getLogger("halve.kernels")

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
HUGE_PAGE = 2 * 2**20
CHUNK_BYTES = 64 * 2**20
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Arena:
    """Cuts uint8 arrays from large mappings. It grows by chunks and never moves or reuses what it gave out.

    Every array keeps its chunk alive, and a chunk goes back to the system with the last of its arrays (and the arena,
    which holds the one it still cuts from). Memory counts as used only where it was written.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._free: Array = np.empty(0, np.uint8)
        self._spans: list[tuple[int, int]] = []  # address and bytes of every chunk
        self.used_bytes = 0  # given out, gaps for alignment left aside

    @property
    def size_bytes(self) -> int:
        """Bytes of the chunks, those at their ends that nobody took among them."""
        return sum(size for _, size in self._spans)

    def take(self, size_bytes: int) -> Array:
        """A zeroed uint8 array [size_bytes] that starts on a multiple of 64 bytes.

        Raises KernelError when the system refuses the memory.
        """
        if size_bytes > self._free.size:
            self._free = self._chunk(max(size_bytes, self._chunk_bytes))
        taken = self._free[:size_bytes]
        self._free = self._free[-(-size_bytes // ALIGNMENT) * ALIGNMENT :]
        self.used_bytes += size_bytes
        return taken

    def _chunk(self, size_bytes: int) -> Array:
        """A new chunk that starts on a huge page, whole huge pages long."""
        size_bytes = -(-size_bytes // HUGE_PAGE) * HUGE_PAGE
        try:
            # What alignment leaves over is never touched. Private: shared memory has other rules for huge pages.
            mapped = mmap.mmap(-1, size_bytes + HUGE_PAGE, **_PRIVATE)
        except (OSError, OverflowError) as error:
            raise KernelError(
                f"the weights need {format_bytes(size_bytes)} more memory and the system refuses it: {error}; "
                "close other programs or take a smaller model"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
            try:
                mapped.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:
                log.info("weights lie in small pages: the system refuses huge ones (%s)", error)
        whole = np.frombuffer(mapped, np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        chunk = whole[start : start + size_bytes]
        self._spans.append((chunk.ctypes.data, size_bytes))
        return chunk

    def huge_bytes(self) -> int | None:
        """How much of the chunks lies in huge pages just now; None where the system does not say."""
        try:
            text = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        return sum(self._overlap(start, stop, huge) for start, stop, huge in parse_smaps(text))

    def _overlap(self, start: int, stop: int, huge: int) -> int:
        """At most the bytes of our chunks within an area: the system joins neighbouring areas, ours and others'."""
        shared = sum(max(0, min(stop, at + size) - max(start, at)) for at, size in self._spans)
        return min(shared, huge)


def parse_smaps(text: str) -> Iterator[tuple[int, int, int]]:
    """First address, end and bytes in anonymous huge pages of each area in the text of /proc/self/smaps."""
    start = stop = 0
    for line in text.splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = int(area[1], 16), int(area[2], 16)
        elif huge := re.match(r"AnonHugePages: +(\d+) kB", line):
            yield start, stop, int(huge[1]) * 1024
