"""A workload through the real scheduler, over a model that takes its time from a table instead of computing.

Everything that decides which tokens run when is the engine's own: `Scheduler`, its order, its blocks, its prefix cache.
What is left out is the model: a clock moves on by `StepTimes`, and answers are as long as the workload says. So the
same workload gives the same figures, and a simulated hour takes seconds.
"""

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from halve.core.errors import ConfigError, RequestError
from halve.core.workload import ServiceLevel, Workload
from halve.engine.block_pool import BlockPool
from halve.engine.config import EngineConfig
from halve.engine.request import Request, SamplingParams
from halve.engine.scheduler import Scheduler, Step
from halve.engine.sequence import Sequence

log = logging.getLogger("halve.engine")

# Prompts are made of so many different tokens: enough that blocks of other names differ, and Python holds the numbers
# up to here once for all. Tokens of answers are above, and of each request alone.
_VOCAB_SIZE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Percentiles:
    """Of a time in seconds over requests."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles":
        """Of any number of values; of none they are 0."""
        array = np.fromiter(values, np.float64)
        if not len(array):
            return cls(mean=0.0, p50=0.0, p90=0.0, p99=0.0)
        p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist()
        return cls(mean=float(array.mean()), p50=p50, p90=p90, p99=p99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What came of a workload.

    num_refused: requests that this engine can never serve, and left out of all the rest. duration_s: to the last
    token. busy_s: of it, steps ran. utilization: busy_s / duration_s. prompt_tokens, output_tokens: of the requests
    served; output_tok_s, total_tok_s: per second of the duration. hit_rate: tokens of prompts found in the cache when
    their request was first admitted, over those of all prompts. mean_running: sequences that hold blocks, over the busy
    time. ttft_s: from arrival to the first token. time_per_token_s: of the tokens after it, a request's mean; of
    requests with more than one token. latency_s: from arrival to the last token. num_draft_tokens, num_accepted_tokens:
    guesses, and of them those that were right. within_level: the share of requests
    that the workload's service level is kept for; level_met: whether it is the share that was asked for.
    """

    num_requests: int
    num_refused: int
    duration_s: float
    busy_s: float
    utilization: float
    prompt_tokens: int
    output_tokens: int
    output_tok_s: float
    total_tok_s: float
    hit_rate: float
    num_hit_tokens: int
    num_steps: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int
    mean_running: float
    ttft_s: Percentiles
    time_per_token_s: Percentiles
    latency_s: Percentiles
    within_level: float
    level_met: bool
    version: int = 1


@dataclass(slots=True)
class _Served:
    """One request's times. last_s: of its latest token so far."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    first_s: float = 0.0
    last_s: float = 0.0
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival_s

    @property
    def time_per_token_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.num_output_tokens - 1)


def simulate(
    workload: Workload,
    step_seconds: Callable[[Step], float],
    *,
    num_blocks: int,
    block_size: int = 16,
    context: int | None = None,
    config: EngineConfig | None = None,
    num_drafts: int = 0,
    draft_rate: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Run a workload to its end.

    step_seconds: what a planned step takes, such as `StepTimes.of_step`. num_blocks, block_size: of the cache.
    context: the most tokens of prompt and answer together, None for no limit. num_drafts: guesses behind each token of
    an answer, each right with probability draft_rate where those before it are; the number is held, whether it pays or
    not. progress: requests ended, requests in all. Raises ConfigError for a configuration, or a rate that is none,
    RequestError for a cache that can't be, or that serves no request.
    """
    if num_drafts < 0 or not 0 <= draft_rate <= 1:
        raise ConfigError(f"simulate: {num_drafts} num_drafts must be 0 or more, draft_rate {draft_rate} from 0 to 1")
    run = _Run(workload, step_seconds, BlockPool(num_blocks, block_size), context, config or EngineConfig())
    run.num_drafts, run.draft_rate = num_drafts, draft_rate
    for num_ended in run.requests():
        if progress:
            progress(num_ended, len(workload.requests))
    return run.result()


