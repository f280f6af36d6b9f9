"""How near is the predicted step to the measured one?

The search adds up a plan's cost from a table of products and of all else (`halve/search/device_table.py`); here the sum
is held against whole steps of a decoder with random weights in that plan: decoding with 1, 8 and 32 sequences at a
context, and a chunk of a prompt. Formats are mixed over the layers, as the search mixes them. The aim is 10 %.

    python benchmarks/step_prediction.py MODEL [--formats int4-g32,int8,int3-g64] [--context 256] [--layers N]

MODEL: a directory whose config.json gives the shapes. Prints a table, and one JSON line last.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from halve.checkpoint.files import read_object
from halve.formats import FORMATS
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.kernels.sampling import SamplingBatch
from halve.models import Decoder, read_config
from halve.models.names import groups
from halve.search.device_table import PlannedTimes, StepShape, device_table
from halve.search.timing import random_weight

BLOCK = 16


class Mixed:
    """Random weights, each fused group in its format."""

    def __init__(self, formats: dict[str, str]) -> None:
        self.formats = formats
        self.made: dict[tuple[str, tuple[int, int]], object] = {}

    def weight(self, module: str, shape: tuple[int, int]) -> object:
        """A matrix of a module."""
        name = self.formats[module]
        if (name, shape) not in self.made:
            self.made[name, shape] = random_weight(FORMATS[name], shape)
        return self.made[name, shape]

    def vector(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Ones."""
        return np.ones(shape, np.float32)

    def forget(self) -> None:
        """Nothing is read."""


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


def decodes(batch: int, context: int) -> StepShape:
    """A step of so many sequences, each at the same place."""
    return StepShape(batch, batch * (context + 1.0), 0, 0.0, batch)


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="int4-g32,int8,int3-g64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--parts", action="store_true", help="also tell products and the rest apart")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    config = read_config(read_object(options.model / "config.json"))
    if options.layers:
        config = replace(config, layers=config.layers[: options.layers])
    ops = NativeOps(activations="int8")
    names = options.formats.split(",")
    by_group = {
        g.name: next(
            (f for f in names[i % len(names) :] + names if not FORMATS[f].refusal(g.members[0].shape[1])), "int8"
        )
        for i, g in enumerate(groups(config))
    }
    by_module = {m.name: by_group[g.name] for g in groups(config) for m in g.members}
    by_module.setdefault("model.embed_tokens", "int8")
    started = time.perf_counter()
    table = device_table(config, {"int8": set(names)}, caches=["bf16"], folder=None)
    table_s = time.perf_counter() - started
    times = PlannedTimes(table, by_group, "int8", ("bf16",) * config.num_layers)
    decoder = Decoder(config.with_kv_format("bf16"), ops, Mixed(by_module))
    cache = decoder.new_cache(32 * (options.context // BLOCK + 1), BLOCK)
    found = {}
    for batch in (1, 8, 32):
        tokens, rows = decode_batch(batch, options.context, config.vocab_size), np.arange(batch, dtype=np.int32)
        taken = []
        for _ in range(options.rounds + 2):
            began = time.perf_counter()
            decoder.sample(tokens, cache, rows, SamplingBatch.greedy(batch))
            taken.append(time.perf_counter() - began)
        shape = decodes(batch, options.context)
        measured, predicted = median(taken[2:]), times.model_s(shape)
        if options.parts:
            from halve.models.compiled import CompiledSteps

            program, step = CompiledSteps(decoder, ops, cache).program(tokens, rows, full=False)
            part, own = program.part(("prepare", "product", "reduce")), []
            for _ in range(options.rounds):
                decoder.sample(tokens, cache, rows, SamplingBatch.greedy(batch))
                began = time.perf_counter()
                part.run(step, tokens.token_ids, rows)
                own.append(time.perf_counter() - began)
            print(
                f"  products {1e3 * median(own):.3f} ms, predicted {1e3 * times.products_s(shape):.3f} ms "
                f"(head {1e3 * table.group_s('int8', 'lm_head', by_group['lm_head'], batch):.3f} ms); "
                f"all else predicted {1e3 * times.others_s(shape):.3f} ms"
            )
        found[f"decode {batch}"] = (measured, predicted, max(taken[2:]) - min(taken[2:]))
    for name, (measured, predicted, spread) in found.items():
        print(f"{name:10} measured {1e3 * measured:9.3f} ms  predicted {1e3 * predicted:9.3f} ms  "
              f"{predicted / measured - 1:+6.1%}  spread {1e3 * spread:.3f} ms")  # fmt: skip
    print(f"the table took {table_s:.1f} s")
    record = {
        "question": "step_prediction",
        "value": max(abs(p / m - 1) for m, p, _ in found.values()),
        "model": options.model.name,
        "layers": config.num_layers,
        "formats": options.formats,
        "context": options.context,
        "steps": {name: {"measured_s": m, "predicted_s": p, "spread_s": s} for name, (m, p, s) in found.items()},
        "table_s": table_s,
        "runs": options.rounds,
        "kernel": ops.isa.name,
        "threads": ops.num_threads,
        "hardware": ops.device.model,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
