"""Tokens from rows of logits on a CUDA device. Definition: `halve.kernels.sampling`.

Greedy batches are one argmax. Otherwise rows are read twice, in tiles over the whole device. The first pass takes the
largest logit of every 32 tokens, which bounds what a cut can keep, so that one instance a row finds the limit of each
cut among few candidates, without sorting: a cut keeps the tokens above a logit and the first few that equal it, and
that logit is found by bisection over the bits of float32, in which order is that of whole numbers. The second pass
weighs what is kept, and the draw then reads one tile.

Agreement: z has the definition's bits. Weights are float32 powers of two, their sums float64, where the definition has
float64 throughout: a cut by top_p or a draw falls on another token only where the definition's running sum lies within
about 2^-20 of its limit. Rows cut by typical_p, by nearness and not by size, are sorted by torch.

`draw` reads no host memory and can be captured: numbers of a batch are a device tensor (`upload`), steps and seeds too.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton

from halve.kernels.cuda.elementwise import ArgmaxScratch, argmax
from halve.kernels.cuda.sampling_kernels import (
    adjust_kernel,
    cut_kernel,
    draw_kernel,
    keep_kernel,
    logprob_kernel,
    survey_kernel,
    weigh_kernel,
)
from halve.kernels.sampling import Ragged, Sampled, SamplingBatch, broken, check_batch

TILE = 4096  # logits at a time
GROUP = 32  # logits that are candidates together: a line of memory
CHUNK = 128  # groups of candidates at a time
WARPS = 8


class Parameters(NamedTuple):
    """A batch's settings on the device.

    floats: float64 [4, R], temperature, top_p, min_p, typical_p. whole: int64 [4, R], top_k, seed (its bits), step,
    num_logprobs.
    """

    floats: torch.Tensor
    whole: torch.Tensor


class DeviceSampled(NamedTuple):
    """`Sampled` on the device, and int32 [R] status: 0, or what `halve.kernels.sampling.broken` tells."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None
    top_ids: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    status: torch.Tensor

    def to_host(self) -> Sampled:
        """Wait for the device. Raises HalveError for a row without an answer."""
        status, ids = torch.stack((self.status, self.token_ids)).cpu().numpy()
        if status.any():
            r = int((status != 0).argmax())
            raise broken(r, int(status[r]))
        rows = len(ids)
        if self.logprobs is None or self.top_ids is None or self.top_logprobs is None:
            nothing = np.empty((rows, 0))
            return Sampled(ids, np.full(rows, np.nan, np.float32), nothing.astype(np.int32), nothing.astype(np.float32))
        return Sampled(ids, self.logprobs.cpu().numpy(), self.top_ids.cpu().numpy(), self.top_logprobs.cpu().numpy())


def sample(logits: torch.Tensor, batch: SamplingBatch, *, parameters: Parameters | None = None) -> DeviceSampled:
    """Choose a token for every row of logits, bf16 or float32 [R, V]; does not wait for the device.

    parameters: from `upload` of this batch, to spare a copy. Raises KernelError for a batch that `check_batch` refuses.
    """
    rows, vocab = logits.shape
    check_batch(batch, rows, vocab)
    if batch.plain_greedy:
        return greedy(logits)
    parameters = parameters or upload(batch, logits.device)
    z = logits
    if batch.bias_tokens is not None or batch.allowed is not None or batch.penalized.any():
        z = adjust(logits, batch)
    chosen, status = draw(z, parameters)
    if (batch.typical_p < 1).any():
        chosen = torch.where(status == 0, _typical(z, parameters, chosen), chosen)
    if z is not logits:
        came_in = argmax(logits)  # what is broken already is told as such
        status = torch.where(came_in == -2, 1, torch.where(status == 1, 2, status))
    most = min(int(batch.num_logprobs.max(initial=-1)), vocab)
    if most < 0:
        return DeviceSampled(chosen, None, None, None, status)
    return DeviceSampled(chosen, *log_probabilities(logits, chosen, parameters.whole[3], most), status)


