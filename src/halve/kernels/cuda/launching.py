"""How `gemm.product` is launched: its splits, its arguments, what it is compiled for.

Nothing here waits for the device.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halve.kernels.cuda import configs, gemm, persistent
from halve.kernels.cuda.ahead import launched
from halve.kernels.cuda.configs import Config
from halve.kernels.cuda.packing import CudaMatrix
from halve.kernels.cuda.workspace import COUNTERS, PARTIAL_ELEMENTS, num_sms, workspace

ALIGNMENT = 16  # bytes, of what the tensor memory accelerator fetches
INTERPRETED = not isinstance(gemm.product, triton.JITFunction)  # TRITON_INTERPRET=1: on the CPU, for tests


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * gain over a row; gain: float32 [K]."""

    gain: Tensor
    eps: float


@dataclass
class Activations:
    """Tokens as a product takes them: bf16 [T, K], or int8 or fp8 e4m3 [T, K] with float32 scale [T].

    norm: what becomes of bf16 tokens before they are multiplied, or None.
    """

    values: Tensor
    scale: Tensor | None = None
    norm: Norm | None = None


def splits_of(matrix: CudaMatrix, tiles: int, config: Config, device: torch.device) -> int:
    """Programs that share the inputs of each tile: enough to fill the device, no more than memory and inputs allow.

    Of large tiles only one or two fit a multiprocessor: one program too many would be a second round of all.
    """
    if not config.programs_a_sm:
        return 1
    rounds = -(-matrix.in_features // (configs.inputs_a_step(matrix, config.cols) * config.unroll))
    room = config.programs_a_sm * num_sms(device)
    fills = room // tiles if config.bt > 64 else -(-room // tiles)
    fits = PARTIAL_ELEMENTS // (tiles * config.bt * config.bn)
    splits = min(fills, fits, max(1, rounds // 2), 64) if tiles <= COUNTERS else 1
    if splits <= 1:
        return 1
    return -(-rounds // -(-rounds // splits))  # no program without work


def launch(
    matrix: CudaMatrix,
    x: Activations,
    out: Tensor,
    add: Tensor | None,
    config: Config,
    offsets: Tensor | None = None,
) -> None:
    """Run `gemm.product`. offsets: int32 [experts + 1] for a stack of matrices."""
    arguments, named, tiles, splits = _arguments(matrix, x, out, add, config, offsets)
    gemm.product[(tiles, splits)](*arguments, **named)


def launch_persistent(matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None, config: Config) -> None:
    """Run `persistent.persistent`; rows of x that do not begin on a multiple of 16 bytes go to `launch`."""
    values = x.values
    if values.data_ptr() % ALIGNMENT or values.stride(0) * values.element_size() % ALIGNMENT:
        launch(matrix, x, out, add, configs.default(matrix, len(values)))
        return
    arguments, named, programs = _persistent_arguments(matrix, x, out, add, config)
    persistent.persistent[(programs,)](*arguments, **named)


def warm_persistent(matrix: CudaMatrix, x: Activations, out: Tensor, config: Config) -> None:
    """Compile what `launch_persistent` would run, without running it; safe in threads."""
    arguments, named, programs = _persistent_arguments(matrix, x, out, None, config)
    persistent.persistent.warmup(*arguments, grid=(programs,), **named)


def _persistent_arguments(
    matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None, config: Config
) -> tuple[list[object], dict[str, object], int]:
    """What `persistent.persistent` takes, by position and by name, and its programs."""
    tiles = -(-len(x.values) // config.bt) * -(-matrix.out_features // config.bn)
    arguments: list[object] = [
        TensorDescriptor.from_tensor(x.values, [config.bt, config.cols]),
        TensorDescriptor.from_tensor(matrix.codes, [config.bn, config.cols]),
        matrix.scale,
        matrix.bias,
        x.scale,
        add,
        out,
        len(x.values),
        matrix.out_features,
        matrix.in_features,
        0 if add is None else add.stride(0),
        out.stride(0),
    ]
    named: dict[str, object] = {
        "HAS_SCALE": matrix.scale is not None,
        "HAS_BIAS": matrix.bias is not None,
        "HAS_ADD": add is not None,
        "ACT": matrix.activations,
        "BT": config.bt,
        "BN": config.bn,
        "COLS": config.cols,
        "SWIZZLE": config.swizzle,
        "FLATTEN": config.flatten,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    return arguments, named, min(tiles, num_sms(x.values.device))


def warm(matrix: CudaMatrix, x: Activations, out: Tensor, config: Config) -> None:
    """Compile what `launch` would run, without running it; safe in threads."""
    arguments, named, tiles, splits = _arguments(matrix, x, out, None, config, None)
    gemm.product.warmup(*arguments, grid=(tiles, splits), **named)


def _arguments(
    matrix: CudaMatrix, x: Activations, out: Tensor, add: Tensor | None, config: Config, offsets: Tensor | None
) -> tuple[list[object], dict[str, object], int, int]:
    """What `gemm.product` takes, by position and by name, and its grid."""
    values = x.values
    num_tokens, experts = len(values), matrix.num_experts
    tiles_t = -(-num_tokens // config.bt) + (experts if offsets is not None else 0)
    tiles = tiles_t * -(-matrix.out_features // config.bn)
    splits = 1 if offsets is not None else splits_of(matrix, tiles, config, values.device)
    work = workspace(values.device) if splits > 1 else None
    arguments: list[object] = [
        matrix.codes,
        matrix.scale,
        matrix.bias,
        values,
        x.scale,
        add,
        out,
        None if work is None else work.partial,
        None if work is None else work.counters,
        offsets,
        num_tokens,
        matrix.out_features,
        matrix.in_features,
        matrix.codes.stride(-2),
        values.stride(0),
        0 if add is None else add.stride(0),
        out.stride(0),
        tiles_t,
        splits,
        matrix.codes.stride(0) if experts else 0,
        matrix.scale.stride(0) if experts and matrix.scale is not None else 0,
    ]
    named = constants(matrix, config, splits > 1, grouped=offsets is not None, add=add is not None)
    return arguments, named, tiles, splits


def constants(matrix: CudaMatrix, config: Config, has_splits: bool, *, grouped: bool, add: bool) -> dict[str, object]:
    """What `gemm.product` is compiled for."""
    kind = "plain" if not matrix.in_cells else "fp8_cells" if matrix.format.kind == "float" else "int_cells"
    step = configs.inputs_a_step(matrix, config.cols) * config.unroll
    experts = matrix.num_experts if grouped else 0
    return {
        "KIND": kind,
        "BITS": 8 if kind != "int_cells" else matrix.format.bits,
        "GROUP": matrix.group_size,
        "HAS_SCALE": matrix.scale is not None,
        "HAS_BIAS": matrix.bias is not None,
        "HAS_ADD": add,
        "ACT": matrix.activations,
        "EXPERTS": experts,
        "POW2": triton.next_power_of_2(max(experts, 1)),
        "BT": config.bt,
        "BN": config.bn,
        "COLS": config.cols,
        "UNROLL": config.unroll,
        "HAS_SPLITS": has_splits,
        "SWIZZLE": config.swizzle,
        "EVEN_K": matrix.in_features % step == 0,
        "PROMOTE": matrix.activations == "fp8" and not matrix.group_size and config.bt <= 64,
        "PTX": not INTERPRETED,
        **launched(matrix.codes.device),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
