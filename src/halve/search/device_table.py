"""What a step costs on this device, from times measured once for a model's shapes and kept on disk.

A step is predicted as

    sum over layers and groups of product(shape, format, T) + head(format, R) + rest(T)
        + answer_pairs * pair(answers) + prompt_pairs * pair(prompts) + engine(R)

T, R: its tokens, and the rows that are sampled. product: a fused group's, with the rounding of its input. rest: all
else that the model does. pairs: keys that queries meet; those of answers, tokens each of a sequence of its own, are
read from the cache once for each, a prompt's once for many of its queries, whatever else is in its step. engine: what
the engine does beside the model. Products depend on what activations are rounded to, rest and pairs on the format of
the cache; layers whose caches differ take each their share. `timing.py` says how all of it is measured.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from halve.core.errors import ConfigError
from halve.core.plan import ActivationFormat
from halve.core.record import from_json, to_json
from halve.engine.scheduler import Step
from halve.formats import FORMATS
from halve.hardware import Device
from halve.kernels.native import NativeOps
from halve.models import ModelConfig
from halve.models.names import FusedGroup, head_group, kind_of, layer_groups
from halve.search.line import Line
from halve.search.reads import Reads
from halve.search.timing import FEWEST_PROMPT, MOST_DECODES, Stopwatch, engine_line

log = logging.getLogger("halve.search")

VERSION = 3  # of tables: raised when what was measured means something else, or was measured wrongly


class StepShape(NamedTuple):
    """What the time of a step depends on. answers, prompts: tokens; rows: that are sampled."""

    answers: int
    answer_pairs: float
    prompts: int
    prompt_pairs: float
    rows: int

    @classmethod
    def of(cls, step: Step) -> "StepShape":
        """That of a planned step; a token and the guesses behind it read their sequence's keys once for all of them."""
        answers, prompts = 0, 0
        answer_pairs, prompt_pairs = 0.0, 0.0
        for chunk in step.chunks:
            count = chunk.num_tokens + len(chunk.draft)
            pairs = count * chunk.start + count * (count + 1) / 2
            if chunk.draft:
                answers, answer_pairs = answers + count, answer_pairs + chunk.start + count
            elif count == 1:
                answers, answer_pairs = answers + 1, answer_pairs + pairs
            else:
                prompts, prompt_pairs = prompts + count, prompt_pairs + pairs
        return cls(answers, answer_pairs, prompts, prompt_pairs, step.num_sampled)

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.answers + self.prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTable:
    """Seconds on one device for one model's shapes.

    device: what they hold for (`device_key`). products: by what activations are rounded to, kind of group and format,
    over tokens; `lm_head` over rows. rest, pair: by the format of the cache, over tokens; pair: of a query's key, all
    layers together. engine: over rows. top_k: experts of a token, 1 without experts.
    """

    device: Mapping[str, str]
    num_layers: int
    products: Mapping[str, Mapping[str, Mapping[str, Line]]]
    rest: Mapping[str, Line]
    pair: Mapping[str, Line]
    engine: Line
    top_k: int = 1
    version: int = VERSION

    def group_s(self, activations: str, kind: str, fmt: str, count: float) -> float:
        """Seconds of one group's product for so many tokens (of the head: rows). Raises ConfigError if unmeasured."""
        found = self.products.get(activations, {}).get(kind, {}).get(fmt)
        if found is None:
            raise ConfigError(
                f"device table: no times of {kind} in {fmt} with {activations} activations; measure it again"
            )
        return found.at(count)

    def layer_s(self, activations: str, kind: str, fmt: str, tokens: float, reads: Reads | None = None) -> float:
        """Seconds of one group's product in a layer. reads: of experts, None for all as they were measured; other
        experts a token take as long as so many more or fewer tokens, of which less than one reads less than one does,
        and some of the experts their share of those that are read.
        """
        if reads is None:
            return self.group_s(activations, kind, fmt, tokens)
        count = tokens * reads.top_k / self.top_k
        return reads.of_step(tokens) * min(1.0, count) * self.group_s(activations, kind, fmt, max(1.0, count))


@dataclass(frozen=True, eq=False)
class PlannedTimes:
    """Step times of one plan: what `halve.engine.simulate` runs on.

    formats: of each group, or part of one's experts, by its name. caches: the format of each layer's cache. reads: of
    experts, as for `DeviceTable.layer_s`, by the same names. Raises ConfigError for a cache that was not measured.
    """

    table: DeviceTable
    formats: Mapping[str, str]
    activations: str
    caches: tuple[str, ...]
    reads: Mapping[str, Reads] = field(default_factory=dict)
    _products: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.caches) - self.table.rest.keys()):
            raise ConfigError(f"device table: no times of a cache in {', '.join(unknown)}; measure it again")

    @property
    def _shares(self) -> dict[str, float]:
        return {name: count / len(self.caches) for name, count in Counter(self.caches).items()}

    def of_step(self, step: Step) -> float:
        """Seconds of a planned step."""
        return self.of(StepShape.of(step))

    def of(self, shape: StepShape) -> float:
        """Seconds of a step."""
        return self.model_s(shape) + self.table.engine.at(shape.rows)

    def model_s(self, shape: StepShape) -> float:
        """Seconds of the model in a step."""
        return self.products_s(shape) + self.others_s(shape)

    def products_s(self, shape: StepShape) -> float:
        """Seconds of a step's products."""
        tokens = shape.tokens
        if tokens not in self._products:
            self._products[tokens] = sum(
                self.table.layer_s(self.activations, kind_of(name), fmt, tokens, self.reads.get(name))
                for name, fmt in self.formats.items()
                if name.startswith("layers.")
            )
        head = (
            self.table.group_s(self.activations, "lm_head", self.formats["lm_head"], shape.rows) if shape.rows else 0.0
        )
        return self._products[tokens] + head

    def others_s(self, shape: StepShape) -> float:
        """Seconds of all that the model does beside products."""
        total = 0.0
        for name, share in self._shares.items():
            rest, pair = self.table.rest[name], self.table.pair[name]
            met = shape.answer_pairs * pair.near(min(shape.answers, MOST_DECODES))
            met += shape.prompt_pairs * pair.near(max(shape.prompts, FEWEST_PROMPT))
            total += share * (rest.at(shape.tokens) + met)
        return total


