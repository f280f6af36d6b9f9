"""Experts that a file holds stacked, all of a layer in one tensor, as one matrix each.

| in the file, for a block P of E experts             | here, for expert e                                       |
|-----------------------------------------------------|----------------------------------------------------------|
| P.gate_up_proj [E, H, 2 I]                          | P.e.gate_proj.weight and P.e.up_proj.weight [I, H]       |
| P.down_proj [E, I, H]                               | P.e.down_proj.weight [H, I]                              |
| P.gate_up_proj_bias [E, 2 I], P.down_proj_bias      | P.e.gate_proj.bias, P.e.up_proj.bias, P.e.down_proj.bias |
| P.gate_up_proj_blocks U8 [E, 2 I, H / 32, 16] and   | the three tensors of `int5-g32`, pack-quantized, of      |
| P.gate_up_proj_scales U8 [E, 2 I, H / 32], and down | gate_proj, up_proj and down_proj                         |

MXFP4 is read without loss: its numbers are 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign, times 2^(scale - 127) for each 32
inputs; twice these numbers are whole and fit 5 bits, and half of the scale is a power of two, exact in bf16.
Sources: OCP Microscaling Formats 1.0; transformers' gpt-oss, whose gates and ups alternate, and Llama 4, whose gates
come before all ups.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halve.checkpoint.files import AGAIN, shown
from halve.checkpoint.quantization_config import Layout, Stored
from halve.checkpoint.safetensors import TensorInfo, TensorReader
from halve.core.errors import CheckpointError
from halve.formats import FORMATS, pack_codes
from halve.formats.base import BF16

Array = np.ndarray[Any, np.dtype[Any]]

ALTERNATING: Mapping[str, bool] = {"GptOssForCausalLM": True, "Llama4ForCausalLM": False}  # gates and ups, by family
MXFP4 = FORMATS["int5-g32"]  # what it is read as
GROUP = 32  # inputs of one scale
DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # by code, sign in the last bit
# Of scales over numbers that are not zero: half of 2^(scale - 127) is a normal bf16, and no number is beyond float32.
SMALLEST, LARGEST = 2, 251
STACKED = re.compile(r"(?P<block>.+\.experts)\.(?P<leaf>gate_up_proj|down_proj)(?P<part>|_bias|_blocks|_scales)")


@dataclass(frozen=True, slots=True)
class Part:
    """One expert's part of a stacked tensor. rows: of its outputs."""

    leaf: str  # the tensor's name without _bias, _blocks or _scales
    kind: str  # weight, bias, weight_packed, weight_scale or weight_shape
    expert: int
    rows: slice
    shape: tuple[int, int]  # of the matrix


def mxfp4_layout(raw: Mapping[str, Any], architecture: str | None) -> Layout:
    """Where the matrices of a checkpoint lie whose quantization_config says mxfp4.

    Raises CheckpointError for families whose experts are not stored so, and keys that change what weights mean.
    """
    if architecture != "GptOssForCausalLM":
        raise CheckpointError(
            f"config.json: quantization_config: mxfp4 is read for GptOssForCausalLM, not {shown(architecture)}; give "
            "the original model"
        )
    if unknown := sorted(raw.keys() - {"quant_method", "modules_to_not_convert", "dequantize"}):
        raise CheckpointError(f"config.json: quantization_config: unknown keys {unknown} for mxfp4")
    stored = Stored(MXFP4, "pack-quantized")
    return Layout(((r"re:.*\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$", stored),))


