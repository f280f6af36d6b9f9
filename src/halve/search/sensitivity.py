"""What each option of each group costs in quality: a screen of all of them, and the frontier measured again.

The screen is one backward pass (`fisher.py`); every option is then rounded once, and its error weighed. Of each group
one option for each number of bits, an anchor, is rounded by the method that the plan would take; the others by `clip`,
which is many times faster than `gptq`, weighed by what gptq gains at these bits. Anchors are then measured directly, by
swapping the group (`swaps.py`):

    measured = a * predicted + b

with a for what the screen leaves out and b for what a pass of float32 sums says of nothing. a and b are fitted to what
was measured of the group; what was not measured is read from there. Losses of groups are added up, and with them what
else a plan rounds (`settings.py`), which is sound near the original and is put right by judging whole plans where it is
not.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from halve.compress import Choice, Statistics
from halve.compress.apply import energy_of, hessian_of
from halve.compress.resolve import Assignment
from halve.compress.rounding import round_weight
from halve.core.plan import RoundingMethod
from halve.formats import FORMATS, Format, Weight
from halve.kernels.ops import Array
from halve.models import ModelConfig, WeightSource
from halve.models.names import EMBEDDING, FusedGroup, Module, groups
from halve.search.fisher import Fisher, Rows
from halve.search.reads import Reads
from halve.search.swaps import Swaps

log = logging.getLogger("halve.search")

# Options of a group that are measured: the ends of what a plan is likely to hold, and between them.
ANCHORS = ("int4-g64", "int8", "int3-g64", "int5-g64", "int2-g64", "int6-g64")
LEAST_KL = 1e-9  # nats: below it a float32 sum over a vocabulary says nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is chosen at once: a fused group, some experts of one, or the embedding table of an untied model (group
    None). reads: of experts; None where every token meets all of the part.
    """

    name: str
    group: FusedGroup | None
    modules: tuple[Module, ...]
    reads: Reads | None = None

    @property
    def of_experts(self) -> bool:
        """Whether it holds experts of a sparse layer."""
        return self.reads is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """An option of a part, in nats per token.

    predicted: by the screen. measured: by a swap, null where it was not. loss: the estimate that plans are made by.
    by_expert: what the screen says of each expert, in their order; empty where none are.
    """

    format: str
    method: RoundingMethod | None
    predicted: float
    measured: float | None
    loss: float
    by_expert: tuple[float, ...] = ()

    @property
    def choice(self) -> Choice:
        """As plans take it."""
        return Choice(format=self.format, method=self.method)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """Scores of every option by part. num_tokens: that swaps were measured on; 0 for none."""

    parts: Mapping[str, tuple[Score, ...]]
    num_tokens: int
    version: int = 1


def parts_of(config: ModelConfig) -> list[Part]:
    """Everything that a plan chooses for, in the order it runs; the untied table first."""
    found = [Part(name=g.name, group=g, modules=g.members, reads=_reads(config, g)) for g in groups(config)]
    if not config.tied:
        table = Module(name=EMBEDDING, shape=(config.vocab_size, config.hidden_size))
        found.insert(0, Part(name="embedding", group=None, modules=(table,)))
    return found


def _reads(config: ModelConfig, group: FusedGroup) -> Reads | None:
    if group.layer is None or group.members[0].expert is None:
        return None
    experts = config.layers[group.layer].experts
    assert experts is not None
    return Reads.even(experts.num_experts, experts.top_k)


def options_of(
    part: Part,
    source: Mapping[str, Format],
    method: Callable[[Format], RoundingMethod],
    *,
    portable: bool,
    allowed: Callable[[Format], bool],
) -> list[Choice]:
    """What a part may be stored in: integer formats that divide its width and are allowed, and as it is.

    method: of a format; experts, whose second moments are not measured, take clip where it says gptq. A portable bundle
    keeps its tables in 16 bits.
    """
    stored = {source[m.name].name for m in part.modules}
    kept = [Choice(format=name, method=None) for name in stored if len(stored) == 1 and not FORMATS[name].scaled]
    if portable and any(m.name == EMBEDDING for m in part.modules):
        return [Choice(format="bf16", method=None)] if stored == {"fp32"} else kept
    widths = {m.shape[1] for m in part.modules}
    formats = [
        f for f in FORMATS.values() if f.kind == "int" and allowed(f) and not any(f.refusal(width) for width in widths)
    ]
    methods = {f.name: method(f) for f in formats}
    if part.of_experts:
        methods = {name: "clip" if chosen == "gptq" else chosen for name, chosen in methods.items()}
    return [Choice(format=f.name, method=methods[f.name]) for f in formats] + kept


