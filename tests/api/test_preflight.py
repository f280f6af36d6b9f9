"""What is said, and refused, before any work begins."""

import logging
from dataclasses import replace

import numpy as np
import pytest

import halve
from halve.api import preflight as module
from halve.api.preflight import check, in_words
from halve.api.shape_cost import LLAMA_1B
from halve.api.texts import _cut, beginnings
from halve.core.certificate import Preflight
from halve.core.errors import ConfigError, OutputError, QualityError
from halve.core.workload import ServiceLevel
from halve.models.names import num_active_parameters

FOUND = Preflight(
    kernels="C++ (test)",
    memory_bytes=1 << 20,
    free_memory_bytes=1 << 30,
    disk_bytes=1 << 20,
    free_disk_bytes=1 << 30,
    seconds=90.0,
    floor_bytes=500_000_000,
    original_bytes=2_500_000_000,
    read_gb_s=25.0,
    floor_s=0.02,
    floor_loss=5e-7,
)


def checked(tmp_path, found=FOUND, limit=0.01, time_s=None, activations="fp32", **level):
    return check(
        found, tmp_path / "out", limit=limit, level=ServiceLevel(**level), time_s=time_s, activations=activations
    )


def test_a_run_that_fits_is_not_warned_of(tmp_path):
    assert checked(tmp_path, ttft_s=1.0, time_per_token_s=0.1, time_s=600.0) == ()


def test_too_little_disk_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"out: this run needs up to 1.05 MB of disk there, 1 kB are free; make room"):
        checked(tmp_path, replace(FOUND, free_disk_bytes=1000))


def test_more_memory_than_the_machine_has_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"needs up to 1e\+06 TB of memory, this machine has .*; take a larger machine"
    ):
        checked(tmp_path, replace(FOUND, memory_bytes=10**18))


@pytest.mark.parametrize("limit", [0.0, 1e-8])
def test_a_limit_below_the_floor_is_refused(tmp_path, limit):
    with pytest.raises(QualityError, match=r"max_quality_loss .* is below the floor: .*; ask for 0.1% or more"):
        checked(tmp_path, limit=limit)


def test_a_service_level_below_bytes_over_bandwidth_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(QualityError, match=r"token in 5 ms here: .* 500 MB .* 20 ms at 25 GB/s; .*\(tpot=20ms\)"):
        checked(tmp_path, time_per_token_s=0.005)
    with pytest.raises(QualityError, match=r"first token after 5 ms here: .*\(ttft=20ms\)"):
        checked(tmp_path, ttft_s=0.005)
    assert checked(tmp_path, replace(FOUND, floor_s=None, read_gb_s=None), time_per_token_s=1e-9) == ()


def test_what_may_not_end_well_is_warned_of(tmp_path):
    (late,) = checked(tmp_path, time_s=60.0)
    assert late.startswith("about 1 min 30 s are likely, more than the 1 min 0 s given")
    (rounded,) = checked(tmp_path, limit=0.001, activations="int8")
    assert "int8 activations alone may lose up to 0.18%" in rounded


def test_a_few_lines_say_all_of_it():
    needs, floor, warning = in_words(replace(FOUND, warnings=("it may rain",)))
    assert needs == (
        "needs: memory up to 1.05 MB (1.07 GB free), disk up to 1.05 MB (1.07 GB free), roughly 1 min 30 s; "
        "kernels: C++ (test)"
    )
    assert floor == (
        "floor: 500 MB of weights a token, 0.20 of the original's; no plan is faster than 20 ms a token at 25 GB/s"
    )
    assert warning == "warning: it may rain"


def test_nothing_is_begun_where_it_is_refused_and_the_lines_come_first(tiny, text, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_free_disk", lambda out: 10)
    with pytest.raises(OutputError, match="of disk there, 10 B are free"):
        halve.optimize(tiny, tmp_path / "out", format="int8", method="rtn", calibration=text)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "_free_disk", lambda out: None)
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 5)
    with caplog.at_level(logging.INFO, "halve"):
        result = halve.optimize(tiny, tmp_path / "out", format="int8", method="rtn", calibration=text)
    assert "needs: memory up to" in caplog.text
    assert "5 B are free: it may swap or be killed" in caplog.text
    before = result.certificate.preflight
    assert before.free_disk_bytes is None
    assert before.floor_bytes / before.original_bytes == pytest.approx(result.certificate.cost.ratio)


def test_the_floor_of_a_search_is_below_that_of_any_plan(tiny, text, tmp_path):
    low = halve.optimize(tiny, tmp_path / "a", format="int2-g32", method="rtn", calibration=text).certificate
    high = halve.optimize(tiny, tmp_path / "b", format="int8", method="rtn", calibration=text).certificate
    assert low.preflight.floor_bytes < high.preflight.floor_bytes < high.preflight.original_bytes


def test_all_documents_speak_where_not_all_of_a_text_can_be_read():
    documents = [np.zeros(length, np.int32) for length in (50, 100, 300, 1000)]
    assert _cut(documents, 1450) is None
    assert _cut(documents, 1449) == 512
    assert _cut(documents, 700) == 256  # 50 + 100 + 256 + 256
    assert _cut(documents, 1) == 64
    assert [len(one) for one in beginnings(documents, 64)] == [50, 64, 64, 64]
    assert beginnings(documents, None) is documents


def test_a_large_models_text_is_what_its_original_reads_in_ten_minutes(monkeypatch):
    monkeypatch.setattr(module, "_flops", lambda config, rough: 2.0 * num_active_parameters(config) * 50)
    assert module.sealed_tokens(LLAMA_1B) == 600 * 50
