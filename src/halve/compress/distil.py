"""Recovery by distillation: a model that was cut into experts learns from the dense model that it was.

The teacher's whole distribution is the aim, KL(dense || sparse) over every token (arXiv:1503.02531). Trained are the
routers, what weighs shared experts, the norms before feed-forwards and the last one, and the experts: all of their
weights in small models, else low-rank changes of them that are added to the weights at the end (LoRA,
arXiv:2106.09685). Attention and tables stay the dense model's, which both run. Experts are computed as one masked
feed-forward, so that a step costs what a dense one does.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from halve.compress.experts import SplitFeedForward
from halve.core.errors import CheckpointError, DataError
from halve.kernels.ops import Array, TokenBatch
from halve.models import Decoder

FULL_PARAMETERS = 100_000_000  # of experts: up to here all of them are trained
LORA_RANK = 16
STEP_TOKENS = 1024
HEAD_LOGITS = 1 << 24  # logits whose gradients are held at once: 64 MiB in float32
LEARNING_RATES = {"full": 5e-4, "lora": 1e-3}
GAIN_RATE = 0.3  # of norms' and routers' learning rate to the experts'
WARMUP = 0.05
CLIP_NORM = 1.0
TOLD = 20  # steps whose loss is averaged for the record


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What recovery did. first_kl, last_kl: nats per token, over its first and last steps. mode: what of the experts
    was trained.
    """

    mode: Literal["full", "lora"]
    steps: int
    tokens: int
    seconds: float
    trained_parameters: int
    first_kl: float
    last_kl: float


class _Experts(nn.Module):
    """The trainable parts of one feed-forward."""

    def __init__(self, made: SplitFeedForward, gain: Tensor, *, lora: bool, drawn: torch.Generator) -> None:
        super().__init__()
        self.base = made
        self.router = nn.Parameter(made.router.clone())
        self.shared_gate = None if made.shared_gate is None else nn.Parameter(made.shared_gate.clone())
        self.gain = nn.Parameter(gain.clone())
        self.weights = nn.ParameterDict()
        for name in ("gate", "up", "down"):
            value: Tensor = getattr(made, name)
            if not lora:
                self.weights[name] = nn.Parameter(value.clone())
                continue
            rows, columns = value.shape
            first = torch.randn(LORA_RANK, columns, generator=drawn) / math.sqrt(columns)
            self.weights[f"{name}_in"] = nn.Parameter(first.to(value.device))
            self.weights[f"{name}_out"] = nn.Parameter(value.new_zeros(rows, LORA_RANK))

    def now(self) -> SplitFeedForward:
        """The feed-forward of the present parameters."""
        found = {}
        for name in ("gate", "up", "down"):
            if name in self.weights:
                found[name] = self.weights[name]
            else:
                found[name] = getattr(self.base, name) + self.weights[f"{name}_out"] @ self.weights[f"{name}_in"]
        return replace(self.base, router=self.router, shared_gate=self.shared_gate, **found)