class Screen:
    """Rounds options and scores them, part by part.

    most_rows: of a matrix that are rounded and weighed, drawn by how much they count (`Rows.drawn`), where nothing is
    swapped; a large model has hundreds of matrices of thousands of rows, and eighteen formats for each. 256 rows say
    a matrix's error to about 2 %.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        statistics: Statistics,
        fisher: Fisher,
        swaps: Swaps | None,
        most_rows: int | None = None,
    ) -> None:
        assert most_rows is None or swaps is None, "what is swapped in needs all of its rows"
        self.config, self.source, self.statistics, self.fisher, self.swaps = config, source, statistics, fisher, swaps
        self.most_rows = most_rows

    def score(self, part: Part, options: Sequence[Choice], *, measure: Callable[[Choice], bool]) -> list[Score]:
        """Scores of a part's options. measure: whether an option is swapped in."""
        originals = [self._original(m) for m in part.modules]
        drawn = self._draw(part, originals)
        originals = [original[rows.index] for original, rows in zip(originals, drawn, strict=True)]
        near = anchors(options, len(ANCHORS))
        gains: dict[int, float] = {}  # by bits, error of gptq over that of clip
        scores = {o: _score(o, [0.0], 0.0) for o in options if not FORMATS[o.format].scaled}
        for option in sorted((o for o in options if o not in scores), key=lambda o: o not in near):
            bits = FORMATS[option.format].bits
            exact = option.method != "gptq" or option in near or bits not in gains
            stored = self._round(part, originals, option if exact else replace(option, method="clip"))
            predicted = self._predicted(part, originals, stored, drawn)
            if not exact:
                predicted = [gains[bits] * one for one in predicted]
            elif option.method == "gptq":
                clipped = self._round(part, originals, replace(option, method="clip"))
                rough = sum(self._predicted(part, originals, clipped, drawn))
                gains[bits] = sum(predicted) / rough if rough > 0 else 1.0
            measured = None
            if exact and self.swaps is not None and measure(option):
                weights = {m.name: w for m, w in zip(part.modules, stored, strict=True)}
                measured = self.swaps.kl(part.group, weights)
            scores[option] = _score(option, predicted, measured, by_expert=part.of_experts)
        self.source.forget()
        return [scores[o] for o in options]

    def weights(self, part: Part, option: Choice) -> dict[str, Weight]:
        """A part's modules as an option stores them."""
        stored = self._round(part, [self._original(m) for m in part.modules], option)
        return {m.name: weight for m, weight in zip(part.modules, stored, strict=True)}

    def _original(self, module: Module) -> Array:
        weight = self.source.weight(module.name, module.shape)
        assert isinstance(weight, Weight)
        return weight.dequantize()

    def _assignment(self, part: Part, module: Module) -> Assignment:
        group = "lm_head" if part.group and part.group.kind == "lm_head" else part.name
        return Assignment(module=module, group=group, format=None, method=None)

    def _round(self, part: Part, originals: Sequence[Array], option: Choice) -> list[Weight]:
        fmt, statistics = FORMATS[option.format], self.statistics
        stored = []
        for module, values in zip(part.modules, originals, strict=True):
            a = self._assignment(part, module)
            hessian = hessian_of(a, statistics.hessians) if option.method == "gptq" else None
            stored.append(round_weight(values, fmt, option.method, energy_of(a, statistics.energies), hessian))
        return stored

    def _draw(self, part: Part, originals: Sequence[Array]) -> list[Rows]:
        """Rows of each module that are rounded and weighed."""
        if self.most_rows is None or max(map(len, originals)) <= self.most_rows:
            return [Rows.all(len(original)) for original in originals]
        assert self.statistics.energies is not None
        energies = self.statistics.energies.by_group
        importances = [np.zeros(len(original)) for original in originals]
        for name, places in self._weighed_together(part):
            if name not in self.fisher.outputs:
                continue
            members = [originals[i] for i in places]
            for i, found in zip(places, self.fisher.importance(name, members, energies.get(name)), strict=True):
                importances[i] += found
        if part.group is not None and part.modules[0].name == EMBEDDING:  # tied: it is looked up, too
            importances[0] += self.fisher.importance(None, originals[:1], None)[0]
        return [Rows.drawn(importance, self.most_rows) for importance in importances]

    def _weighed_together(self, part: Part) -> list[tuple[str, list[int]]]:
        """Names that the Fisher information knows groups by, and which of the part's modules they hold: one for each
        expert, or for all.
        """
        if part.group is None or not part.of_experts:
            return [] if part.group is None else [(part.name, list(range(len(part.modules))))]
        by_expert: dict[int, list[int]] = {}
        for place, module in enumerate(part.group.members):
            assert module.expert is not None
            by_expert.setdefault(module.expert, []).append(place)
        return [(part.group.of_expert(expert).name, places) for expert, places in by_expert.items()]

    def _predicted(
        self, part: Part, originals: Sequence[Array], stored: Sequence[Weight], drawn: Sequence[Rows]
    ) -> list[float]:
        """Of all that is weighed, or of each expert, which has inputs of its own; one that no token came to costs 0."""
        found = []
        hessians = None if part.of_experts else self.statistics.hessians
        for name, places in self._weighed_together(part):
            assert self.statistics.energies is not None
            if name not in self.fisher.outputs:
                found.append(0.0)
                continue
            found.append(
                self.fisher.of_product(
                    name,
                    [originals[i] for i in places],
                    [stored[i] for i in places],
                    self.statistics.energies.by_group[name],
                    None if hessians is None else hessians.of(name),
                    [drawn[i] for i in places],
                )
            )
        if part.modules[0].name == EMBEDDING:
            found.append(self.fisher.of_table(originals[0], stored[0], drawn[0]))
        return found


