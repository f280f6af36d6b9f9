"""Memory for weights: alignment, growth, huge pages, and that it goes back to the system."""

import gc
import mmap
import weakref

import numpy as np
import pytest

from halve.core.errors import KernelError
from halve.kernels import arena as module
from halve.kernels.arena import HUGE_PAGE, Arena, parse_smaps

SMAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
AnonHugePages:      2048 kB
7f0000400000-7f0000500000 rw-p 00000000 00:00 0                          [stack]
AnonHugePages:         0 kB
"""


def test_arrays_start_on_multiples_of_64_bytes_and_do_not_overlap():
    arena = Arena(chunk_bytes=HUGE_PAGE)
    taken = [arena.take(size) for size in (1, 63, 64, 65, 0, 100_000, 3 * HUGE_PAGE, 7)]
    for number, array in enumerate(taken):
        assert array.dtype == np.uint8
        assert array.ctypes.data % 64 == 0
        assert not array.any()
        array[:] = number
    assert all((array == number).all() for number, array in enumerate(taken))


def test_the_first_array_of_a_chunk_starts_on_a_huge_page():
    assert Arena().take(10).ctypes.data % HUGE_PAGE == 0


def test_it_grows_by_chunks_and_gives_a_large_array_one_of_its_own():
    arena = Arena(chunk_bytes=2 * HUGE_PAGE)
    arena.take(HUGE_PAGE)
    arena.take(HUGE_PAGE)
    assert arena.size_bytes == 2 * HUGE_PAGE
    arena.take(5 * HUGE_PAGE - 1)
    assert arena.size_bytes == 7 * HUGE_PAGE
    assert arena.used_bytes == 7 * HUGE_PAGE - 1


def test_arrays_keep_their_memory_and_the_last_one_frees_it(monkeypatch):
    class Mapped(mmap.mmap):
        """A mapping that can be watched."""

    mapped = []

    def watched(*arguments, **options):
        made = Mapped(*arguments, **options)
        mapped.append(weakref.ref(made))
        return made

    monkeypatch.setattr(module.mmap, "mmap", watched)
    arena = Arena()
    array, other = arena.take(1000), arena.take(1000)
    array[:] = 5
    del arena, other
    gc.collect()
    assert mapped[0]() is not None
    assert (array == 5).all()
    del array
    gc.collect()
    assert mapped[0]() is None


def test_memory_that_the_system_refuses_is_an_error_that_says_how_much():
    with pytest.raises(KernelError, match=r"the weights need 1\.15e\+06 TB more memory and the system refuses it"):
        Arena().take(2**60)


def test_a_system_without_huge_pages_gives_plain_ones_and_says_so(monkeypatch, caplog):
    class Plain(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module.mmap, "mmap", Plain)
    caplog.set_level("INFO", "halve.kernels")
    Arena().take(100)[:] = 1
    assert "weights lie in small pages: the system refuses huge ones" in caplog.text


def test_the_bytes_in_huge_pages_are_read_from_smaps():
    assert list(parse_smaps(SMAPS)) == [
        (0x7F0000000000, 0x7F0000400000, 2048 * 1024),
        (0x7F0000400000, 0x7F0000500000, 0),
    ]


def test_written_memory_is_in_huge_pages_where_the_system_has_them():
    arena = Arena(chunk_bytes=8 * HUGE_PAGE)
    arena.take(8 * HUGE_PAGE)[:] = 1
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            on = "[never]" not in file.read()
    except OSError:
        on = False
    huge = arena.huge_bytes()
    if not on:
        assert not huge
    elif huge == 0:
        pytest.skip("huge pages are allowed, and none is free")
    else:
        assert HUGE_PAGE <= huge <= arena.size_bytes


def test_where_the_system_does_not_say_the_bytes_in_huge_pages_are_unknown(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(module.Path, "read_text", absent)
    assert Arena().huge_bytes() is None
