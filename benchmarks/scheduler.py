"""What does the engine itself cost per step, in Python, beside the model?

Bound: a step must take well under the milliseconds that a model takes for it. At batch 32, a 1B model on two cores
decodes in some 150 ms and a GPU in 5: under 1 ms is below a fifth of the latter. The runner is a stub that answers at
once; everything else is real: planning, blocks, prefix hashes, the arrays of a batch and of its sampling, tokens
committed, outputs made. Without a tokenizer, as it is not the scheduler's.

    python benchmarks/scheduler.py [--batch 32] [--prompt 512] [--tokens 256] [--runs 5] [--sampled]
"""

import argparse
import json
import platform
import statistics
import sys
import time

import numpy as np

from halve.engine import EngineConfig, EngineCore, Request, SamplingParams
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch


class Instant:
    """A runner that knows its tokens at once."""

    vocab_size, context, block_size, batch_invariant = 32000, 8192, 16, True

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """The next token follows from the last."""
        none = np.empty((len(rows), 0), np.float32)
        token_ids = (batch.token_ids[rows] * 31 + 7) % self.vocab_size
        return Sampled(token_ids.astype(np.int32), np.full(len(rows), np.nan, np.float32), none.astype(np.int32), none)

    def copy_blocks(self, pairs: Array) -> None:
        """Nothing to copy."""


def run(batch: int, prompt: int, tokens: int, sampling: dict[str, float], seed: int) -> tuple[list[float], list[float]]:
    """Seconds of each step that decodes only, and of each that holds a prompt's chunk; `batch` requests at once."""
    rng = np.random.default_rng(seed)
    core = EngineCore(Instant(batch * -(-(prompt + tokens) // 16)), None, EngineConfig(max_num_seqs=batch))
    for i in range(batch):
        ids = tuple(rng.integers(0, 32000, prompt).tolist())
        params = SamplingParams(max_tokens=tokens, seed=i, **sampling)
        core.add(Request(request_id=str(i), prompt_token_ids=ids, sampling=params))
    decodes, prefills = [], []
    while core.has_unfinished:
        before = core.metrics().num_computed_tokens
        started = time.perf_counter()
        core.step()
        taken = time.perf_counter() - started
        (decodes if core.metrics().num_computed_tokens - before == batch else prefills).append(taken)
    core.check_invariants()
    return decodes, prefills


def main() -> None:
    """Measure and print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sampled", action="store_true", help="temperature, top-p and penalties, instead of greedy")
    arguments = parser.parse_args()
    sampling = {"temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.5} if arguments.sampled else {}
    medians, prefills = [], []
    for seed in range(arguments.runs + 1):
        decode, prefill = run(arguments.batch, arguments.prompt, arguments.tokens, sampling, seed)
        medians.append(statistics.median(decode) * 1e3)
        prefills.append(statistics.median(prefill) * 1e3)
        print(f"run {seed}: a decode step {medians[-1]:.3f} ms, a step with a prompt {prefills[-1]:.3f} ms")
    medians, prefills = medians[1:], prefills[1:]  # the first warms up
    print(
        json.dumps(
            {
                "question": "engine_step_ms",
                "value": round(statistics.median(medians), 4),
                "spread": round(max(medians) - min(medians), 4),
                "prefill_step_ms": round(statistics.median(prefills), 4),
                "runs": arguments.runs,
                "ceiling": 1.0,
                "batch": arguments.batch,
                "prompt": arguments.prompt,
                "sampled": arguments.sampled,
                "hardware": platform.processor() or platform.machine(),
                "command": " ".join(sys.argv),
            }
        )
    )


if __name__ == "__main__":
    main()
