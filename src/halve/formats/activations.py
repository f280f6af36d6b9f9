"""Activations in one byte: a scale for each row, found when the row is there (dynamic). Source: arXiv:2208.07339, 2.1;
fp8 is e4m3 of arXiv:2209.05433.
"""

import numpy as np

from halve.formats.base import FP8, Array, Format

SMALLEST_ABSMAX = np.float32(1e-36)  # below, 127 / absmax would leave float32's range: the row counts as zeros
LARGEST_FP8 = np.float32(448)


def int8_rows(x: Array) -> tuple[Array, Array]:
    """Codes int8 [T, K] and scales float32 [T] of float32 rows [T, K]; x ~ codes * scale, within scale / 2.

    scale = absmax / 127, code = x * (127 / absmax) rounded to nearest, ties to even, each operation in float32: kernels
    make the same bits. A row with NaN or infinity gets the scale NaN, so that it is seen and not lost.
    """
    absmax = np.abs(x).max(axis=1, initial=0).astype(np.float32)
    broken = ~np.isfinite(x).all(axis=1)
    some = ~broken & (absmax >= SMALLEST_ABSMAX)
    inverse = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=some)
    scale = np.where(some, absmax / np.float32(127), np.float32(0)).astype(np.float32)
    codes = np.rint(np.where(some[:, None], x, np.float32(0)) * inverse[:, None]).astype(np.int8)
    return codes, np.where(broken, np.float32(np.nan), scale)


def fp8_rows(x: Array) -> tuple[Array, Array]:
    """Codes e4m3 [T, K] and scales float32 [T] of float32 rows [T, K]; x ~ codes * scale, within 1/16 of each value.

    scale = absmax / 448, code = x * (448 / absmax) rounded to nearest, ties to even; zeros, NaN and infinity as in
    `int8_rows`. Values below 2^-10 of the scale round to 0.
    """
    absmax = np.abs(x).max(axis=1, initial=0).astype(np.float32)
    broken = ~np.isfinite(x).all(axis=1)
    some = ~broken & (absmax >= SMALLEST_ABSMAX)
    inverse = np.divide(LARGEST_FP8, absmax, out=np.zeros_like(absmax), where=some)
    scale = np.where(some, absmax / LARGEST_FP8, np.float32(0)).astype(np.float32)
    scaled = np.where(some[:, None], x, np.float32(0)) * inverse[:, None]
    codes = np.clip(scaled, -LARGEST_FP8, LARGEST_FP8).astype(FP8)  # 448 / absmax * absmax may round to above 448
    return codes, np.where(broken, np.float32(np.nan), scale)


def activations_for(weight: Format, activations: str) -> str:
    """How a plan's activations are rounded before products with a format: int8 meets integer weights, fp8 fp8 only."""
    if activations == "fp8":
        return "fp8" if weight.name == "fp8" else "fp32"
    return "fp32" if activations == "int8" and weight.kind != "int" else activations
