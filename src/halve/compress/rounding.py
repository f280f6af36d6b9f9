"""From floats to codes and scales: R0 rounds to nearest, R1 also chooses how much of each group's range to clip.

R0 (`rtn`): scale = max|w| / ((2^b - 1) / 2), the minmax observer of compressed-tensors.
R1 (`clip`): for each group minimise sum_j e_j (w_j - code_j * scale)^2, with e_j = E[x_j^2] of input j, over a grid of
scales; then refit scale = sum(e w code) / sum(e code^2) and round again, kept where it helps. This is the diagonal of
the layer's output error; see llama.cpp's importance matrix (PR 4861) and llm-compressor's `imatrix_mse` observer.
Both round against the bf16 scale that is stored, so that a scale's own rounding costs nothing. R2 (`gptq`) begins with
R1's scales and is told in `gptq.py`.
"""

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from halve.compress.gptq import gptq
from halve.core.errors import FormatError
from halve.formats import Format, Weight, pack_codes
from halve.formats.base import BF16, FP8
from halve.kernels.ops import Array

log = logging.getLogger("halve.compress")

# Scales tried, as shares of R0's; above 1 because codes are one step longer on the negative side.
GRID = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.875, 0.85, 0.825, 0.8, 0.77, 0.74, 0.7, 0.65, 0.6, 0.5, 1.03, 1.07)
NUM_REFITS = 2
# Inputs that calibration never woke still get this share of the mean energy, so that their weights are not thrown away.
ENERGY_FLOOR = 0.01
FP16_LIMIT = 65520.0  # rounds to infinity, as all above it
FLOAT_LIMIT = 2.0**127  # an integer format's lowest code stands for up to 1.44 times the largest weight of its group
ERROR_WEIGHTS = 1 << 22  # weights whose error is summed at a time
CHUNK_WEIGHTS = 1 << 18  # weights rounded at a time: their float32 temporaries stay in the second-level cache


def round_weight(
    weight: Array, fmt: Format, method: str | None, energy: Array | None = None, hessian: Array | None = None
) -> Weight:
    """Store float32 [.., out, in] in `fmt`.

    method: `rtn`, `clip` (needs energy float [in], E[x^2] of each input), `gptq` (integers; needs hessian float
    [in, in], E[x x^T], beside it); None for plain floats.
    Raises FormatError when the format does not fit the width or the values, or one of them is not finite.
    """
    if reason := fmt.refusal(weight.shape[-1]):
        raise FormatError(f"{fmt.name}: {reason}")
    if method not in (known := methods_of(fmt)):
        words = "none" if not fmt.scaled else "rtn, clip or gptq" if "gptq" in known else "rtn or clip"
        raise FormatError(f"{fmt.name}: method {method!r}; it takes {words}")
    matrix = torch.from_numpy(np.require(weight, np.float32, ["C", "W"])).view(-1, weight.shape[-1])
    _check_values(matrix, fmt)
    if not fmt.scaled:
        return Weight(format=fmt, shape=weight.shape, codes=weight.astype(fmt.dtype))
    if method == "gptq":
        return _gptq(matrix, fmt, energy, hessian, weight.shape)
    if method == "clip":
        weights = _weights(energy, weight.shape[-1])
        choose = _fp8_rtn if fmt.kind == "float" else _clip
    else:
        weights = torch.ones(weight.shape[-1])
        choose = _fp8_rtn if fmt.kind == "float" else _rtn
    return _by_chunks(matrix, fmt, weights, choose, weight.shape)


def methods_of(fmt: Format) -> tuple[str | None, ...]:
    """The methods that round to a format."""
    if not fmt.scaled:
        return (None,)
    return ("rtn", "clip", "gptq") if fmt.kind == "int" else ("rtn", "clip")


