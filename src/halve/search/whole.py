"""One format for all of a model: what is searched where single groups are not told apart."""

from collections.abc import Mapping

from halve.compress import ActivationChoice, KVChoice, resolve
from halve.formats import FORMATS, Format
from halve.models.config import ModelConfig
from halve.models.names import modules
from halve.search.front import Candidate
from halve.search.uniform import bytes_per_token, method_for, plan_for


def uniform_candidates(
    config: ModelConfig,
    source: Mapping[str, Format],
    *,
    portable: bool,
    activations: ActivationChoice = "auto",
    kv_cache: KVChoice = "auto",
) -> tuple[Candidate, ...]:
    """Every integer format that fits all of a model's matrices, as a plan for all of it; by bytes, cheapest first."""
    found = []
    stored = dict(source)
    for fmt in FORMATS.values():
        if fmt.kind != "int" or any(fmt.refusal(module.shape[1]) for module in modules(config)):
            continue
        if portable and fmt.bits not in (4, 8):
            continue
        method = method_for(fmt, "auto")
        plan = plan_for(
            config, fmt, method, portable=portable, source=stored, activations=activations, kv_cache=kv_cache
        )
        size = bytes_per_token(config, resolve(plan, config), stored)
        found.append(Candidate(format=fmt.name, method=method, plan=plan, bytes_per_token=size, choices={}))
    return tuple(sorted(found, key=lambda candidate: candidate.bytes_per_token))
