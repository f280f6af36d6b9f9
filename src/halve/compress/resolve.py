"""A plan's patterns to one assignment a module, with every rule of the target checked before any work."""

from dataclasses import dataclass
from typing import Literal

from halve.core.errors import FormatError, PlanError
from halve.core.plan import ActivationFormat, Activations, KVCache, KVFormat, Plan, RoundingMethod, WeightRule, Weights
from halve.formats import FORMATS, Format, check
from halve.formats.base import formats_that_divide
from halve.models.config import ModelConfig
from halve.models.names import EMBEDDING, Module, groups, modules

ActivationChoice = ActivationFormat | Literal["auto"]
KVChoice = KVFormat | Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What becomes of one module; format None: it stays as the checkpoint has it."""

    module: Module
    group: str  # its fused group, the name of its input's energy; "embedding" for an untied table
    format: Format | None
    method: RoundingMethod | None


def resolve(plan: Plan, config: ModelConfig) -> tuple[Assignment, ...]:
    """Match every module of the model with its rule.

    Raises PlanError for unknown formats, a rule that matches nothing, int8 activations that no integer weight meets,
    and in a portable plan for formats that differ inside a fused group and for activations or caches that are rounded;
    FormatError naming the module and the formats that would fit when one does not divide its width.
    """
    check(plan)
    group_of = {m.name: g.name for g in groups(config) for m in g.members}
    used: set[int] = set()
    assignments = []
    for module in modules(config):
        rule = plan.weights.rule_for(module.name)
        if rule is not None:
            used.add(plan.weights.rules.index(rule))
        fmt = FORMATS[rule.format] if rule else None
        if fmt is not None and (reason := fmt.refusal(module.shape[1])):
            fitting = formats_that_divide([module.shape[1]])
            raise FormatError(f"{module.name}: format {fmt.name}: {reason}; formats that fit it: {', '.join(fitting)}")
        group = group_of.get(module.name, "embedding")
        assignments.append(Assignment(module=module, group=group, format=fmt, method=rule.method if rule else None))
    for i, rule in enumerate(plan.weights.rules):
        if i not in used:
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
    for what, chosen in (("activations", plan.activations.format), ("kv_cache", plan.kv_cache.format)):
        if chosen != "fp32":
            raise PlanError(
                f"{what} {chosen}: a portable plan computes in float32, as other engines do that its logits are "
                f"compared with; leave out --portable, or take {what} fp32"
            )


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
    # Portable: computed here as other engines compute it in float32, so that their logits and ours can be compared.
    if activations == "auto":
        activations = "int8" if fmt.kind == "int" and not portable else "fp32"
    if kv_cache == "auto":
        kv_cache = "fp32" if portable else "bf16"
    return Plan(
        portable=portable,
        weights=Weights(rules=tuple(rules)),
        activations=Activations(format=activations),
        kv_cache=KVCache(format=kv_cache),
    )
