"""The format table, and `Weight`: a matrix as it is stored.

Every compressed format is symmetric: weight ~ codes * scale, codes in [-2^(b-1), 2^(b-1) - 1], one bf16 scale for
each row (`int8`, `fp8`) or for each `group_size` consecutive inputs of a row (`int4-g32`). Scales are bf16 because
its 8 significant bits are exact in float32, float16 (in range) and bf16 alike, so that a file converts without loss
to what other engines read; codes are always rounded against the scale as stored. Files written by others may hold
their scales in fp16 or fp32, and keep them: rounding a scale would change every weight of its group.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from halve.core.errors import FormatError, PlanError
from halve.core.plan import Plan
from halve.formats.integer import unpack_codes

Array = np.ndarray[Any, np.dtype[Any]]

BF16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
FP8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": BF16,
    "fp8": FP8,
}
SCALE_DTYPE = BF16  # what we write
SCALE_DTYPES = (BF16, np.dtype(np.float16), np.dtype(np.float32))  # what a weight may hold


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a matrix is stored. `group_size` None with `scaled` means one scale for each row."""

    name: str
    kind: Literal["float", "int"]
    bits: int
    scaled: bool = False
    group_size: int | None = None
    version: int = 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of a plain or 8-bit format; below 8 bits codes are packed into uint32 words."""
        if self.kind == "float":
            return FLOAT_DTYPES[self.name]
        return np.dtype(np.int8) if self.bits == 8 else np.dtype(np.uint32)

    def refusal(self, in_features: int) -> str | None:
        """Say why a row of `in_features` values can't be stored in this format, or None."""
        if self.group_size is not None and in_features % self.group_size:
            return f"group_size {self.group_size} does not divide in_features {in_features}"
        return None

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored codes of a matrix [.., out, in]."""
        if self.kind == "float" or self.bits == 8:
            return shape
        return (*shape[:-1], math.ceil(shape[-1] * self.bits / 32))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix [.., out, in]: [.., out, groups], or [.., out, 1] for one a row."""
        return (*shape[:-1], shape[-1] // self.group_size if self.group_size else 1)

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes and scales of a matrix [.., out, in], scales in bf16."""
        codes = math.prod(self.codes_shape(shape)) * self.dtype.itemsize
        return codes + (math.prod(self.scale_shape(shape)) * SCALE_DTYPE.itemsize if self.scaled else 0)

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight in a long row, scales included."""
        return self.bits + (16 / self.group_size if self.group_size else 0)


def _table() -> dict[str, Format]:
    rows = [
        Format(name="fp32", kind="float", bits=32),
        Format(name="fp16", kind="float", bits=16),
        Format(name="bf16", kind="float", bits=16),
        Format(name="fp8", kind="float", bits=8, scaled=True),
        Format(name="int8", kind="int", bits=8, scaled=True),
    ]
    for bits in (8, 6, 5, 4, 3, 2):
        groups = (32, 64) if bits == 2 else (32, 64, 128)
        rows += [Format(name=f"int{bits}-g{g}", kind="int", bits=bits, scaled=True, group_size=g) for g in groups]
    return {row.name: row for row in rows}


FORMATS: dict[str, Format] = _table()


def format_named(name: str) -> Format:
    """Look a format up. Raises FormatError that lists the known names."""
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}; known formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def formats_that_divide(in_features: Iterable[int]) -> list[str]:
    """Names of the compressed formats that fit rows of every given length."""
    widths = set(in_features)
    return [f.name for f in FORMATS.values() if f.scaled and not any(f.refusal(width) for width in widths)]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Weight:
    """A matrix as stored: codes, scales and their format.

    shape: the logical shape, [out, in] or [experts, out, in].
    codes: floats or int8 of `shape`, or uint32 words [.., out, ceil(in * bits / 32)] below 8 bits (`pack_codes`).
    scale: bf16, fp16 or fp32 [.., out, groups] ([.., out, 1] for one a row), None for plain floats.
    Raises FormatError when the arrays do not fit the format.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Array
    scale: Array | None = None

    def __post_init__(self) -> None:
        f = self.format
        if reason := f.refusal(self.shape[-1]):
            raise FormatError(f"{f.name}: {reason}")
        if self.codes.dtype != f.dtype or self.codes.shape != f.codes_shape(self.shape):
            raise FormatError(
                f"{f.name}: codes are {self.codes.dtype} {self.codes.shape}; a matrix {self.shape} "
                f"needs {f.dtype} {f.codes_shape(self.shape)}"
            )
        if f.scaled != (self.scale is not None):
            raise FormatError(f"{f.name}: {'needs' if f.scaled else 'takes no'} scale")
        if self.scale is not None and (
            self.scale.dtype not in SCALE_DTYPES or self.scale.shape != f.scale_shape(self.shape)
        ):
            raise FormatError(
                f"{f.name}: scale is {self.scale.dtype} {self.scale.shape}; a matrix {self.shape} "
                f"needs bfloat16, float16 or float32 {f.scale_shape(self.shape)}"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def unpacked_codes(self) -> Array:
        """Codes one by one: int8 of `shape` for integer formats, else the stored floats."""
        if self.format.kind == "int" and self.format.bits < 8:
            return unpack_codes(self.codes, self.format.bits, self.shape[-1])
        return self.codes

    def dequantize(self) -> Array:
        """What the stored bits mean, float32 of `shape`: codes * scale, exactly rounded once. The definition."""
        values = widen(self.unpacked_codes())
        if self.scale is None:
            return values
        scale = widen(self.scale)
        group = self.format.group_size or self.shape[-1]
        grouped = values.reshape(*self.shape[:-1], -1, group) * scale[..., None]
        return grouped.reshape(self.shape)


def widen(values: Array) -> Array:
    """Exact float32 of any stored element type. bf16 goes by a shift, many times faster than the cast."""
    if values.dtype == BF16:
        bits = np.ascontiguousarray(values).view(np.uint16).astype(np.uint32)
        return np.left_shift(bits, 16, out=bits).view(np.float32)
    return values.astype(np.float32)


def check(plan: Plan) -> None:
    """Refuse a plan that names unknown formats or breaks the rules of a portable bundle, with PlanError."""
    for i, rule in enumerate(plan.weights.rules):
        where = f"plan.weights.rules[{i}] ({rule.pattern!r})"
        if rule.format not in FORMATS:
            raise PlanError(f"{where}: unknown format {rule.format!r}; known formats are {', '.join(FORMATS)}")
        if rule.method is not None and not FORMATS[rule.format].scaled:
            raise PlanError(f"{where}: format {rule.format} is stored as it is and takes no method")
        if rule.method is None and FORMATS[rule.format].scaled:
            raise PlanError(f"{where}: format {rule.format} needs a method: rtn, clip or gptq")
        if rule.method == "gptq" and FORMATS[rule.format].kind != "int":
            raise PlanError(f"{where}: format {rule.format}: gptq rounds to integers; take rtn or clip")
        if plan.portable and rule.pattern == "model.embed_tokens" and FORMATS[rule.format].bits < 16:
            raise PlanError(f"{where}: other engines read embeddings in 16 bits; set portable to false or use bf16")
