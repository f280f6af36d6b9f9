"""A plan's patterns to one assignment a module, with every rule of the target checked before any work."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from halve.core.errors import FormatError, PlanError
from halve.core.plan import ActivationFormat, Activations, KVCache, KVFormat, Plan, RoundingMethod, WeightRule, Weights
from halve.formats import FORMATS, Format, check
from halve.formats.base import formats_that_divide
from halve.models.config import ModelConfig
from halve.models.names import EMBEDDING, LM_HEAD, Module, experts_of, group_pattern, groups, layer_groups, modules

LAYERS = "model.layers."  # before the number of a layer

ActivationChoice = ActivationFormat | Literal["auto"]
KVChoice = KVFormat | Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What becomes of one module; format None: it stays as the checkpoint has it."""

    module: Module
    group: str  # its fused group; "embedding" for an untied table
    format: Format | None
    method: RoundingMethod | None

    @property
    def inputs(self) -> str:
        """The name of its input's energy: its group's, which for an expert are those of its own tokens."""
        return self.group if self.module.expert is None else f"{self.group}.{self.module.expert}"


def resolve(plan: Plan, config: ModelConfig) -> tuple[Assignment, ...]:
    """Match every module of the model with its rule.

    Raises PlanError for unknown formats, a rule that matches nothing, a layer that is not there, int8 activations that
    no integer weight meets, and in a portable plan for formats that differ inside a fused group and for activations or
    caches that are rounded; FormatError naming the module and the formats that would fit when one does not divide its
    width.
    """
    check(plan)
    plan.kv_cache.formats(config.num_layers)
    group_of = {m.name: g.name for g in groups(config) for m in g.members}
    used: set[int] = set()
    assignments = []
    near: dict[str, Weights] = {}  # rules that may match what begins so: those of experts are thousands
    for module in modules(config):
        beginning = module.name[: module.name.find(".", len(LAYERS)) + 1] if module.name.startswith(LAYERS) else ""
        if beginning not in near:
            near[beginning] = plan.weights.of_names(beginning)
        rule = near[beginning].rule_for(module.name)
        if rule is not None:
            used.add(id(rule))
        fmt = FORMATS[rule.format] if rule else None
        if fmt is not None and (reason := fmt.refusal(module.shape[1])):
            fitting = formats_that_divide([module.shape[1]])
            raise FormatError(f"{module.name}: format {fmt.name}: {reason}; formats that fit it: {', '.join(fitting)}")
        group = group_of.get(module.name, "embedding")
        assignments.append(Assignment(module=module, group=group, format=fmt, method=rule.method if rule else None))
    for i, rule in enumerate(plan.weights.rules):
        if id(rule) not in used:
            raise PlanError(f"plan.weights.rules[{i}]: pattern {rule.pattern!r} matches no module that is still free")
    if plan.portable:
        _check_portable(plan, assignments, config)
    _check_activations(plan, assignments)
    return tuple(assignments)


def _check_activations(plan: Plan, assignments: list[Assignment]) -> None:
    stored = [a.format for a in assignments]
    if plan.activations.format == "int8" and all(f is not None and f.kind == "float" for f in stored):
        names = sorted({f.name for f in stored if f})
        raise PlanError(
            f"activations int8: they meet integer weights only, and all weights are floats ({', '.join(names)}); "
            "take fp32 or bf16 activations, or an integer format"
        )
    if plan.activations.format == "fp8" and all(f is not None and f.name != "fp8" for f in stored):
        names = sorted({f.name for f in stored if f})
        raise PlanError(
            f"activations fp8: they meet fp8 weights only, and none is stored so ({', '.join(names)}); take fp32, bf16 "
            "or, with integer weights, int8 activations"
        )


def _check_portable(plan: Plan, assignments: list[Assignment], config: ModelConfig) -> None:
    if any(layer.experts is not None and layer.experts.stacked for layer in config.layers):
        raise PlanError(
            f"portable: other engines read the experts of a {config.architecture} stacked in one tensor; leave out "
            "--portable"
        )
    formats: dict[str, dict[str, str]] = {}
    for a in assignments:
        name = a.format.name if a.format else "as it is"
        formats.setdefault(a.group, {})[a.module.name] = name
        if a.module.name == EMBEDDING and a.format is not None and a.format.bits < 16:
            table = "tied embedding table" if config.tied else "embedding table"
            raise PlanError(f"{a.module.name}: a portable bundle keeps its {table} in 16 bits, not {name}")
    for group, members in formats.items():
        if len(set(members.values())) > 1:
            raise PlanError(f"{group}: a portable bundle needs one format for a fused group, not {members}")
    kept = [("kv_cache", chosen) for chosen in plan.kv_cache.names]
    for what, chosen in (("activations", plan.activations.format), *kept):
        if chosen != "fp32":
            raise PlanError(
                f"{what} {chosen}: a portable plan computes in float32, as other engines do that its logits are "
                f"compared with; leave out --portable, or take {what} fp32"
            )


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Choice:
    """What a group is stored in. method: None where the format is stored as it is."""

    format: str
    method: RoundingMethod | None

    def __str__(self) -> str:
        return f"{self.format} ({self.method})" if self.method else self.format


