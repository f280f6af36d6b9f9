"""Does the cost model rank plans as the clock does?

Plans drawn at random (a format for each fused group), from cheap to dear, are built as decoders of random weights in
MODEL's shape; a whole decode step of each is predicted from the device table and measured, all plans in turns in every
round. Told is Spearman's rank correlation of both; the aim is 0.95 over 30 plans.

    python benchmarks/cost_ranking.py MODEL [--plans 30] [--batch 1] [--context 256] [--layers 4] [--rounds 9]

MODEL: a directory whose config.json gives the shapes. Prints one JSON line last.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from step_prediction import BLOCK, Mixed, decode_batch, decodes

from halve.checkpoint.files import read_object
from halve.formats import FORMATS
from halve.kernels.native import NativeOps
from halve.kernels.sampling import SamplingBatch
from halve.models import Decoder, read_config
from halve.models.names import groups
from halve.search.device_table import PlannedTimes, device_table

NAMES = ("int2-g32", "int3-g64", "int4-g32", "int4-g128", "int5-g32", "int6-g64", "int8", "bf16")


def main() -> None:
    """Draw, predict, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    config = read_config(read_object(options.model / "config.json"))
    if options.layers:
        config = replace(config, layers=config.layers[: options.layers])
    ops, rng = NativeOps(activations="int8"), np.random.default_rng(0)
    names = [name for name in NAMES if name in FORMATS]
    table = device_table(config, {"int8": set(names) | {"int8"}}, caches=["bf16"], folder=None)
    plans = []
    for i in range(options.plans):
        # Some formats of a window that slides from cheap to dear, so that costs spread.
        middle = i * (len(names) - 1) / max(1, options.plans - 1)
        near = [name for j, name in enumerate(names) if abs(j - middle) <= 1.5]
        plan = {}
        for group in groups(config):
            drawn = str(rng.choice(near))
            plan[group.name] = "int8" if FORMATS[drawn].refusal(group.members[0].shape[1]) else drawn
        plans.append(plan)
    tokens = decode_batch(options.batch, options.context, config.vocab_size)
    rows = np.arange(options.batch, dtype=np.int32)
    predicted, decoders = [], []
    for plan in plans:
        times = PlannedTimes(table, plan, "int8", ("bf16",) * config.num_layers)
        predicted.append(times.model_s(decodes(options.batch, options.context)))
        by_module = {m.name: plan[g.name] for g in groups(config) for m in g.members}
        by_module.setdefault("model.embed_tokens", "int8")
        decoder = Decoder(config.with_kv_format("bf16"), ops, Mixed(by_module))
        decoders.append((decoder, decoder.new_cache(options.batch * (options.context // BLOCK + 1), BLOCK)))
    taken: list[list[float]] = [[] for _ in plans]
    for done in range(options.rounds + 1):
        for i in rng.permutation(len(plans)):
            decoder, cache = decoders[i]
            decoder.sample(tokens, cache, rows, SamplingBatch.greedy(options.batch))  # its own weights in the caches
            began = time.perf_counter()
            decoder.sample(tokens, cache, rows, SamplingBatch.greedy(options.batch))
            if done:
                taken[i].append(time.perf_counter() - began)
    measured = [float(np.quantile(one, 0.25)) for one in taken]  # what else runs only ever adds
    record = {
        "question": "cost_ranking",
        "value": float(spearmanr(predicted, measured).statistic),
        "model": options.model.name,
        "layers": config.num_layers,
        "batch": options.batch,
        "context": options.context,
        "plans": options.plans,
        "predicted_s": predicted,
        "measured_s": measured,
        "runs": options.rounds,
        "kernel": ops.isa.name,
        "threads": ops.num_threads,
        "hardware": ops.device.model,
        "load": os.getloadavg(),
    }
    worst = max(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))
    print(f"Spearman {record['value']:.3f} over {options.plans} plans; steps from {1e3 * min(measured):.3f} to "
          f"{1e3 * max(measured):.3f} ms, predicted within {worst:.1%}")  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
