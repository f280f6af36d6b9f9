"""What the ceilings say and refuse. Nothing here asserts a speed."""

from dataclasses import replace

import pytest

from halve.core.errors import ConfigError, KernelError
from halve.core.record import to_dict
from halve.hardware import detect_cpu
from halve.kernels import ceilings, native_library
from halve.kernels.ceilings import ARITHMETIC, LEAST_ARENA_BYTES, LOOPS, Arena, gmac_s, loop_for, measure, thread_counts

needs_library = pytest.mark.skipif(native_library.available() is not None, reason="the C++ part is not built")
RUNNABLE = {loop.number: loop for loop in LOOPS if loop.refusal(detect_cpu()) is None}.values()


@pytest.fixture
def quick(monkeypatch):
    """Samples of microseconds: what is measured is not looked at here."""
    monkeypatch.setattr(ceilings, "BLOCKS", 2)


@needs_library
def test_every_ceiling_is_told_for_one_thread_and_for_all(quick):
    found = measure(samples=3, arena_bytes=LEAST_ARENA_BYTES)
    threads = {str(n) for n in thread_counts(detect_cpu().num_cores)}
    told = to_dict(found)
    for name in ("read_gb_s", *(f"{what}_gmac_s" for what in ARITHMETIC)):
        if told[name] is not None:
            assert told[name].keys() == threads
            for leaf in told[name].values():
                assert leaf.keys() == {"value", "low", "high", "n"}
                assert 0 < leaf["low"] <= leaf["value"] <= leaf["high"]
                assert leaf["n"] == 3
    assert told["read_gb_s"] is not None
    assert told["fp32_gmac_s"] is not None  # every processor has floats


@needs_library
def test_arithmetic_is_measured_or_refused_with_a_reason(quick):
    found = measure(num_threads=1, samples=3, arena_bytes=LEAST_ARENA_BYTES)
    assert found.instructions.keys() | found.refused.keys() == set(ARITHMETIC)
    for what in ARITHMETIC:
        assert (getattr(found, f"{what}_gmac_s") is None) == (what in found.refused)
    assert all("needs " in reason for reason in found.refused.values())


@needs_library
def test_progress_counts_to_its_total(quick):
    steps = []
    measure(samples=3, arena_bytes=LEAST_ARENA_BYTES, progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    assert len({total for _, total in steps}) == 1


@needs_library
@pytest.mark.parametrize("loop", RUNNABLE, ids=lambda loop: loop.instruction)
def test_a_loop_that_this_processor_has_runs_on_one_and_many_threads(loop, quick):
    assert gmac_s(loop, 1) > 0
    assert gmac_s(loop, 3) > 0  # more than the cores of a small machine: the team has them


def test_the_fastest_loop_that_a_processor_has_is_taken():
    device = detect_cpu()
    with_vnni = replace(device, features=frozenset({"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"}))
    plain = replace(device, features=frozenset())
    assert loop_for("int8", with_vnni).instruction == "vpdpbusd zmm"
    assert loop_for("bf16", with_vnni).instruction == "vdpbf16ps zmm"
    assert loop_for("int8", replace(device, features=frozenset({"avx2"}))).instruction == "vpmaddubsw vpmaddwd vpaddd"
    assert loop_for("int8", plain) is None
    assert loop_for("fp32", plain).features == ()


@needs_library
def test_a_loop_that_does_not_exist_is_refused():
    with pytest.raises(KernelError, match="ceiling loop 99 is not in this build"):
        gmac_s(replace(LOOPS[-1], number=99), 1)


def test_an_arena_that_a_cache_could_hold_is_refused():
    with pytest.raises(ConfigError, match=r"arena_bytes: 2097152 must be .* at least 268435456"):
        Arena(2 << 20)
    with pytest.raises(ConfigError, match="must be a multiple of 2097152"):
        Arena(LEAST_ARENA_BYTES + 1)


def test_an_arena_that_memory_has_no_room_for_is_refused(monkeypatch):
    monkeypatch.setattr(ceilings, "free_memory_bytes", lambda: 300 << 20)
    with pytest.raises(ConfigError, match=r"arena_bytes: 268 MB is more than half of the 315 MB .* end other programs"):
        Arena(LEAST_ARENA_BYTES)


@needs_library
def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ConfigError, match="num_threads: 0 is not between 1 and"):
        measure(num_threads=0)
    with pytest.raises(ConfigError, match=r"num_threads: \d+ is not between 1 and"):
        measure(num_threads=detect_cpu().num_cores + 1)
    with pytest.raises(ConfigError, match="samples: 2 is too few"):
        measure(samples=2)


def test_without_the_library_nothing_is_measured(monkeypatch):
    def absent():
        raise KernelError("not built")

    monkeypatch.setattr(ceilings, "library", absent)
    with pytest.raises(KernelError, match="not built"):
        measure()


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 3, 4, 6]), (64, [1, 2, 3, 4, 8, 16, 32, 64])]
)
def test_threads_are_counted_singly_then_in_doubles(cores, expected):
    assert thread_counts(cores) == expected
