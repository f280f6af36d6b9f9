"""Plans of one format, and the bytes that a plan reads for a token."""

from collections.abc import Sequence
from typing import Literal

from halve.compress import ActivationChoice, Assignment, KVChoice, uniform_plan
from halve.core.plan import Plan, RoundingMethod
from halve.formats import Format
from halve.models import sizes
from halve.models.config import ModelConfig

MethodChoice = RoundingMethod | Literal["auto"]


def method_for(fmt: Format, method: MethodChoice) -> RoundingMethod:
    """`auto`: clip for integers, which gains at every width; fp8 has one scale a row that fits its range already."""
    if method != "auto":
        return method
    return "clip" if fmt.kind == "int" else "rtn"


def plan_for(
    config: ModelConfig,
    fmt: Format,
    method: RoundingMethod,
    *,
    portable: bool,
    source: dict[str, Format],
    activations: ActivationChoice = "auto",
    kv_cache: KVChoice = "auto",
) -> Plan:
    """The uniform plan of a format over a checkpoint whose modules are stored as `source` says."""
    widest = max(f.bits for f in source.values())
    return uniform_plan(
        config,
        fmt,
        method,
        portable=portable,
        source_bits=widest,
        activations=activations,
        kv_cache=kv_cache,
    )


def bytes_per_token(config: ModelConfig, assignments: Sequence[Assignment], source: dict[str, Format]) -> int:
    """Bytes of weights that one decoded token reads at batch 1 by a plan over a checkpoint stored as `source` says."""
    chosen = {a.module.name: a.format or source[a.module.name] for a in assignments}
    return sizes.bytes_per_token(config, chosen)
