import importlib.util
import json
import logging
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch
import triton

from halve.core.errors import KernelError
from halve.formats import FORMATS
from halve.kernels.cuda import configs, product_rows, tuning
from halve.kernels.dispatch import Kernel
from tests.kernels.cuda.test_products import DEVICE, make_activations, make_weight, pack, project


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HALVE_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget():
    tuning._known.clear()
    tuning._load.cache_clear()


@pytest.fixture
def matrix():
    return pack(make_weight("int4-g32", (64, 128)), DEVICE)


@pytest.fixture
def timed(monkeypatch):
    """The cut of 128 outputs is the fastest; what was measured is listed."""
    measured = []

    def measure(run, copies, **_):
        choice = run.__defaults__[0]
        measured.append(choice)
        return 1.0 if choice.config is not None and choice.config.bn == 128 else 2.0

    monkeypatch.setattr(tuning, "measure", measure)
    return measured


def only_file(cache):
    (path,) = (cache / "cuda").glob("*.json")
    return path


def test_the_fastest_cut_is_kept_and_found_again(cache, matrix, timed, caplog):
    with caplog.at_level(logging.INFO, logger="halve.kernels"):
        found = tuning.tune(matrix, [1, 2])
    assert {count: choice.config.bn for count, choice in found.items()} == {1: 128, 2: 128}
    assert "int4-g32 bf16 64x128 group 32 tokens 1: triton Config(" in caplog.text
    forget()
    before = len(timed)
    assert tuning.tune(matrix, [1, 2]) == found
    assert len(timed) == before
    assert tuning.chosen(matrix, 2, torch.bfloat16) == found[2]
    tuning.tune(matrix, [1], again=True)
    assert len(timed) > before


def test_a_product_runs_as_it_was_measured(cache, matrix, timed):
    tuning.tune(matrix, [4])
    x, _ = make_activations("bf16", 3, 128)
    out = project(matrix, x)
    assert tuning.chosen(matrix, 3, torch.bfloat16).config.bn == 128
    assert out.shape == (3, 64)


def test_measuring_runs_every_cut(cache, matrix):
    assert tuning.tune(matrix, [1])[1].kernel.name in ("triton", "cuda_gemv")


def test_without_measurements_the_default_runs(cache, matrix):
    choice = tuning.chosen(matrix, 5, torch.bfloat16)
    row = product_rows.runnable(matrix, 5, product_rows.cuda_device(DEVICE), torch.bfloat16)[0]
    assert row.name == ("triton" if DEVICE == "cpu" else "cuda_gemv")
    assert choice == tuning.Choice(row, product_rows.cuts(row, matrix, 5)[0])
    assert not (cache / "cuda").exists()


def test_without_measurements_torch_multiplies_many_tokens(cache, monkeypatch):
    monkeypatch.setattr(product_rows, "_library_refusal", lambda device, spec, multiple: None)
    plain, packed = (pack(make_weight(name, (64, 128)), DEVICE) for name in ("bf16", "int4-g32"))
    names = [tuning.chosen(m, n, torch.bfloat16).kernel.name for m in (plain, packed) for n in (64, 65, 128, 129)]
    assert names == ["triton", *["torch_mm"] * 3, *["triton"] * 3, "widen_torch_mm"]


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        '{"version": 1, "choices": {}}',
        '{"version": 2, "choices": {"a": {"row": "gone"}}}',
        '{"version": 2}',
    ],
)
def test_a_file_that_is_not_ours_is_measured_anew(cache, matrix, timed, content, caplog):
    path = tuning.cache_file(matrix.codes.device)
    path.parent.mkdir()
    path.write_text(content)
    assert tuning.tune(matrix, [1])[1].config.bn == 128
    assert "measured anew" in caplog.text
    assert json.loads(path.read_text())["version"] == tuning.FILE_VERSION
    assert only_file(cache) == path


def test_the_cache_can_be_off(monkeypatch, matrix, timed):
    monkeypatch.setenv("HALVE_CACHE", "off")
    forget()
    assert tuning.cache_file(matrix.codes.device) is None
    assert tuning.tune(matrix, [1])[1].config.bn == 128


def test_the_users_cache_is_the_standards(monkeypatch, tmp_path):
    monkeypatch.delenv("HALVE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_file(torch.device(DEVICE)).is_relative_to(tmp_path / "halve" / "cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file(torch.device(DEVICE)).is_relative_to(tmp_path / ".cache" / "halve")


def test_a_cache_that_can_not_be_written_is_said(monkeypatch, tmp_path, matrix, timed, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALVE_CACHE", str(tmp_path / "file"))
    forget()
    tuning.tune(matrix, [1])
    assert "can't be kept" in caplog.text


def test_a_cut_that_needs_too_much_memory_is_passed_over(cache, matrix, monkeypatch):
    def measure(run, copies, **_):
        if run.__defaults__[0].config.bn == 128:
            return 3.0
        raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(tuning, "measure", measure)
    assert tuning.tune(matrix, [1])[1].config.bn == 128


def test_a_device_that_no_cut_fits_is_named(cache, matrix, monkeypatch):
    def measure(run, copies, **_):
        raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(tuning, "measure", measure)
    with pytest.raises(KernelError, match="no cut of int4-g32 bf16 64x128"):
        tuning.tune(matrix, [1])


def test_a_device_without_a_row_is_named(cache, matrix, monkeypatch):
    row = Kernel(name="none", op="project", refusal=lambda device, spec: "not today", run=print)
    monkeypatch.setattr(product_rows, "TABLE", [row])
    monkeypatch.setattr(tuning, "TABLE", [row])
    with pytest.raises(KernelError, match=r"no kernel multiplies int4-g32 .*not today"):
        tuning.chosen(matrix, 1, torch.bfloat16)


def test_nothing_is_measured_inside_a_capture(monkeypatch, matrix):
    class OnDevice:
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelError, match="inside a graph's capture"):
        tuning.tune(replace(matrix, codes=OnDevice()), [1])


@pytest.mark.parametrize(("count", "counted"), [(0, 1), (1, 1), (3, 4), (64, 64), (65, 128), (10**6, 16384)])
def test_tokens_are_classed_by_the_next_power_of_two(count, counted):
    assert configs.token_class(count) == counted


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scaled or n == "bf16"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_every_cut_suits_its_matrix(name, tokens):
    for activations in ("bf16", {"int8": "int8", "fp8": "fp8"}.get(name, "bf16")):
        matrix = pack(make_weight(name, (8, 128)), DEVICE, activations=activations)
        found = configs.candidates(matrix, tokens)
        assert found[0] == configs.default(matrix, tokens)
        assert all(configs.shared_memory(matrix, c) <= 227 << 10 for c in found)
        assert all(not matrix.group_size or c.cols <= matrix.group_size for c in found)
