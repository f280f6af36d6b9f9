"""Matrices in the layout that the CUDA kernels read, made once from a file's rows, on the device.

Codes that must become bf16 before a product lie in cells of 16 bits, 16 / w fields of w bits each, lowest first. Field
f of the 32 neighbouring cells of a chunk are the 32 inputs from 32 * f on of the 16 / w * 32 inputs of that chunk, so
that a kernel that takes one field of 32 cells gets 32 neighbouring inputs of one group (groups have 32 inputs at
least), without moving anything between threads, and two cells of a register become two bf16 at once. A row of cells
is contiguous: threads load 16 bytes each. Integers are offset to unsigned; int8 and fp8 stay as they are (w = 8).
A width that is no power of two is split in planes of cells: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2; a row holds all chunks of
the low plane, then all of the high one. Rows are padded with code 0 to whole chunks of the narrowest plane.

Codes that meet activations of their own kind (int8 with int8, fp8 with fp8), and bf16, keep their natural layout
[out, in], which tensor cores read as it is. Scales are stored [groups, out]: the rows of a tile read
theirs side by side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halve.core.errors import KernelError
from halve.formats import FORMATS, Format, Weight
from halve.formats.base import Array
from halve.kernels.cuda.upload import unpacked, upload
from halve.kernels.cuda.workspace import workspace

ACTIVATIONS = ("bf16", "int8", "fp8")
COLUMNS = 32  # cells of a chunk, inputs of a field of it
CELL_BITS = 16
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # bits of a code -> of its planes, low one first
BLOCK = 128  # rows and columns under one scale of block-scaled fp8


@dataclass(frozen=True, eq=False)
class CudaMatrix:
    """A matrix [out, in], or [experts, out, in], as the kernels read it.

    activations: what it is multiplied with, "bf16", "int8" (integer weights) or "fp8" (fp8 weights).
    codes: [.., out, in] in bf16, int8 or fp8, or int16 [.., out, cells] (see the module). scale: [.., groups, out] in
    bf16 or float32, one group for one scale a row; None for plain floats. group_size: inputs under one scale, 0 for
    whole rows. bias: float32 [.., out] or None.
    """

    format: Format
    shape: tuple[int, ...]
    activations: str
    codes: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    group_size: int = 0

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.shape[-1]

    @property
    def num_experts(self) -> int:
        """Matrices stacked in this one; 0 for a plain matrix."""
        return self.shape[0] if len(self.shape) == 3 else 0

    @property
    def in_cells(self) -> bool:
        """Whether the codes lie in cells."""
        return self.codes.dtype == torch.int16

    @property
    def size_bytes(self) -> int:
        """Bytes of codes and scales, padding included: what a product of few tokens reads."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale) if t is not None)


def pack(
    weight: Weight, device: str | torch.device, *, activations: str = "bf16", bias: Array | None = None
) -> CudaMatrix:
    """Bring a stored matrix [out, in] or [experts, out, in] to the device; what its bits mean does not change.

    fp32 and fp16 become bf16, which is the one rounding here. bias: float [.., out]. Raises KernelError for activations
    that the format does not meet.
    """
    fmt = weight.format
    if reason := activations_refusal(fmt, activations):
        raise KernelError(f"{fmt.name} with activations {activations!r}: {reason}")
    if len(weight.shape) not in (2, 3) or 0 in weight.shape:
        raise KernelError(f"a product needs a matrix [out, in] or [experts, out, in], got shape {weight.shape}")
    where = torch.device(device)
    workspace(where)
    if activations != "bf16" or not fmt.scaled:
        codes = upload(weight.codes, where)
        codes = codes if fmt.scaled else codes.to(torch.bfloat16)
    elif fmt.kind == "int":
        stored = upload(weight.codes, where)
        codes = to_cells(stored if fmt.bits == 8 else unpacked(stored, fmt.bits, weight.shape[-1]), fmt.bits)
    else:
        codes = to_cells(upload(weight.codes, where).view(torch.int8), 8)
    scale = None if weight.scale is None else upload(weight.scale, where)
    return CudaMatrix(
        format=fmt,
        shape=weight.shape,
        activations=activations,
        codes=codes,
        scale=None if scale is None else _scale_for_kernels(scale, activations),
        bias=None if bias is None else torch.from_numpy(np.asarray(bias, np.float32).copy()).to(where),
        group_size=fmt.group_size or 0,
    )


