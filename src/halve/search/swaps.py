"""KL by swapping: one group of the original model is stored otherwise, everything behind it runs again.

What comes before a swapped layer is the original's and is kept, so that a swap costs the layers from there on and the
head. Source of the idea: ExLlamaV3's measure_model and ModelOpt's `kl_div`, which swap as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from halve.evaluate.scorer import rows_at_a_time
from halve.formats import Weight
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.reference import ROUND_INPUT, TorchOps
from halve.models import Decoder, WeightSource
from halve.models.decoder import Projection
from halve.models.moe import ExpertProjection
from halve.models.names import EMBEDDING, FusedGroup

KEEP_LOGITS = 1 << 26  # of the original, kept in float32: 256 MiB


class Swapped:
    """A `WeightSource` that answers with given weights, and with the original's for all else."""

    def __init__(self, source: WeightSource, weights: Mapping[str, Weight]) -> None:
        self.source, self.weights = source, weights

    def weight(self, module: str, shape: tuple[int, int]) -> Any:
        """The given weight of a module, or the original's."""
        return self.weights.get(module) or self.source.weight(module, shape)

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """The original's."""
        return self.source.vector(name, shape)

    def forget(self) -> None:
        """As the original's."""
        self.source.forget()


class _RoundedInputs(TorchOps):
    """`TorchOps` that rounds the input of every product, whatever its weights are stored in."""

    def __init__(self, ops: TorchOps, activations: str) -> None:
        super().__init__(str(ops.torch_device))
        self._round = ROUND_INPUT[activations]

    def project(self, linear: Any, x: Any) -> Any:
        """round(x) @ weight.T + bias."""
        return super().project(linear, self._round(x))


class Swaps:
    """The original model over some windows of text, ready to have groups of it swapped.

    decoder: the original on `TorchOps`.
    """

    def __init__(self, decoder: Decoder, source: WeightSource, windows: Sequence[Array], *, device: str) -> None:
        self.decoder, self.source = decoder, source
        self.batch = TokenBatch.whole(windows)
        self.num_tokens = self.batch.num_tokens
        self.swapped_ops = TorchOps(device, widened=True)
        with torch.inference_mode():
            self.streams = [decoder.ops.embed(decoder.embedding, self.batch.token_ids)]
            for layer in decoder.layers:
                self.streams.append(layer(self.streams[-1], self.batch))
            self._kept = (
                self._logs(decoder.head, self.streams[-1], 0, self.num_tokens)
                if self.num_tokens * decoder.config.vocab_size <= KEEP_LOGITS
                else None
            )

    def kl(self, group: FusedGroup | None, weights: Mapping[str, Weight]) -> float:
        """Mean KL(original || swapped) in nats per token.

        group: whose members `weights` holds; None for an embedding table alone. A tied table is swapped in both places.
        """
        decoder = self.decoder
        source = Swapped(self.source, weights)
        with torch.inference_mode():
            head = decoder.head
            if group is None or group.kind == "lm_head":
                start, stream = len(decoder.layers), self.streams[-1]
                if EMBEDDING in weights:
                    table = self.swapped_ops.table(weights[EMBEDDING])
                    start, stream = 0, decoder.ops.embed(table, self.batch.token_ids)
                if group is not None:
                    head = Projection(group, self.swapped_ops, source)
                return self._run(stream, start, head)
            assert group.layer is not None
            layer = decoder.layers[group.layer]
            before = layer.projections[group.kind]
            kind = Projection if group.members[0].expert is None else ExpertProjection
            layer.projections[group.kind] = kind(group, self.swapped_ops, source)
            try:
                return self._run(self.streams[group.layer], group.layer, head)
            finally:
                layer.projections[group.kind] = before

    def kl_of_caches(self, formats: Mapping[int, str]) -> float:
        """Mean KL of the original with keys and values of some layers rounded to a format, in nats per token."""
        layers = self.decoder.layers
        before = {index: layers[index].attention_spec for index in formats}
        for index, name in formats.items():
            layers[index].attention_spec = replace(before[index], kv_format=name)
        try:
            with torch.inference_mode():
                start = min(formats)
                return self._run(self.streams[start], start, self.decoder.head)
        finally:
            for index, spec in before.items():
                layers[index].attention_spec = spec

    def kl_of_activations(self, name: str) -> float:
        """Mean KL of the original with the input of every product rounded to a format, in nats per token."""
        ops, projections = _RoundedInputs(self.swapped_ops, name), list(self.decoder.projections())
        before = [projection.ops for projection in projections]
        for projection in projections:
            projection.ops = ops
        try:
            with torch.inference_mode():
                return self._run(self.streams[0], 0, self.decoder.head)
        finally:
            for projection, own in zip(projections, before, strict=True):
                projection.ops = own

    def kl_of(self, other: Decoder) -> float:
        """Mean KL(original || another decoder of the same tokens) in nats per token."""
        with torch.inference_mode():
            stream = other.ops.embed(other.embedding, self.batch.token_ids)
            for layer in other.layers:
                stream = layer(stream, self.batch)
            return self._scored(stream, other.head)

    def _run(self, stream: Any, start: int, head: Projection) -> float:
        for layer in self.decoder.layers[start:]:
            stream = layer(stream, self.batch)
        return self._scored(stream, head)

    def _scored(self, stream: Any, head: Projection) -> float:
        total = 0.0
        step = rows_at_a_time(self.decoder.config.vocab_size)
        for begin in range(0, self.num_tokens, step):
            end = min(begin + step, self.num_tokens)
            new = self._logs(head, stream, begin, end)
            old = (
                self._kept[begin:end]
                if self._kept is not None
                else self._logs(self.decoder.head, self.streams[-1], begin, end)
            )
            total += float((old.exp() * (old - new)).sum(-1).double().sum())
        return max(0.0, total / self.num_tokens)

    def _logs(self, head: Projection, stream: Any, begin: int, end: int) -> Any:
        decoder = self.decoder
        normed = decoder.ops.rms_norm(stream[begin:end], decoder.final_norm, decoder.config.rms_norm_eps)
        (logits,) = head(normed)
        return logits.log_softmax(-1)
