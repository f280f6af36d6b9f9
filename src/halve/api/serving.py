"""How an engine is to divide its steps for a workload: sequences, tokens, and prompts beside answers, by simulation."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from halve.api.progress import Advance
from halve.core.plan import Serving
from halve.engine import EngineConfig, Simulation

log = logging.getLogger("halve")

# Tried one after the other, the others held; the tokens of a step end where products were timed.
TRIED: dict[str, tuple[int, ...]] = {
    "max_num_seqs": (8, 16, 32, 64, 128),
    "max_prefill_beside_decode": (64, 128, 256, 512),
    "max_tokens_per_step": (128, 256, 512),
}
WORTHWHILE = 0.05  # of the speed: less is within what a simulation may be wrong by


def best_serving(simulated: Callable[[EngineConfig], Simulation], progress: Advance) -> Serving:
    """What is to differ from an engine's own way, and is worth it.

    simulated: the workload as such an engine serves it, at the highest pace at which its service level is kept.
    """
    chosen = Serving()
    usual = best = simulated(engine_for(chosen))
    num_ways, num_done = sum(map(len, TRIED.values())), 0
    for name, values in TRIED.items():
        for value in values:
            num_done += 1
            progress(num_done, num_ways)
            changed: dict[str, Any] = {name: value}
            tried = replace(chosen, **changed)
            if _holds(tried) and is_worthwhile(found := simulated(engine_for(tried)), best):
                best, chosen = found, tried
    if chosen.chosen:
        words = ", ".join(f"{name} {value}" for name, value in chosen.chosen.items())
        log.info(
            "steps with %s: %.4g tokens/s by the simulation, not %.4g", words, best.output_tok_s, usual.output_tok_s
        )
    return chosen


def engine_for(serving: Serving) -> EngineConfig:
    """The engine that a plan asks for."""
    usual = EngineConfig()
    return replace(
        usual,
        max_num_seqs=serving.max_num_seqs or usual.max_num_seqs,
        max_tokens_per_step=serving.max_tokens_per_step or usual.max_tokens_per_step,
        max_prefill_beside_decode=serving.max_prefill_beside_decode or usual.max_prefill_beside_decode,
    )


def _holds(serving: Serving) -> bool:
    """Whether a step has room for a token of every sequence."""
    usual = EngineConfig()
    most = serving.max_tokens_per_step or usual.max_tokens_per_step
    return (serving.max_num_seqs or usual.max_num_seqs) <= most


def is_worthwhile(found: Simulation, before: Simulation) -> bool:
    """Whether a way of serving is clearly better than another; keeping the service level counts before speed."""
    if found.level_met != before.level_met:
        return found.level_met
    return found.output_tok_s > before.output_tok_s * (1 + WORTHWHILE)
