"""Scales and norms that learn from the original, under codes that stay as they are.

Rounding decides which code each weight gets; what the codes are multiplied by can still be chosen, and no format, no
byte and no kernel changes with it. So the scale of every group, and the gains of the norms, follow the gradient of
KL(original || smaller) over calibration text, each step on other windows (distillation, arXiv:1503.02531; scales alone,
as in the last stage of EfficientQAT, arXiv:2407.11062). A scale s is s0 * exp(t) with t learned, so that steps are
shares of it and no scale changes its sign.

What helps on the text that is learned from may hurt on other text. Where text is held out, what is kept is the state of
least KL on it, with scales as a file stores them; the first state is one of those, so that nothing gets worse there.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halve.checkpoint import Checkpoint, TensorWriter, weight_specs, weight_tensors
from halve.compress.apply import carry_files, make_directory, write_text
from halve.compress.calibrate import flat_batches
from halve.compress.distil import batches
from halve.core.certificate import Tuning
from halve.core.errors import CheckpointError
from halve.core.plan import Plan
from halve.formats import Weight
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.reference import Matrix
from halve.models import Decoder, ModelConfig
from halve.models.names import EMBEDDING, FINAL_NORM, layer_norms, modules, vectors

LEARNING_RATE = 3e-3
WARMUP_STEPS = 5
HEAD_LOGITS = 1 << 24  # logits whose gradients are held at once: 64 MiB in float32
TOLD = 10  # steps whose loss is averaged for the record
CHECK_STEPS = 8  # between two looks at the held-out text


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """scales: float32, of modules by name, [out, groups]. gains: of norms by name."""

    scales: Mapping[str, Array]
    gains: Mapping[str, Array]
    record: Tuning


def tune(
    original: Decoder,
    smaller: Decoder,
    documents: Sequence[Array],
    *,
    window_tokens: int,
    steps: int,
    seconds: float,
    held_out: Sequence[Array] = (),
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Train until the steps are done or the time is over, one step at least. `smaller` is left as it was tuned.

    Both are dense models over torch's Ops, the smaller one with its weights as stored (not widened) and activations in
    float32. documents: int32 token ids each; held_out: others, which decide what is kept. The same seed gives the same
    scales where the time does not end it. Raises DataError without tokens, CheckpointError when the loss stops being
    finite. progress: steps done, in all.
    """
    started = clock()
    scaled = _scaled(smaller)
    first = {name: _scale(found[0]).clone() for name, found in scaled.items()}
    shares = {name: torch.zeros_like(value) for name, value in first.items()}
    gains = _gains(smaller)
    for gain in gains.values():
        gain.requires_grad_()
    optimizer = torch.optim.Adam([*shares.values(), *gains.values()], lr=LEARNING_RATE, betas=(0.9, 0.99))
    judge = _Judge(original, smaller, held_out, window_tokens)
    losses: list[float] = []
    tokens = 0

    def scales_now() -> dict[str, Tensor]:
        """As a file stores them."""
        return {name: (first[name] * shares[name].exp()).to(torch.bfloat16).float() for name in first}

    _put(scaled, first)
    judge.look(0, first, gains)
    for step, batch in enumerate(batches(documents, window_tokens, np.random.default_rng(seed))):
        done = max(step / steps, (clock() - started) / seconds)
        if step and done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - done)
        optimizer.zero_grad()
        _put(scaled, {name: first[name] * shares[name].exp() for name in first})
        loss, slopes = loss_and_slopes(original, smaller, batch)
        if not math.isfinite(loss):
            raise CheckpointError(f"tuning: the loss is {loss} at step {step}; take another seed or other text")
        losses.append(loss)
        for name, slope in slopes.items():
            shares[name].grad = slope
        optimizer.step()
        tokens += batch.num_tokens
        if judge.batches and len(losses) % CHECK_STEPS == 0:
            _put(scaled, found := scales_now())
            judge.look(len(losses), found, gains)
        if progress:
            progress(step + 1, steps)
    _put(scaled, found := scales_now())
    if judge.batches:
        judge.look(len(losses), found, gains)
        found = judge.scales
        _put(scaled, found)
        with torch.no_grad():
            for name, gain in gains.items():
                gain.copy_(judge.gains[name])
    for gain in gains.values():
        gain.requires_grad_(False)
    return Tuned(
        scales={name: value.cpu().numpy() for name, value in found.items()},
        gains={name: gain.detach().cpu().numpy() for name, gain in gains.items()},
        record=Tuning(
            steps=len(losses),
            tokens=tokens,
            seconds=clock() - started,
            first_kl=float(np.mean(losses[:TOLD])),
            last_kl=float(np.mean(losses[-TOLD:])),
            kept_step=judge.step if judge.batches else None,
            held_out_first_kl=judge.first if judge.batches else None,
            held_out_kl=judge.best if judge.batches else None,
        ),
    )


def loss_and_slopes(original: Decoder, smaller: Decoder, batch: TokenBatch) -> tuple[float, dict[str, Tensor]]:
    """KL(original || smaller) in nats per token, and by module its derivative by t of every scale s * exp(t), at t = 0.

    Gains that ask for gradients get theirs.
    """
    scaled = _scaled(smaller)
    leaves = {name: _scale(found[0]).detach().requires_grad_() for name, found in scaled.items()}
    _put(scaled, leaves)
    loss = _backward(original, smaller, batch)
    slopes = {name: leaf.grad * leaf.detach() for name, leaf in leaves.items() if leaf.grad is not None}
    _put(scaled, {name: leaf.detach() for name, leaf in leaves.items()})
    return loss, slopes