def pack_fp8(codes: Tensor, scale: Tensor, *, activations: str = "fp8", bias: Tensor | None = None) -> CudaMatrix:
    """A matrix from fp8 e4m3 codes [out, in] and float32 scales, all on the device.

    scale: [] for the whole matrix, [out] for rows, or [ceil(out / 128), ceil(in / 128)] for blocks of 128 x 128, as
    block-scaled checkpoints store it (weight_scale_inv). Raises KernelError for another shape.
    """
    workspace(codes.device)
    out_features, in_features = codes.shape
    blocks = (math.ceil(out_features / BLOCK), math.ceil(in_features / BLOCK))
    group = 0
    if scale.numel() == 1:
        expanded = scale.reshape(1, 1).expand(1, out_features)
    elif scale.shape == (out_features,):
        expanded = scale[None]
    elif scale.shape == blocks:
        expanded, group = scale.repeat_interleave(BLOCK, dim=0)[:out_features].T, BLOCK
    else:
        raise KernelError(
            f"fp8 scales {tuple(scale.shape)} of a matrix {tuple(codes.shape)}: expected one, "
            f"[{out_features}] or {list(blocks)}"
        )
    return CudaMatrix(
        format=FORMATS["fp8"],
        shape=(out_features, in_features),
        activations=activations,
        codes=codes.contiguous() if activations == "fp8" else to_cells(codes.view(torch.int8), 8),
        scale=expanded.float().contiguous(),
        bias=bias,
        group_size=group,
    )


def concatenate(matrices: Sequence[CudaMatrix]) -> CudaMatrix:
    """One matrix whose outputs are those of all, in order (q, k and v; gate and up).

    Raises KernelError for matrices of different formats, inputs, activations or experts.
    """
    alike = {(m.format.name, m.shape[:-2], m.in_features, m.activations, m.group_size) for m in matrices}
    if len(alike) != 1:
        raise KernelError(f"matrices of one product must share format, inputs and activations, got {sorted(alike)}")
    first = matrices[0]
    scales = [m.scale for m in matrices if m.scale is not None]
    if any(s.dtype != scales[0].dtype for s in scales):
        scales = [s.float() for s in scales]
    biases = None
    if any(m.bias is not None for m in matrices):
        zeros = (torch.zeros(m.out_features, device=m.codes.device) for m in matrices)
        biases = torch.cat([z if m.bias is None else m.bias for m, z in zip(matrices, zeros, strict=True)])
    return CudaMatrix(
        format=first.format,
        shape=(*first.shape[:-2], sum(m.out_features for m in matrices), first.in_features),
        activations=first.activations,
        codes=torch.cat([m.codes for m in matrices], dim=-2),
        scale=torch.cat(scales, dim=-1) if scales else None,
        bias=biases,
        group_size=first.group_size,
    )


def activations_refusal(fmt: Format, activations: str) -> str | None:
    """Why weights of a format can't meet activations of a kind, or None."""
    if activations not in ACTIVATIONS:
        return f"activations are one of {list(ACTIVATIONS)}"
    if activations == "int8" and not (fmt.kind == "int" and fmt.bits == 8):
        return "int8 activations meet int8 weights; use bf16"
    if activations == "fp8" and fmt.name != "fp8":
        return "fp8 activations meet fp8 weights; use bf16"
    return None


def to_cells(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [.., n] in cells, int16 [.., cells]; see the module. Codes of 8 bits are taken as bytes."""
    planes = PLANES[bits]
    chunk = COLUMNS * CELL_BITS // planes[-1]
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % chunk)).to(torch.int32)
    rest = padded & 255 if bits == 8 else padded + (1 << (bits - 1))
    parts = []
    for width in planes:
        fields = (rest & ((1 << width) - 1)).view(*rest.shape[:-1], -1, CELL_BITS // width, COLUMNS)
        cells = fields[..., 0, :].clone()
        for f in range(1, CELL_BITS // width):
            cells |= fields[..., f, :] << (f * width)
        parts.append(torch.where(cells >= 1 << 15, cells - (1 << 16), cells).to(torch.int16).flatten(-2))
        rest = rest >> width
    return torch.cat(parts, dim=-1)


def _scale_for_kernels(scale: Tensor, activations: str) -> Tensor:
    """Scales [.., out, groups] as [.., groups, out]: bf16 stays for bf16 activations, all else is float32, exactly."""
    exact = scale if scale.dtype == torch.bfloat16 and activations == "bf16" else scale.float()
    return exact.transpose(-1, -2).contiguous()
