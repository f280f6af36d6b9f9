"""Plans of one format, and the bytes that a plan reads for a token.

Bytes read for one token at batch 1 bound its speed on any device whose memory is the limit (arXiv:2312.03863, 2.2), so
that they stand for its cost where no times were measured.
"""

import math
from collections.abc import Sequence
from typing import Literal

from halve.compress import ActivationChoice, Assignment, KVChoice, uniform_plan
from halve.core.plan import Plan, RoundingMethod
from halve.formats import Format
from halve.models.config import ModelConfig
from halve.models.names import EMBEDDING, layer_of, modules, vectors

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
    """Bytes of weights that one decoded token reads at batch 1: every product once, one row of an untied table, and of
    a sparse layer's experts as many as a token runs through.

    The cache is left out: it grows with the context and is the same for every uniform plan.
    """
    total: float = sum(math.prod(shape) * 4 for _, shape in vectors(config))
    for a in assignments:
        fmt = a.format or source[a.module.name]
        looked_up = a.module.name == EMBEDDING and not config.tied
        shape = (1, a.module.shape[1]) if looked_up else a.module.shape
        size = fmt.size_bytes(shape)
        if a.module.expert is not None:
            experts = config.layers[layer_of(a.module.name)].experts
            assert experts is not None
            total += size * experts.top_k / experts.num_experts
        else:
            total += size
    return round(total)


def plain_bytes_per_token(config: ModelConfig, source: dict[str, Format]) -> int:
    """The same for the checkpoint as it is."""
    untouched = [Assignment(module=m, group="", format=None, method=None) for m in modules(config)]
    return bytes_per_token(config, untouched, source)