class _Judge:
    """Keeps the state of least KL on text that is not learned from."""

    def __init__(self, original: Decoder, smaller: Decoder, documents: Sequence[Array], window_tokens: int) -> None:
        self.original, self.smaller = original, smaller
        self.batches = [TokenBatch.whole(one) for one in flat_batches(documents, window_tokens)]
        with torch.no_grad():
            self.taught = [original.hidden(batch) for batch in self.batches]
        self.first = self.best = math.inf
        self.step = 0
        self.scales: dict[str, Tensor] = {}
        self.gains: dict[str, Tensor] = {}

    def look(self, step: int, scales: Mapping[str, Tensor], gains: Mapping[str, Tensor]) -> None:
        """Score the model as it stands, with these scales and gains; keep them where they are the best so far."""
        if not self.batches:
            return
        with torch.no_grad():
            total = sum(
                _divergence(self.original, self.smaller, taught, self.smaller.hidden(batch), backward=False)
                for batch, taught in zip(self.batches, self.taught, strict=True)
            )
        kl = total / sum(batch.num_tokens for batch in self.batches)
        if step == 0:
            self.first = kl
        if step == 0 or kl < self.best:
            self.best, self.step = kl, step
            self.scales = {name: value.detach().clone() for name, value in scales.items()}
            self.gains = {name: gain.detach().clone() for name, gain in gains.items()}


def write_tuned(bundle: Checkpoint, config: ModelConfig, plan: Plan, tuned: Tuned, directory: Path) -> None:
    """Write a compressed model again, its codes as they were. Raises OutputError, CheckpointError."""
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    stored = {m.name: bundle.read_weight(m.name, m.shape).format for m in modules(config)}
    for module in modules(config):
        specs |= weight_specs(module.name, stored[module.name], module.shape, portable=plan.portable)
    for name, _ in vectors(config):
        info = bundle.reader.info(name)
        specs[name] = (info.dtype, info.shape)
    make_directory(directory / "halve")
    with TensorWriter(directory, specs) as writer:
        for module in modules(config):
            weight = bundle.read_weight(module.name, module.shape)
            if weight.scale is not None and module.name in tuned.scales:
                scale = tuned.scales[module.name].reshape(weight.scale.shape).astype(weight.scale.dtype)
                weight = Weight(format=weight.format, shape=weight.shape, codes=weight.codes, scale=scale)
            for name, array in weight_tensors(module.name, weight, portable=plan.portable).items():
                writer.write(name, array)
            bundle.reader.forget()
        for name, _ in vectors(config):
            value = bundle.reader.read(name)
            if name in tuned.gains:
                value = tuned.gains[name].astype(value.dtype).reshape(value.shape)
            writer.write(name, value)
    for file in ("halve/plan.json", "config.json"):
        write_text(directory / file, (bundle.path / file).read_text(encoding="utf-8"))
    carry_files(bundle, directory)


def _scaled(model: Decoder) -> dict[str, list[Matrix]]:
    """Matrices with scales by their module's name; a table that is also the head is there twice."""
    found: dict[str, list[Matrix]] = {}
    pairs = [(EMBEDDING, model.embedding)]
    pairs += [
        (member.name, linear)
        for projection in model.projections()
        for member, linear in zip(projection.group.members, projection.linears, strict=True)
    ]
    for name, (_, matrix) in pairs:
        if matrix.scale is not None:
            found.setdefault(name, []).append(matrix)
    return found


def _scale(matrix: Matrix) -> Tensor:
    assert matrix.scale is not None
    return matrix.scale


def _put(scaled: Mapping[str, Sequence[Matrix]], scales: Mapping[str, Tensor]) -> None:
    for name, matrices in scaled.items():
        for matrix in matrices:
            matrix.scale = scales[name]


def _gains(model: Decoder) -> dict[str, Tensor]:
    """Gains of the norms before attention, before feed-forwards and before the head."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(model.layers):
        layer.norms = [gain.clone() for gain in layer.norms]
        found |= dict(zip(layer_norms(index), layer.norms, strict=True))
    model.final_norm = model.final_norm.clone()
    found[FINAL_NORM] = model.final_norm
    return found


def _backward(original: Decoder, smaller: Decoder, batch: TokenBatch) -> float:
    """Add the gradients of one step; its loss, nats per token."""
    with torch.no_grad():
        taught = original.hidden(batch)
    hidden = smaller.hidden(batch)
    leaf = hidden.detach().requires_grad_()
    total = _divergence(original, smaller, taught, leaf, backward=True)
    hidden.backward(leaf.grad)
    return total / batch.num_tokens


def _divergence(original: Decoder, smaller: Decoder, taught: Tensor, hidden: Tensor, *, backward: bool) -> float:
    """The sum over tokens of KL(original || smaller), from final states, as many logits at a time as fit.

    backward: also add the gradients of its mean.
    """
    total, size = 0.0, max(1, HEAD_LOGITS // smaller.config.vocab_size)
    for start in range(0, len(taught), size):
        with torch.no_grad():
            aim = original.logits(taught[start : start + size]).log_softmax(-1)
        found = smaller.logits(hidden[start : start + size]).log_softmax(-1)
        loss = (aim.exp() * (aim - found)).sum()
        if backward:
            (loss / len(taught)).backward()
        total += float(loss.detach())
    return total
