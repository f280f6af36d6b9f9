"""R2: codes chosen one input after the other, the error of each made up for by those that are still to come.

For a row w of a matrix whose inputs have the second moments H = E[x x^T], a product's error is d H d^T with
d = w - codes * scale. With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), for each input j in turn

    e = (w_j - q_j) / U_jj,    w_k -= e U_jk for every k > j

which minimises the error over all weights that are still free. Source: GPTQ, arXiv:2210.17323, eq. 2, 3 and section 4.

Inputs are taken in falling order of H_jj, but stay in the groups in which they lie, with scales chosen beforehand by
R1 (static activation order), so that the file is one that rounding to nearest could have written. H gets a share of
its mean diagonal more on its diagonal, the first of DAMPINGS that makes it positive definite and the result no worse
than R1's; where none does, R1's result stands. An input that calibration never woke is tied to no other and is
rounded to nearest. After the codes, scales are fitted to them by the whole of H (coordinate descent, group by group),
codes are found again for these, and the better of both is kept, row by row.
"""

import logging

import torch
from torch import Tensor

from halve.formats import Format

log = logging.getLogger("halve.compress")

DAMPINGS = (0.01, 0.025, 0.05, 0.1, 0.5)  # shares of the mean diagonal
BLOCK = 128  # inputs whose error is spread on later blocks at once
ROW_WEIGHTS = 1 << 25  # weights of rows that are rounded side by side: 128 MiB in float32
NUM_ROUNDS = 3  # codes, then scales fitted to them and codes again
FITS = 2  # sweeps of a fit over the groups


def gptq(
    matrix: Tensor, fmt: Format, hessian: Tensor, codes: Tensor, scales: Tensor, *, fit: bool = True
) -> tuple[Tensor, Tensor, float | None]:
    """Better codes int8 [out, in] and scales float32 [out, groups] than those given, R1's.

    matrix: float32 [out, in]. hessian: float [in, in], E[x x^T] of its inputs, up to a factor. fit: also fit scales;
    without it, the paper's method with the scales given. Returns with them the damping that was used, None where the
    given ones stand.
    """
    group = fmt.group_size or matrix.shape[1]
    mean = float(hessian.diagonal().mean())
    if not mean > 0:
        return codes, scales, None
    best_codes, best_scales = codes.clone(), scales.clone()
    used = None
    for damping in DAMPINGS:
        damped = hessian.to(torch.float64, copy=True)
        damped.diagonal().add_(damping * mean)
        order = torch.argsort(damped.diagonal(), descending=True, stable=True)
        factor = inverse_factor(damped[order][:, order])
        if factor is None:
            continue
        factor, weights = factor.float(), damped.float()
        del damped
        step = max(1, ROW_WEIGHTS // matrix.shape[1])
        improved = 0
        for start in range(0, len(matrix), step):
            rows = slice(start, start + step)
            improved += _improve(
                matrix[rows], fmt, group, weights, factor, order, best_codes[rows], best_scales[rows], fit
            )
        if improved:
            used = damping
            break
    return best_codes, best_scales, used


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """U, upper, with hessian^-1 = U^T U, both [n, n] in float64; None where hessian is not positive definite.

    The factor of the mirrored matrix, mirrored, is upper and has M M^T = hessian; U = M^-1.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower).all()):
        return None
    upper = lower.flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    return inverse if bool(torch.isfinite(inverse).all()) else None


def round_in_order(matrix: Tensor, scales: Tensor, fmt: Format, group: int, factor: Tensor, order: Tensor) -> Tensor:
    """The paper's codes int8 [out, in] for scales [out, groups]; factor: of the Hessian in that order of inputs."""
    rest = matrix.t()[order].contiguous()  # [in, out]: an input is one row
    steps = torch.where(scales > 0, scales, torch.inf).t().contiguous()
    kept = scales.t().contiguous()
    codes = torch.empty(rest.shape, dtype=torch.int8)
    half = 1 << (fmt.bits - 1)
    groups = (order // group).tolist()
    for start in range(0, len(rest), BLOCK):
        end = min(start + BLOCK, len(rest))
        errors = torch.empty((end - start, rest.shape[1]))
        for j in range(start, end):
            code = (rest[j] / steps[groups[j]]).round_().clamp_(-half, half - 1)
            codes[order[j]] = code.to(torch.int8)
            torch.sub(rest[j], code.mul_(kept[groups[j]]), out=errors[j - start])
            errors[j - start] /= factor[j, j]
            if j + 1 < end:
                rest[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def row_errors(matrix: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, group: int) -> Tensor:
    """d H d^T of each row, float32 [out]."""
    difference = matrix - _values(codes, scales, group)
    return ((difference @ hessian) * difference).sum(1)


def fit_scales(matrix: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, group: int) -> Tensor:
    """Scales as stored (bf16 values), each in turn the best for these codes with the others as they are.

    With d the error of a row and q the codes of group g, the change that d H d^T is least for is q H d / (q H q).
    """
    scales = scales.clone()
    difference = matrix - _values(codes, scales, group)
    for _ in range(FITS):
        for g in range(scales.shape[1]):
            inside = slice(g * group, (g + 1) * group)
            part = codes[:, inside].float()
            along = (difference @ hessian[:, inside] * part).sum(1)
            curve = (part @ hessian[inside, inside] * part).sum(1)
            wanted = scales[:, g] + torch.where(curve > 0, along / curve, 0.0)
            new = wanted.clamp_min(0).to(torch.bfloat16).float()
            difference[:, inside] -= part * (new - scales[:, g])[:, None]
            scales[:, g] = new
    return scales


def _values(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return (codes.float().view(len(codes), -1, group) * scales[..., None]).view(codes.shape)


def _improve(
    matrix: Tensor,
    fmt: Format,
    group: int,
    hessian: Tensor,
    factor: Tensor,
    order: Tensor,
    codes: Tensor,
    scales: Tensor,
    fit: bool,
) -> int:
    """Replace codes and scales in place for every row that gets better; how many did."""
    error = row_errors(matrix, codes, scales, hessian, group)
    first = error.clone()
    tried = scales
    for turn in range(NUM_ROUNDS if fit else 1):
        if turn:
            tried = fit_scales(matrix, codes, scales, hessian, group)
            _keep(matrix, hessian, group, codes, tried, codes, scales, error)
        found = round_in_order(matrix, tried, fmt, group, factor, order)
        _keep(matrix, hessian, group, found, tried, codes, scales, error)
    return int((error < first).sum())


def _keep(
    matrix: Tensor,
    hessian: Tensor,
    group: int,
    new_codes: Tensor,
    new_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
) -> None:
    new = row_errors(matrix, new_codes, new_scales, hessian, group)
    better = new < error
    error.copy_(torch.where(better, new, error))
    scales.copy_(torch.where(better[:, None], new_scales, scales))
    codes.copy_(torch.where(better[:, None], new_codes, codes))
