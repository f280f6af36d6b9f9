"""What a run says before it begins, and what it refuses."""

import logging
import shutil
from types import SimpleNamespace

import pytest

import halve
from halve.api import preflight as module
from halve.core.errors import OutputError


def test_it_says_memory_disk_time_kernels_and_the_floor(tiny, text, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "halve"):
        halve.optimize(tiny, tmp_path / "out", max_quality_loss="20%", calibration=text)
    said = caplog.text
    for words in ("of memory (", "of disk (", "kernels: ", "no plan reads less than", "tokens through the model"):
        assert words in said


def test_a_full_disk_is_refused_before_anything_is_computed(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match=r"its disk has 10 B free; make room, or name an output on another disk"):
        halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text)
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_a_warning(tiny, text, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1000)
    with caplog.at_level(logging.WARNING, "halve"):
        halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text)
    assert "1 kB are free: it may be slow or be ended by the system" in caplog.text


def test_the_floor_is_the_least_that_a_read_loop_allows():
    found = module.Preflight(
        disk_bytes=1, disk_free_bytes=1, memory_bytes=1, memory_free_bytes=None, seconds=None, tokens=0,
        kernels="none", original_bytes_per_token=4_000_000, floor_bytes_per_token=1_000_000, read_gb_s=2.0,
    )  # fmt: skip
    assert found.floor_tok_s == 2000
    assert "(0.25 of now): at most 2,000 tokens/s for one sequence at 2 GB/s" in found.lines()[1]
    assert len(found.lines()) == 2
