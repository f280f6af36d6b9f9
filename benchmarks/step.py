"""Where does the time of a decode step go?

A step at batch 1 must read every weight once, so all else (norms, rounding, attention, choosing the token) should stay
small: the aim is a tenth. The step is one program of instructions (`kernels/program.py`); timed are the whole of it,
its products alone, and each other kind of operation alone, in turn, so that a drift of the machine hits all alike. The
weights' bytes over the time of the products is a rate of reading, told beside that of a read loop.

    python benchmarks/step.py BUNDLE [--batch 1] [--context 512] [--rounds 9]

Prints a table, and one JSON line last.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np

import halve
from halve.hardware import detect_cpu
from halve.kernels import ceilings
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.kernels.program import OPERATIONS
from halve.models.compiled import CompiledSteps

BLOCK = 16


def decode_batch(batch: int, context: int, vocab_size: int) -> TokenBatch:
    """Each of `batch` sequences runs its token at position `context`."""
    per = context // BLOCK + 1
    tables = np.random.default_rng(0).permutation(batch * per).reshape(batch, per).astype(np.int32)
    return TokenBatch(
        token_ids=np.random.default_rng(1).integers(0, vocab_size, batch).astype(np.int32),
        positions=np.full(batch, context, np.int32),
        cu_seqlens=np.arange(batch + 1, dtype=np.int32),
        slot_mapping=(tables[:, context // BLOCK] * BLOCK + context % BLOCK).astype(np.int32),
        block_tables=tables,
    )


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model = halve.load(options.bundle, cache_bytes=10**9)
    ops, config = model.ops, model.config
    assert isinstance(ops, NativeOps)
    cache = model.decoder.new_cache(options.batch * (options.context // BLOCK + 1), BLOCK)
    batch, rows = (
        decode_batch(options.batch, options.context, config.vocab_size),
        np.arange(options.batch, dtype=np.int32),
    )
    program, step = CompiledSteps(model.decoder, ops, cache).program(batch, rows, full=False)
    parts = {"step": program} | {name: program.part({name}) for name in OPERATIONS}
    parts["all but products"] = program.part(set(OPERATIONS) - {"product"})
    memory, read = ceilings.Arena(ceilings.LEAST_ARENA_BYTES), []
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(options.rounds + 1):
        read.append(memory.read_gb_s(ops.num_threads))
        for name, part in parts.items():
            started = time.perf_counter()
            part.run(step, batch.token_ids, rows)
            seconds[name].append(time.perf_counter() - started)
    ms = {name: 1000 * median(times[1:]) for name, times in seconds.items()}  # the first round warms up
    others = median(1 - b / a for a, b in zip(seconds["step"][1:], seconds["product"][1:], strict=True))
    size = sum(linear.matrix.data.nbytes for projection in model.decoder.projections() for linear in projection.linears)
    rate = size / ms["product"] / 1e6
    for name, value in ms.items():
        print(f"{name:18} {value:8.3f} ms  {value / ms['step']:6.1%}")
    print(f"products read {rate:.1f} GB/s beside a read loop of {median(read[1:]):.1f}")
    record = {
        "question": "step",
        "model": options.bundle.name,
        "batch": options.batch,
        "context": options.context,
        "milliseconds": ms,
        "share_of_all_but_products": {"value": others, "without_products": ms["all but products"] / ms["step"]},
        "products_gb_s": rate,
        "read_gb_s": median(read[1:]),
        "runs": options.rounds,
        "kernel": ops.isa.name,
        "threads": ops.num_threads,
        "hardware": detect_cpu().model,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/step.py BUNDLE --batch {options.batch} --context {options.context}",
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