def device_key(config: ModelConfig, device: Device, isa: str, num_threads: int, version: str) -> dict[str, str]:
    """What measured times depend on: the machine, what runs on it, and the shapes."""
    shapes = [config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim]
    shapes += [config.vocab_size, config.num_layers]
    if (experts := config.layers[0].experts) is not None:
        shapes += [experts.num_experts, experts.top_k, experts.intermediate_size, experts.shared_size]
    return {
        "model": device.model,
        "features": " ".join(sorted(device.features)),
        "isa": isa,
        "threads": str(num_threads),
        "halve": version,
        "shapes": " ".join(map(str, shapes)),
    }


def device_table(
    config: ModelConfig,
    formats: Mapping[ActivationFormat, Iterable[str]],
    *,
    caches: Iterable[str],
    folder: Path | None,
    version: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> DeviceTable:
    """The table of a model's shapes on this device, from disk as far as it is there, else measured and kept.

    formats: that products are needed in, where they fit, by what activations are rounded to. caches: formats that are
    needed. folder: where tables are kept, each time as it is measured; None keeps none. version: of Halve. A file of
    another machine, or broken, is measured again, and that is said.
    """
    ops = {activations: NativeOps(activations=activations) for activations in formats}
    first = next(iter(ops.values()))
    key = device_key(config, first.device, first.isa.name, first.num_threads, version)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = None if folder is None else folder / f"{name}.json"
    table = _read(path, key) if path is not None and path.exists() else None
    kinds = {group.kind: group for group in (*layer_groups(config, 0).values(), head_group(config))}
    known = set() if table is None else {(a, k, f) for a, of in table.products.items() for k in of for f in of[k]}
    products = [
        (activations, kind, fmt)
        for activations, names in formats.items()
        for kind, group in kinds.items()
        for fmt in sorted(_fitting(group, names))
        if (activations, kind, fmt) not in known
    ]
    rests = [one for one in dict.fromkeys(caches) if table is None or one not in table.rest]
    num_todo, num_done = len(products) + len(rests), 0
    if table is None:
        experts = config.layers[0].experts
        table = DeviceTable(
            device=key,
            num_layers=config.num_layers,
            products={},
            rest={},
            pair={},
            engine=engine_line(),
            top_k=experts.top_k if experts else 1,
        )

    def measured(grown: DeviceTable) -> DeviceTable:
        nonlocal num_done
        num_done += 1
        if path is not None:
            _keep(path, grown)
        if progress:
            progress(num_done, num_todo)
        return grown

    for cache in rests:
        rest, pair = Stopwatch(config.with_kv_format(cache), first).rest()
        table = measured(replace(table, rest={**table.rest, cache: rest}, pair={**table.pair, cache: pair}))
    for activations, own in ops.items():
        todo = [(kind, fmt) for needed, kind, fmt in products if needed == activations]
        watch = Stopwatch(config.with_kv_format(next(iter(table.rest))), own) if todo else None
        for kind, fmt in todo:
            assert watch is not None
            line = watch.head(FORMATS[fmt]) if kind == "lm_head" else watch.group(kind, FORMATS[fmt])
            table = measured(replace(table, products=_with(table.products, (activations, kind, fmt), line)))
    return table


def _with(
    products: Mapping[str, Mapping[str, Mapping[str, Line]]], at: tuple[str, str, str], line: Line
) -> dict[str, Mapping[str, Mapping[str, Line]]]:
    """Products and one more."""
    activations, kind, fmt = at
    kinds = products.get(activations, {})
    return {**products, activations: {**kinds, kind: {**kinds.get(kind, {}), fmt: line}}}


def _keep(path: Path, table: DeviceTable) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(to_json(table))
        temporary.replace(path)
    except OSError as error:
        log.warning("device table is not kept: %s: %s", path, error.strerror)


def _read(path: Path, key: Mapping[str, str]) -> DeviceTable | None:
    try:
        table = from_json(DeviceTable, path.read_text(encoding="utf-8"), str(path))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        log.warning("device table can't be read and is measured again: %s", error)
        return None
    if table.version != VERSION:
        log.info("%s: a table of version %d, and this Halve measures version %d", path, table.version, VERSION)
        return None
    if dict(table.device) != dict(key):
        changed = sorted(k for k in key if table.device.get(k) != key[k])
        log.warning("%s: a table of another %s; it is measured again", path, ", ".join(changed))
        return None
    return table


def _fitting(group: FusedGroup, formats: Iterable[str]) -> set[str]:
    return {f for f in formats if not any(FORMATS[f].refusal(m.shape[1]) for m in group.members)}
