"""Muon for the matrices inside the blocks, AdamW for embeddings, norms and routers; warmup, plateau, decay.

Muon: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024, kellerjordan.github.io/posts/muon),
coefficients of its Newton-Schulz step as there; at scale: arXiv:2502.16982. AdamW: arXiv:1711.05101.
Schedule: warmup-stable-decay, arXiv:2404.06395.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train_tiny.model import Llama


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix; singular values end between about 0.7 and 1.2.

    g: [..., rows, columns]; returned in the same type. On a GPU it runs in bf16, which the iteration bears.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        m = x @ x.mT
        x = a * x + (b * m + c * m @ m) @ x
    out: Tensor = (x.mT if tall else x).to(g.dtype)
    return out


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; matrices of one shape are handled as one batch."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        matrices = list(params)
        shapes = sorted({tuple(p.shape) for p in matrices})
        groups = [{"params": [p for p in matrices if tuple(p.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if not live:
                continue
            update = orthogonalise(torch.stack([self._momentum(p, group["momentum"]) for p in live]))
            scale = max(1.0, live[0].shape[0] / live[0].shape[1]) ** 0.5
            for p, u in zip(live, update.unbind(), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"] * scale)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        m: Tensor = self.state[p].setdefault("momentum", torch.zeros_like(p))
        m.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(m, momentum)


def make_optimizers(
    model: Llama, *, name: str, muon_lr: float, adam_lr: float, router_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """name: "muon" (with AdamW for what is not a matrix of a block) or "adamw" for all; routers have a rate apart."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    routers: list[nn.Parameter] = []
    for key, parameter in model.named_parameters():
        if key.endswith("gate.weight"):
            routers.append(parameter)
        elif parameter.ndim == 2 and "embed_tokens" not in key and name == "muon":
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest}] + ([{"params": routers, "lr": router_lr}] if routers else [])
    adamw = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_schedule(optimizers: list[torch.optim.Optimizer], factor: float, step: int) -> None:
    """Scale every learning rate; Muon's momentum rises from 0.85 to 0.95 over its first 200 steps."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            if "momentum" in group:
                group["momentum"] = 0.85 + 0.10 * min(1.0, step / 200)


def lr_factor(progress: float, warmup: float, decay: float) -> float:
    """Linear up over the first `warmup` of the run, flat, then linear to zero over the last `decay`."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    if progress > 1 - decay:
        return max((1 - progress) / decay, 0.0)
    return 1.0