class StackedReader(TensorReader):
    """A reader that shows each expert's part of stacked tensors under a name of its own; other tensors as they are.

    Raises CheckpointError as `TensorReader` does, and for stacked tensors whose shapes do not fit each other.
    """

    def __init__(self, directory: Path, *, alternating: bool) -> None:
        super().__init__(directory)
        self.alternating = alternating
        self._parts: dict[str, Part] = {}
        self._hidden: set[str] = set()
        for name in tuple(self._entries):
            if (match := STACKED.fullmatch(name)) is not None:
                self._unstack(name, match)
        self.names = tuple(sorted((self._entries.keys() - self._hidden) | self._parts.keys()))

    def _unstack(self, name: str, match: re.Match[str]) -> None:
        info, part = super().info(name), match["part"]
        rank = {"": 3, "_bias": 2, "_blocks": 4, "_scales": 3}[part]
        if len(info.shape) != rank or 0 in info.shape:
            raise CheckpointError(
                f"{self.directory}: {name}: shape {list(info.shape)}; stacked experts have {rank} sizes"
            )
        self._hidden.add(name)
        if part == "_scales":
            self._check_scales(name, info)
            return
        outputs = info.shape[2] if part == "" else info.shape[1]
        inputs = info.shape[1] if part == "" else 0
        if part == "_blocks":
            inputs = info.shape[2] * GROUP
            self._check_blocks(name, info)
        leaves = ("gate_proj", "up_proj") if match["leaf"] == "gate_up_proj" else ("down_proj",)
        if outputs % len(leaves):
            raise CheckpointError(f"{self.directory}: {name}: {outputs} outputs are not as many gates as ups; {AGAIN}")
        kinds = {"": ("weight",), "_bias": ("bias",)}.get(part, ("weight_packed", "weight_scale", "weight_shape"))
        for i, leaf in enumerate(leaves):
            each = outputs // len(leaves)
            rows = slice(i, None, len(leaves)) if self.alternating else slice(i * each, (i + 1) * each)
            for e in range(info.shape[0]):
                for kind in kinds:
                    stacked = f"{match['block']}.{match['leaf']}"
                    self._parts[f"{match['block']}.{e}.{leaf}.{kind}"] = Part(stacked, kind, e, rows, (each, inputs))

    def _check_blocks(self, name: str, info: TensorInfo) -> None:
        scales = name.removesuffix("_blocks") + "_scales"
        if info.dtype != "U8" or info.shape[3] != GROUP // 2:
            raise CheckpointError(
                f"{self.directory}: {name}: {info.dtype} {list(info.shape)}; blocks of mxfp4 are U8 with {GROUP // 2} "
                f"bytes for {GROUP} numbers"
            )
        if scales not in self._entries:
            raise CheckpointError(f"{self.directory}: {scales} is missing, beside {name}; {AGAIN}")
        found = super().info(scales)
        if found.dtype != "U8" or found.shape != info.shape[:3]:
            raise CheckpointError(
                f"{self.directory}: {scales}: {found.dtype} {list(found.shape)}; the blocks beside it need U8 "
                f"{list(info.shape[:3])}"
            )

    def _check_scales(self, name: str, info: TensorInfo) -> None:
        if name.removesuffix("_scales") + "_blocks" not in self._entries:
            raise CheckpointError(f"{self.directory}: {name} {list(info.shape)} has no blocks beside it; {AGAIN}")

    def __contains__(self, name: object) -> bool:
        return name in self._parts or (name not in self._hidden and super().__contains__(name))

    def info(self, name: str) -> TensorInfo:
        """As `TensorReader.info`, of an expert's part too."""
        part = self._parts.get(name)
        if part is None:
            return super().info(name)
        rows, width = part.shape
        if part.kind in ("weight", "bias"):
            stored = super().info(part.leaf + ("_bias" if part.kind == "bias" else ""))
            return TensorInfo(name, stored.dtype, part.shape if part.kind == "weight" else (rows,), stored.file)
        file = super().info(f"{part.leaf}_blocks").file
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (rows, width * MXFP4.bits // 32)),
            "weight_scale": ("BF16", (rows, width // GROUP)),
            "weight_shape": ("I64", (2,)),
        }
        dtype, shape = shapes[part.kind]
        return TensorInfo(name, dtype, shape, file)

    def read(self, name: str) -> Array:
        """As `TensorReader.read`; an expert's part is a copy.

        Raises CheckpointError for a scale of mxfp4 that is no number or can't be run.
        """
        part = self._parts.get(name)
        if part is None:
            return super().read(name)
        if part.kind == "weight":
            return np.ascontiguousarray(super().read(part.leaf)[part.expert, :, part.rows].T)
        if part.kind == "bias":
            return np.ascontiguousarray(super().read(f"{part.leaf}_bias")[part.expert, part.rows])
        if part.kind == "weight_shape":
            return np.array(part.shape, np.int64)
        blocks = super().read(f"{part.leaf}_blocks")[part.expert, part.rows]
        if part.kind == "weight_scale":
            return self._scales(f"{part.leaf}_scales", part, blocks)
        codes = np.empty((*blocks.shape, 2), np.int8)
        codes[..., 0], codes[..., 1] = DOUBLED[blocks & 15], DOUBLED[blocks >> 4]
        return pack_codes(codes.reshape(part.shape), MXFP4.bits).view(np.int32)

    def _scales(self, name: str, part: Part, blocks: Array) -> Array:
        """Half of each group's scale, bf16; 0 where all its numbers are zero."""
        stored = super().read(name)[part.expert, part.rows]
        used = (blocks & 0x77).any(axis=2)  # all but signs
        wrong = np.argwhere(used & ((stored < SMALLEST) | (stored > LARGEST)) | (stored == 255))
        if len(wrong):
            row, group = (int(i) for i in wrong[0])
            value = int(stored[row, group])
            row = range(*part.rows.indices(super().info(name).shape[1]))[row]
            what = "no number" if value == 255 else f"2^{value - 127}"
            raise CheckpointError(
                f"{self.directory}: {name}: {value} at [{part.expert}, {row}, {group}] stands for {what}; scales of "
                f"mxfp4 that are run are {SMALLEST} to {LARGEST} (2^{SMALLEST - 127} to 2^{LARGEST - 127}); {AGAIN}"
            )
        exact = np.ldexp(np.float32(1), stored.astype(np.int32) - 128, dtype=np.float32)
        halved: Array = np.where(used, exact, np.float32(0)).astype(BF16)
        return halved

    def close(self) -> None:
        """As `TensorReader.close`."""
        super().close()
        self._parts, self._hidden = {}, set()
