"""How one product is cut into programs: a fixed choice that is sane anywhere, and the few that a tuner tries.

What decides is how many tokens share the weights. Few: memory is the limit, tiles are small and the inputs are split
until about six programs wait for memory on every multiprocessor. Many: the tensor cores are the limit, tiles are as
large as the registers hold (128 x 256 sums for 8-bit activations, 128 x 128 where weights are widened on the way).
"""

from dataclasses import dataclass, replace

from halve.kernels.cuda.packing import CELL_BITS, COLUMNS, PLANES, CudaMatrix
from halve.kernels.cuda.workspace import shared_bytes

MANY_TOKENS = 16384  # the largest class of tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One way to cut a product. See `gemm.product` for each; programs_a_sm decides the splits."""

    bt: int
    bn: int
    cols: int
    unroll: int = 1
    programs_a_sm: int = 0  # split the inputs until so many; 0 does not split
    swizzle: int = 1
    warps: int = 4
    stages: int = 4
    flatten: bool = False  # see `persistent.persistent`; nothing to the others
    blocks: int = 1  # programs that a multiprocessor must hold at once; see `gemv.cut`; nothing to the others


def token_class(num_tokens: int) -> int:
    """The power of two that a number of tokens counts as: the next one up, 16384 at most."""
    return min(1 << max(num_tokens - 1, 0).bit_length(), MANY_TOKENS)


def inputs_a_step(matrix: CudaMatrix, cols: int) -> int:
    """Inputs that one step of the kernel covers, before it is unrolled."""
    if not matrix.in_cells:
        return cols
    return COLUMNS * CELL_BITS // PLANES[matrix.format.bits][-1]


def columns(matrix: CudaMatrix) -> int:
    """Inputs of one tensor-core step: 128 bytes of a row, within a group; 32 in cells."""
    if matrix.in_cells:
        return COLUMNS
    widest = 64 if matrix.activations == "bf16" else 128
    return min(widest, matrix.group_size) if matrix.group_size else widest


def default(matrix: CudaMatrix, num_tokens: int, *, grouped: bool = False) -> Config:
    """The choice without measurements. num_tokens: of one expert where grouped, on average."""
    return candidates(matrix, token_class(num_tokens), grouped=grouped)[0]


def candidates(matrix: CudaMatrix, tokens: int, *, grouped: bool = False) -> list[Config]:
    """What is worth trying for a class of tokens, the default first; all fit the device's shared memory."""
    found = (_fitting(matrix, config) for config in _wished(matrix, tokens, grouped=grouped))
    return list(dict.fromkeys(found))


def shared_memory(matrix: CudaMatrix, config: Config) -> int:
    """Bytes that a program of `gemm.product` takes at most: the inputs of every stage."""
    inputs = inputs_a_step(matrix, config.cols) * config.unroll
    bits = matrix.format.bits if matrix.format.scaled else 16
    return config.stages * inputs * (config.bt * (2 if matrix.activations == "bf16" else 1) + config.bn * bits // 8)


def _fitting(matrix: CudaMatrix, config: Config) -> Config:
    """The same with fewer stages, then fewer tokens, until it fits."""
    limit = shared_bytes(matrix.codes.device)
    while shared_memory(matrix, config) > limit and (config.stages, config.bt) != (2, 8):
        less_deep, less_wide = replace(config, stages=config.stages - 1), replace(config, bt=config.bt // 2)
        config = less_deep if config.stages > 2 else less_wide
    return config


def _wished(matrix: CudaMatrix, tokens: int, *, grouped: bool) -> list[Config]:
    """What is worth trying, were shared memory endless."""
    cols = columns(matrix)
    wide = matrix.in_cells and len(PLANES[matrix.format.bits]) > 1  # a step is long already
    twice = 1 if wide else 2
    if tokens <= 64:
        bt = max(8, tokens)
        splits = 0 if grouped else 6
        found = [
            Config(bt=bt, bn=64, cols=cols, unroll=twice, programs_a_sm=splits, stages=3),
            Config(bt=bt, bn=64, cols=cols, unroll=1, programs_a_sm=splits, stages=5),
            Config(bt=bt, bn=128, cols=cols, unroll=twice, programs_a_sm=splits // 2, warps=8, stages=3),
            Config(bt=bt, bn=64, cols=cols, unroll=twice, programs_a_sm=splits // 2, stages=4),
        ]
        if bt <= 16:
            found += [
                Config(bt=bt, bn=64, cols=cols, unroll=twice, programs_a_sm=2 * splits, stages=3),
                Config(bt=bt, bn=32, cols=cols, unroll=twice, programs_a_sm=splits + 2, warps=2, stages=4),
            ]
        if bt == 8:
            found.append(Config(bt=16, bn=64, cols=cols, unroll=twice, programs_a_sm=splits, stages=3))
        return found
    # So few tiles leave most of the device without work; what is read in two planes has no registers for splits.
    few = 1 if tokens <= 256 and not grouped and not wide else 0
    if matrix.activations == "bf16":
        found = [
            Config(bt=128, bn=128, cols=cols, programs_a_sm=few, swizzle=8, warps=8, stages=3),
            Config(bt=64, bn=128, cols=cols, swizzle=8, warps=8, stages=4),
            Config(bt=128, bn=64, cols=cols, swizzle=8, warps=8, stages=3),
        ]
        if matrix.in_cells and matrix.format.bits <= 3:
            return found[1:]  # so many fields at once do not fit the registers beside 128 x 128 sums
        if not matrix.in_cells:
            found.append(Config(bt=256, bn=128, cols=cols, swizzle=8, warps=8, stages=3))
        return found
    small = Config(bt=128, bn=128, cols=cols, programs_a_sm=few, swizzle=8, warps=8, stages=4)
    large = Config(bt=256, bn=128, cols=cols, swizzle=8, warps=8, stages=4)
    square = Config(bt=128, bn=128, cols=cols, swizzle=8, warps=4, stages=4)
    ordered = [large, small] if tokens >= 1024 and not matrix.group_size else [small, large]
    return [*ordered, square]


def persistent_candidates(matrix: CudaMatrix) -> list[Config]:
    """What is worth trying of `persistent.persistent`, the default first."""
    cols = 64 if matrix.activations == "bf16" else 128
    return [
        Config(bt=128, bn=256, cols=cols, swizzle=8, warps=8, stages=4, flatten=True),
        Config(bt=128, bn=256, cols=cols, swizzle=8, warps=8, stages=3),
        Config(bt=128, bn=128, cols=cols, swizzle=8, warps=4, stages=4, flatten=True),
    ]
