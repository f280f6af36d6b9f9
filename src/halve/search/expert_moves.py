"""What could become of the experts of a sparse model: fewer for a token, fewer in all, alike ones merged.

Experts are ranked by what the text would miss without them, the mean over their tokens of their weight times the
length of what they give (REAP, arXiv:2510.13999), times how often they are asked, since the mean alone keeps experts
that hardly anyone asks. An expert that is merged goes to the one whose mean output points most like its own.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from halve.core.plan import ExpertGroup, ExpertPlan, LayerExperts
from halve.kernels.ops import Array, TokenBatch
from halve.models import Decoder, ModelConfig
from halve.models.moe import ExpertCounts

PRUNED_SHARES = (0.25, 0.5)  # of experts left out or merged, tried in turn until one loses too much


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertStatistics:
    """Of each expert of one layer: tokens int64 [experts] that came to it; saliency float64 [experts], what a token
    of the text would miss without it; mean float64 [experts, hidden], of its outputs.
    """

    tokens: Array
    saliency: Array
    mean: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMove:
    """A change of experts. kind: moves of one kind go further one after the other. name: as people say it; short: as
    plans are called.
    """

    kind: str
    name: str
    short: str
    plan: ExpertPlan


def expert_statistics(decoder: Decoder, windows: Sequence[Array]) -> dict[int, ExpertStatistics]:
    """By sparse layer. decoder: the original over torch's Ops."""
    batch = TokenBatch.whole(windows)
    found: dict[int, ExpertStatistics] = {}
    ops = decoder.ops
    with torch.inference_mode():
        x = ops.embed(decoder.embedding, batch.token_ids)
        for index, layer in enumerate(decoder.layers):
            x = layer.attend(x, batch)
            if layer.router is not None:
                normed = layer.normed(x)
                routing = layer.router(normed)
                rows = ops.take_rows(normed, routing.rows)
                gate, up = layer.projections["gate_up"](rows, routing.offsets)
                (out,) = layer.projections["down"](ops.silu_mul(gate, up), routing.offsets)
                found[index] = _of_layer(ops.to_host(out), routing.weights, routing.offsets, batch.num_tokens)
            x = ops.add(x, layer.feed_forward(x))
    return found


def _of_layer(outputs: Array, weights: Array, offsets: Array, num_tokens: int) -> ExpertStatistics:
    tokens = np.diff(offsets).astype(np.int64)
    said = weights.astype(np.float64) * np.linalg.norm(outputs.astype(np.float64), axis=1)
    owner = np.repeat(np.arange(len(tokens)), tokens)
    mean = np.zeros((len(tokens), outputs.shape[1]))
    np.add.at(mean, owner, outputs)
    return ExpertStatistics(
        tokens=tokens,
        saliency=np.bincount(owner, said, len(tokens)) / num_tokens,
        mean=mean / np.maximum(tokens, 1)[:, None],
    )


def without(decoder: Decoder, plan: ExpertPlan) -> Decoder:
    """The decoder with the experts of a plan that merges none: over the same weights, so that it takes no memory."""
    made = decoder.copied()
    kept = {layer.layer: [g.members[0] for g in layer.groups] for layer in plan.layers}
    for index, layer in enumerate(made.layers):
        if layer.router is None:
            continue
        layer.router = router = copy.copy(layer.router)
        count = router.experts.num_experts
        router.counts = ExpertCounts.of(count)
        router.experts = replace(router.experts, top_k=plan.top_k or router.experts.top_k)
        if index in kept:
            router.left_out = np.setdiff1d(np.arange(count), kept[index])
    return made


def expert_moves(config: ModelConfig, statistics: dict[int, ExpertStatistics]) -> list[ExpertMove]:
    """What is worth measuring, of each kind the smallest change first; nothing for a dense model."""
    experts = next((layer.experts for layer in config.layers if layer.experts is not None), None)
    if experts is None or len({(x.num_experts, x.top_k) for y in config.layers if (x := y.experts) is not None}) > 1:
        return []
    moves = [
        ExpertMove(kind="top_k", name=f"{k} experts a token", short=f"top{k}", plan=ExpertPlan(top_k=k))
        for k in sorted({experts.top_k - 1, experts.top_k // 2} - {0}, reverse=True)
        if k < experts.top_k
    ]
    for kind in ("prune", "merge") if experts.removable else ():
        for share in PRUNED_SHARES:
            kept = experts.num_experts - max(1, round(experts.num_experts * share))
            if kept < max(experts.top_k, 1):
                continue
            layers = tuple(_groups(i, one, kept, merge=kind == "merge") for i, one in statistics.items())
            what = "left out" if kind == "prune" else "merged"
            moves.append(
                ExpertMove(
                    kind=kind,
                    name=f"{experts.num_experts - kept} of {experts.num_experts} experts {what}",
                    short=f"{kind}{kept}",
                    plan=ExpertPlan(layers=layers),
                )
            )
    return moves


def _groups(layer: int, statistics: ExpertStatistics, kept: int, *, merge: bool) -> LayerExperts:
    order = np.argsort(-statistics.saliency, kind="stable")
    stay = sorted(int(e) for e in order[:kept])
    members: dict[int, list[int]] = {e: [e] for e in stay}
    if merge:
        unit = statistics.mean / np.maximum(np.linalg.norm(statistics.mean, axis=1, keepdims=True), 1e-30)
        for gone in sorted(int(e) for e in order[kept:]):
            members[stay[int(np.argmax(unit[stay] @ unit[gone]))]].append(gone)
    groups = []
    for group in members.values():
        counts = statistics.tokens[group].astype(np.float64) + 1  # who was never asked counts a little
        weights = np.round(counts / counts.sum(), 6)
        weights[0] += 1 - weights.sum()
        groups.append(ExpertGroup(members=tuple(group), weights=tuple(float(w) for w in weights)))
    return LayerExperts(layer=layer, groups=tuple(groups))