def _gptq(matrix: Tensor, fmt: Format, energy: Array | None, hessian: Array | None, shape: tuple[int, ...]) -> Weight:
    width = matrix.shape[1]
    if hessian is None or hessian.shape != (width, width):
        raise FormatError(f"method gptq needs the second moments of {width} inputs; calibrate with them, or use clip")
    moments = torch.from_numpy(np.array(hessian, np.float32))
    if not bool(torch.isfinite(moments).all()) or bool((moments.diagonal() < 0).any()):
        raise FormatError("method gptq needs second moments that are finite, none negative; calibrate again")
    codes, scales = _rounded(matrix, fmt, _weights(energy, width), _clip)
    codes, found, damping = gptq(matrix, fmt, moments, codes, scales.float())
    if damping is None:
        log.warning("gptq: no damping made it better than clip for a matrix %s; clip's result is kept", list(shape))
    return _stored(codes, found.to(torch.bfloat16), fmt, shape)


def _check_values(matrix: Tensor, fmt: Format) -> None:
    low, high = (float(value) for value in torch.aminmax(matrix))  # NaN where any value is
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise FormatError(f"{fmt.name}: weight holds NaN or infinity; check the checkpoint before compressing it")
    if fmt.name != "fp32" and largest >= (FP16_LIMIT if fmt.name == "fp16" else FLOAT_LIMIT):
        raise FormatError(f"{fmt.name}: a weight of size {largest:g} is beyond its range; store this matrix as fp32")


def _weights(energy: Array | None, in_features: int) -> Tensor:
    """What each input's error counts, float32 [in]: its energy and a floor."""
    if energy is None or energy.shape != (in_features,):
        raise FormatError(f"method clip needs the energy of {in_features} inputs; calibrate first, or use rtn")
    if not (np.isfinite(energy).all() and (energy >= 0).all()):
        raise FormatError("method clip needs energies that are finite and not negative; calibrate again")
    weights = torch.from_numpy(np.array(energy, np.float32))
    return weights + ENERGY_FLOOR * weights.mean()


Rounder = Callable[[Tensor, Tensor, Format], tuple[Tensor, Tensor]]


def _by_chunks(matrix: Tensor, fmt: Format, energy: Tensor, rounder: Rounder, shape: tuple[int, ...]) -> Weight:
    return _stored(*_rounded(matrix, fmt, energy, rounder), fmt, shape)


def _rounded(matrix: Tensor, fmt: Format, energy: Tensor, rounder: Rounder) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and bf16 scales [out, groups], a few rows at a time.

    `rounder` sees [rows, groups, group] and energy [groups, group].
    """
    rows, width = matrix.shape
    group = fmt.group_size or width
    codes_dtype = torch.float8_e4m3fn if fmt.kind == "float" else torch.int8
    codes = torch.empty((rows, width), dtype=codes_dtype)
    scales = torch.empty((rows, width // group), dtype=torch.bfloat16)
    step = max(1, CHUNK_WEIGHTS // width)
    for start in range(0, rows, step):
        part = matrix[start : start + step].view(-1, width // group, group)
        part_codes, part_scales = rounder(part, energy.view(-1, group), fmt)
        codes[start : start + step] = part_codes.view(-1, width).to(codes_dtype)
        scales[start : start + step] = part_scales
    return codes, scales


def _stored(codes: Tensor, scales: Tensor, fmt: Format, shape: tuple[int, ...]) -> Weight:
    scale_shape = fmt.scale_shape(shape)
    return Weight(
        format=fmt,
        shape=shape,
        codes=_stored_codes(codes, fmt).reshape(fmt.codes_shape(shape)),
        scale=scales.view(torch.uint16).numpy().view(BF16).reshape(scale_shape),
    )


def _stored_codes(codes: Tensor, fmt: Format) -> Array:
    if fmt.kind == "float":
        return codes.view(torch.uint8).numpy().view(FP8)
    return codes.numpy() if fmt.bits == 8 else pack_codes(codes.numpy(), fmt.bits)


def _stored_scale(scale: Tensor) -> Tensor:
    """The scale as the file keeps it: bf16."""
    return scale.to(torch.bfloat16).to(torch.float32)


def _codes(part: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Nearest codes for scales [rows, groups]; a zero scale (a group of zeros) gives codes 0."""
    step = torch.where(scale > 0, scale, torch.inf)
    half = 1 << (fmt.bits - 1)
    return (part / step[..., None]).round_().clamp_(-half, half - 1)