def greedy(
    logits: torch.Tensor, *, out: torch.Tensor | None = None, scratch: ArgmaxScratch | None = None
) -> DeviceSampled:
    """The likeliest token of every row, ties to the lowest id."""
    chosen = argmax(logits, out=out, scratch=scratch)
    return DeviceSampled(chosen, None, None, None, torch.where(chosen < 0, -1 - chosen, 0))


def upload(batch: SamplingBatch, device: torch.device | str) -> Parameters:
    """A batch's settings on the device."""
    floats = np.stack([batch.temperature, batch.top_p, batch.min_p, batch.typical_p]).astype(np.float64)
    whole = np.stack([batch.top_k.astype(np.int64), batch.seed.view(np.int64), batch.step, batch.num_logprobs])
    return Parameters(_send(floats, device), _send(whole.astype(np.int64), device))


def adjust(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Logits float32 [R, V] after what is allowed, bias and penalties, with the bits of the definition's z."""
    rows, vocab = logits.shape
    device = logits.device
    bias = counts = seen = allowed = None
    if batch.bias_tokens is not None and batch.bias_values is not None:
        bias = torch.zeros(rows, vocab, dtype=torch.float32, device=device)
        bias[_places(batch.bias_tokens, device)] = _send(batch.bias_values, device)
    if batch.penalized.any() and batch.prompt_tokens is not None and batch.output_tokens is not None:
        counts = torch.zeros(rows, vocab, dtype=torch.int32, device=device)
        at = _places(batch.output_tokens, device)
        counts.index_put_(at, torch.ones_like(at[1], dtype=torch.int32), accumulate=True)
        seen = torch.zeros(rows, vocab, dtype=torch.int8, device=device)
        seen[_places(batch.prompt_tokens, device)] = 1
    if batch.allowed is not None:
        allowed = _send(batch.allowed.view(np.int32), device)
    penalties = _send(
        np.stack([batch.repetition_penalty, batch.frequency_penalty, batch.presence_penalty]).astype(np.float64), device
    )
    z = torch.empty(rows, vocab, dtype=torch.float32, device=device)
    if rows:
        adjust_kernel[(rows, triton.cdiv(vocab, TILE))](
            logits, bias, counts, seen, allowed, penalties, z, logits.stride(0), (vocab + 31) // 32, rows,
            V=vocab, WIDTH=TILE, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return z


def draw(
    z: torch.Tensor, parameters: Parameters, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and statuses, int32 [R] each, from z, bf16 or float32 [R, V], by all steps but typical_p's."""
    rows, vocab = z.shape
    chosen, status = out or (torch.empty(rows, dtype=torch.int32, device=z.device) for _ in "ts")
    if rows:
        limits = _cut(z, parameters)
        shape = _shape(vocab)
        weights = torch.empty_like(limits.sums)
        equals = torch.empty_like(limits.ids)
        weigh_kernel[(rows, shape["TILES"])](
            z, parameters.floats, limits.maxima, limits.keys, limits.lowest, weights, equals, z.stride(0),
            **shape, V=vocab, num_warps=WARPS,
        )  # fmt: skip
        draw_kernel[(rows,)](
            z, *parameters, limits.maxima, limits.ids, limits.keys, limits.lowest, weights, equals, chosen, status,
            z.stride(0), rows, **shape, V=vocab, num_warps=WARPS,
        )  # fmt: skip
    return chosen, status


class _Limits(NamedTuple):
    """What rows keep: int32 [R, 2] keys and how many of those that equal them; float64 [R] lowest logits.

    maxima float32, ids int32, sums float64 [R, tiles]: largest logits, their first ids, weights relative to them.
    """

    keys: torch.Tensor
    lowest: torch.Tensor
    maxima: torch.Tensor
    ids: torch.Tensor
    sums: torch.Tensor


def _shape(vocab: int) -> dict[str, int]:
    width = _tile(vocab)
    tiles = triton.cdiv(vocab, width)
    return {"WIDTH": width, "TILES": tiles, "PADDED": triton.next_power_of_2(tiles)}


def _cut(z: torch.Tensor, parameters: Parameters) -> _Limits:
    rows, vocab = z.shape
    shape = _shape(vocab)
    tiles, group = shape["TILES"], min(GROUP, shape["WIDTH"])
    groups = shape["WIDTH"] // group

    def room(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, *sizes, dtype=dtype, device=z.device)

    limits = _Limits(
        room(2, dtype=torch.int32), room(dtype=torch.float64), room(tiles, dtype=torch.float32),
        room(tiles, dtype=torch.int32), room(tiles, dtype=torch.float64),
    )  # fmt: skip
    maxima = room(tiles * groups, dtype=torch.float32)
    padded = shape["PADDED"] * groups
    survey_kernel[(rows, tiles)](
        z, parameters.floats, limits.maxima, limits.ids, limits.sums, maxima, z.stride(0), rows,
        V=vocab, WIDTH=shape["WIDTH"], TILES=tiles, GROUP=group, num_warps=WARPS,
    )  # fmt: skip
    cut_kernel[(rows,)](
        z, *parameters, limits.maxima, limits.sums, maxima, room(padded, dtype=torch.int32), limits.keys,
        limits.lowest, z.stride(0), rows,
        V=vocab, TILES=tiles, PADDED=shape["PADDED"], GROUPS=padded, GROUP=group, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip
    return limits


def log_probabilities(
    logits: torch.Tensor, chosen: torch.Tensor, wanted: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the chosen tokens float32 [R], and those of the `most` likeliest, ids and values [R, most].

    wanted: int64 [R], as num_logprobs; what a row did not ask for is NaN and -1.
    """
    rows, vocab = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, most, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows, most, dtype=torch.float32, device=logits.device)
    if rows:
        logprob_kernel[(rows,)](
            logits, chosen, wanted, logprobs, ids, values, logits.stride(0), most,
            V=vocab, WIDTH=_tile(vocab), num_warps=WARPS,
        )  # fmt: skip
    return logprobs, ids, values


def _typical(z: torch.Tensor, parameters: Parameters, others: torch.Tensor) -> torch.Tensor:
    """`draw` for rows with a typical_p below 1; the other rows keep the tokens that they have."""
    rows, vocab = z.shape
    cut = torch.empty(rows, vocab, dtype=torch.float32, device=z.device)
    limits = _cut(z, parameters)
    keep_kernel[(rows,)](
        z, parameters.floats, limits.maxima, limits.keys, limits.lowest, cut, z.stride(0),
        **_shape(vocab), V=vocab, num_warps=WARPS,
    )  # fmt: skip
    temperature, typical_p = parameters.floats[0][:, None], parameters.floats[3][:, None]
    s = cut.double()
    s = (s - s.amax(1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0)
    w = s.exp()
    mean = (w * torch.where(w > 0, s, 0.0)).sum(1, keepdim=True) / w.sum(1, keepdim=True)
    order = (s - mean).abs().sort(dim=1, stable=True).indices
    running = w.gather(1, order).cumsum(1)
    # A token stays where those before it do not hold the share yet.
    before = torch.cat((torch.zeros_like(running[:, :1]), running[:, :-1]), 1)
    stays = torch.zeros_like(cut, dtype=torch.bool).scatter(1, order, before < typical_p * running[:, -1:])
    plain = torch.stack((parameters.floats[0], *torch.ones_like(parameters.floats[1:])))
    plain[2] = 0.0
    whole = parameters.whole.clone()
    whole[0] = 0
    chosen, _ = draw(cut.masked_fill(~stays, -torch.inf), Parameters(plain, whole))
    acts = (typical_p < 1) & (temperature > 0)
    return torch.where(acts[:, 0], chosen, others)


def _tile(vocab: int) -> int:
    return min(TILE, max(16, 1 << (vocab - 1).bit_length()))


def _send(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def _places(tokens: Ragged, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and token of every id."""
    rows = np.repeat(np.arange(len(tokens.offsets) - 1), np.diff(tokens.offsets))
    return _send(rows, device), _send(tokens.ids.astype(np.int64), device)
