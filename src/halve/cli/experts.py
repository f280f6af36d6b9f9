"""What experts did, for `halve generate` and `halve batch`: as JSON, and as a line on stderr."""

import sys
from typing import TYPE_CHECKING, Any

from halve.core.record import to_dict
from halve.core.units import format_bytes

if TYPE_CHECKING:
    from halve.engine import EngineMetrics


def expert_facts(metrics: "EngineMetrics") -> dict[str, Any]:
    """`experts` of a sparse model's JSON; nothing for a dense one."""
    if metrics.experts_per_step is None:
        return {}
    return {
        "experts": {
            "tokens": metrics.expert_tokens,
            "per_step": metrics.experts_per_step,
            "imbalance": metrics.expert_imbalance,
            "cache": None if metrics.expert_cache is None else to_dict(metrics.expert_cache),
        }
    }


def show_expert_cache(metrics: "EngineMetrics") -> None:
    """What reading experts from disk came to; nothing where all lie in memory."""
    use = metrics.expert_cache
    if use is None or use.hit_rate is None:
        return
    ahead = f", {use.num_ahead_right / use.num_ahead:.0%} of {use.num_ahead:,} rightly ahead" if use.num_ahead else ""
    print(
        f"halve: experts: {use.hit_rate:.1%} of {use.hits + use.misses:,} were in memory "
        f"({format_bytes(use.size_bytes)} of {format_bytes(use.expert_bytes)}); {format_bytes(use.read_bytes)} read"
        f"{ahead}; {use.wait_s:.1f} s of {metrics.busy_s:.1f} s waited",
        file=sys.stderr,
    )
