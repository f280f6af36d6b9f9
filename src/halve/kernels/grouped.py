"""Products of tokens that were sorted by expert: each expert's rows with its own matrix, in one call."""

import ctypes
from collections.abc import Sequence

import numpy as np

from halve.core.errors import KernelError
from halve.kernels.native import NativeOps
from halve.kernels.native_checks import floats, int32
from halve.kernels.native_library import library
from halve.kernels.native_rows import Linear
from halve.kernels.ops import Array
from halve.kernels.products import (
    ROUNDINGS,
    ActivationsRecord,
    InputLayout,
    PrepareRecord,
    ProductRecord,
    product_record,
)


class GroupedLinears:
    """The matrices of all experts that take the same input: gate and up of each, or down of each.

    experts: for each its matrices, as many as the others' and of one shape; those of one expert in formats that take
    their input alike. Raises KernelError for others. by_layout: for each layout of inputs all experts' matrices, none
    where an expert takes another.
    """

    def __init__(self, ops: NativeOps, experts: Sequence[Sequence[Linear]]) -> None:
        if reason := ungrouped(experts):
            raise KernelError(f"{reason}; project experts one by one")
        self.ops, self.experts = ops, experts
        self.width, self.out_features = experts[0][0].layout.width, experts[0][0].matrix.out_features
        self.by_layout: dict[InputLayout, list[Sequence[Linear]]] = {}
        for e, parts in enumerate(experts):
            alike = self.by_layout.setdefault(parts[0].layout, [()] * len(experts))
            alike[e] = parts

    def __call__(self, x: Array, offsets: Array) -> list[Array]:
        """y[r] = x[r] @ expert(r).weight.T + bias for each matrix of an expert: e owns rows offsets[e]:offsets[e + 1].

        x: float32 [T, in]. offsets: int32 [experts + 1], rising from 0 to T. Returns float32 [T, out] for each. Every
        expert that has rows reads its weights once; a row's result is the bits that `ops.project` gives. Raises
        KernelError for offsets that do not fit.
        """
        ops, out_features = self.ops, self.out_features
        x = floats("x", x, (None, self.width))
        offsets = int32("offsets", offsets, (len(self.experts) + 1,))
        if offsets[0] != 0 or offsets[-1] != len(x) or (np.diff(offsets) < 0).any():
            raise KernelError(f"offsets {offsets.tolist()} must rise from 0 to the {len(x)} rows of x")
        results = [np.empty((len(x), out_features), np.float32) for _ in self.experts[0]]
        addresses = [y.ctypes.data for y in results]
        active = np.flatnonzero(np.diff(offsets)).tolist()
        records, kept, count = (ProductRecord * max(len(active), 1))(), [], 0
        for layout, experts in self.by_layout.items():
            asked = [e for e in active if experts[e]]
            if not asked:
                continue
            inputs, arrays = self._prepared(x, layout)
            kept.append(arrays)
            for e in asked:
                first, rows = int(offsets[e]), int(offsets[e + 1] - offsets[e])
                records[count] = product_record(
                    _from_row(inputs, layout, first),
                    [linear.matrix for linear in experts[e]],
                    [linear.bias for linear in experts[e]],
                    [(address + 4 * first * out_features, out_features) for address in addresses],
                    rounding=layout.rounding,
                    rows=rows,
                )
                count += 1
        library().halve_grouped(ops.isa.number, ctypes.addressof(records), count, ops.num_threads)
        del kept  # lived until here
        return results

    def _prepared(self, x: Array, layout: InputLayout) -> tuple[ActivationsRecord, list[Array]]:
        """Rows as a layout has them, and the memory that they lie in."""
        inputs, arrays = layout.allocate(max(len(x), 1))
        prepare = PrepareRecord(
            x=x.ctypes.data, out=inputs, x_stride=layout.width, width=layout.width, rounding=ROUNDINGS[layout.rounding]
        )
        library().halve_prepare(self.ops.isa.number, ctypes.addressof(prepare), len(x), self.ops.num_threads)
        return inputs, arrays


def ungrouped(experts: Sequence[Sequence[Linear]]) -> str | None:
    """Why experts' matrices can't be one grouped product, or None."""
    linears = [linear for parts in experts for linear in parts]
    shapes = {(linear.layout.width, linear.matrix.out_features) for linear in linears}
    if not linears or len(shapes) != 1 or len({len(parts) for parts in experts}) != 1:
        return "experts of one product must be there and share their shape"
    if any(len({linear.layout for linear in parts}) != 1 for parts in experts):
        return "an expert's matrices take their input in different ways"
    return None


def project_groups(ops: NativeOps, experts: Sequence[Linear], x: Array, offsets: Array) -> Array:
    """`GroupedLinears` of one matrix an expert, once."""
    return GroupedLinears(ops, [[expert] for expert in experts])(x, offsets)[0]


def _from_row(inputs: ActivationsRecord, layout: InputLayout, row: int) -> ActivationsRecord:
    """The same rows from one of them on."""
    moved = ActivationsRecord.from_buffer_copy(inputs)
    for name, row_bytes in layout.parts().items():
        setattr(moved, name, getattr(inputs, name) + row * row_bytes)
    return moved
