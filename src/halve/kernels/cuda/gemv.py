"""Products of at most 8 tokens by `gemv.cu`, which reads every weight once, as fast as memory gives it.

Each cut is compiled at its first use (`nvrtc.py`) and launched through the driver. Inside a graph's capture launches
are programmatic: a product fetches its first weights while the kernel before it ends. Outside one, where that kernel
may still be writing these weights, they are not; so a graph must not write weights that it multiplies.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halve.hardware import Device
from halve.kernels.cuda import ahead, configs, driver, launching, nvrtc
from halve.kernels.cuda.configs import Config, inputs_a_step
from halve.kernels.cuda.launching import Activations
from halve.kernels.cuda.packing import CELL_BITS, COLUMNS, PLANES, CudaMatrix
from halve.kernels.cuda.workspace import num_sms
from halve.kernels.cuda.workspace import shared_bytes as device_shared_bytes
from halve.kernels.dispatch import Spec

SOURCES = [Path(__file__).with_name(name) for name in ("gemv_machine.cuh", "gemv.cu")]
MAX_TOKENS = 8
ROWS = 16  # of a tile of the tensor cores
CELL_ROW_BYTES = 64  # of one row in a step
MOST_OF_PLANES = 2  # tokens, up to which those that meet codes of 4 bits are made two columns of bytes
BYTE_INPUTS = 64  # of a step whose operands are both bytes
ALIGNMENT = 16  # bytes, of the tokens that a thread reads at once
KINDS = {"bf16": 2, "int8": 3, "fp8": 4}  # of matrices whose numbers are multiplied as they lie, by activations


def refusal(device: Device, spec: Spec) -> str | None:
    """Why the row does not run a product here, or None."""
    if device.kind != "cuda" or "sm_80" not in device.features:
        return "needs a CUDA device of sm_80 or later"
    if spec.activations == "fp8" and "sm_89" not in device.features:
        return "needs sm_89 or later for fp8 activations"
    if spec.activations != "bf16" and spec.format is not None and (spec.format.group_size or 0) % BYTE_INPUTS:
        return f"multiplies bytes in groups of {BYTE_INPUTS} inputs or more, not {spec.format.group_size}"
    if spec.format is not None and spec.format.scaled and len(PLANES[spec.format.bits]) > 1:
        return f"does not read codes of {spec.format.bits} bits, which lie in two planes"
    if spec.num_tokens is not None and spec.num_tokens > MAX_TOKENS:
        return f"takes {MAX_TOKENS} tokens at most, not {spec.num_tokens}"
    inputs = COLUMNS
    if spec.activations != "bf16":
        inputs = BYTE_INPUTS
    elif spec.format is not None and spec.format.scaled:
        inputs *= CELL_BITS // spec.format.bits
    for name, size, multiple in (("out_features", spec.out_features, ROWS), ("in_features", spec.in_features, inputs)):
        if size is not None and size % multiple:
            return f"needs {name} in multiples of {multiple}, not {size}"
    return nvrtc.refusal(max(int(f[3:]) for f in device.features if f.startswith("sm_")))


def cut(tall: int, warps: int, ring: int, blocks: int = 1, programs: int = 0) -> Config:
    """A cut: tiles of 16 * tall outputs, `ring` steps of every warp in flight, `blocks` programs on a multiprocessor.

    programs: for each multiprocessor, which share the tiles; 0 for one a tile.
    """
    return Config(
        bt=MAX_TOKENS, bn=ROWS * tall, cols=COLUMNS, warps=warps, stages=ring, blocks=blocks, programs_a_sm=programs
    )


OTHERS = (
    cut(2, 16, 4),
    cut(2, 8, 4, 2),
    cut(1, 8, 8),
    cut(2, 8, 6),
    cut(1, 4, 8, 4),
    cut(2, 16, 3, 1, 1),
    cut(1, 16, 4, 2, 2),
    cut(2, 16, 5),
)
OF_PLANES = tuple(cut(2, 16, ring, 1, 1) for ring in (3, 4, 5, 6))


def candidates(matrix: CudaMatrix, tokens: int) -> list[Config]:
    """What is worth trying, the default first; all divide the matrix and fit the device's shared memory.

    Defaults are the fastest on an H200, for one or two tokens inside whole steps, where the first weights arrive while
    small kernels still run: programs that share the tiles keep fetching through all of them, and tokens that become
    planes do so once for each. For more tokens they are those of a sweep of products alone. Tiles of 32 outputs that
    make more than one program for every multiprocessor overlap by themselves. Fewer programs have to bring many warps
    each, if the inputs give each warp steps enough; bytes that become bf16 in few instructions (8 bits and bf16) go
    best through many small programs.
    """
    sms, tokens = num_sms(matrix.codes.device), configs.token_class(tokens)
    steps = matrix.in_features // step_inputs(matrix)
    bits = 8 * matrix.codes.element_size() if not matrix.in_cells else matrix.format.bits
    if in_planes(matrix, tokens):
        return _fitting(matrix, tokens, (*OF_PLANES, *OTHERS))
    if tokens <= 2 and not matrix.in_cells:
        first = cut(2, 16, 3, 1, 1) if bits == 16 and matrix.out_features > 32 * sms else cut(2, 16, 4)
        if bits == 8:
            first = cut(2, 16, 3) if steps < 96 and matrix.out_features <= 32 * sms else cut(1, 16, 4, 2, 2)
    elif matrix.out_features > 32 * sms:
        first = cut(4, 8, 4) if tokens >= 8 and matrix.out_features <= 64 * sms else cut(2, 8, 4, 2)
    elif bits == 2:
        first = cut(2, 8, 6)
    elif tokens <= 2 and bits >= 8:
        first = cut(1, 16, 4, 2) if steps >= 192 else cut(1, 8, 8)
    elif steps < 96 or (tokens == 1 and matrix.group_size == 32):
        first = cut(1, 8, 8)
    else:
        first = cut(2, 16, 3 if tokens == 1 else 4)
    wished = [first, *OTHERS, cut(4, 8, 4) if tokens > 2 else first]
    if bits >= 8:
        wished.append(cut(1, 16, 4, 2))  # of which fewer bits need more registers than there are
    return _fitting(matrix, tokens, wished)


def _fitting(matrix: CudaMatrix, tokens: int, wished: Sequence[Config]) -> list[Config]:
    """Cuts that divide a matrix and fit the device's shared memory."""
    limit = device_shared_bytes(matrix.codes.device)
    return [
        c
        for c in dict.fromkeys(wished)
        if matrix.out_features % c.bn == 0
        and shared_bytes(matrix, macros(matrix, tokens, c, wide=False, add=False)) <= limit
    ]


