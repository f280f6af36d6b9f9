"""Workloads that are known by name: how long requests of real traces were, what they shared, how their load swung.

Only statistics ship, not the traces: quantiles of lengths, the mean, the share of prompts that earlier prompts began
with, and the busiest minute over the mean. Lengths drawn from quantiles lie on straight lines between them, and prompts
and answers are drawn apart (their correlation in the traces is -0.11 and 0.07).
"""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from halve.core.errors import ConfigError
from halve.core.workload import ServiceLevel, Workload, WorkloadRequest
from halve.economics.costs import Mix
from halve.economics.fields import nearest

QUANTILES = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """prompt, output: tokens at `QUANTILES`. cached_share: of prompt tokens, that earlier prompts began with.

    peak: the busiest minute's requests over the mean minute's; 1 where the trace has no times.
    """

    name: str
    source: str
    mean_prompt: float
    mean_output: float
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    cached_share: float = 0.0
    peak: float = 1.0

    @property
    def mix(self) -> Mix:
        """The average request."""
        prompt = Decimal(repr(self.mean_prompt))
        return Mix(
            prompt_tokens=prompt,
            output_tokens=Decimal(repr(self.mean_output)),
            cached_tokens=prompt * Decimal(repr(self.cached_share)),
        )

    def workload(self, requests: int, requests_per_s: float, level: ServiceLevel, seed: int = 0) -> Workload:
        """Requests of these lengths that come at random, so many a second on average."""
        draw = random.Random(seed)
        at, rows = 0.0, []
        for _ in range(requests):
            at += draw.expovariate(requests_per_s)
            rows.append(
                WorkloadRequest(
                    arrival_s=at,
                    prompt_tokens=max(1, round(_drawn(self.prompt, draw.random()))),
                    output_tokens=max(1, round(_drawn(self.output, draw.random()))),
                )
            )
        return Workload(name=self.name, requests=tuple(rows), service_level=level)


def _drawn(values: Sequence[int], share: float) -> float:
    """The value at a share of the distribution that quantiles describe."""
    i = min(bisect_right(QUANTILES, share), len(QUANTILES) - 1)
    low, high = QUANTILES[i - 1], QUANTILES[i]
    return values[i - 1] + (values[i] - values[i - 1]) * (share - low) / (high - low)


# As scripts/workload_statistics.py prints them of the traces that `source` names.
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="chat",
            source="Azure LLM inference trace 2023, conversation: 19,366 requests (CC BY 4.0; arXiv:2311.18677)",
            mean_prompt=1154.7,
            mean_output=211.1,
            prompt=(2, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050),
            output=(7, 54, 85, 129, 395, 424, 451, 601, 1000),
            peak=1.52,
        ),
        Preset(
            name="code",
            source="Azure LLM inference trace 2023, code: means and peak (CC BY 4.0); the shape of lengths is chat's",
            mean_prompt=2048.0,
            mean_output=28.0,
            prompt=(4, 367, 702, 1809, 2109, 4849, 7242, 7346, 24920),
            output=(1, 7, 11, 17, 52, 56, 60, 80, 133),
            peak=3.9,
        ),
        Preset(
            name="retrieval",
            source="Mooncake conversation trace: 12,031 requests (Apache-2.0; arXiv:2407.00079), blocks of 512 tokens",
            mean_prompt=12035.1,
            mean_output=342.6,
            prompt=(891, 964, 2307, 6909, 15366, 27367, 39549, 85401, 126195),
            output=(1, 24, 157, 350, 472, 597, 698, 1120, 2000),
            cached_share=0.3736,
            peak=1.21,
        ),
        Preset(
            name="batch",
            source="arXiv summarization lengths of Vidur: 28,257 pairs (MIT; arXiv:2405.05465); no times of arrival",
            mean_prompt=2588.1,
            mean_output=291.4,
            prompt=(1, 1242, 1986, 2730, 3370, 3702, 3813, 3933, 4054),
            output=(5, 78, 115, 167, 242, 372, 736, 3270, 4056),
        ),
    )
}


def find_preset(name: str) -> Preset:
    """A workload by its name. Raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(
            f"workload {name!r}: neither a trace file nor one of {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def preset_of(workload: Workload) -> Preset:
    """The same statistics of a trace of one's own; arrivals are taken from it where it spans time."""
    requests = workload.requests
    prompt, output = (sorted(getattr(r, f"{what}_tokens") for r in requests) for what in ("prompt", "output"))
    seen: set[int] = set()
    cached = 0
    for request in requests:
        for i, name in enumerate(request.prefix_blocks):
            if name not in seen:
                break
            cached += min(workload.block_tokens, request.prompt_tokens - i * workload.block_tokens)
        seen.update(request.prefix_blocks)
    minutes = int(workload.duration_s // 60)
    peak = 1.0
    if minutes >= 5:
        counts = [0] * minutes
        for request in requests:
            if request.arrival_s < minutes * 60:
                counts[int(request.arrival_s // 60)] += 1
        peak = max(counts) * minutes / sum(counts)
    return Preset(
        name=workload.name,
        source=f"{len(requests):,} requests of {workload.name}",
        mean_prompt=workload.num_prompt_tokens / len(requests),
        mean_output=workload.num_output_tokens / len(requests),
        prompt=tuple(_quantile(prompt, q) for q in QUANTILES),
        output=tuple(_quantile(output, q) for q in QUANTILES),
        cached_share=cached / workload.num_prompt_tokens,
        peak=peak,
    )


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[round(share * (len(ordered) - 1))]
