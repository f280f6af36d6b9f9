"""Compressed matrices as tensors of a file, in the layouts of compressed-tensors.

| storage         | tensors of module P, a matrix [N, K] of b bits with G scales a row                        |
|-----------------|--------------------------------------------------------------------------------------------|
| pack-quantized  | P.weight_packed I32 [N, ceil(K * b / 32)], P.weight_scale [N, G], P.weight_shape I64 [2]    |
| int-quantized   | P.weight I8 [N, K], P.weight_scale [N, G]                                                  |
| float-quantized | P.weight F8_E4M3 [N, K], P.weight_scale [N, G]                                             |
| plain           | P.weight F32, F16 or BF16                                                                  |

Words hold code + 2^(b-1), first code lowest. Our scales are BF16; those of others may be F16 or F32 and are kept.
Source: compressed-tensors 0.20.0, compressors/pack_quantized and compressors/naive_quantized.
"""

import math
from typing import Any

import numpy as np

from halve.checkpoint.files import AGAIN
from halve.checkpoint.quantization_config import (
    VERSION,
    Layout,
    Storage,
    quantization_config,
    storage_of,
)
from halve.checkpoint.safetensors import TensorReader
from halve.core.errors import CheckpointError, FormatError
from halve.formats import FORMATS, Format, Weight, pack_codes
from halve.formats.base import BF16, FP8, widen

__all__ = [
    "VERSION",
    "Layout",
    "check_finite",
    "quantization_config",
    "read_weight",
    "weight_specs",
    "weight_tensors",
]

Array = np.ndarray[Any, np.dtype[Any]]

PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # dtype word -> format
PLAIN_WORDS = {name: word for word, name in PLAIN.items()}
SCALE_WORDS = ("BF16", "F16", "F32")
SIGN = np.uint8(0x80)  # code + 128 as a byte is the code's two's complement with its sign flipped
CHECK_CHUNK = 2**18  # values; fits a core's cache