def macros(
    matrix: CudaMatrix, tokens: int, config: Config, *, wide: bool, add: bool, norm: bool = False
) -> dict[str, int]:
    """What `gemv.cu` is compiled for. tokens: rounded up to 1, 2, 4 or 8."""
    return {
        "KIND": KINDS[matrix.activations] if not matrix.in_cells else 1 if matrix.format.kind == "float" else 0,
        "BITS": matrix.format.bits if matrix.in_cells else 8 * matrix.codes.element_size(),
        "GROUP": matrix.group_size,
        "SCALES": 0 if matrix.scale is None else matrix.scale.element_size(),
        "TOKENS": configs.token_class(tokens),
        "TALL": config.bn // ROWS,
        "WARPS": config.warps,
        "RING": config.stages,
        "BLOCKS": config.blocks,
        "PLANES": int(in_planes(matrix, tokens)),
        "NORM": int(norm),
        "WIDE": int(wide),
        "HAS_BIAS": int(matrix.bias is not None),
        "HAS_ADD": int(add),
    }


def in_planes(matrix: CudaMatrix, tokens: int) -> bool:
    """Whether so many tokens are made columns of bytes for codes of 4 bits."""
    return matrix.in_cells and matrix.format.kind == "int" and matrix.format.bits == 4 and tokens <= MOST_OF_PLANES


def takes_norm(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None) -> bool:
    """Whether `launch` norms tokens itself."""
    return in_planes(matrix, len(x.values)) and _suits(matrix, x.values, out, add)


def step_inputs(matrix: CudaMatrix) -> int:
    """Inputs of one row in a step of a warp."""
    return BYTE_INPUTS if matrix.activations != "bf16" else inputs_a_step(matrix, COLUMNS)


