"""A dense feed-forward as experts: which neurons belong together, and which experts a token needs.

A gated feed-forward is a sum over its neurons, so that a token may leave out those that hardly speak for it. Neurons
that speak for every token become the shared expert, the others are clustered by when they speak, in equal numbers
(CMoE, arXiv:2502.04416). As there the router needs no training; but since most readers know linear routers alone, its
rows are either those of the gate of a representative neuron, or the least-squares fit of how loud each expert will be,
whichever finds more on held-out tokens. Then the down projection is fitted again to the neurons that are left, as
pruning by second moments does (arXiv:2301.00774).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ROUTER_SCALE = 0.1  # spread of the router's logits at first: a token's experts then weigh about the same
ROUTER_RIDGE = 1e-2  # of the mean square of inputs
DOWN_RIDGE = 1e-3  # of the mean square of neurons, towards the weights that were there
CLUSTER_TOKENS = 4096
CLUSTER_ROUNDS = 20

RouterKind = Literal["representative", "fitted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a feed-forward is cut: `experts` slices of `size` neurons, the first `shared` of them for every token, and
    `active` of the others for each.
    """

    experts: int
    active: int
    shared: int
    size: int

    @property
    def routed(self) -> int:
        """Experts that a router chooses from."""
        return self.experts - self.shared

    @property
    def share(self) -> float:
        """Of the neurons, that a token runs through."""
        return (self.active + self.shared) / self.experts


