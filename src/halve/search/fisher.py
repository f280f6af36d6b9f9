"""How much each output of each product counts, from one backward pass: what turns an error of weights into nats.

Near the original, KL is quadratic in a change d of a product's outputs, KL = 1/2 E[(g . d)^2], where g is the gradient
of log p(y) and y is drawn from the model's own prediction (the Fisher information; Amari 1998). Taking outputs and
inputs for independent, as K-FAC does (arXiv:1503.05671), and outputs for independent of each other,

    KL per token ~ 1/2 sum_i r_i (dW_i H dW_i^T),   r_i = E[g_i^2],   H = E[x x^T] of the inputs

so that one pass screens every format and method at once. Streamed: a forward pass keeps the stream before each layer,
a backward pass takes the layers again from the last, one of them in memory at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halve.core.errors import DataError
from halve.formats import Weight
from halve.kernels.ops import Array, Buffer, Ops, TokenBatch
from halve.models.config import ModelConfig
from halve.models.decoder import DecoderLayer, Projection, WeightSource
from halve.models.moe import Hook
from halve.models.names import EMBEDDING, FINAL_NORM, FusedGroup, head_group
from halve.models.rope import RopeTable

BLOCK_WEIGHTS = 1 << 22  # squared at a time
HEAD_LOGITS = 1 << 24  # logits whose gradients are held at once: 64 MiB in float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Some rows of a matrix that speak for all. index: int64 [drawn]; stands_for: float64 [drawn], how many rows each
    one counts for; total: rows of the matrix.
    """

    index: Array
    stands_for: Array
    total: int

    @classmethod
    def all(cls, total: int) -> "Rows":
        """Every row, for itself."""
        return cls(index=np.arange(total), stands_for=np.ones(total), total=total)

    @classmethod
    def drawn(cls, importance: Array, most: int) -> "Rows":
        """At most so many rows, each with a chance in proportion to its importance, float [rows], and never above one.

        A sum over rows of values, each over its chance, is then without bias (Horvitz and Thompson 1952), and close
        where values go about as importance does. Chances are laid side by side and one row is taken at every whole
        number (systematic sampling), so that the draw is the same each time.
        """
        total = len(importance)
        if total <= most:
            return cls.all(total)
        # A little for all: importance comes from few tokens, and a row that none of them asked for may still cost.
        shares = importance / max(importance.sum(), np.finfo(float).tiny) * 0.9 + 0.1 / total
        chances = np.minimum(1.0, most * shares)
        while chances.sum() < most * (1 - 1e-6):  # what certain rows leave over goes to the others
            free = chances < 1
            scaled = chances[free] * (most - (~free).sum()) / chances[free].sum()
            chances[free] = np.minimum(1.0, scaled)
        steps = np.floor(np.cumsum(chances) + 0.5)
        index = np.flatnonzero(np.diff(steps, prepend=0.0) > 0)
        return cls(index=index, stands_for=1 / chances[index], total=total)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fisher:
    """outputs: E[g^2] of each output of a fused group, its members side by side, float64 [out]. table: of each column
    of what the embedding table gives, float64 [hidden]. token_share: of each token of the text, float64 [vocab].
    """

    outputs: Mapping[str, Array]
    table: Array
    token_share: Array

    def of_product(
        self,
        group: str,
        originals: Sequence[Array],
        stored: Sequence[Weight],
        energy: Array,
        hessian: Array | None,
        drawn: Sequence["Rows"] | None = None,
    ) -> float:
        """Nats per token that a group's stored weights are expected to cost.

        energy: float [in], E[x^2], which counts where hessian, float [in, in], is None. drawn: which rows of each
        member are given, all where it is None.
        """
        counts, total = self.outputs[group], 0.0
        moments = None if hessian is None else torch.from_numpy(np.array(hessian, np.float32))
        drawn = drawn or [Rows.all(len(original)) for original in originals]
        start = 0
        for original, weight, rows in zip(originals, stored, drawn, strict=True):
            difference = torch.from_numpy(np.asarray(original, np.float32) - weight.dequantize())
            if moments is None:
                errors = difference.square() @ torch.from_numpy(np.asarray(energy, np.float32))
            else:
                errors = ((difference @ moments) * difference).sum(1)
            total += float((counts[start + rows.index] * rows.stands_for) @ errors.double().numpy())
            start += rows.total
        return 0.5 * total

    def of_table(self, original: Array, stored: Weight, rows: "Rows | None" = None) -> float:
        """The same of an embedding table, where it is looked up."""
        rows = rows or Rows.all(len(original))
        squares = (np.asarray(original, np.float32) - stored.dequantize()) ** 2
        return float(0.5 * ((self.token_share[rows.index] * rows.stands_for) @ squares) @ self.table)

    def importance(self, group: str | None, originals: Sequence[Array], energy: Array | None) -> list[Array]:
        """About how the rows of each member share a group's loss: what each would cost if it were all lost, float64
        [out]. group: None for an embedding table alone, which has no energy.
        """
        if group is None or energy is None:
            return [self.token_share * _squares_by(original, self.table) for original in originals]
        counts, found, start = self.outputs[group], [], 0
        for original in originals:
            found.append(counts[start : start + len(original)] * _squares_by(original, energy))
            start += len(original)
        return found


