"""Router rows that tell clusters of tokens apart, for copies of a feed-forward that have yet to differ.

Rows drawn at random see mostly what all tokens have in common, the mean of a feed-forward's inputs, so that one copy
may get nearly every token. Here rows are orthogonal to that mean and point at the centres of spherical k-means with
even shares (Dhillon and Modha 2001); then their lengths are set so that loads are even, since a
router has no bias. Each copy so begins with tokens of its own, that have something in common.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from halve.compress.sparsify import calibration_batches
from halve.core.errors import CheckpointError, DataError
from halve.kernels.ops import Array
from halve.kernels.reference import TorchOps
from halve.models.config import ModelConfig
from halve.models.decoder import DecoderLayer, WeightSource
from halve.models.names import EMBEDDING
from halve.models.rope import RopeTable

# Of the logits. The likeliest copy's is some 0.5 to 1.5 above the next, so that a router in training turns slowly.
LOGIT_STD = 1.5
ROUNDS = 60  # of k-means
LOAD_ROUNDS = 300  # of lengths


def cluster_routers(
    config: ModelConfig, source: WeightSource, documents: Sequence[Array], copies: int, *, window_tokens: int, seed: int
) -> Iterator[Tensor]:
    """Each layer's router rows, float32 [copies, hidden size], from the dense model's own inputs.

    documents: int32 token ids, of which the first CALIBRATION_TOKENS are used. Raises DataError when they hold fewer
    tokens than copies, CheckpointError naming the layer when the model makes NaN or infinity.
    """
    ops = TorchOps("cpu", widened=True)
    batches = calibration_batches(documents, window_tokens)
    if (found := sum(batch.num_tokens for batch in batches)) < copies:
        raise DataError(f"the text to cluster has {found} tokens, for {copies} copies; give more text")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        table = ops.table(source.weight(EMBEDDING, (config.vocab_size, config.hidden_size)))
        streams = [ops.embed(table, batch.token_ids) for batch in batches]
        del table
        source.forget()
        rope = RopeTable(config.head_dim)
        for index in range(config.num_layers):
            layer = DecoderLayer(config, index, ops, source, rope)
            streams = [layer.attend(x, batch) for x, batch in zip(streams, batches, strict=True)]
            inputs = torch.cat([layer.normed(x) for x in streams])
            if not bool(torch.isfinite(inputs).all()):
                raise CheckpointError(f"layer {index}: the model computes NaN or infinity on the text to cluster")
            yield cluster_rows(inputs, copies, generator)
            streams = [x + layer.feed_forward(x) for x in streams]
            source.forget()


def cluster_rows(inputs: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Rows [copies, H] under which each takes about as many of the inputs [N, H]; of length zero for a single copy."""
    mean = inputs.mean(0)
    common = functional.normalize(mean, dim=0)
    apart = inputs - mean
    apart = functional.normalize(apart - (apart @ common)[:, None] * common, dim=1)
    centres = apart[torch.randperm(len(apart), generator=generator)[:copies]]
    handicap = torch.zeros(copies)
    for _ in range(ROUNDS):
        nearest = (apart @ centres.t() + handicap).argmax(1)
        handicap -= 0.02 * (_loads(nearest, copies) - 1)
        sums = torch.zeros_like(centres).index_add(0, nearest, apart)
        centres = functional.normalize(sums, dim=1)
    rows = centres - centres.mean(0)
    logits = inputs @ rows.t()
    lengths, evenest, least = torch.ones(copies), torch.ones(copies), float("inf")
    for _ in range(LOAD_ROUNDS):
        loads = _loads((logits * lengths).argmax(1), copies)
        if (most := float(loads.max())) < least:
            evenest, least = lengths, most
        lengths = lengths * torch.exp(-0.05 * (loads - 1))
    rows, logits = rows * evenest[:, None], logits * evenest
    return rows * (LOGIT_STD / logits.std().clamp_min(1e-30))


def _loads(chosen: Tensor, copies: int) -> Tensor:
    """Tokens of each copy, over what an even share would be."""
    return torch.bincount(chosen, minlength=copies).float() * (copies / len(chosen))
