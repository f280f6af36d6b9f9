"""Which CUDA row runs a format, without a card, torch's or Triton's help."""

import types

import pytest
import torch

from halve.formats import FORMATS
from halve.hardware import Device, cuda_features
from halve.kernels.cuda import rows
from halve.kernels.dispatch import Spec, choose


def card(major, minor):
    features = cuda_features(major, minor)
    return Device(
        name="cuda:0", kind="cuda", model="a card", features=features, num_cores=1, memory_bytes=1, machine="cuda"
    )


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setattr(rows, "unavailable", lambda: None)


@pytest.mark.parametrize(
    ("name", "activations", "kernel"),
    [
        ("bf16", "fp32", "triton_bf16"),
        ("bf16", "int8", "triton_bf16"),
        ("int8", "int8", "triton_int8_int8"),
        ("int8", "bf16", "triton_bf16"),
        ("int4-g32", "int8", "triton_bf16"),
        ("fp8", "fp8", "triton_fp8_fp8"),
        ("fp8", "int8", "triton_bf16"),
        ("int8", "fp8", "triton_bf16"),
    ],
)
def test_weights_meet_activations_of_their_own_kind_where_the_plan_says_so(name, activations, kernel):
    spec = Spec(op="linear", format=FORMATS[name], activations=activations)
    assert choose(rows.TABLE, card(9, 0), spec).kernel.name == kernel


def test_a_card_without_fp8_is_told_what_it_lacks():
    report = {row["format"]: row for row in rows.format_report(card(8, 0), None)}
    assert report["fp8"]["kernel"] == "triton_bf16"
    assert report["fp8"]["refused"][0] == {"kernel": "triton_fp8_fp8", "reason": "needs sm_89"}
    assert report["int8"]["kernel"] == "triton_int8_int8"


def test_without_a_card_every_row_refuses_with_the_reason():
    report = rows.format_report(None, "no NVIDIA driver is installed")
    assert {row["format"] for row in report} == set(FORMATS)
    assert {r["reason"] for row in report for r in row["refused"]} == {"no NVIDIA driver is installed"}
    assert {row["kernel"] for row in report} == {None}


def test_an_old_card_another_device_and_a_missing_triton_are_refused(monkeypatch):
    spec = Spec(op="linear", format=FORMATS["bf16"])
    assert rows.TABLE[-1].refusal(card(7, 5), spec) == "needs sm_80"
    cpu = Device(name="cpu", kind="cpu", model="", features=frozenset(), num_cores=1, memory_bytes=1, machine="")
    assert rows.TABLE[-1].refusal(cpu, spec) == "needs an NVIDIA GPU"
    monkeypatch.setattr(rows, "unavailable", lambda: "no triton")
    assert rows.TABLE[-1].refusal(card(9, 0), spec) == "no triton"


def test_whether_a_device_runs_these_kernels_is_told_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert rows.refusal("cuda") == "needs sm_80, the card is sm_75"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert rows.refusal("cuda:0") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rows.refusal("cuda").startswith("torch ")
    monkeypatch.setattr(torch, "version", types.SimpleNamespace(hip="6.2"))
    assert rows.refusal("cuda") == "torch is built for ROCm"
    monkeypatch.setattr(rows, "unavailable", lambda: "no triton")
    assert rows.refusal("cuda") == "no triton"


def test_a_python_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert rows.unavailable() == "the package triton is not installed (pip install triton)"
