"""Sparse feed-forwards: a router sends each token to a few of many experts, whose weighted outputs are summed.

Tokens are sorted by expert, so that every expert that is asked reads its weights once a step, whatever the number of
its tokens: by one grouped product on our C++ kernels (`kernels/grouped.py`), else expert by expert. Router variants are
data (`config.Experts`). Sources: arXiv:1701.06538, arXiv:2401.04088 (Mixtral), arXiv:2401.06066 (shared experts),
arXiv:2405.04434, 2.1.2 and arXiv:2412.19437, 2.1.2 (groups of experts, corrected choices).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from halve.core.errors import CheckpointError
from halve.formats import FORMATS, Weight
from halve.kernels.grouped import GroupedLinears, ungrouped
from halve.kernels.native import NativeOps
from halve.kernels.ops import Array, Buffer, Ops, Packed
from halve.models.config import Experts, ModelConfig
from halve.models.latent import joined
from halve.models.names import FusedGroup, Kind, Module, router_name, router_vectors, shared_gate_name

ROUTED: tuple[Kind, ...] = ("gate_up", "down")  # groups of a sparse layer that hold all its experts

# Sees a group's input and outputs and returns the outputs to use: calibration looks, an adapter adds to them.
Hook = Callable[[FusedGroup, Buffer, list[Buffer]], list[Buffer]]


class Source(Protocol):
    """Where weights come from; `decoder.WeightSource`."""

    def weight(self, module: str, shape: tuple[int, int]) -> Weight | Packed:
        """A matrix."""

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A float tensor."""


class Held(Protocol):
    """Experts of a layer that are not all in memory; `offload.OffloadedLayer`."""

    def portions(self, experts: Sequence[int], ahead: Callable[[], None] | None) -> Iterator[list[int]]:
        """Those of the experts asked for that are in memory until the next are asked for, all of them in turn.

        ahead: called once, behind what is asked for: it may tell the next layer what to expect.
        """

    def expect(self, experts: Sequence[int]) -> None:
        """These experts will probably be asked for soon, the first most probably."""


@dataclass(slots=True)
class ExpertCounts:
    """How often experts of one layer were asked: arrays that a compiled step adds to.

    tokens: int64 [experts]. totals: int64 [2], calls, and experts read in them.
    """

    tokens: Array
    totals: Array

    @classmethod
    def of(cls, num_experts: int) -> "ExpertCounts":
        """None was asked yet."""
        return cls(np.zeros(num_experts, np.int64), np.zeros(2, np.int64))

    @property
    def steps(self) -> int:
        """Calls."""
        return int(self.totals[0])

    @property
    def reads(self) -> int:
        """Experts read in all calls."""
        return int(self.totals[1])

    def add(self, counts: Array) -> None:
        """One call's tokens of each expert."""
        self.tokens += counts
        self.totals += (1, np.count_nonzero(counts))


@dataclass(frozen=True, slots=True)
class Routing:
    """Where tokens go: rows int32 [T * top_k] sorted by expert, their weights float32, and where each expert begins."""

    rows: Array
    weights: Array
    offsets: Array