def grouped_plan(
    config: ModelConfig,
    choices: Mapping[str, Choice],
    *,
    portable: bool,
    activations: ActivationFormat,
    kv_cache: KVFormat | KVCache,
) -> Plan:
    """The plan that stores each fused group, by its name, as chosen; and `embedding`, the table of an untied model.

    Some experts of a group may have a choice of their own, under the name of `FusedGroup.of_experts`. What has no
    choice stays as the checkpoint has it. Rules are few: what most experts of a layer have, and then what most layers
    have, is said once, last. Raises PlanError for a name that is no group of this model.
    """
    known = {group.name: group for group in groups(config)}
    named = {experts_of(name)[0] for name in choices}
    if unknown := sorted(named - known.keys() - ({"embedding"} if not config.tied else set())):
        raise PlanError(f"choices: {unknown} are no groups of this model; they are {', '.join(known)}")
    of_experts: dict[str, dict[Choice, list[int]]] = {}
    for name, choice in choices.items():
        group_name, experts = experts_of(name)
        of_experts.setdefault(group_name, {}).setdefault(choice, []).extend(experts or ())
    rules: list[WeightRule] = []
    common: list[WeightRule] = []
    by_pattern: dict[str, dict[int, Choice | None]] = {}
    for layer in range(config.num_layers):
        for kind, group in layer_groups(config, layer).items():
            pattern, by_choice = group_pattern(config, layer, kind), of_experts.get(group.name, {})
            ordered = sorted(by_choice, key=lambda choice: -len(by_choice[choice]))
            for other in ordered[1:]:
                some = [pattern.replace(".experts.*.", f".experts.{n}.") for n in number_patterns(by_choice[other])]
                rules += [_rule(one.format(layer), other) for one in some]
            by_pattern.setdefault(pattern, {})[layer] = ordered[0] if ordered else None
    for pattern, chosen in by_pattern.items():
        counts = Counter(chosen.values())
        most = None if None in counts else counts.most_common(1)[0][0]
        rules += [_rule(pattern.format(i), c) for i, c in chosen.items() if c is not None and c != most]
        if most is not None:
            common.append(_rule(pattern.format("*"), most))
    if len(common) == len(by_pattern) and len({(r.format, r.method) for r in common}) == 1:
        common = [WeightRule(pattern="model.layers.*", format=common[0].format, method=common[0].method)]
    tables = {"lm_head": EMBEDDING if config.tied else LM_HEAD, "embedding": EMBEDDING}
    whole = [_rule(module, choices[name]) for name, module in tables.items() if name in choices]
    return Plan(
        portable=portable,
        weights=Weights(rules=(*rules, *common, *whole)),
        activations=Activations(format=activations),
        kv_cache=kv_cache if isinstance(kv_cache, KVCache) else KVCache(format=kv_cache),
    )


def number_patterns(numbers: Iterable[int]) -> list[str]:
    """Shell wildcards of whole numbers, one for all that differ in their last digit: `[035]`, `1[27]`."""
    by_tens: dict[str, str] = {}
    for number in sorted(numbers):
        tens = str(number)[:-1]
        by_tens[tens] = by_tens.get(tens, "") + str(number)[-1]
    return [tens + (digits if len(digits) == 1 else f"[{digits}]") for tens, digits in by_tens.items()]


def _rule(pattern: str, choice: Choice) -> WeightRule:
    return WeightRule(pattern=pattern, format=choice.format, method=choice.method)


def rounded_format(
    portable: bool, activations: ActivationChoice, kv_cache: KVChoice, kind: Literal["int", "float"] = "int"
) -> tuple[ActivationFormat, KVFormat]:
    """What auto stands for: int8 activations where integer weights meet them and a bf16 cache, in portable plans fp32.

    Portable: computed here as other engines compute it in float32, so that their logits and ours can be compared.
    """
    if activations == "auto":
        activations = "int8" if kind == "int" and not portable else "fp32"
    if kv_cache == "auto":
        kv_cache = "fp32" if portable else "bf16"
    return activations, kv_cache


def uniform_plan(
    config: ModelConfig,
    fmt: Format,
    method: RoundingMethod,
    *,
    portable: bool,
    source_bits: int,
    activations: ActivationChoice = "auto",
    kv_cache: KVChoice = "auto",
) -> Plan:
    """The plan that stores every product in `fmt`.

    The embedding table goes along natively; in a portable plan it stays (16 bits; 32-bit sources become bf16).
    source_bits: of the checkpoint's widest float. activations: auto takes int8 where integer weights meet them, fp32
    with floats and in a portable plan. kv_cache: auto takes bf16, and fp32 in a portable plan.
    """
    rules = [WeightRule(pattern="model.layers.*", format=fmt.name, method=method)]
    if not config.tied:
        rules.append(WeightRule(pattern="lm_head", format=fmt.name, method=method))
    if not portable:
        rules.append(WeightRule(pattern=EMBEDDING, format=fmt.name, method=method))
    elif source_bits > 16:
        rules.append(WeightRule(pattern=EMBEDDING, format="bf16"))
    activations, kv_cache = rounded_format(portable, activations, kv_cache, fmt.kind)
    return Plan(
        portable=portable,
        weights=Weights(rules=tuple(rules)),
        activations=Activations(format=activations),
        kv_cache=KVCache(format=kv_cache),
    )
