"""What Prometheus reads. Names are vLLM's under `halve:` where it has one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from halve.server.served import Registry

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_TPOT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Metrics:
    """Counters of requests, and gauges of engines."""

    def __init__(self, registry: Registry) -> None:
        self.registry = CollectorRegistry()
        label = ["model_name"]
        common: dict[str, Any] = {"registry": self.registry, "labelnames": label}
        self.ttft = Histogram(
            "halve:time_to_first_token_seconds", "First token after arrival.", buckets=_TTFT, **common
        )
        self.tpot = Histogram("halve:time_per_output_token_seconds", "Between two tokens.", buckets=_TPOT, **common)
        self.latency = Histogram("halve:e2e_request_latency_seconds", "From arrival to end.", buckets=_TTFT, **common)
        self.prompt_tokens = Counter("halve:prompt_tokens", "Tokens of prompts.", **common)
        self.generation_tokens = Counter("halve:generation_tokens", "Tokens of answers.", **common)
        self.cached_tokens = Counter("halve:prompt_tokens_cached", "Tokens of prompts found in the cache.", **common)
        self.requests = Counter(
            "halve:request_success", "Answers by how they ended.", registry=self.registry,
            labelnames=["model_name", "finished_reason"],
        )  # fmt: skip
        self.errors = Counter(
            "halve:request_errors", "Requests that were refused, by status.", registry=self.registry,
            labelnames=["status"],
        )  # fmt: skip
        self.micro_usd = Counter(
            "halve:cost_micro_usd", "Micro-dollars of requests.", registry=self.registry,
            labelnames=["model_name", "key_id"],
        )  # fmt: skip
        self.registry.register(_Engines(registry))

    def text(self, key_id: str | None = None) -> str:
        """In Prometheus's text format. key_id: what other keys cost is left out."""
        text = generate_latest(self.registry).decode()
        if key_id is None:
            return text
        of_others = re.compile(rf'^halve:cost_micro_usd\w*{{(?!.*key_id="{re.escape(key_id)}").*\n', re.MULTILINE)
        return of_others.sub("", text)


class _Engines(Collector):
    def __init__(self, registry: Registry) -> None:
        self._models = registry

    def _experts(self) -> Iterator[Any]:
        """Of sparse models."""
        tokens = CounterMetricFamily(
            "halve:expert_tokens", "Tokens that came to an expert.", labels=["model_name", "layer", "expert"]
        )
        read = GaugeMetricFamily(
            "halve:experts_per_step", "Experts of a layer that a step reads.", labels=["model_name"]
        )
        skew = GaugeMetricFamily(
            "halve:expert_imbalance", "Tokens of the busiest expert over the mean expert's.", labels=["model_name"]
        )
        for served in self._models:
            found = served.engine.metrics()
            if found.experts_per_step is None or found.expert_imbalance is None:
                continue
            read.add_metric([served.name], found.experts_per_step)
            skew.add_metric([served.name], found.expert_imbalance)
            for layer, counts in enumerate(found.expert_tokens):
                for expert, count in enumerate(counts):
                    tokens.add_metric([served.name, str(layer), str(expert)], count)
        yield from (tokens, read, skew)

    def _expert_cache(self) -> Iterator[Any]:
        """Of models whose experts are read from disk."""
        used = [(served.name, use) for served in self._models if (use := served.engine.metrics().expert_cache)]
        counters = {
            "expert_cache_hits": ("Experts that lay in memory when a step asked.", lambda u: u.hits),
            "expert_cache_misses": ("Experts that a step waited for.", lambda u: u.misses),
            "expert_cache_ahead": ("Experts read before they were asked for.", lambda u: u.num_ahead),
            "expert_cache_ahead_right": ("Of them, those that were asked for.", lambda u: u.num_ahead_right),
            "expert_cache_read_bytes": ("Bytes of experts read from disk.", lambda u: u.read_bytes),
            "expert_cache_wait_seconds": ("Seconds in which steps waited for experts.", lambda u: u.wait_s),
        }
        gauges = {
            "expert_cache_hit_rate": ("Hits over hits and misses.", lambda u: u.hit_rate or 0.0),
            "expert_cache_size_bytes": ("Memory for experts.", lambda u: u.size_bytes),
        }
        kinds: list[tuple[Any, dict[str, Any]]] = [(CounterMetricFamily, counters), (GaugeMetricFamily, gauges)]
        for kind, table in kinds:
            for name, (help_text, value) in table.items():
                family = kind(f"halve:{name}", help_text, labels=["model_name"])
                for model, use in used:
                    family.add_metric([model], float(value(use)))
                yield family

    def collect(self) -> Iterator[Any]:
        """Gauges as they are now."""
        gauges = {
            "num_requests_running": ("Sequences that run.", lambda m: m.num_running),
            "num_requests_waiting": ("Sequences that wait.", lambda m: m.num_waiting),
            "kv_cache_usage_perc": (
                "Share of the cache that is used, 0 to 1.",
                lambda m: m.blocks_used / max(1, m.blocks_used + m.blocks_free + m.blocks_cached),
            ),
            "kv_blocks_used": ("Blocks of the cache that are used.", lambda m: m.blocks_used),
            "kv_blocks_cached": ("Blocks kept for the next prompt with their prefix.", lambda m: m.blocks_cached),
            "kv_blocks_free": ("Blocks that hold nothing.", lambda m: m.blocks_free),
        }
        counters = {
            "num_preemptions": ("Sequences that gave up their blocks.", lambda m: m.num_preemptions),
            "prefix_cache_hits": ("Prompt tokens found in the cache.", lambda m: m.num_hit_tokens),
            "prefix_cache_queries": ("Tokens found or computed.", lambda m: m.num_hit_tokens + m.num_computed_tokens),
            "spec_decode_num_draft_tokens": ("Tokens that were guessed.", lambda m: m.num_draft_tokens),
            "spec_decode_num_accepted_tokens": ("Guesses that were right.", lambda m: m.num_accepted_tokens),
            "engine_steps": ("Steps.", lambda m: m.num_steps),
            "engine_busy_seconds": ("Seconds of steps.", lambda m: m.busy_s),
        }
        kinds: list[tuple[Any, dict[str, Any]]] = [(GaugeMetricFamily, gauges), (CounterMetricFamily, counters)]
        for kind, table in kinds:
            for name, (help_text, value) in table.items():
                family = kind(f"halve:{name}", help_text, labels=["model_name"])
                for served in self._models:
                    family.add_metric([served.name], float(value(served.engine.metrics())))
                yield family
        yield from self._experts()
        yield from self._expert_cache()
        try:
            joules = int(_ENERGY.read_text()) / 1e6
        except (OSError, ValueError):
            return
        yield CounterMetricFamily("halve:energy_joules", "Energy of the processor, as it tells.", value=joules)