# Values with all of these bits set are NaN or infinite, and no others.
NON_FINITE: dict[np.dtype[Any], tuple[type[np.unsignedinteger[Any]], int]] = {
    BF16: (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    FP8: (np.uint8, 0x7F),
}


def weight_specs(
    module: str, fmt: Format, shape: tuple[int, ...], *, portable: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that carry a matrix: name -> (dtype word, shape). Raises FormatError where the format does not fit."""
    if not fmt.scaled:
        return {f"{module}.weight": (PLAIN_WORDS[fmt.name], shape)}
    if len(shape) != 2:
        raise FormatError(f"{module}: shape {list(shape)}: {fmt.name} is written for matrices [out, in] only; use bf16")
    if reason := fmt.refusal(shape[-1]):
        raise FormatError(f"{module}: {fmt.name}: {reason}")
    return _specs(module, fmt, shape, storage_of(fmt, portable))


def _specs(
    module: str, fmt: Format, shape: tuple[int, ...], storage: Storage
) -> dict[str, tuple[str, tuple[int, ...]]]:
    scale = {f"{module}.weight_scale": ("BF16", fmt.scale_shape(shape))}
    if storage == "pack-quantized":
        packed = ("I32", (shape[0], math.ceil(shape[1] * fmt.bits / 32)))
        return {f"{module}.weight_packed": packed, **scale, f"{module}.weight_shape": ("I64", (2,))}
    return {f"{module}.weight": ("F8_E4M3" if storage == "float-quantized" else "I8", shape), **scale}


def weight_tensors(module: str, weight: Weight, *, portable: bool) -> dict[str, Array]:
    """The tensors of `weight_specs`. Raises FormatError when the scales of another's file don't fit bf16 exactly."""
    specs = weight_specs(module, weight.format, weight.shape, portable=portable)
    if weight.scale is None:
        return {f"{module}.weight": weight.codes}
    scale = weight.scale.astype(BF16)
    if weight.scale.dtype != BF16 and not np.array_equal(widen(scale), widen(weight.scale)):
        raise FormatError(
            f"{module}: scales in {weight.scale.dtype} do not fit bf16 exactly; compress the original model instead"
        )
    tensors = {f"{module}.weight_scale": scale}
    if f"{module}.weight_shape" in specs:
        words = pack_codes(weight.codes, 8) if weight.format.bits == 8 else weight.codes
        tensors[f"{module}.weight_packed"] = words.view(np.int32)
        tensors[f"{module}.weight_shape"] = np.array(weight.shape, np.int64)
    else:
        tensors[f"{module}.weight"] = weight.codes
    return {name: tensors[name] for name in specs}


def read_weight(reader: TensorReader, module: str, layout: Layout, shape: tuple[int, ...]) -> Weight:
    """A matrix as it is stored, its codes and scales views on the file where no conversion is needed.

    shape: what the model's configuration asks for. Raises CheckpointError naming the tensor on missing tensors,
    other types or shapes, NaN, infinity, and scales of zero over codes that are not.
    """
    stored = layout.stored(module)
    if stored is None:
        return _read_plain(reader, module, shape)
    fmt, storage = stored.format, stored.storage
    if len(shape) != 2:
        raise CheckpointError(f"{module}: shape {list(shape)}: {fmt.name} is read for matrices [out, in] only")
    if reason := fmt.refusal(shape[-1]):
        raise CheckpointError(f"{module}: {fmt.name}: {reason}; config.json and weights do not belong together")
    for part in ("weight_zero_point", "weight_g_idx"):
        if f"{module}.{part}" in reader:
            raise CheckpointError(
                f"{module}.{part}: zero points and reordered columns are not supported, and config.json names neither"
            )
    tensors = {
        name.removeprefix(f"{module}."): _read_part(reader, name, spec, fmt, shape)
        for name, spec in _specs(module, fmt, shape, storage).items()
    }
    weight = Weight(format=fmt, shape=shape, codes=_codes(module, tensors, fmt, shape), scale=tensors["weight_scale"])
    check_finite(f"{module}.weight_scale", tensors["weight_scale"])
    if fmt.kind == "float":
        check_finite(f"{module}.weight", weight.codes)
    _check_scales(module, weight)
    return weight


def _read_plain(reader: TensorReader, module: str, shape: tuple[int, ...]) -> Weight:
    name = f"{module}.weight"
    if name not in reader and f"{name}_packed" in reader:
        raise CheckpointError(
            f"{name}_packed: a compressed matrix that quantization_config of config.json does not name; "
            "config.json and weights do not belong together"
        )
    info = reader.info(name)
    if info.dtype not in PLAIN:
        raise CheckpointError(
            f"{name}: {info.dtype}, and quantization_config of config.json does not name it; "
            f"plain matrices are {', '.join(PLAIN)}"
        )
    _expect_shape(name, info.shape, shape)
    codes = reader.read(name)
    check_finite(name, codes)
    return Weight(format=FORMATS[PLAIN[info.dtype]], shape=shape, codes=codes)


def _read_part(
    reader: TensorReader, name: str, spec: tuple[str, tuple[int, ...]], fmt: Format, shape: tuple[int, ...]
) -> Array:
    """One of the tensors that carry a matrix of `shape`, its type and shape checked first."""
    info = reader.info(name)
    allowed = SCALE_WORDS if name.endswith(".weight_scale") else (spec[0],)
    if info.dtype not in allowed:
        raise CheckpointError(f"{name}: {info.dtype}; {fmt.name} needs {' or '.join(allowed)}")
    if name.endswith(".weight_packed") and info.shape != spec[1]:
        padded = math.ceil(shape[1] / (32 // fmt.bits))
        if info.shape == (shape[0], padded):
            raise CheckpointError(
                f"{name}: rows of {padded} words hold {32 // fmt.bits} codes each with padding, as compressed-tensors "
                f"wrote {fmt.bits} bits before June 2026; only dense rows ({spec[1][1]} words) are read. "
                "Save the model again with compressed-tensors 0.18 or later"
            )
    _expect_shape(name, info.shape, spec[1])
    return reader.read(name)


def _codes(module: str, tensors: dict[str, Array], fmt: Format, shape: tuple[int, ...]) -> Array:
    """Codes as `Weight` holds them."""
    if "weight_packed" not in tensors:
        return tensors["weight"]
    if tuple(tensors["weight_shape"].tolist()) != shape:
        raise CheckpointError(
            f"{module}.weight_shape: holds {tensors['weight_shape'].tolist()}; the model needs {list(shape)}"
        )
    words = tensors["weight_packed"]
    if fmt.bits < 8:
        return words.view(np.uint32)
    codes: Array = np.bitwise_xor(words.view(np.uint8)[:, : shape[1]], SIGN).view(np.int8)
    return codes


def _expect_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(
            f"{name}: shape {list(found)}; the model needs {list(expected)}: "
            "config.json and weights do not belong together"
        )


def _check_scales(module: str, weight: Weight) -> None:
    """A scale of zero may stand only over zeros: anything else is a damaged file.

    Scales may be negative: AutoRound puts the number of largest magnitude at the lowest code, whatever its sign.
    """
    assert weight.scale is not None
    scale = widen(weight.scale)
    rows = np.flatnonzero((scale == 0).any(axis=-1))
    if not rows.size:
        return
    part = Weight(
        format=weight.format,
        shape=(len(rows), weight.shape[1]),
        codes=np.ascontiguousarray(weight.codes[rows]),
        scale=np.ascontiguousarray(weight.scale[rows]),
    )
    codes = widen(part.unpacked_codes()).reshape(*scale[rows].shape, -1)
    wrong = np.argwhere((scale[rows] == 0) & (codes != 0).any(axis=-1))
    if wrong.size:
        row, group = int(rows[wrong[0, 0]]), int(wrong[0, 1])
        raise CheckpointError(f"{module}.weight_scale: 0 at [{row}, {group}] over codes that aren't zero; {AGAIN}")


def check_finite(name: str, array: Array) -> None:
    """Refuse NaN and infinity with CheckpointError naming tensor and place.

    array: bf16, fp16, fp32 or fp8, looked at by its exponent bits, without conversion.
    """
    bits, mask = NON_FINITE[array.dtype]
    flat = np.ascontiguousarray(array).reshape(-1)
    values = flat.view(bits)
    for start in range(0, values.size, CHECK_CHUNK):
        found = np.bitwise_and(values[start : start + CHECK_CHUNK], bits(mask))
        if found.max() == mask:
            position = start + int(np.argmax(found == mask))
            place = [int(i) for i in np.unravel_index(position, array.shape)]
            raise CheckpointError(f"{name}: {float(flat[position])} at {place}; weights must be finite; {AGAIN}")