def _squares_by(matrix: Array, weights: Array) -> Array:
    """sum_j matrix_ij^2 weights_j, float64 [rows], a few rows at a time."""
    found = np.empty(len(matrix))
    step = max(1, BLOCK_WEIGHTS // matrix.shape[1])
    for start in range(0, len(matrix), step):
        found[start : start + step] = np.square(matrix[start : start + step], dtype=np.float32) @ weights
    return found


def fisher(
    config: ModelConfig,
    source: WeightSource,
    ops: Ops,
    documents: Sequence[Array],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Fisher:
    """Run windows (int32 token ids each) forward and backward. ops: differentiable ones, of torch.

    progress: layers done of both passes, in all. Raises DataError when there are no tokens.
    """
    documents = [document for document in documents if len(document)]
    if not documents:
        raise DataError("the calibration text holds no tokens; give documents that are not empty")
    batch = TokenBatch.whole(documents)
    num_tokens, rope = batch.num_tokens, RopeTable(config.rotary_dim)
    sums: dict[str, list[Any]] = {}
    count = _Count(progress, 2 * config.num_layers)
    with torch.no_grad():
        table = ops.table(source.weight(EMBEDDING, (config.vocab_size, config.hidden_size)))
        streams = [ops.embed(table, batch.token_ids)]
        del table
        for index in range(config.num_layers):
            streams.append(DecoderLayer(config, index, ops, source, rope)(streams[-1], batch))
            source.forget()
            count()
    gradient = _of_head(config, source, ops, streams.pop(), sums, torch.Generator().manual_seed(seed))
    source.forget()
    for index in reversed(range(config.num_layers)):
        layer = DecoderLayer(config, index, ops, source, rope)
        for projection in layer.projections.values():
            projection.hook = _counting(sums)
        stream = streams.pop().detach().requires_grad_()
        layer(stream, batch).backward(gradient)
        gradient = stream.grad
        source.forget()
        count()
    shares = np.bincount(batch.token_ids, minlength=config.vocab_size) / num_tokens
    return Fisher(
        outputs={
            name: (torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]) / num_tokens).cpu().numpy()
            for name, parts in sums.items()
        },
        table=(gradient.square().double().sum(0) / num_tokens).cpu().numpy(),
        token_share=shares,
    )


class _Count:
    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)


def _counting(sums: dict[str, list[Any]]) -> Hook:
    """A hook that adds up the squares of the gradients of outputs, as they come."""

    def hook(group: FusedGroup, x: Buffer, outputs: list[Buffer]) -> list[Buffer]:
        for place, output in enumerate(outputs):
            output.register_hook(lambda g, place=place: _add(sums, group.name, place, g.square().double().sum(0)))
        return outputs

    return hook


def _add(sums: dict[str, list[Any]], name: str, place: int, squares: Any) -> None:
    for entry in sums.setdefault(name, []):
        if entry[0] == place:
            entry[1] += squares
            return
    sums[name].append([place, squares])


def _of_head(
    config: ModelConfig, source: WeightSource, ops: Ops, stream: Any, sums: dict[str, list[Any]], drawn: torch.Generator
) -> Any:
    """Gradients of sum log p(y), y drawn from p, with respect to the last layer's output; some rows at a time."""
    gain = ops.vector(source.vector(FINAL_NORM, (config.hidden_size,)))
    head = Projection(head_group(config), ops, source)
    head.hook = _counting(sums)
    gradient = torch.empty_like(stream)
    step = max(1, HEAD_LOGITS // config.vocab_size)
    for start in range(0, len(stream), step):
        part = stream[start : start + step].detach().requires_grad_()
        (logits,) = head(ops.rms_norm(part, gain, config.rms_norm_eps))
        logs = logits.log_softmax(-1)
        tokens = torch.multinomial(logs.detach().exp().cpu(), 1, generator=drawn).to(logs.device)
        logs.gather(1, tokens).sum().backward()
        gradient[start : start + step] = part.grad
    return gradient
