"""GGUF files of llama.cpp: what they say of a model, and its tensors as they are stored.

The package `gguf` parses the file and undoes its formats. What has the very bits of a format of ours keeps them, so
that the same kernels run it: F32, F16, BF16; Q8_0 is int8-g32 and Q4_0 int4-g32 with scales in fp16. All else (Q4_1,
Q5_0, the K- and IQ-formats) is undone to float32: the same numbers, but not the same bytes.
Source: ggml-quants.c of llama.cpp, block_q4_0 and block_q8_0; gguf 0.19.0, gguf_reader.py and quants.py.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from halve.checkpoint.compressed_tensors import check_finite
from halve.core.errors import CheckpointError, ConfigError
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.base import BF16, widen

Array = np.ndarray[Any, np.dtype[Any]]

MAGIC = b"GGUF"
BLOCK = 32  # weights of a block of Q4_0 and Q8_0, which share a scale
KEPT = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "Q8_0": "int8-g32", "Q4_0": "int4-g32"}


def is_gguf(path: Path) -> bool:
    """Whether a file is one of llama.cpp's, by its name or its first bytes; False for what is no file."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return path.suffix.lower() == ".gguf" or file.read(4) == MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the permissions") from error


class GGUFFile:
    """An opened GGUF file: metadata read, tensors mapped.

    Raises ConfigError where the package that parses it is not installed, CheckpointError for a file that is broken or
    cut short.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._package = _package()
        try:
            if self.path.stat().st_size < 24 or not is_gguf(self.path):
                raise CheckpointError(f"{self.path}: no GGUF file; give one that llama.cpp reads")
            reader = self._package.GGUFReader(self.path)
            self.metadata: Mapping[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}; check the permissions") from error
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as error:
            raise CheckpointError(
                f"{self.path}: a broken GGUF file ({error!s:.120}); copy or convert it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @property
    def names(self) -> frozenset[str]:
        """Names of its tensors, as llama.cpp calls them."""
        return frozenset(self._tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def type_of(self, name: str) -> str:
        """How a tensor is stored, as llama.cpp calls it: `Q4_0`."""
        return str(self._tensor(name).tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, rows first: [out, in]."""
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return int(self._tensor(name).n_bytes)

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A matrix in the format of ours that has its bits, else in float32. Raises CheckpointError."""
        self._expect(name, shape)
        kind = self.type_of(name)
        if kind not in KEPT:
            return Weight(format=FORMATS["fp32"], shape=shape, codes=self.values(name, shape))
        fmt, raw = FORMATS[KEPT[kind]], self._tensor(name).data
        if not fmt.scaled:
            codes = raw.reshape(-1).view(BF16).reshape(shape) if kind == "BF16" else raw.reshape(shape)
            codes = np.ascontiguousarray(codes)
            check_finite(f"{self.path}: {name}", codes)
            return Weight(format=fmt, shape=shape, codes=codes)
        blocks = np.ascontiguousarray(raw).view(np.uint8).reshape(shape[0], shape[1] // BLOCK, -1)
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        check_finite(f"{self.path}: {name}", scale)
        if kind == "Q8_0":
            codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(shape)
        else:  # the first half of a block lies in the low halves of its bytes
            halves = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
            codes = pack_codes((halves.astype(np.int8) - 8).reshape(shape), 4)
        return Weight(format=fmt, shape=shape, codes=codes, scale=scale)

    def values(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor as float32 of `shape`. Raises CheckpointError as `weight` does."""
        self._expect(name, shape)
        tensor = self._tensor(name)
        if self.type_of(name) == "BF16":
            values = widen(tensor.data.reshape(-1).view(BF16).reshape(shape))
        else:
            try:
                values = self._package.quants.dequantize(tensor.data, tensor.tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise CheckpointError(
                    f"{self.path}: {name}: {self.type_of(name)} can't be undone by gguf "
                    f"({error!s:.80}); convert the model to another type"
                ) from error
            values = np.ascontiguousarray(values, np.float32).reshape(shape)
        check_finite(f"{self.path}: {name}", values)
        return values

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: {name} is missing; convert the model again")
        return self._tensors[name]

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shape(name) != shape:
            raise CheckpointError(
                f"{self.path}: {name}: shape {list(self.shape(name))}; the file's own metadata asks for {list(shape)}"
            )


def _package() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ConfigError(
            "GGUF files are read by the package gguf, which is not installed; pip install 'halve[gguf]'"
        ) from error
    return gguf