class Router:
    """The router of one layer, in float32 beside whatever the rest computes in."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops, source: Source) -> None:
        experts = config.layers[layer].experts
        assert experts is not None
        self.experts: Experts = experts
        self.ops = ops
        shape = (experts.num_experts, config.hidden_size)
        beside = {part: source.vector(name, shape[:1]) for part, name in router_vectors(config, layer).items()}
        self.linear = ops.linear(_floats(source.vector(router_name(config, layer), shape)), beside.get("bias"))
        self.correction = beside.get("correction")
        self.shared_gate = None
        if experts.shared_size and experts.shared_gate:
            self.shared_gate = ops.linear(_floats(source.vector(shared_gate_name(layer), (1, config.hidden_size))))
        self.layer = layer
        self.left_out: Array | None = None  # experts that no token goes to, as if they were not there
        self.counts = ExpertCounts.of(experts.num_experts)

    def logits(self, x: Buffer) -> Array:
        """float32 [T, experts]. Raises CheckpointError for NaN, which would send tokens anywhere."""
        logits = self.ops.to_host(self.ops.project(self.linear, x))
        if np.isnan(logits).any():
            raise self.broken()
        if self.left_out is not None:
            logits = logits.copy()
            logits[:, self.left_out] = -np.inf
        return logits

    def broken(self) -> CheckpointError:
        """What to raise for logits with NaN."""
        return CheckpointError(
            f"layer {self.layer}: the router's logits hold NaN; the layers before it, or its weights, are broken"
        )

    def likely(self, x: Buffer) -> list[int]:
        """Experts that tokens [T, H] would choose, those of most tokens first; nothing is counted."""
        counts = np.diff(route(self.logits(x), self.experts, self.correction).offsets)
        order = np.argsort(-counts, kind="stable")
        return order[: np.count_nonzero(counts)].tolist()  # type: ignore[no-any-return]

    def __call__(self, x: Buffer) -> Routing:
        """Choose experts for tokens [T, H]."""
        routing = route(self.logits(x), self.experts, self.correction)
        self.counts.add(np.diff(routing.offsets))
        return routing


def route(logits: Array, experts: Experts, correction: Array | None = None) -> Routing:
    """The experts of each token and their weights, as `config.Experts` tells.

    logits: float32 [T, experts]. correction: float32 [experts], added to scores for the choice. Ties go to the lower
    expert.
    """
    if experts.scores == "sigmoid":
        shares = sigmoid(logits)
    else:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = shifted / shifted.sum(axis=1, keepdims=True)
    wishes = logits if correction is None and experts.group_score == "largest" else shares
    if correction is not None:
        wishes = wishes + correction
    if experts.num_groups > 1:
        wishes = _within_groups(wishes, experts)
    chosen = np.argsort(-wishes, axis=1, kind="stable")[:, : experts.top_k]
    weights = np.take_along_axis(shares, chosen, axis=1)
    if experts.renormalize:
        weights = weights / weights.sum(axis=1, keepdims=True)
    if experts.scale != 1:
        weights = weights * np.float32(experts.scale)
    flat = chosen.ravel()
    order = np.argsort(flat, kind="stable")  # by expert, then by token
    offsets = np.zeros(experts.num_experts + 1, np.int32)
    np.cumsum(np.bincount(flat, minlength=experts.num_experts), out=offsets[1:])
    return Routing((order // experts.top_k).astype(np.int32), weights.ravel()[order].astype(np.float32), offsets)


def _within_groups(wishes: Array, experts: Experts) -> Array:
    """Wishes [T, experts], minus infinity outside of each token's best groups."""
    grouped = wishes.reshape(len(wishes), experts.num_groups, -1)
    counted = 2 if experts.group_score == "two" else 1
    values = np.sort(grouped, axis=2)[:, :, -counted:].sum(axis=2)
    best = np.argsort(-values, axis=1, kind="stable")[:, : experts.top_groups]
    allowed = np.zeros(values.shape, bool)
    np.put_along_axis(allowed, best, True, axis=1)
    return np.where(allowed[:, :, None], grouped, -np.inf).reshape(wishes.shape)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), of float32 in float32."""
    with np.errstate(over="ignore"):  # far below zero it is 1 / infinity
        found: Array = 1 / (1 + np.exp(-x))
    return found


class ExpertProjection:
    """One kind of product of all experts of a layer. hook: sees each expert's rows under `FusedGroup.of_expert`.

    held: of experts that are not all in memory; rows then come only for those that are.
    """

    held: Held | None = None

    def __init__(self, group: FusedGroup, ops: Ops, source: Source) -> None:
        self.group, self.ops = group, ops
        self.hook: Hook | None = None
        self.after: Callable[[Buffer], Buffer] | None = None
        num_experts = 1 + max(m.expert for m in group.members if m.expert is not None)
        self.groups = [group.of_expert(e) for e in range(num_experts)]
        self.parts = [[self._linear(m, source) for m in one.members] for one in self.groups]
        self.grouped: GroupedLinears | None = None
        if isinstance(ops, NativeOps) and ungrouped(self.parts) is None:
            self.grouped = GroupedLinears(ops, self.parts)

    def _linear(self, module: Module, source: Source) -> Any:
        bias = source.vector(f"{module.name}.bias", module.shape[:1]) if module.bias else None
        return self.ops.linear(source.weight(module.name, module.shape), bias)

    @property
    def linears(self) -> list[Any]:
        """Every expert's matrices, one expert after the other."""
        return [linear for parts in self.parts for linear in parts]

    def __call__(self, x: Buffer, offsets: Array) -> list[Buffer]:
        """Rows [N, in] sorted by expert -> one [N, out] for each matrix of an expert."""
        if self.hook is None and self.grouped is not None:
            return self.grouped(x, offsets)
        asked = np.flatnonzero(np.diff(offsets)).tolist()
        found = [self.of_expert(e, x[int(offsets[e]) : int(offsets[e + 1])]) for e in asked]
        return [joined(list(outputs), axis=0) for outputs in zip(*found, strict=True)]

    def of_expert(self, expert: int, x: Buffer) -> list[Buffer]:
        """One expert's products."""
        outputs = [self.ops.project(linear, x) for linear in self.parts[expert]]
        return self.hook(self.groups[expert], x, outputs) if self.hook else outputs


