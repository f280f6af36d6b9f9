"""From scores and costs to plans: the Pareto front of a model, cheapest first, and why each plan is as it is.

Everything that a decoded token costs is a sum over parts (`bytes`: what is read; `seconds`: what a workload's steps
take by the device table), as losses are, so that the solver chooses among all of them at once. Uniform plans are among
its choices; none is tried for its own sake.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from halve.compress import Choice, grouped_plan, resolve
from halve.core.certificate import Measured
from halve.core.plan import ActivationFormat, KVCache, Plan, RoundingMethod
from halve.engine.scheduler import Step
from halve.formats import FORMATS, Format
from halve.kernels.ops import Array
from halve.models import ModelConfig
from halve.models.names import experts_of, ranges
from halve.search.device_table import DeviceTable, PlannedTimes, StepShape
from halve.search.reads import Reads
from halve.search.sensitivity import Part, Score, Sensitivity
from halve.search.settings import Setting
from halve.search.solver import Solution, front
from halve.search.uniform import bytes_per_token

# What is stored takes memory and is loaded, even where it is not read or not waited for: it counts as a tenth of what
# reading it takes. It decides between formats that are equally fast here.
STORED_SHARE = 0.1

RETREAT = 0.75

CostOf = Callable[[Part, Format], float]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan that could be made.

    format: `int4-g32`, or `mixed-3.52` by the bits of a weight that is read. method: of most of its weights.
    predicted_kl: nats per token by the sensitivities; cost: in the unit that was searched in; both null for a named
    format. choices: by part, empty for a named format; reads: of its parts that hold experts.
    """

    format: str
    method: RoundingMethod
    plan: Plan
    bytes_per_token: int
    predicted_kl: float | None = None
    cost: float | None = None
    choices: Mapping[str, Choice]
    reads: Mapping[str, Reads] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A candidate's quality on the selection text, and whether it is within the limit."""

    format: str
    method: RoundingMethod
    bytes_per_token: int
    ppl_ratio: Measured
    kl_mean: Measured
    passed: bool
    version: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A change of one part that a plan did not make, and why. cost, loss: what it would have added."""

    part: str
    chosen: str
    rejected: str
    cost: float
    loss: float
    why: str


def bytes_cost(part: Part, fmt: Format) -> float:
    """Bytes that a decoded token reads at batch 1, and STORED_SHARE of those that it does not."""
    size = sum(fmt.size_bytes(m.shape) for m in part.modules)
    if part.reads is not None:
        return size * (part.reads.of_token + STORED_SHARE * (1 - part.reads.of_token))
    if part.group is None:  # a table is looked up: one row of it
        return sum(fmt.size_bytes((1, m.shape[1])) for m in part.modules) + STORED_SHARE * size
    return float(size)


class StepCounts:
    """Which steps a workload makes: how many of so many tokens, and of so many sampled rows; and all of them."""

    def __init__(self) -> None:
        self.tokens: Counter[int] = Counter()
        self.rows: Counter[int] = Counter()
        self.steps: list[StepShape] = []

    def watching(self, seconds: Callable[[Step], float]) -> Callable[[Step], float]:
        """Step times that are counted as they are asked for."""

        def of(step: Step) -> float:
            shape = StepShape.of(step)
            self.steps.append(shape)
            self.tokens[shape.tokens] += 1
            if shape.rows:
                self.rows[shape.rows] += 1
            return seconds(step)

        return of

    def others_s(self, times: PlannedTimes) -> float:
        """Seconds of all these steps in what is no product."""
        return sum(times.others_s(shape) + times.table.engine.at(shape.rows) for shape in self.steps)

    def cost(self, table: DeviceTable, activations: ActivationFormat, *, byte_s: float = 0.0) -> CostOf:
        """Seconds of all these steps in a part's products; byte_s: for each byte that is stored beside."""

        def of(part: Part, fmt: Format) -> float:
            stored = byte_s * sum(fmt.size_bytes(m.shape) for m in part.modules)
            if part.group is None:
                return stored
            kind, name = part.group.kind, fmt.name
            if kind == "lm_head":
                return stored + sum(n * table.group_s(activations, kind, name, rows) for rows, n in self.rows.items())
            return stored + sum(
                n * table.layer_s(activations, kind, name, tokens, part.reads) for tokens, n in self.tokens.items()
            )

        return of


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A setting that plans may take. cost: of what no choice of formats changes, such as attention."""

    setting: Setting
    cost: float = 0.0
    suffix: str = ""  # of the plans' names


def candidates(
    config: ModelConfig,
    parts: Sequence[Part],
    sensitivity: Sensitivity,
    cost_of: CostOf,
    source: Mapping[str, Format],
    offers: Sequence[Offer],
    *,
    portable: bool,
    num_points: int = 40,
) -> list[Candidate]:
    """The front as plans, cheapest first; what costs as much as the original, or changes nothing, is left out.

    offers: settings of one kind of activations, since `cost_of` is of products with these.
    """
    costs, losses = tables(parts, sensitivity, cost_of)
    pairs = [(point, offer) for point in front(costs, losses, num_points=num_points) for offer in offers]
    found: list[Candidate] = []
    names: dict[str, set[str]] = {}
    for point, offer in _undominated(pairs, lambda p: (p[0].cost + p[1].cost, p[0].loss + p[1].setting.loss)):
        choices = choices_of(parts, sensitivity, point)
        if all(choice.method is None for choice in choices.values()):
            continue
        setting = offer.setting
        kv_cache = KVCache.of_layers(setting.caches)
        plan = grouped_plan(config, choices, portable=portable, activations=setting.activations, kv_cache=kv_cache)
        size = bytes_per_token(config, resolve(plan, config), dict(source))
        found.append(
            Candidate(
                format=_name(config, parts, choices, names.setdefault(offer.suffix, set())) + offer.suffix,
                method=_most(parts, choices),
                plan=plan,
                bytes_per_token=size,
                predicted_kl=point.loss + setting.loss,
                cost=point.cost + offer.cost,
                choices=choices,
                reads={part.name: part.reads for part in parts if part.reads is not None},
            )
        )
    return found


def undominated(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that nothing cheaper is expected to beat, cheapest first."""
    return _undominated(found, lambda c: (c.cost or 0.0, c.predicted_kl or 0.0))


