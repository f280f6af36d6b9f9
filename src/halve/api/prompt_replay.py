"""The requests of a log replayed before and after a change: how many prompt tokens the prefix cache really finds.

The simulator runs the engine's own scheduler, blocks and cache over a clock; the engine itself runs a model, one answer
token for each prompt. Both have a cache of a certain size, so that what was pushed out is not found.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from halve.api.prompt_log import Encode, Sample
from halve.core.workload import Workload, WorkloadRequest
from halve.data.prompt_parts import BLOCK_TOKENS, Recurring, reordered
from halve.engine.simulate import simulate
from halve.engine.step_times import StepTimes

# A step of 1 and of 512 tokens: of some 8B model on some card. Only what overlaps depends on it.
_STEPS = StepTimes(tokens=(1, 512), seconds=(0.02, 0.08))


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What one replay found. change: what was done to the requests. through: the simulator, or a model's name.

    num_refused: requests that don't fit into the cache or the context, left out of the rest.
    """

    change: str
    through: str
    num_requests: int
    num_refused: int
    prompt_tokens: int
    hit_tokens: int

    @property
    def hit_rate(self) -> float:
        """Of the prompt's tokens."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def replay_simulated(samples: Sequence[Sample], *, cache_tokens: int, window_s: float | None) -> list[Replayed]:
    """As sent, reordered, and where times are known reordered and held back to the ends of windows."""
    times = [sample.at for sample in samples]
    known = all(at is not None for at in times)
    start = min((at for at in times if at is not None), default=0.0)
    arrivals = [(at or 0.0) - start if known else float(i) for i, at in enumerate(times)]
    plain = [(a, s.sent, s.sent_tokens, s.answer_tokens) for a, s in zip(arrivals, samples, strict=True)]
    better = [(a, s.better, s.better_tokens, s.answer_tokens) for a, s in zip(arrivals, samples, strict=True)]
    found = [_simulated("as sent", plain, cache_tokens), _simulated("reordered", better, cache_tokens)]
    if known and window_s:
        held = [(math.ceil(a / window_s) * window_s, *rest) for a, *rest in better]
        change = f"reordered, sent together each {window_s:g} s"
        found.append(_simulated(change, held, cache_tokens))  # type: ignore[arg-type]
    return found


def _simulated(change: str, rows: list[tuple[float, tuple[int, ...], int, int]], cache_tokens: int) -> Replayed:
    requests = tuple(
        WorkloadRequest(arrival_s=at, prompt_tokens=size, output_tokens=answer, prefix_blocks=names)
        for at, names, size, answer in sorted(rows, key=lambda row: (row[0], row[1]))
    )
    workload = Workload(name=change, requests=requests, block_tokens=BLOCK_TOKENS)
    result = simulate(workload, _STEPS.of_step, num_blocks=max(2, cache_tokens // BLOCK_TOKENS))
    return Replayed(
        change=change,
        through="simulator",
        num_requests=result.num_requests,
        num_refused=result.num_refused,
        prompt_tokens=result.prompt_tokens,
        hit_tokens=result.num_hit_tokens,
    )


def replay_on_engine(
    samples: Sequence[Sample],
    recurring: Recurring,
    encode: Encode,
    answer: Callable[[Sequence[int], str], int | None],
    name: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[Replayed]:
    """As sent and reordered, through a model.

    answer: runs a prompt among those of a salt, and tells its tokens that were in the cache; None where the model can't
    take it.
    """
    found = []
    for turn, change in enumerate(("as sent", "reordered")):
        result = Replayed(change=change, through=name, num_requests=0, num_refused=0, prompt_tokens=0, hit_tokens=0)
        for i, sample in enumerate(samples):
            if sample.request is None:
                continue
            request = reordered(sample.request, recurring) if turn else sample.request
            ids = encode(request.messages, request.tools)
            hits = answer(ids, change)
            if hits is None:
                result = replace(result, num_refused=result.num_refused + 1)
            else:
                result = replace(
                    result,
                    num_requests=result.num_requests + 1,
                    prompt_tokens=result.prompt_tokens + len(ids),
                    hit_tokens=result.hit_tokens + hits,
                )
            if progress:
                progress(turn * len(samples) + i + 1, 2 * len(samples))
        found.append(result)
    return found
