"""A workload run for real: both models' engines answer the same requests in turns, and the clock says what that costs.

The prompts are random tokens of the workload's lengths, equal where its prompts are, other ones in every round, so that
nothing is found in the cache that the workload does not share. Answers are as long as the workload says.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from statistics import median

import numpy as np

from halve.api.clock import witnessed
from halve.api.model import Model
from halve.api.progress import Advance
from halve.api.versus.figures import usd_per_mtok
from halve.core.certificate import Measured, Roofline, WorkloadReplay
from halve.core.errors import QualityError
from halve.core.workload import Workload
from halve.engine import SamplingParams

log = logging.getLogger("halve")

ROUNDS = 3
REPLAY_S = 40.0  # of all rounds of both models, by the simulation; a longer workload is cut to its first requests
SLOW = 3  # times that, and no other round begins; or, foretold of the fewest requests, none at all
FEWEST = 8  # requests


@dataclass(frozen=True, kw_only=True)
class Paced:
    """A workload as it is to be replayed. paces: of the original and the smaller model, times the workload's own.

    foretold_s: what a simulation says that each takes.
    """

    workload: Workload
    paces: tuple[float, float]
    foretold_s: tuple[float, float]

    def cut(self) -> Workload | None:
        """The first requests that are foretold to fit all rounds into `REPLAY_S`; None where hardly any do."""
        share = REPLAY_S / (ROUNDS * max(sum(self.foretold_s), 1e-9))
        count = len(self.workload.requests)
        fits = max(min(FEWEST, count), int(share * count))
        if fits / count > SLOW * share:
            return None
        return self.workload.first(fits)


@dataclass(frozen=True, kw_only=True)
class Played:
    """One round of one model. Times in seconds, one for each request; time_per_token_s: of those with several."""

    seconds: float
    num_tokens: int
    ttft_s: tuple[float, ...]
    time_per_token_s: tuple[float, ...]
    within_level: float


def replay_in_turns(
    models: Sequence[Model], asked: Paced, usd_per_hour: Decimal | None, advance: Advance
) -> WorkloadReplay | None:
    """Replay with the original and the smaller model in turns; None for a workload that would take too long.

    Raises QualityError for a clock that is wrong.
    """
    if (workload := asked.cut()) is None:
        log.info("workload %s is not run: %d requests would take too long here", asked.workload.name, FEWEST)
        return None
    rounds: list[list[Played]] = [[], []]
    started = time.perf_counter()
    with witnessed():
        for done in range(ROUNDS):
            for which in (0, 1) if done % 2 == 0 else (1, 0):
                rounds[which].append(play(models[which], workload, asked.paces[which], seed=done))
            advance(done + 1, ROUNDS)
            if time.perf_counter() - started > SLOW * REPLAY_S:
                break
    after = rounds[1]
    speeds = [_spread([one.num_tokens / one.seconds for one in played]) for played in rounds]
    each = [[one.seconds / one.num_tokens for one in played] for played in rounds]
    return WorkloadReplay(
        num_requests=len(after[-1].ttft_s),
        num_rounds=len(after),
        output_tok_s=speeds[1],
        original_output_tok_s=speeds[0],
        ratio=_ratio(each[1], each[0]),
        ttft_p50_s=_median_of(float(np.quantile(one.ttft_s, 0.5)) for one in after),
        ttft_p99_s=_median_of(float(np.quantile(one.ttft_s, 0.99)) for one in after),
        time_per_token_p50_s=_median_of(float(np.quantile(one.time_per_token_s or (0.0,), 0.5)) for one in after),
        time_per_token_p99_s=_median_of(float(np.quantile(one.time_per_token_s or (0.0,), 0.99)) for one in after),
        within_level=median(one.within_level for one in after),
        level_met=median(one.within_level for one in after) >= workload.service_level.share,
        usd_per_mtok=_priced(usd_per_hour, speeds[1]),
        original_usd_per_mtok=_priced(usd_per_hour, speeds[0]),
    )


def check_replay(replay: WorkloadReplay, workload: Workload, limits: Sequence[Roofline]) -> None:
    """Raise QualityError for a replay that is faster than its longest answer's steps can read the weights."""
    steps = max(request.output_tokens for request in workload.requests[: replay.num_requests])
    tokens = sum(request.output_tokens for request in workload.requests[: replay.num_requests])
    for limit, speed in zip(limits, (replay.original_output_tok_s, replay.output_tok_s), strict=False):
        read = steps * max(0, limit.bytes_per_step - limit.cached_bytes)
        least = read / (limit.read_gb_s * 1e9 * (1 + limit.tolerance))
        if tokens / speed.value < least:
            raise QualityError(
                f"{limit.model} model: its replay took {tokens / speed.value:.3g} s, and reading its weights "
                f"{steps} times takes {least:.3g} s at {limit.read_gb_s:.3g} GB/s; a speed that this machine can't "
                "reach is not certified. Check its clock, or run it again with nothing else running"
            )


def play(model: Model, workload: Workload, pace: float, *, seed: int) -> Played:
    """Every request at its time, by the model's engine. pace: times the workload's own; infinity for all at once."""
    with ThreadPoolExecutor(1) as aside:  # whoever calls may run an event loop of their own
        return aside.submit(asyncio.run, _play(model, workload, pace, seed)).result()


async def _play(model: Model, workload: Workload, pace: float, seed: int) -> Played:
    vocab_size = model.config.vocab_size
    prompts = [
        ((workload.prompt_token_ids(i, vocab_size) + 7919 * seed) % vocab_size).tolist()
        for i in range(len(workload.requests))
    ]
    model.engine.metrics()  # its cache is made before the clock starts
    began = time.perf_counter()

    async def one(index: int) -> tuple[float, float, int]:
        request = workload.requests[index]
        due = began + request.arrival_s / pace
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sampling = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
        count, first, last = 0, 0.0, 0.0
        async for output in model.stream(prompts[index], sampling):
            if output.token_id is not None:
                last, count = time.perf_counter(), count + 1
                first = first or last
        return first - due, last - due, count

    found = await asyncio.gather(*(one(i) for i in range(len(prompts))))
    seconds = time.perf_counter() - began
    level = workload.service_level
    each = [(last - first) / max(1, count - 1) for first, last, count in found]
    return Played(
        seconds=seconds,
        num_tokens=sum(count for _, _, count in found),
        ttft_s=tuple(first for first, _, _ in found),
        time_per_token_s=tuple(s for s, (_, _, count) in zip(each, found, strict=True) if count > 1),
        within_level=sum(level.keeps(first, s) for s, (first, _, _) in zip(each, found, strict=True)) / len(found),
    )


def _median_of(values: Iterable[float]) -> float:
    return float(median(values))


def _spread(values: Sequence[float]) -> Measured:
    return Measured(value=median(values), low=min(values), high=max(values), n=len(values))


def _ratio(ours: Sequence[float], others: Sequence[float]) -> Measured:
    """Of each round, whose halves ran one after the other: median, lowest and highest."""
    return _spread([one / other for one, other in zip(ours, others, strict=True)])


def _priced(usd_per_hour: Decimal | None, speed: Measured) -> Measured | None:
    if usd_per_hour is None:
        return None
    low, value, high = (usd_per_mtok(usd_per_hour, one) for one in (speed.high, speed.value, speed.low))
    assert low is not None
    assert value is not None
    assert high is not None
    return Measured(value=value, low=low, high=high, n=speed.n)
