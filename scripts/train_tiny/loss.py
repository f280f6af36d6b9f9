"""Next-token loss without the whole [tokens, vocabulary] matrix, and the sum of it over a stream."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from halve.core.errors import ConfigError
from train_tiny.model import Llama

Forward = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]  # a Body, compiled or not


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Where and how numbers are made. loss_chunk: rows of logits held at once; eval_batch: windows at once."""

    device: str  # "cpu" or "cuda"
    dtype: str  # "bf16" or "fp32"
    loss_chunk: int
    eval_batch: int

    def __post_init__(self) -> None:
        if self.loss_chunk < 1 or self.eval_batch < 1:
            raise ConfigError(f"--loss-chunk {self.loss_chunk} and --eval-batch {self.eval_batch} must be 1 or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of hidden states."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in bf16 where that was asked for."""
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "bf16" else contextlib.nullcontext()


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T against targets, a chunk of rows at a time.

    The gradients are made in the forward pass, so the [tokens, vocabulary] matrix never exists as a whole.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        """Return the mean loss in nats, float32."""
        N = hidden_NH.shape[0]
        w = weight_VH.to(hidden_NH.dtype)
        dh, dw = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH)
        total = torch.zeros((), device=hidden_NH.device)
        for i in range(0, N, chunk):
            h, t = hidden_NH[i : i + chunk], targets_N[i : i + chunk]
            logits = (h @ w.T).float()
            lse = torch.logsumexp(logits, dim=-1)
            total += (lse - logits.gather(1, t[:, None]).squeeze(1)).sum()
            grad = logits.sub_(lse[:, None]).exp_()
            grad.scatter_add_(1, t[:, None], torch.full_like(lse, -1.0)[:, None])
            g = grad.to(hidden_NH.dtype)
            dh[i : i + chunk] = g @ w
            dw += (g.T @ h).to(dw.dtype)
        ctx.save_for_backward(dh, dw)
        ctx.scale = 1.0 / N
        return total / N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale the gradients that were made on the way."""
        dh, dw = ctx.saved_tensors
        scale = grads[0] * ctx.scale
        return dh * scale.to(dh.dtype), dw * scale, None, None


def batch_loss(model: Llama, body: Forward, x: Tensor, y: Tensor, compute: Compute) -> tuple[Tensor, Tensor]:
    """Mean loss in nats per token, and the routers' losses. x, y: int64 [B, T], y one token ahead."""
    with compute.autocast():
        hidden, routers = body(x, compute.torch_dtype)
    with torch.autocast(compute.device, enabled=False):
        weight = model.model.embed_tokens.weight
        loss: Tensor = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), weight, y.reshape(-1), compute.loss_chunk
        )
    return loss, routers


@torch.no_grad()
def stream_loss(model: Llama, ids: NDArray[np.uint16], compute: Compute, max_tokens: int = 0) -> tuple[float, int]:
    """Summed loss (nats) and number of predicted tokens, in windows of the context that do not overlap.

    max_tokens: stop after as many predictions; 0 takes the whole stream.
    """
    context = model.config.context
    if max_tokens:
        ids = ids[: max_tokens + 1]
    total, count = 0.0, 0
    starts = range(0, len(ids) - 1, context)
    for i in range(0, len(starts), compute.eval_batch):
        rows = [np.asarray(ids[s : s + context + 1], dtype=np.int64) for s in starts[i : i + compute.eval_batch]]
        full = [row for row in rows if len(row) == context + 1]
        rest = [row[None] for row in rows if 1 < len(row) < context + 1]
        for window in ([np.stack(full)] if full else []) + rest:
            total += _window_loss(model, torch.from_numpy(window).to(compute.device), compute)
            count += window.shape[0] * (window.shape[1] - 1)
    return total, count


def _window_loss(model: Llama, ids_BT: Tensor, compute: Compute) -> float:
    with compute.autocast():
        hidden, _ = model.model(ids_BT[:, :-1], compute.torch_dtype)
    hidden, targets = hidden.flatten(0, 1), ids_BT[:, 1:].reshape(-1)
    weight = model.model.embed_tokens.weight.to(hidden.dtype)
    total = 0.0
    for j in range(0, len(targets), compute.loss_chunk):
        logits = (hidden[j : j + compute.loss_chunk] @ weight.T).float()
        total += functional.cross_entropy(logits, targets[j : j + compute.loss_chunk], reduction="sum").item()
    return total
