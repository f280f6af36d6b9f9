"""One format for the whole model: every format that fits, ranked by the bytes a decode step reads, and bisected.

Bytes read for one token at batch 1 bound its speed on any device whose memory is the limit (arXiv:2312.03863,
2.2), so that they rank formats until measured kernels do. Quality falls with bits up to noise, so the cheapest
format that passes is found by bisection: about four models judged instead of sixteen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from halve.compress import ActivationChoice, Assignment, KVChoice, resolve, uniform_plan
from halve.core.certificate import Measured
from halve.core.errors import FormatError
from halve.core.plan import Plan, RoundingMethod
from halve.formats import FORMATS, Format
from halve.models.config import ModelConfig
from halve.models.names import EMBEDDING, modules, vectors

MethodChoice = RoundingMethod | Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan that could be made. refusal: why it can't, then plan is None."""

    format: str
    method: RoundingMethod
    plan: Plan | None
    bytes_per_token: int | None
    refusal: str | None = None


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


def method_for(fmt: Format, method: MethodChoice) -> RoundingMethod:
    """`auto`: clip for integers, which gains at every width; fp8 has one scale a row that fits its range already."""
    if method != "auto":
        return method
    return "clip" if fmt.kind == "int" else "rtn"


def candidates(
    config: ModelConfig,
    method: MethodChoice,
    *,
    portable: bool,
    source: dict[str, Format],
    activations: ActivationChoice = "auto",
    kv_cache: KVChoice = "auto",
) -> list[Candidate]:
    """Every compressed format as a uniform plan: those that fit, cheapest first, then those that do not, with why.

    source: the stored format of each module of the checkpoint. activations, kv_cache: as `uniform_plan` takes them.
    """
    fitting, refused = [], []
    for fmt in FORMATS.values():
        if not fmt.scaled:
            continue
        chosen = method_for(fmt, method)
        try:
            if fmt.name == "fp8":
                raise FormatError("as many bytes as int8 with fewer significant bits; ask for it by --format fp8")
            plan = plan_for(
                config, fmt, chosen, portable=portable, source=source, activations=activations, kv_cache=kv_cache
            )
            size = bytes_per_token(config, resolve(plan, config), source)
        except FormatError as error:
            refused.append(
                Candidate(format=fmt.name, method=chosen, plan=None, bytes_per_token=None, refusal=str(error))
            )
            continue
        fitting.append(Candidate(format=fmt.name, method=chosen, plan=plan, bytes_per_token=size))
    return sorted(fitting, key=lambda c: c.bytes_per_token or 0) + refused


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
    """Bytes of weights that one decoded token reads at batch 1: every product once, one row of an untied table.

    The cache is left out: it grows with the context and is the same for every uniform plan.
    """
    total = sum(shape[0] * 4 for _, shape in vectors(config))
    for a in assignments:
        fmt = a.format or source[a.module.name]
        looked_up = a.module.name == EMBEDDING and not config.tied
        shape = (1, a.module.shape[1]) if looked_up else a.module.shape
        total += fmt.size_bytes(shape)
    return total


def plain_bytes_per_token(config: ModelConfig, source: dict[str, Format]) -> int:
    """The same for the checkpoint as it is."""
    untouched = [Assignment(module=m, group="", format=None, method=None) for m in modules(config)]
    return bytes_per_token(config, untouched, source)


def cheapest_passing(
    ranked: Sequence[Candidate], judge: Callable[[Candidate], Judged]
) -> tuple[int | None, dict[int, Judged]]:
    """Index of the cheapest candidate that passes, None when even the dearest fails, and all that was judged.

    ranked: cheapest first. The candidate just below the answer was judged and failed.
    """
    judged: dict[int, Judged] = {}
    low, high = -1, len(ranked)  # below low all fail; from high on all pass
    while high - low > 1:
        middle = (low + high) // 2
        judged[middle] = judge(ranked[middle])
        if judged[middle].passed:
            high = middle
        else:
            low = middle
    return (high if high < len(ranked) else None), judged
