"""How near is the predicted step to the measured one?

The search adds up a plan's cost from a table of products and of all else (`halve/search/device_table.py`); here the sum
is held against whole steps of a decoder with random weights in that plan: decoding with 1, 8 and 32 sequences at a
context, and a chunk of a prompt. Formats are mixed over the layers, as the search mixes them. The aim is 10 %.

    python benchmarks/step_prediction.py MODEL [--formats int4-g32,int8,int3-g64] [--context 256] [--layers N]
        [--repeats 3]

MODEL: a directory whose config.json gives the shapes. Steps are measured before and after the table, since a shared
machine drifts while it is made; each repeat makes one anew, and the medians over them are told, with the spread of the
steps as a sign of how steady the machine was. Prints a table, and one JSON line last.
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


def measured_s(decoder: Decoder, cache: object, batch: int, context: int, rounds: int) -> list[float]:
    """Seconds of whole steps."""
    tokens, rows = decode_batch(batch, context, decoder.config.vocab_size), np.arange(batch, dtype=np.int32)
    taken = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        decoder.sample(tokens, cache, rows, SamplingBatch.greedy(batch))  # type: ignore[arg-type]
        taken.append(time.perf_counter() - began)
    return taken[2:]


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="int4-g32,int8,int3-g64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
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
    decoder = Decoder(config.with_kv_format("bf16"), ops, Mixed(by_module))
    cache = decoder.new_cache(32 * (options.context // BLOCK + 1), BLOCK)
    batches, rounds = (1, 8, 32), options.rounds
    measured: dict[int, list[float]] = {batch: [] for batch in batches}
    predicted: dict[int, list[float]] = {batch: [] for batch in batches}
    table_s = []
    for _ in range(options.repeats):
        for batch in batches:
            measured[batch] += measured_s(decoder, cache, batch, options.context, rounds)
        started = time.perf_counter()
        table = device_table(config, {"int8": set(names)}, caches=["bf16"], folder=None)
        table_s.append(time.perf_counter() - started)
        times = PlannedTimes(table, by_group, "int8", ("bf16",) * config.num_layers)
        for batch in batches:
            predicted[batch].append(times.model_s(decodes(batch, options.context)))
            measured[batch] += measured_s(decoder, cache, batch, options.context, rounds)
    found = {}
    for batch in batches:
        steps, told = measured[batch], predicted[batch]
        found[f"decode {batch}"] = {
            "measured_s": median(steps), "predicted_s": median(told), "difference": median(told) / median(steps) - 1,
            "steps_s": [min(steps), max(steps)], "predictions_s": told,
        }  # fmt: skip
        spans = (f"{1e3 * median(v):9.3f} ms [{1e3 * min(v):.3f}, {1e3 * max(v):.3f}]" for v in (steps, told))
        words = "  predicted ".join(spans)
        print(f"decode {batch:<3} measured {words}  {median(told) / median(steps) - 1:+6.1%}")
    print(f"a table took {median(table_s):.1f} s")
    record = {
        "question": "step_prediction",
        "value": max(abs(one["difference"]) for one in found.values()),  # type: ignore[arg-type]
        "model": options.model.name,
        "layers": config.num_layers,
        "formats": options.formats,
        "context": options.context,
        "steps": found,
        "table_s": median(table_s),
        "repeats": options.repeats,
        "kernel": ops.isa.name,
        "threads": ops.num_threads,
        "hardware": ops.device.model,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
