"""How much of a trace's prompts does the prefix cache save, and is that what an infinite cache would, less its size?

Bound: an infinite cache that answers one request after the other finds every block that an earlier prompt began with
(`infinite`). A finite one that forgets what lay longest finds those at a stack distance within its size (Mattson et
al., IBM Systems Journal 9, 1970): `hits_by_size` computes them for all sizes in one pass, without the engine (`lru`).
The engine's scheduler and cache run the same trace in `halve.engine.simulate`: one request at a time (`alone`), where
it must find exactly what `lru` says, and as it is used, many at once over a clock (`engine`): then blocks of what runs
can't be forgotten, and a prompt that comes while the one it shares with still waits finds nothing of it.

Blocks are of 512 tokens, as the trace names them. Beside exactness the run says how fast the simulator is.

    python benchmarks/prefix_cache.py TRACE [--sizes 2000 8000 32000 128000] [--first N] [--alone]
"""

import argparse
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from halve.core.workload import Workload, WorkloadRequest
from halve.data import read_trace
from halve.engine import EngineConfig, Simulation, StepTimes, simulate

# A 70B model on eight H100, roughly: 12 ms for the weights, 15k prompt tokens a second. Only the order of requests
# follows from it here.
TIMES = StepTimes(tokens=(1, 64, 1064), seconds=(0.012, 0.014, 0.080))


class Stack:
    """Places in a cache that forgets what was used longest ago, for all its sizes at once.

    Places are counted from the latest use, 1 on; an item is in a cache of n places when its own is n or less. A place
    whose item was dropped is a hole: the next that comes in takes the nearest one instead of pushing something out.
    """

    def __init__(self, num_uses: int) -> None:
        self._tree = [0] * (num_uses + 1)  # Fenwick: how many places lie at each time of use
        self._time = 0
        self._last: dict[object, int] = {}
        self._holes: list[int] = []  # times, the latest first, negated
        self._total = 0

    def use(self, item: object) -> int | None:
        """The place that an item had, None if it is new; it is first now."""
        used = self._last.get(item)
        place = None if used is None else self._total - self._up_to(used - 1)
        if self._holes and (used is None or -self._holes[0] > used):
            self._add(-heappop(self._holes), -1)
            if used is not None:
                heappush(self._holes, -used)
        elif used is not None:
            self._add(used, -1)
        self._time += 1
        self._add(self._time, 1)
        self._last[item] = self._time
        return place

    def drop(self, item: object) -> None:
        """Take an item out; its place stays free."""
        heappush(self._holes, -self._last.pop(item))

    def _add(self, at: int, change: int) -> None:
        self._total += change
        while at < len(self._tree):
            self._tree[at] += change
            at += at & -at

    def _up_to(self, at: int) -> int:
        total = 0
        while at > 0:
            total += self._tree[at]
            at -= at & -at
        return total


def infinite_hits(requests: Iterable[WorkloadRequest], block_tokens: int) -> int:
    """Prompt tokens that a cache without end finds, one request after the other."""
    known: set[int] = set()
    hits = 0
    for request in requests:
        names = request.prefix_blocks[: (request.prompt_tokens - 1) // block_tokens]
        found = next((i for i, name in enumerate(names) if name not in known), len(names))
        hits += found * block_tokens
        known.update(request.prefix_blocks[: request.prompt_tokens // block_tokens])
    return hits


def hits_by_size(workload: Workload, sizes: Sequence[int]) -> list[int]:
    """Prompt tokens found by caches of so many blocks, each large enough for any one request.

    Names must stand for all tokens up to their block's end, as those of the Mooncake traces do. Blocks of answers take
    places too; a last block that is not full is given back. (A prompt that ends with a block computes that one again
    where it is known, which is left out here: it takes a place while the request runs.)
    """
    size = workload.block_tokens
    num_blocks = [-(-(r.prompt_tokens + r.output_tokens - 1) // size) for r in workload.requests]
    stack = Stack(2 * sum(num_blocks))
    depths: Counter[int] = Counter()
    for index, (request, count) in enumerate(zip(workload.requests, num_blocks, strict=True)):
        named = request.prefix_blocks[: request.prompt_tokens // size]
        blocks: list[object] = [*named, *((index, i) for i in range(len(named), count))]
        searched = (request.prompt_tokens - 1) // size
        for i, block in enumerate(blocks):
            place = stack.use(block)
            if place is not None and i < searched:
                depths[place] += size
        if (request.prompt_tokens + request.output_tokens - 1) % size:
            stack.drop(blocks.pop())
        for block in reversed(blocks):
            stack.use(block)
    return [sum(tokens for depth, tokens in depths.items() if depth <= most) for most in sizes]


def run(workload: Workload, num_blocks: int, *, alone: bool) -> tuple[Simulation, float]:
    """Simulate, one request after the other or many at once; and how long that took."""
    config = EngineConfig(
        max_num_seqs=1 if alone else 64,
        max_tokens_per_step=1 << 20 if alone else 1064,
        max_prefill_beside_decode=None if alone else 1000,
    )
    started = time.perf_counter()
    done = simulate(workload, TIMES.of_step, num_blocks=num_blocks, block_size=workload.block_tokens, config=config)
    return done, time.perf_counter() - started


def main() -> None:
    """Measure and print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 8000, 32000, 128000], help="blocks")
    parser.add_argument("--first", type=int, help="requests")
    parser.add_argument("--alone", action="store_true", help="also one request after the other: a step for each token")
    arguments = parser.parse_args()
    workload = read_trace(arguments.trace)
    workload = workload.first(arguments.first or len(workload.requests))
    total = workload.num_prompt_tokens
    infinite = infinite_hits(workload.requests, workload.block_tokens) / total
    rows = []
    for size, hits in zip(arguments.sizes, hits_by_size(workload, arguments.sizes), strict=True):
        engine, taken = run(workload, size, alone=False)
        row = {
            "blocks": size,
            "lru": round(hits / total, 5),
            "engine": round(engine.hit_rate, 5),
            "preemptions": engine.num_preemptions,
            "steps": engine.num_steps,
            "mean_running": round(engine.mean_running, 1),
            "us_per_step": round(taken / engine.num_steps * 1e6, 1),
            "simulated_s": round(engine.duration_s),
            "taken_s": round(taken, 1),
        }
        if arguments.alone:
            alone, _ = run(workload, size, alone=True)
            row |= {"alone": round(alone.hit_rate, 5), "alone_less_lru_tokens": alone.num_hit_tokens - hits}
        rows.append(row)
        print(row)
    print(
        json.dumps(
            {
                "question": "prefix_cache_hit_rate",
                "value": rows[-1]["engine"],
                "infinite": round(infinite, 5),
                "runs": rows,
                "trace": workload.name,
                "requests": len(workload.requests),
                "hardware": platform.processor() or platform.machine(),
                "command": " ".join(sys.argv),
            }
        )
    )


if __name__ == "__main__":
    main()
