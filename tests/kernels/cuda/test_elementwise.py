"""Norms, gated units, rounding and gathers on CUDA against float64 and the definition of int8 rows."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from halve.core.errors import KernelError
from halve.formats.activations import int8_rows
from halve.kernels.cuda import elementwise
from halve.kernels.cuda.elementwise import Activations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["bf16", "int8", "fp8"]
WIDTHS = [1, 48, 1000]
ROUNDING = {"bf16": 2.0**-8, "int8": 1 / 254, "fp8": 2.0**-4}  # of a value (bf16, fp8), of the row's largest (int8)


def random(*shape, seed=0, dtype=torch.bfloat16):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return torch.from_numpy(values).to(dtype).to(DEVICE)


def widened(activations):
    """Float64 on the CPU."""
    values = activations.values.cpu().double()
    return values if activations.scale is None else values * activations.scale.cpu().double()[:, None]


def agree(found, expected, activations):
    """Rounding, and 2^-18 for some ten float32 operations before it. fp8 has steps of 2^-10 * scale near zero."""
    largest = expected.abs().amax(1, keepdim=True)
    step = largest if activations == "int8" else expected.abs()
    bound = step * ROUNDING[activations] + largest * (2.0**-18 + (2.0**-10 / 448 if activations == "fp8" else 0))
    assert ((widened(found) - expected).abs() <= bound).all()


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_agrees_with_float64_and_adds_to_the_stream(activations, width):
    x, stream = random(3, width), random(3, width, seed=1, dtype=torch.float32)
    gain = random(width, seed=2, dtype=torch.float32)
    total = x.cpu().double() + stream.cpu().double()
    found = elementwise.rms_norm(x, gain, 1e-5, residual=stream, activations=activations)
    expected = total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain.cpu().double()
    agree(found, expected, activations)
    torch.testing.assert_close(stream.cpu(), total.float(), rtol=2e-7, atol=2e-7)


def test_a_norm_without_a_stream_reads_rows_at_any_stride_and_rounds_a_bf16_stream():
    x = random(2, 96)[:, :40]
    gain = random(40, seed=2)
    found = elementwise.rms_norm(x, gain, 1e-6)
    wide = x.cpu().double()
    agree(found, wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * gain.cpu().double(), "bf16")
    stream = random(2, 40, seed=3)
    expected = (x.float() + stream.float()).to(torch.bfloat16)
    elementwise.rms_norm(x, gain, 1e-6, residual=stream)
    assert torch.equal(stream, expected)


@pytest.mark.parametrize("activations", FORMATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_gated_unit_agrees_with_float64(activations, width):
    gate_up = random(3, 2 * width)
    gate, up = gate_up.cpu().double().chunk(2, 1)
    agree(elementwise.silu_mul(gate_up, activations=activations), gate * gate.sigmoid() * up, activations)


def test_int8_rows_have_the_bits_of_the_definition():
    x = random(40, 333, dtype=torch.float32) * torch.logspace(-30, 30, 40, device=DEVICE)[:, None]
    x[0] = 0
    x[1, 5], x[2, 7] = float("nan"), float("-inf")
    x[3] = x[3] * 1e-37
    x[4] = torch.arange(333, device=DEVICE) - 127.5  # ties, were its largest 127
    codes, scale = int8_rows(x.cpu().numpy())
    found = elementwise.quantize(x, "int8")
    whole = ~np.isnan(scale)
    assert np.array_equal(found.scale.cpu().numpy(), scale, equal_nan=True)
    assert np.array_equal(found.values.cpu().numpy()[whole], codes[whole])


def test_fp8_rows_reach_448_and_a_broken_row_is_seen():
    x = random(4, 100, dtype=torch.float32)
    x[1, 3] = float("inf")
    x[2] = 0
    found = elementwise.quantize(x, "fp8")
    assert float(found.values.float().abs().amax()) == 448
    assert torch.equal(found.scale.isnan().cpu(), torch.tensor([False, True, False, False]))
    assert found.scale[2] == 0
    agree(Activations(found.values[[0, 3]], found.scale[[0, 3]]), x.cpu().double()[[0, 3]], "fp8")


def test_results_go_where_they_are_asked_to_and_no_rows_are_no_work():
    x = random(2, 64)
    out = Activations(torch.empty(2, 64, dtype=torch.int8, device=DEVICE), torch.empty(2, device=DEVICE))
    assert elementwise.quantize(x, "int8", out=out) is out
    assert torch.equal(out.values, elementwise.quantize(x, "int8").values)
    assert elementwise.silu_mul(random(0, 64)).values.shape == (0, 32)
    assert elementwise.rms_norm(random(0, 64), random(64), 1e-6).values.shape == (0, 64)
    assert elementwise.argmax(random(0, 64)).shape == (0,)
    assert elementwise.take_rows(x, torch.empty(0, dtype=torch.int32, device=DEVICE)).shape == (0, 64)


def test_unknown_activations_too_wide_rows_and_wrong_room_are_refused():
    with pytest.raises(KernelError, match="activations: 'fp4' has no CUDA kernels"):
        elementwise.quantize(random(1, 8), "fp4")
    with pytest.raises(KernelError, match="rows of 65537 elements are wider"):
        elementwise.quantize(random(1, 65537), "int8")
    with pytest.raises(KernelError, match=r"out: torch.bfloat16 \(1, 8\) does not hold int8"):
        elementwise.quantize(random(1, 8), "int8", out=Activations(random(1, 8), None))


def test_rows_are_taken_by_number_and_minus_one_gives_zeros():
    x = random(7, 5000)
    rows = torch.tensor([6, -1, 0, 6], dtype=torch.int32, device=DEVICE)
    found = elementwise.take_rows(x, rows)
    assert torch.equal(found[[0, 2, 3]], x[[6, 0, 6]])
    assert not found[1].any()
    wide = torch.empty(4, 5000, dtype=torch.float32, device=DEVICE)
    assert torch.equal(elementwise.take_rows(x, rows, out=wide), found.float())


@pytest.mark.parametrize("vocab", [1, 100, 4096, 9000])
def test_argmax_takes_the_lowest_of_equals(vocab):
    z = (random(3, vocab, dtype=torch.float32) * 2).round()
    assert np.array_equal(elementwise.argmax(z).cpu().numpy(), z.cpu().numpy().argmax(1))


def test_argmax_tells_broken_and_forbidden_rows():
    z = random(5, 5000)
    z[0, 3], z[1, 4999], z[2] = float("nan"), float("inf"), float("-inf")
    assert elementwise.argmax(z).tolist()[:3] == [-2, -2, -4]