def shared_bytes(matrix: CudaMatrix, fixed: dict[str, int]) -> int:
    """Shared memory of one program: the rings, two buffers of sums, and tokens as planes with scales and sums."""
    inputs, tokens = step_inputs(matrix), fixed["TOKENS"]
    groups = 0 if not fixed["GROUP"] else max(1, inputs // fixed["GROUP"])
    step = fixed["TALL"] * (ROWS * CELL_ROW_BYTES + groups * ROWS * fixed["SCALES"])
    planes = 2 * matrix.in_features + 8 * groups * matrix.in_features // inputs + 4 * fixed["WARPS"]
    return (
        fixed["WARPS"] * (fixed["RING"] * step + 2 * ROWS * fixed["TALL"] * tokens * 4)
        + fixed["PLANES"] * tokens * planes
    )


def launch(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None, config: Config) -> None:
    """Run `gemv`. Tokens that do not begin on a multiple of 16 bytes, and other types of numbers, go to Triton."""
    values = x.values
    if not _suits(matrix, values, out, add):
        launching.launch(matrix, x, out, add, configs.default(matrix, len(values)))
        return
    device = values.device
    wide, norm = out.dtype == torch.float32, x.norm is not None
    fixed = macros(matrix, len(values), config, wide=wide, add=add is not None, norm=norm)
    shared = shared_bytes(matrix, fixed)
    with torch.cuda.device(device), driver.context(device.index):
        driver.launch(
            _functions(device.index, tuple(fixed.items()), shared),
            _programs(matrix, config),
            config.warps * 32,
            shared,
            torch.cuda.current_stream(device).cuda_stream,
            _parameters(matrix, x, out, add),
            ahead=torch.cuda.is_current_stream_capturing() and ahead.programmatic(device),
        )


def warm(matrix: CudaMatrix, x: Activations, out: Tensor, config: Config) -> None:
    """Compile what `launch` would run, without running it; safe in threads."""
    fixed = macros(matrix, len(x.values), config, wide=out.dtype == torch.float32, add=False)
    _binary(tuple(fixed.items()), torch.cuda.get_device_capability(out.device))


def _programs(matrix: CudaMatrix, config: Config) -> int:
    tiles = matrix.out_features // config.bn
    return min(tiles, config.programs_a_sm * num_sms(matrix.codes.device)) if config.programs_a_sm else tiles


def _suits(matrix: CudaMatrix, values: Tensor, out: Tensor, add: Tensor | None) -> bool:
    """Whether operands are as the kernel reads and writes them."""
    aligned = values.data_ptr() % ALIGNMENT == 0 and values.stride(0) * values.element_size() % ALIGNMENT == 0
    types = out.dtype in (torch.bfloat16, torch.float32) and (add is None or add.dtype == torch.bfloat16)
    return types and aligned and values.device == out.device == matrix.codes.device


def _parameters(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None) -> list[Any]:
    """What `gemv` takes, in its order."""
    values = x.values
    gain = None if x.norm is None else x.norm.gain
    pointers = (matrix.codes, matrix.scale, matrix.bias, values, x.scale, gain, add, out)
    sizes = (len(values), matrix.out_features, matrix.in_features)
    code_row = matrix.codes.stride(-2) * matrix.codes.element_size()
    strides = (code_row, values.stride(0), 0 if add is None else add.stride(0), out.stride(0))
    return [
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in pointers),
        *(ctypes.c_int(n) for n in sizes),
        *(ctypes.c_longlong(n) for n in strides),
        ctypes.c_float(0.0 if x.norm is None else x.norm.eps),
    ]


@cache
def _source() -> bytes:
    return b"".join(path.read_bytes() for path in SOURCES)


def _binary(fixed: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    options = tuple(f"-D{name}={value}" for name, value in fixed)
    return nvrtc.compiled(_source(), "gemv.cu", options, capability[0] * 10 + capability[1])


def _load(device: int, fixed: tuple[tuple[str, int], ...], shared: int) -> ctypes.c_void_p:
    """The kernel in the current context, the device's."""
    return driver.load(_binary(fixed, torch.cuda.get_device_capability(device)), "gemv", shared)


_functions = nvrtc.Once(_load)