class _Run:
    """One pass over a workload."""

    def __init__(
        self,
        workload: Workload,
        step_seconds: Callable[[Step], float],
        pool: BlockPool,
        context: int | None,
        config: EngineConfig,
    ) -> None:
        self.workload, self.step_seconds = workload, step_seconds
        longest = max(r.prompt_tokens + r.output_tokens for r in workload.requests)
        self.scheduler = Scheduler.configured(config, pool, context=longest + 1 if context is None else context)
        self.num_drafts, self.draft_rate = 0, 0.0
        self.clock = self.busy = self.running = 0.0
        self.served: list[_Served] = []
        self.num_refused = 0
        self._num_arrived = self._num_ended = 0
        self._in_flight: dict[Sequence, tuple[int, _Served]] = {}
        self._random = random.Random(0)

    def requests(self) -> Iterable[int]:
        """Run to the end; yields how many requests have ended whenever that has changed."""
        scheduler, arrivals = self.scheduler, self.workload.requests
        while scheduler.has_unfinished or self._num_arrived < len(arrivals):
            before = self._num_ended
            if not scheduler.has_unfinished:
                self.clock = max(self.clock, arrivals[self._num_arrived].arrival_s)
            while self._num_arrived < len(arrivals) and arrivals[self._num_arrived].arrival_s <= self.clock:
                self._arrive(self._num_arrived)
                self._num_arrived += 1
            if scheduler.has_unfinished:
                self._step()
            if self._num_ended > before:
                yield self._num_ended

    def _arrive(self, index: int) -> None:
        given = self.workload.requests[index]
        prompt = tuple(self.workload.prompt_token_ids(index, _VOCAB_SIZE).tolist())
        params = SamplingParams(max_tokens=given.output_tokens, seed=index)
        request = Request(request_id=str(index), prompt_token_ids=prompt, sampling=params)
        try:
            self.scheduler.check(request)
        except RequestError as error:
            if not self.num_refused:
                log.warning("workload %s: left out what this engine can't serve: %s", self.workload.name, error)
            self.num_refused += 1
            self._num_ended += 1
            return
        served = _Served(given.arrival_s, given.prompt_tokens, given.output_tokens)
        self.served.append(served)
        self._in_flight[self.scheduler.add(request)] = _VOCAB_SIZE + index, served

    def _step(self) -> None:
        """One step of the engine."""
        scheduler, in_flight = self.scheduler, self._in_flight
        if self.num_drafts:
            for sequence in scheduler.running:
                sequence.num_drafts = self.num_drafts
        step = scheduler.schedule()
        if self.num_drafts:
            self._guess(step)
        seconds = self.step_seconds(step)
        self.clock += seconds
        self.busy += seconds
        self.running += seconds * scheduler.num_running
        for sequence, _, num_generated in scheduler.commit(step, [in_flight[one][0] for one in step.sampled]):
            if num_generated == 1:
                served = in_flight[sequence][1]
                served.first_s, served.num_cached_tokens = self.clock, sequence.num_cached_tokens
            if sequence.num_prompt_tokens + num_generated >= sequence.max_tokens:
                _, served = in_flight.pop(sequence)
                served.last_s, served.num_output_tokens = self.clock, num_generated
                scheduler.remove(sequence)
                self._num_ended += 1

    def _guess(self, step: Step) -> None:
        for chunk in step.chunks:
            token = self._in_flight[chunk.sequence][0]
            right = (self._random.random() < self.draft_rate for _ in range(chunk.num_drafts))
            chunk.draft.extend(token if one else -1 for one in right)
        step.number_rows()

    def result(self) -> Simulation:
        served, counts = self.served, self.scheduler.counts
        if not served:
            raise RequestError(
                f"workload {self.workload.name}: this engine can serve none of its {self.num_refused} requests; give "
                "the cache more blocks, or a longer context"
            )
        level: ServiceLevel = self.workload.service_level
        within = sum(level.keeps(one.ttft_s, one.time_per_token_s) for one in served) / len(served)
        prompt, output = (sum(getattr(one, f"num_{what}_tokens") for one in served) for what in ("prompt", "output"))
        hits = sum(one.num_cached_tokens for one in served)
        duration = max(self.clock, np.finfo(np.float64).tiny)
        return Simulation(
            num_requests=len(served),
            num_refused=self.num_refused,
            duration_s=self.clock,
            busy_s=self.busy,
            utilization=self.busy / duration,
            prompt_tokens=prompt,
            output_tokens=output,
            output_tok_s=output / duration,
            total_tok_s=(prompt + output) / duration,
            hit_rate=hits / prompt,
            num_hit_tokens=hits,
            num_steps=counts.num_steps,
            num_preemptions=counts.num_preemptions,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
            mean_running=self.running / max(self.busy, np.finfo(np.float64).tiny),
            ttft_s=Percentiles.of(one.ttft_s for one in served),
            time_per_token_s=Percentiles.of(one.time_per_token_s for one in served if one.num_output_tokens > 1),
            latency_s=Percentiles.of(one.last_s - one.arrival_s for one in served),
            within_level=within,
            level_met=within >= level.share,
        )