def _undominated(found: Sequence[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    """key: cost and loss."""
    kept: list[T] = []
    for one in sorted(found, key=key):
        if not kept or key(one)[1] < key(kept[-1])[1]:
            kept.append(one)
    return kept


def tables(parts: Sequence[Part], sensitivity: Sensitivity, cost_of: CostOf) -> tuple[list[Array], list[Array]]:
    """Costs and losses of each part's options, as the solver takes them."""
    scores = [sensitivity.parts[p.name] for p in parts]
    costs = [np.array([cost_of(p, FORMATS[s.format]) for s in one]) for p, one in zip(parts, scores, strict=True)]
    return costs, [np.array([s.loss for s in one]) for one in scores]


def choices_of(parts: Sequence[Part], sensitivity: Sensitivity, solution: Solution) -> dict[str, Choice]:
    """A solution by part."""
    return {p.name: sensitivity.parts[p.name][i].choice for p, i in zip(parts, solution.chosen, strict=True)}


def _name(config: ModelConfig, parts: Sequence[Part], choices: Mapping[str, Choice], names: set[str]) -> str:
    """By the bits of a weight that products read; a plan of one format is called after it."""
    formats = {c.format for name, c in choices.items() if name != "embedding"}
    if len(formats) == 1:
        name = formats.pop()
    else:
        bits = weights = 0.0
        for part in parts:
            if part.group is None:
                continue
            size = sum(m.shape[0] * m.shape[1] for m in part.modules)
            weights += size
            bits += 8 * sum(FORMATS[choices[part.name].format].size_bytes(m.shape) for m in part.modules)
        name = f"mixed-{bits / weights:.2f}"
    unique, n = name, 1
    while unique in names:
        n += 1
        unique = f"{name}-{n}"
    names.add(unique)
    return unique


def _most(parts: Sequence[Part], choices: Mapping[str, Choice]) -> RoundingMethod:
    counts: Counter[RoundingMethod] = Counter()
    for part in parts:
        method = choices[part.name].method
        if method is not None:
            counts[method] += sum(m.shape[0] * m.shape[1] for m in part.modules)
    return counts.most_common(1)[0][0]


def cheapest_passing(
    ranked: Sequence[Candidate], judge: Callable[[Candidate], Judged], *, start: int | None = None, worth: float = 0.0
) -> tuple[int | None, dict[int, Judged]]:
    """Index of the cheapest candidate that passes, None when even the dearest fails, and all that was judged.

    ranked: cheapest first. start: where to look first, and from there in growing steps; None for the middle. worth: the
    share of its cost that a candidate must save over one that passes to be judged. The candidate just below the answer,
    or the next below it that is worth it, was judged and failed.
    """
    judged: dict[int, Judged] = {}
    low = -1  # up to there all fail
    high = end = len(ranked)  # from high on all pass; from end on, what is below it is not worth judging
    at, stride = start, 1
    while end - low > 1:
        middle = (low + end) // 2 if at is None else min(max(at, low + 1), end - 1)
        judged[middle] = judge(ranked[middle])
        if judged[middle].passed:
            high = middle
            most = (1 - worth) * (ranked[high].cost or 0.0)
            end = next((i for i in range(high) if worth and (ranked[i].cost or 0.0) > most), high)
        else:
            low = middle
        bracketed = low >= 0 and high < len(ranked)
        at = None if at is None or bracketed else (high - stride if judged[middle].passed else low + stride)
        stride *= 2
    return (high if high < len(ranked) else None), judged


def retreat(ranked: Sequence[Candidate], first: int, how_many: int) -> list[int]:
    """Whom to open the sealed text for, in turn: the first choice, and each time one that is expected to lose less.

    Each loses RETREAT of the one before it, or what comes next to that. Which they are must be known before the text is
    opened: a choice by what was read there would be judged on text that it has seen.
    """
    order = [first]
    while len(order) < how_many and order[-1] + 1 < len(ranked):
        last, most = order[-1], RETREAT * (ranked[order[-1]].predicted_kl or 0.0)
        order.append(
            next((i for i in range(last + 1, len(ranked)) if (ranked[i].predicted_kl or 0.0) <= most), last + 1)
        )
    return order


def likely_start(ranked: Sequence[Candidate], limit_kl: float) -> int:
    """The cheapest candidate that the sensitivities expect to keep a limit of nats per token."""
    for i, candidate in enumerate(ranked):
        if candidate.predicted_kl is not None and candidate.predicted_kl <= limit_kl:
            return i
    return max(0, len(ranked) - 1)


def rejected_moves(
    parts: Sequence[Part], sensitivity: Sensitivity, cost_of: CostOf, choices: Mapping[str, Choice], limit: float
) -> list[Move]:
    """For each part, the best cheaper option that was not taken, and what speaks against it; the best moves first.

    limit: nats per token that the plan may lose by the sensitivities. A move that loses more than what is left of it
    lost to the limit; one that would fit must give up as much elsewhere.
    """
    left = limit - sum(_score(sensitivity, p.name, choices[p.name]).loss for p in parts)
    moves: list[tuple[float, Move]] = []
    for part in parts:
        chosen = _score(sensitivity, part.name, choices[part.name])
        now = cost_of(part, FORMATS[chosen.format])
        best: tuple[float, Move] | None = None
        for score in sensitivity.parts[part.name]:
            saved, more = now - cost_of(part, FORMATS[score.format]), score.loss - chosen.loss
            if saved <= 0 or more <= 0:
                continue
            why = "loses more than the limit leaves" if more > left else "saves less for its loss than what was taken"
            move = Move(
                part=part.name,
                chosen=str(chosen.choice),
                rejected=str(score.choice),
                cost=-saved,
                loss=more,
                why=why,
            )
            if best is None or saved / more > best[0]:
                best = saved / more, move
        if best:
            moves.append(best)
    return [move for _, move in sorted(moves, key=lambda m: -m[0])]


def _score(sensitivity: Sensitivity, part: str, choice: Choice) -> Score:
    return next(s for s in sensitivity.parts[part] if s.choice == choice)


def in_words(choices: Mapping[str, Choice]) -> list[str]:
    """What is done to which layers: `int4-g32 (gptq): qkv of layers 0-3, 5; down of layers 1, 2`."""
    by_choice: dict[Choice, dict[str, list[int]]] = {}
    for name, choice in _joined(choices):
        layer, _, kind = name.removeprefix("layers.").partition(".")
        kinds = by_choice.setdefault(choice, {})
        if name.startswith("layers."):
            kinds.setdefault(_of_kind(kind), []).append(int(layer))
        else:
            kinds.setdefault("embedding table" if name == "embedding" else name, [])
    lines = []
    for choice, kinds in sorted(by_choice.items(), key=lambda item: -FORMATS[item[0].format].bits_per_weight):
        said = [
            f"{kind} of layer{'s' if len(layers) > 1 else ''} {ranges(layers)}" if layers else kind
            for kind, layers in kinds.items()
        ]
        lines.append(f"{choice}: {'; '.join(said)}")
    return lines


def _joined(choices: Mapping[str, Choice]) -> Iterator[tuple[str, Choice]]:
    """Parts of experts that one choice was made for, as one; as the whole group where that is all of them."""
    of_group: dict[str, dict[Choice, list[int]]] = {}
    for name, choice in choices.items():
        group, experts = experts_of(name)
        if experts is None:
            yield name, choice
        else:
            of_group.setdefault(group, {}).setdefault(choice, []).extend(experts)
    for group, by_choice in of_group.items():
        for choice, members in by_choice.items():
            yield group if len(by_choice) == 1 else f"{group}[{ranges(members)}]", choice


def _of_kind(kind: str) -> str:
    """`gate_up of experts 0-2, 5 of` a layer."""
    name, bracket, experts = kind.partition("[")
    return f"{name} of experts {experts.removesuffix(']')}" if bracket else name