@dataclass(eq=False)
class SplitFeedForward:
    """A feed-forward whose neurons lie expert by expert, the shared ones first.

    gate, up: [width, H]; down: [H, width]; router: [routed, H]; shared_gate: [1, H], whose sigmoid, doubled, weighs the
    shared neurons. Differentiable in all of them. A token's expert weighs softmax over the chosen, times their number:
    about 1 for each.
    """

    split: Split
    gate: Tensor
    up: Tensor
    down: Tensor
    router: Tensor
    shared_gate: Tensor | None

    def neurons(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, width]."""
        gated: Tensor = F.silu(x @ self.gate.t()) * (x @ self.up.t())
        return gated

    def shares(self, x: Tensor) -> Tensor:
        """What each neuron counts for each token: [T, width], 0 for those that are left out."""
        split = self.split
        top = (x @ self.router.t()).topk(split.active, dim=1)
        weights = torch.zeros(len(x), split.routed, dtype=x.dtype, device=x.device)
        weights = weights.scatter(1, top.indices, top.values.softmax(1) * split.active)
        routed = weights.repeat_interleave(split.size, 1)
        if self.shared_gate is None:
            return routed
        shared = 2 * torch.sigmoid(x @ self.shared_gate.t())
        return torch.cat([shared.expand(-1, split.shared * split.size), routed], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        out: Tensor = (self.neurons(x) * self.shares(x)) @ self.down.t()
        return out


def loudness(neurons: Tensor, down: Tensor) -> Tensor:
    """How much each neuron adds to what a layer gives: |h| times the length of its column, [T, width]."""
    lengths: Tensor = down.norm(dim=0)
    return neurons.abs() * lengths


def order_neurons(loud: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Neurons expert by expert, shared ones first: int64 [width], and the neuron that represents each routed expert,
    int64 [routed].

    loud: [T, width]. A neuron speaks for a token when it is among the loudest share that the token will run through;
    those that speak most often are shared.
    """
    _, width = loud.shape
    most = max(1, round(width * split.share))
    rate = torch.zeros(width, dtype=loud.dtype, device=loud.device)
    rate.index_add_(0, loud.topk(most, dim=1).indices.flatten(), torch.ones(loud.shape[0] * most, device=loud.device))
    by_rate = rate.argsort(descending=True, stable=True)
    num_shared = split.shared * split.size
    shared, rest = by_rate[:num_shared].sort().values, by_rate[num_shared:].sort().values
    stride = max(1, len(loud) // CLUSTER_TOKENS)
    cluster, centres, features = _clusters(loud[::stride, rest].t(), split.routed, loud[:, rest].mean(0))
    experts = [rest[cluster == e] for e in range(split.routed)]
    nearest = [
        rest[(features @ centres[e]).masked_fill(cluster != e, -torch.inf).argmax()] for e in range(split.routed)
    ]
    return torch.cat([shared, *experts]), torch.stack(nearest)


def _clusters(points: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spherical k-means with clusters of equal size: of each point its cluster, the centres, the points normed.

    Begins with the weightiest point and then those that are far from all before; so it draws nothing at random.
    """
    features = F.normalize(points, dim=1)
    chosen = [int(weight.argmax())]
    far = 1 - features @ features[chosen[0]]
    for _ in range(count - 1):
        chosen.append(int((far * weight).argmax()))
        far = torch.minimum(far, 1 - features @ features[chosen[-1]])
    centres = features[torch.tensor(chosen)]
    cluster = torch.full((len(points),), -1, device=points.device)
    for _ in range(CLUSTER_ROUNDS):
        before, cluster = cluster, balanced(features @ centres.t(), len(points) // count)
        if torch.equal(before, cluster):
            break
        centres = F.normalize(torch.stack([features[cluster == e].mean(0) for e in range(count)]), dim=1)
    return cluster, centres, features


def balanced(likeness: Tensor, size: int) -> Tensor:
    """Each point's cluster, `size` points in each: int64 [points].

    likeness: [points, clusters]. Points ask for the cluster that is most like them; one that is full keeps those that
    would lose most by their second choice, and the others ask again.
    """
    points, clusters = likeness.shape
    wishes = likeness.clone()
    found = torch.full((points,), -1, device=likeness.device)
    room = [size] * clusters
    while (free := (found < 0).nonzero().flatten()).numel():
        top = wishes[free].topk(min(2, clusters), dim=1)
        regret, best = top.values[:, 0] - top.values[:, -1], top.indices[:, 0]
        for e in range(clusters):
            asking = (best == e).nonzero().flatten()
            kept = asking[regret[asking].argsort(descending=True, stable=True)[: room[e]]]
            found[free[kept]] = e
            room[e] -= len(kept)
            if not room[e]:
                wishes[:, e] = -torch.inf
    return found


def expert_lengths(neurons: Tensor, down: Tensor, split: Split) -> Tensor:
    """Length of what each routed expert would give: [T, routed]. neurons, down: ordered."""
    first = split.shared * split.size
    parts = [slice(first + e * split.size, first + (e + 1) * split.size) for e in range(split.routed)]
    return torch.stack([(neurons[:, part] @ down[:, part].t()).norm(dim=1) for part in parts], dim=1)


def make_router(
    inputs: Sequence[Tensor], lengths: Sequence[Tensor], representatives: Tensor, active: int
) -> tuple[Tensor, RouterKind, float]:
    """Rows of a linear router [routed, H], how they were made, and the share of experts' lengths that they find.

    inputs: batches [T, H]; lengths: of each expert's output, [T, routed]; representatives: gate rows of a neuron of
    each. The last batch in five is kept out of the fit, and the kind that finds more of it wins.
    """
    held = [i for i in range(len(inputs)) if i % 5 == 4] or [len(inputs) - 1]
    seen = [i for i in range(len(inputs)) if i not in held] or held
    fitted = fit_router([inputs[i] for i in seen], [lengths[i] for i in seen])
    x, y = torch.cat([inputs[i] for i in held]), torch.cat([lengths[i] for i in held])
    rows: dict[RouterKind, Tensor] = {"representative": representatives, "fitted": fitted}
    found = {kind: float(_captured(x @ router.t(), y, active)) for kind, router in rows.items()}
    kind = max(found, key=lambda k: found[k])
    spread = (x @ rows[kind].t()).std()
    return rows[kind] * (ROUTER_SCALE / spread.clamp_min(1e-12)), kind, found[kind]


def fit_router(inputs: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
    """The linear map of inputs that is nearest to how much longer an expert's output is than the others': ridge."""
    hidden = inputs[0].shape[1]
    moments = inputs[0].new_zeros(hidden, hidden)
    target = inputs[0].new_zeros(hidden, lengths[0].shape[1])
    for x, y in zip(inputs, lengths, strict=True):
        moments.addmm_(x.t(), x)
        target.addmm_(x.t(), y - y.mean(1, keepdim=True))
    moments.diagonal().add_(ROUTER_RIDGE * moments.diagonal().mean())
    solved: Tensor = torch.linalg.solve(moments, target)
    return solved.t().contiguous()


def _captured(logits: Tensor, lengths: Tensor, active: int) -> Tensor:
    """Share of the lengths of all experts that the chosen ones hold."""
    return lengths.gather(1, logits.topk(active, dim=1).indices).sum() / lengths.sum().clamp_min(1e-30)


def refit_down(moments: Tensor, cross: Tensor, down: Tensor) -> Tensor:
    """The down projection [H, width] that is nearest to a target, from the neurons that are left.

    moments: [width, width], of weighted neurons; cross: [width, H], of them with the target.
    """
    ridge = DOWN_RIDGE * moments.diagonal().mean().clamp_min(1e-12)
    regular = moments.clone()
    regular.diagonal().add_(ridge)
    solved: Tensor = torch.linalg.solve(regular, cross + ridge * down.t())
    return solved.t().contiguous()