def _score(option: Choice, predicted: Sequence[float], measured: float | None, *, by_expert: bool = False) -> Score:
    total = sum(predicted)
    return Score(
        format=option.format,
        method=option.method,
        predicted=total,
        measured=measured,
        loss=total,
        by_expert=tuple(predicted) if by_expert else (),
    )


def anchors(options: Sequence[Choice], how_many: int) -> list[Choice]:
    """The options of a part to measure first: of each anchor the nearest format that the part has."""
    scaled = [o for o in options if FORMATS[o.format].scaled]
    found: list[Choice] = []
    for name in ANCHORS:
        wanted = FORMATS[name].bits_per_weight
        same = [o for o in scaled if FORMATS[o.format].bits == FORMATS[name].bits]
        if same:
            best = min(same, key=lambda o: abs(FORMATS[o.format].bits_per_weight - wanted))
            found += [best] if best not in found else []
    return found[:how_many] if found else scaled[:how_many]


def fitted(scores: Sequence[Score], slope: float = 1.0, offset: float = 0.0) -> list[Score]:
    """Losses of all options of one part from those that were measured, and never more for more bits of the same group.

    slope, offset: a and b where fewer than two, or none, were measured. The fit is in relative terms: an error of a
    tenth counts the same at 2 bits as at 8.
    """
    known = [(s.predicted, s.measured) for s in scores if s.measured is not None and FORMATS[s.format].scaled]
    a, b = slope, offset
    if len(known) == 1:
        a = max(known[0][1] - b, LEAST_KL) / max(known[0][0], LEAST_KL)
    elif len(known) > 1:
        a, b = _fit(np.array(known))
    estimated = []
    for s in scores:
        if not FORMATS[s.format].scaled:
            estimated.append(replace(s, loss=0.0))
        elif s.measured is not None:
            estimated.append(replace(s, loss=max(s.measured, LEAST_KL)))
        else:
            estimated.append(replace(s, loss=max(a * s.predicted + b, LEAST_KL)))
    return estimated


def _fit(known: Array) -> tuple[float, float]:
    """a, b >= 0 of measured = a * predicted + b, least squares of relative errors."""
    predicted, measured = known[:, 0], np.maximum(known[:, 1], LEAST_KL)
    rows = np.stack([predicted / measured, 1 / measured], axis=1)
    from scipy.optimize import nnls

    (a, b), _ = nnls(rows, np.ones(len(rows)))
    return float(a), float(b)


def typical_slope(all_scores: Mapping[str, Sequence[Score]]) -> float:
    """The median of measured over predicted: the slope of a part of which nothing was measured."""
    ratios = [
        s.measured / s.predicted
        for scores in all_scores.values()
        for s in scores
        if s.measured and s.predicted > LEAST_KL
    ]
    return float(np.median(ratios)) if ratios else 1.0


def analyse(
    screen: Screen | None,
    parts: Sequence[Part],
    options: Mapping[str, Sequence[Choice]],
    *,
    num_tokens: int,
    num_anchors: int = len(ANCHORS),
    time_s: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    keep: Callable[[str, list[Score]], None] | None = None,
    known: Mapping[str, Sequence[Score]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Score every option of every part.

    screen: may be None where all parts are known. num_tokens: that it swaps on. time_s: for swaps; when it is over the
    rest is screened only. known: parts that an earlier run scored; keep: told of each part as it is scored. progress:
    parts done, in all.
    """
    started = clock()
    found: dict[str, list[Score]] = {}
    for i, part in enumerate(parts):
        if known and part.name in known:
            found[part.name] = list(known[part.name])
        else:
            assert screen is not None, "parts that are not known need a screen"
            wanted = set(anchors(options[part.name], num_anchors))
            found[part.name] = screen.score(
                part,
                options[part.name],
                measure=lambda o, wanted=wanted: o in wanted and clock() - started <= time_s,  # type: ignore[misc]
            )
            if keep:
                keep(part.name, found[part.name])
        if progress:
            progress(i + 1, len(parts))
    slope = typical_slope(found)
    return Sensitivity(
        parts={name: tuple(fitted(scores, slope)) for name, scores in found.items()},
        num_tokens=num_tokens,
    )


def losses_of(sensitivity: Sensitivity, choices: Mapping[str, Choice]) -> float:
    """The sum of the losses of a plan's choices, nats per token."""
    return sum(next(s.loss for s in sensitivity.parts[name] if s.choice == choice) for name, choice in choices.items())


def all_scores(sensitivity: Sensitivity) -> Iterator[tuple[str, Score]]:
    """Every score with its part's name."""
    for name, scores in sensitivity.parts.items():
        for score in scores:
            yield name, score