def recover(
    dense: Decoder,
    layers: Sequence[SplitFeedForward],
    documents: Sequence[Array],
    *,
    window_tokens: int,
    steps: int,
    seconds: float | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[SplitFeedForward], list[Tensor], Tensor, Recovery]:
    """Train until the steps are done or the time is over, one step at least; the learning rate falls to zero by
    whichever is nearer.

    dense: the teacher, over torch's Ops. documents: int32 token ids each. Returns the layers, the gains before
    feed-forwards, the last gain, and the record. The same seed gives the same model where the time does not end it.
    Raises DataError without tokens, CheckpointError when the loss stops being finite. progress: steps done, in all.
    """
    started = clock()
    lora = sum(m.gate.numel() + m.up.numel() + m.down.numel() for m in layers) > FULL_PARAMETERS
    drawn = torch.Generator().manual_seed(seed)
    parts = [
        _Experts(made, layer.norms[1], lora=lora, drawn=drawn) for made, layer in zip(layers, dense.layers, strict=True)
    ]
    final = nn.Parameter(dense.final_norm.clone())
    rate = LEARNING_RATES["lora" if lora else "full"]
    experts = [p for part in parts for p in part.weights.values()]
    others = [p for part in parts for p in (part.router, part.gain, part.shared_gate) if p is not None] + [final]
    optimizer = torch.optim.AdamW(
        [{"params": experts, "share": 1.0}, {"params": others, "share": GAIN_RATE}],
        lr=rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    losses: list[float] = []
    tokens = 0
    for step, batch in enumerate(batches(documents, window_tokens, np.random.default_rng(seed))):
        done = max(step / steps, 0.0 if seconds is None else (clock() - started) / seconds)
        if step and done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"] * min(1.0, (step + 1) / max(1, WARMUP * steps)) * (1 - done)
        optimizer.zero_grad()
        losses.append(_backward(dense, parts, final, batch))
        if not math.isfinite(losses[-1]):
            raise CheckpointError(f"recovery: the loss is {losses[-1]} at step {step}; take another seed or other text")
        nn.utils.clip_grad_norm_([*experts, *others], CLIP_NORM)
        optimizer.step()
        tokens += batch.num_tokens
        if progress:
            progress(step + 1, steps)
    with torch.no_grad():
        made = [_detached(part.now()) for part in parts]
    return (
        made,
        [part.gain.detach() for part in parts],
        final.detach(),
        Recovery(
            mode="lora" if lora else "full",
            steps=len(losses),
            tokens=tokens,
            seconds=clock() - started,
            trained_parameters=sum(p.numel() for p in [*experts, *others]),
            first_kl=float(np.mean(losses[:TOLD])),
            last_kl=float(np.mean(losses[-TOLD:])),
        ),
    )


def _detached(made: SplitFeedForward) -> SplitFeedForward:
    gate = None if made.shared_gate is None else made.shared_gate.detach()
    found = {name: getattr(made, name).detach() for name in ("gate", "up", "down", "router")}
    return replace(made, shared_gate=gate, **found)


def batches(documents: Sequence[Array], window_tokens: int, random: np.random.Generator) -> Iterator[TokenBatch]:
    """Windows in a new order each time round, packed into steps."""
    windows = [
        document[start : start + window_tokens]
        for document in documents
        for start in range(0, len(document), window_tokens)
    ]
    if not windows:
        raise DataError("the text to recover on holds no tokens; give documents that are not empty")
    packed: list[Array] = []
    while True:
        for i in random.permutation(len(windows)):
            packed.append(windows[i])
            if sum(map(len, packed)) >= STEP_TOKENS:
                yield TokenBatch.whole(packed)
                packed = []


def _backward(dense: Decoder, parts: Sequence[_Experts], final: Tensor, batch: TokenBatch) -> float:
    """Add the gradients of one step; its loss, nats per token."""
    ops, eps = dense.ops, dense.config.rms_norm_eps
    with torch.no_grad():
        taught = dense.hidden(batch)
        x = ops.embed(dense.embedding, batch.token_ids)
    for layer, part in zip(dense.layers, parts, strict=True):
        x = layer.attend(x, batch)
        x = x + part.now()(ops.rms_norm(x, part.gain, eps))
    leaf = x.detach().requires_grad_()
    total, count = 0.0, batch.num_tokens
    size = max(1, HEAD_LOGITS // dense.config.vocab_size)
    for start in range(0, count, size):
        with torch.no_grad():
            aim = dense.logits(taught[start : start + size]).log_softmax(-1)
        found = dense.logits(ops.rms_norm(leaf[start : start + size], final, eps)).log_softmax(-1)
        loss = (aim.exp() * (aim - found)).sum() / count
        loss.backward()
        total += float(loss.detach())
    x.backward(leaf.grad)
    return total