def _rtn(part: Tensor, energy: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    scale = _stored_scale(part.abs().amax(-1) / ((2**fmt.bits - 1) / 2))
    return _codes(part, scale, fmt), scale


def _fp8_rtn(part: Tensor, energy: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """One scale a row that puts its largest value at the format's largest, 448. Source: arXiv:2209.05433."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = _stored_scale(part.abs().amax(-1) / largest)
    step = torch.where(scale > 0, scale, torch.inf)
    return (part / step[..., None]).clamp_(-largest, largest), scale


def _clip(part: Tensor, energy: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    largest = part.abs().amax(-1) / ((2**fmt.bits - 1) / 2)
    best_scale = _stored_scale(largest)
    best_codes = _codes(part, best_scale, fmt)
    best_error = _error(part, best_codes, best_scale, energy)
    for share in GRID[1:]:
        scale = _stored_scale(largest * share)
        _keep_better(part, energy, fmt, scale, best_scale, best_codes, best_error)
    weighted = part * energy
    for _ in range(NUM_REFITS):
        over = (weighted * best_codes).sum(-1)
        under = (best_codes.square() * energy).sum(-1)
        scale = _stored_scale(torch.where(under > 0, over / under, best_scale).clamp_min_(0))
        _keep_better(part, energy, fmt, scale, best_scale, best_codes, best_error)
    return best_codes, best_scale


def _keep_better(
    part: Tensor, energy: Tensor, fmt: Format, scale: Tensor, best_scale: Tensor, best_codes: Tensor, best_error: Tensor
) -> None:
    """Take `scale` in place for every group where its error is lower."""
    codes = _codes(part, scale, fmt)
    error = _error(part, codes, scale, energy)
    better = error < best_error
    best_error.copy_(torch.where(better, error, best_error))
    best_scale.copy_(torch.where(better, scale, best_scale))
    best_codes.copy_(torch.where(better[..., None], codes, best_codes))


def _error(part: Tensor, codes: Tensor, scale: Tensor, energy: Tensor) -> Tensor:
    """Energy-weighted squared error of each group."""
    return (part - codes * scale[..., None]).square_().mul_(energy).sum(-1)


def relative_error(weight: Array, stored: Weight, energy: Array | None) -> float:
    """sqrt(sum e (w - stored)^2 / sum e w^2): the output error that independent inputs of that energy would see."""
    width = weight.shape[-1]
    rows = np.asarray(weight, np.float32).reshape(-1, width)
    weights = np.ones(width) if energy is None else np.asarray(energy, np.float64)
    lost = kept = 0.0
    step = max(1, ERROR_WEIGHTS // width)  # a few rows at a time: a large table is not widened whole once more
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        difference = part - _rows_of(stored, start, start + step).dequantize()
        lost += float(np.einsum("oi,oi->i", difference, difference, dtype=np.float64) @ weights)
        kept += float(np.einsum("oi,oi->i", part, part, dtype=np.float64) @ weights)
    return (lost / kept) ** 0.5 if kept > 0 else 0.0


def _rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Some rows of a matrix; a leading expert axis is run through."""
    codes = weight.codes.reshape(-1, weight.codes.shape[-1])[start:stop]
    scale = None if weight.scale is None else weight.scale.reshape(-1, weight.scale.shape[-1])[start:stop]
    return Weight(format=weight.format, shape=(len(codes), weight.shape[-1]), codes=codes, scale=scale)