def sparse_feed_forward(
    ops: Ops,
    router: Router,
    projections: Mapping[Kind, Any],
    x: Buffer,
    forced: int = 0,
    ahead: Callable[[], None] | None = None,
) -> Buffer:
    """[T, H] -> [T, H]: every token through its experts, weighted, and through the shared expert where there is one.

    forced: for calibration, experts with fewer tokens than this are shown those they would like best, too; what they
    make of them goes to hooks alone. ahead: as for `Held.portions`.
    """
    routing = router(x)
    rows = ops.take_rows(x, routing.rows)
    if router.experts.weigh == "input":
        rows = rows * _like(routing.weights[:, None], rows)
    held = projections["gate_up"].held
    if held is None:
        outputs = _through(ops, router, projections, rows, routing.offsets)
    else:
        outputs = _in_portions(ops, router, projections, rows, routing.offsets, held.portions, ahead)
    if router.experts.weigh == "output":
        outputs = outputs * _like(routing.weights[:, None], outputs)
    out = _sum(outputs, routing, len(x))
    if router.experts.shared_size:
        gate, up = projections["shared_gate_up"](x)
        (shared,) = projections["shared_down"](ops.silu_mul(gate, up))
        if router.shared_gate is not None:
            share = sigmoid(ops.to_host(ops.project(router.shared_gate, x)).astype(np.float64))
            shared = shared * _like(share.astype(np.float32), shared)
        out = ops.add(out, shared)
    if forced:
        show_experts(ops, router, projections, x, routing, forced)
    return out


def _through(ops: Ops, router: Router, projections: Mapping[Kind, Any], rows: Buffer, offsets: Array) -> Buffer:
    """Rows [N, H] sorted by expert -> what each one's expert makes of it."""
    gate, up = projections["gate_up"](rows, offsets)
    (outputs,) = projections["down"](gated(ops, router.experts, gate, up), offsets)
    return outputs


def _in_portions(
    ops: Ops,
    router: Router,
    projections: Mapping[Kind, Any],
    rows: Array,
    offsets: Array,
    portions: Callable[[Sequence[int], Callable[[], None] | None], Iterator[list[int]]],
    ahead: Callable[[], None] | None,
) -> Array:
    """`_through` of experts that come into memory by portions. A row's result does not depend on who is beside it."""
    counts = np.diff(offsets)
    outputs = np.empty_like(rows)
    for there in portions(np.flatnonzero(counts).tolist(), ahead):
        mine = np.zeros_like(counts)
        mine[there] = counts[there]
        at = np.flatnonzero(np.repeat(mine > 0, counts))
        within = np.concatenate([[0], np.cumsum(mine)]).astype(np.int32)
        outputs[at] = _through(ops, router, projections, rows[at], within)
    return outputs


def gated(ops: Ops, experts: Experts, gate: Buffer, up: Buffer) -> Buffer:
    """What goes into an expert's last product: silu(gate) * up, or what `Experts.clamp` tells (arXiv:2508.10925)."""
    if experts.clamp is None:
        return ops.silu_mul(gate, up)
    alpha, limit = experts.clamp
    if isinstance(gate, np.ndarray):
        gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
        return (up + 1) * (gate * sigmoid(gate * np.float32(alpha)))
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * (gate * alpha).sigmoid())


def show_experts(
    ops: Ops, router: Router, projections: Mapping[Kind, Any], x: Buffer, routing: Routing, least: int
) -> None:
    """Run experts that got fewer than `least` tokens over those whose logits for them are largest, for hooks alone."""
    counts = np.diff(routing.offsets)
    few = np.flatnonzero(counts < min(least, len(x)))
    if not len(few):
        return
    logits = router.logits(x)
    for e in few:
        own = routing.rows[routing.offsets[e] : routing.offsets[e + 1]]
        liked = np.argsort(-logits[:, e], kind="stable")
        others = liked[~np.isin(liked, own)][: least - len(own)].astype(np.int32)
        others = np.sort(others)
        rows = ops.take_rows(x, others)
        if router.experts.weigh == "input":
            rows = rows * _like(sigmoid(logits[others, e])[:, None], rows)
        gate, up = projections["gate_up"].of_expert(int(e), rows)
        projections["down"].of_expert(int(e), gated(ops, router.experts, gate, up))


def _sum(outputs: Buffer, routing: Routing, num_tokens: int) -> Buffer:
    """Sum over each token's experts, in the order of the experts: [N, H] -> [T, H]."""
    of_token = np.argsort(routing.rows, kind="stable").reshape(num_tokens, -1)
    if isinstance(outputs, np.ndarray):
        return outputs[of_token].sum(axis=1)
    import torch

    return outputs[torch.from_numpy(of_token).to(outputs.device)].sum(dim=1)


def _like(values: Array, buffer: Buffer) -> Any:
    """float32 values as the buffer's kind of array, on its device and of its type."""
    if isinstance(buffer, np.ndarray):
        return values
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(buffer.device, buffer.dtype)


def _floats(values: Array) -> Weight:
    return Weight(format=FORMATS["fp32"], shape=values.shape, codes=np.ascontiguousarray(values, np.float32))
