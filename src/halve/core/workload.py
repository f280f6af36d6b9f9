"""What a model is asked to do: when requests come, how long they are, what they share, how soon answers must be there.

A workload holds no text. Requests that begin alike name the same blocks, so that prompts with the same sharing can be
made for any vocabulary (`Workload.prompt_token_ids`), for a simulator as for a model.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from halve.core.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]

_OWN = np.uint64(1 << 63)  # blocks that no other request names lie above it


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadRequest:
    """One request. arrival_s: seconds from the start of the workload. prompt_tokens, output_tokens: how many.

    prefix_blocks: names of the prompt's first blocks, each of `Workload.block_tokens` tokens (the last one may be cut
    short by the prompt's end). Two prompts share their tokens as far as their names are the same.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival_s) and self.arrival_s >= 0):
            raise ConfigError(f"workload: arrival_s {self.arrival_s} must be finite, 0 or more")
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ConfigError(
                f"workload: {self.prompt_tokens} prompt_tokens and {self.output_tokens} output_tokens; both must be 1 "
                "or more"
            )
        if any(not 0 <= name < 2**63 for name in self.prefix_blocks):
            raise ConfigError(f"workload: prefix_blocks {self.prefix_blocks!r:.80} must be from 0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLevel:
    """How soon answers must come: the first token within ttft_s, the others one each time_per_token_s on average.

    None: no limit. share: of the requests that must keep both.
    """

    ttft_s: float | None = None
    time_per_token_s: float | None = None
    share: float = 0.99

    def __post_init__(self) -> None:
        for name in ("ttft_s", "time_per_token_s"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise ConfigError(f"service_level.{name}: {limit} must be above 0 and finite, or null for no limit")
        if not 0 < self.share <= 1:
            raise ConfigError(f"service_level.share: {self.share} must be above 0 and at most 1")

    def keeps(self, ttft_s: float, time_per_token_s: float) -> bool:
        """Whether a request that was answered so is within the limits."""
        soon = self.ttft_s is None or ttft_s <= self.ttft_s
        return soon and (self.time_per_token_s is None or time_per_token_s <= self.time_per_token_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests in the order of their arrival. name: for people. block_tokens: tokens of a named block.

    Raises ConfigError for no requests, arrivals out of order, or more names than a prompt has blocks.
    """

    name: str
    requests: tuple[WorkloadRequest, ...]
    block_tokens: int = 512
    service_level: ServiceLevel = field(default_factory=ServiceLevel)
    version: int = 1

    def __post_init__(self) -> None:
        if self.version != 1:
            raise ConfigError(f"workload: version {self.version} was written by a newer Halve (this one reads 1)")
        if not self.requests:
            raise ConfigError(f"workload {self.name}: there are no requests in it; give at least one")
        if self.block_tokens < 1:
            raise ConfigError(f"workload {self.name}: block_tokens {self.block_tokens} must be 1 or more")
        before = 0.0
        for i, request in enumerate(self.requests):
            if request.arrival_s < before:
                raise ConfigError(
                    f"workload {self.name}: request {i} arrives at {request.arrival_s} s, the one before it at "
                    f"{before} s; sort them by arrival_s"
                )
            before = request.arrival_s
            most = -(-request.prompt_tokens // self.block_tokens)
            if len(request.prefix_blocks) > most:
                raise ConfigError(
                    f"workload {self.name}: request {i} names {len(request.prefix_blocks)} blocks, its prompt of "
                    f"{request.prompt_tokens} tokens has {most} of {self.block_tokens}"
                )

    @classmethod
    def poisson(
        cls,
        *,
        requests_per_s: float,
        num_requests: int,
        prompt_tokens: int,
        output_tokens: int,
        shared_tokens: int = 0,
        seed: int = 0,
        service_level: ServiceLevel | None = None,
    ) -> Self:
        """Requests of one length that come at random, `requests_per_s` on average; infinity for all at once.

        shared_tokens: of every prompt's beginning, the same in all. Raises ConfigError.
        """
        if not requests_per_s > 0 or not 0 <= shared_tokens <= prompt_tokens:
            raise ConfigError(
                f"workload: {requests_per_s} requests_per_s must be above 0, and {shared_tokens} shared_tokens from 0 "
                f"to the prompt's {prompt_tokens}"
            )
        gaps = np.random.default_rng(seed).exponential(1 / requests_per_s, num_requests)
        arrivals = np.cumsum(gaps).tolist()
        return cls(
            name=f"{num_requests} requests, {prompt_tokens}+{output_tokens} tokens, {requests_per_s:g}/s",
            requests=tuple(
                WorkloadRequest(
                    arrival_s=arrival,
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    prefix_blocks=(0,) if shared_tokens else (),
                )
                for arrival in arrivals
            ),
            block_tokens=shared_tokens or 512,
            service_level=service_level or ServiceLevel(),
        )

    @property
    def duration_s(self) -> float:
        """When the last request comes."""
        return self.requests[-1].arrival_s

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Of all answers."""
        return sum(request.output_tokens for request in self.requests)

    def first(self, num_requests: int) -> Self:
        """The first so many requests, or all."""
        return replace(self, requests=self.requests[:num_requests])

    def fitting(self, max_tokens: int) -> Self:
        """The requests whose prompt and answer are at most so many tokens together. Raises ConfigError for none."""
        fits: Iterable[WorkloadRequest] = (r for r in self.requests if r.prompt_tokens + r.output_tokens <= max_tokens)
        return replace(self, requests=tuple(fits))

    def faster(self, factor: float) -> Self:
        """The same requests `factor` times as fast after each other; infinity for all at once."""
        if not factor > 0:
            raise ConfigError(f"workload {self.name}: factor {factor} must be above 0")
        requests = tuple(replace(r, arrival_s=r.arrival_s / factor) for r in self.requests)
        return replace(self, requests=requests)

    def prompt_token_ids(self, index: int, vocab_size: int) -> Array:
        """Tokens int32 [prompt_tokens] of a request's prompt, below vocab_size, the same wherever it is asked.

        They look random, are equal between requests where their blocks' names are, and differ otherwise.
        """
        request = self.requests[index]
        positions = np.arange(request.prompt_tokens, dtype=np.uint64)
        keys = np.full(request.prompt_tokens, _OWN + np.uint64(index))
        named = np.repeat(np.array(request.prefix_blocks, np.uint64), self.block_tokens)[: request.prompt_tokens]
        keys[: len(named)] = named
        return (_mixed(_mixed(keys) + positions) % np.uint64(vocab_size)).astype(np.int32)


def _mixed(x: Array) -> Array:
    """The output of SplitMix64 (OOPSLA 2014, "Fast splittable pseudorandom number generators") for states x, uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
