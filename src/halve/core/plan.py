"""The plan: how every part of a model is stored and run. Search writes it; compress, models, engine, report read it.

A plan is made of sections, each with its own version. Reading an old plan runs the migrations of each section in
turn, so that a file written today stays readable; a section or version from a newer Halve is refused by name.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from halve.core.errors import ConfigError, PlanError
from halve.core.record import from_dict, parse_json, shown, to_dict

Migration = Callable[[dict[str, Any]], dict[str, Any]]
ActivationFormat = Literal["fp32", "bf16", "int8", "fp8"]
KVFormat = Literal["fp32", "bf16", "int8", "int4", "fp8"]
RoundingMethod = Literal["rtn", "clip", "gptq"]
SpeculationMethod = Literal["none", "ngram", "draft"]

# MIGRATIONS[section][n] turns version n of that section into version n + 1; "plan" is the outer object.
MIGRATIONS: dict[str, dict[int, Migration]] = {
    "plan": {},
    "weights": {},
    "activations": {},
    "kv_cache": {1: lambda raw: {**raw, "layers": []}},  # formats of single layers came
    "experts": {},
    "speculation": {},
    "serving": {},
}

MAX_DRAFT_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRule:
    """Modules whose name matches `pattern` (shell wildcards) are stored in `format`, rounded by `method`."""

    pattern: str
    format: str
    method: RoundingMethod | None = None  # None: stored as it is (16 and 32 bits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Rules in order, the first match wins; a module that none matches keeps the checkpoint's own format."""

    rules: tuple[WeightRule, ...]
    version: int = 1

    def rule_for(self, name: str) -> WeightRule | None:
        """The rule of module `name`, such as `model.layers.0.self_attn.q_proj`."""
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def of_names(self, beginning: str) -> "Weights":
        """The rules without those whose pattern can't match a name that begins so."""
        known = ((rule, re.split(r"[*?\[]", rule.pattern, maxsplit=1)[0]) for rule in self.rules)
        return Weights(
            rules=tuple(rule for rule, plain in known if plain.startswith(beginning) or beginning.startswith(plain))
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """The input of every projection is rounded to this format before the product.

    int8: the input of products with integer weights, one float32 scale a token, found when the token is there
    (`halve.formats.activations.int8_rows`); the input of products with float weights is not rounded then.
    fp8: the same for products with fp8 weights (`halve.formats.activations.fp8_rows`); for GPUs, not for our C++.
    """

    format: ActivationFormat = "fp32"
    version: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCaches:
    """Layers, by their numbers, whose keys and values are kept in a format of their own. Raises PlanError."""

    layers: tuple[int, ...]
    format: KVFormat

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise PlanError(f"kv_cache.layers: {list(self.layers)} in {self.format}; name layers, 0 for the first")


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys and values are rounded to this format before attention reads them; `layers` names those in another.

    int8: one bf16 scale a token and head for keys and one for values (`halve.kernels.reference.round_kv_int8`).
    int4: one for each 32 dims of these, keys rotated by a Hadamard matrix (`halve.kernels.reference.round_keys_int4`).
    fp8: e4m3 without a scale, beyond 448 cut off; for GPUs, not for our C++. Raises PlanError for a layer named twice.
    """

    format: KVFormat = "bf16"
    layers: tuple[LayerCaches, ...] = ()
    version: int = 2

    def __post_init__(self) -> None:
        named = [layer for some in self.layers for layer in some.layers]
        if twice := sorted({layer for layer in named if named.count(layer) > 1}):
            raise PlanError(f"kv_cache.layers: {twice} are named twice; a layer has one format")

    @classmethod
    def of_layers(cls, formats: Sequence[KVFormat]) -> "KVCache":
        """The cache of layers in these formats, in order; the one that most have is said once."""
        counts = Counter(formats)
        most = counts.most_common(1)[0][0]
        others = (
            LayerCaches(layers=tuple(i for i, one in enumerate(formats) if one == name), format=name)
            for name in counts
            if name != most
        )
        return cls(format=most, layers=tuple(others))

    def formats(self, num_layers: int) -> tuple[KVFormat, ...]:
        """The format of each layer of a model. Raises PlanError for a layer that it does not have."""
        own = {layer: some.format for some in self.layers for layer in some.layers}
        if beyond := sorted(layer for layer in own if layer >= num_layers):
            raise PlanError(f"kv_cache.layers: {beyond} of a model with layers 0 to {num_layers - 1}")
        return tuple(own.get(layer, self.format) for layer in range(num_layers))

    @property
    def names(self) -> tuple[KVFormat, ...]:
        """Every format that a layer may be in, that of most layers first."""
        return tuple(dict.fromkeys((self.format, *(some.format for some in self.layers))))

    def __str__(self) -> str:
        """In words, such as `int4, int8 in layers 0 and 3`."""
        return ", ".join([self.format, *(f"{one.format} in {_layers(one.layers)}" for one in self.layers)])


def _layers(numbers: tuple[int, ...]) -> str:
    *before, last = map(str, sorted(numbers))
    return f"layers {', '.join(before)} and {last}" if before else f"layer {last}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertGroup:
    """Experts of one layer that become one, by their numbers in the original: their mean by `weights`, which sum to 1.

    Raises PlanError.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.members or len(self.members) != len(self.weights) or min(self.members) < 0:
            raise PlanError(
                f"experts: group {list(self.members)} with weights {list(self.weights)}; each needs its own"
            )
        if abs(sum(self.weights) - 1) > 1e-3 or min(self.weights) < 0:
            raise PlanError(f"experts: weights {list(self.weights)} of {list(self.members)}: none below 0, sum 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExperts:
    """What becomes of the experts of one layer. groups: one for each that stays; who is in none is left out."""

    layer: int
    groups: tuple[ExpertGroup, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPlan:
    """Which experts of a sparse model stay, and how many of them a token runs through.

    top_k: None for as many as in the original. layers: every sparse layer, all with as many groups, since a
    config.json has one number of experts; empty where all experts stay. Raises PlanError.
    """

    top_k: int | None = None
    layers: tuple[LayerExperts, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise PlanError(f"experts.top_k: {self.top_k} must be at least 1")
        if len({len(layer.groups) for layer in self.layers}) > 1 or any(not layer.groups for layer in self.layers):
            raise PlanError("experts.layers: every sparse layer must keep the same number of experts, at least one")
        for layer in self.layers:
            members = [m for group in layer.groups for m in group.members]
            if len(set(members)) < len(members):
                raise PlanError(f"experts.layers: layer {layer.layer} names an expert twice")

    @property
    def changes(self) -> bool:
        """Whether anything becomes of the experts at all."""
        return self.top_k is not None or bool(self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """Where guesses of the next tokens come from; answers are the same with and without.

    ngram: from what followed when the same tokens came before. draft: from a smaller model with the same tokenizer, at
    `path` (a directory, of a bundle also relative to it, or ORG/NAME). max_tokens: guesses at a time, at most; how many
    pay is measured while it runs. Raises ConfigError.
    """

    method: SpeculationMethod = "none"
    max_tokens: int = 8
    path: str | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError(f"speculation.max_tokens: {self.max_tokens} must be from 1 to {MAX_DRAFT_TOKENS}")
        if (self.method == "draft") != bool(self.path):
            raise ConfigError(
                f"speculation.path: {self.path!r} with method {self.method!r}; name a model with method 'draft', and "
                "none with another"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """How an engine on a CPU divides its steps over this model; null where nothing speaks against the engine's own.

    max_num_seqs: sequences of a step. max_tokens_per_step: tokens of a step, prompts and decodes together.
    max_prefill_beside_decode: tokens of prompts in a step that also decodes. Raises ConfigError.
    """

    max_num_seqs: int | None = None
    max_tokens_per_step: int | None = None
    max_prefill_beside_decode: int | None = None
    version: int = 1

    def __post_init__(self) -> None:
        for name, value in self.chosen.items():
            if value < 1:
                raise ConfigError(f"serving.{name}: {value} must be 1 or more")

    @property
    def chosen(self) -> dict[str, int]:
        """What is not left to the engine, by name."""
        names = ("max_num_seqs", "max_tokens_per_step", "max_prefill_beside_decode")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How a model is stored and run.

    portable: the bundle opens in transformers (embeddings 16-bit, fused layers uniform); else all parts are free.
    Format names are checked by `halve.formats.check`, since they live in a room above this one.
    """

    portable: bool = False
    weights: Weights = field(default_factory=lambda: Weights(rules=()))
    activations: Activations = field(default_factory=Activations)
    kv_cache: KVCache = field(default_factory=KVCache)
    experts: ExpertPlan = field(default_factory=ExpertPlan)
    speculation: Speculation = field(default_factory=Speculation)
    serving: Serving = field(default_factory=Serving)
    version: int = 1

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(to_dict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan of this or an older version. Raises PlanError naming what is unknown or too new."""
        try:
            return from_dict(cls, migrate(parse_json(text, "plan")), "plan")
        except ConfigError as error:
            raise PlanError(str(error)) from error


# The version that this Halve writes, by section; "plan" is the outer object. It rises when what an older file says
# would be read as something else; a new value of a field does not raise it: a Halve without it refuses it by name.
VERSIONS = {"plan": 1, "weights": 1, "activations": 1, "kv_cache": 2, "experts": 1, "speculation": 1, "serving": 1}


def migrate(
    raw: Any,
    migrations: Mapping[str, Mapping[int, Migration]] = MIGRATIONS,
    versions: Mapping[str, int] = VERSIONS,
) -> dict[str, Any]:
    """Bring every section of a plan's JSON up to today's version, oldest step first.

    Raises PlanError when a version is missing, is newer than this Halve, or has no step that leads on.
    """
    plan = _upgrade("plan", raw, migrations["plan"], versions["plan"])
    sections = versions.keys() - {"plan"}
    return {
        key: _upgrade(key, value, migrations[key], versions[key]) if key in sections else value
        for key, value in plan.items()
    }


def _upgrade(name: str, raw: Any, steps: Mapping[int, Migration], target: int) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise PlanError(f"{name}: expected an object, got {shown(raw)}")
    version = raw.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise PlanError(f"{name}.version: expected a whole number, got {shown(version)}")
    if version > target:
        raise PlanError(f"{name}: version {version} was written by a newer Halve (this one reads up to {target})")
    while version < target:
        if version not in steps:
            raise PlanError(f"{name}: version {version} can't be read any more; known steps start at {sorted(steps)}")
        version, raw = version + 1, {**steps[version](raw), "version": version + 1}
    return dict(raw)
