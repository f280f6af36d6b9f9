"""How much cheaper does a plan decode than the best format for all, where both are as close to the original?

KL(original || smaller) in nats per token on sealed text, which neither calibration nor search saw, weights alone
rounded: of the whole model in each format, each matrix by the better of clip and gptq; and of plans along the search's
front, their scales and norms tuned. Then, for each format, the cheapest plan whose KL is no higher decodes beside it,
in turns: both as random weights of Llama-3.2-1B's shape, whole, every part stored as the same part of the small model
is, since a tiny model's time is not its weights'. The front is made for the bytes of that shape.

    python benchmarks/cost_at_equal_kl.py MODEL [--portable] [--formats int8,int6-g32,...] [--points 12]
        [--tokens 20000]

--portable: formats and plans that other engines read, tables in 16 bits. Prints a table, and one JSON line last.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from methods_against_peers import Bench, opened, uniform
from step_prediction import BLOCK, Mixed, decode_batch

from halve.api.making import TUNE_STEPS
from halve.api.shape_cost import CONTEXT, LLAMA_1B, mapped
from halve.api.trial import ratio_of_medians
from halve.checkpoint import open_checkpoint
from halve.compress import Choice
from halve.formats import FORMATS, Format
from halve.kernels.native import NativeOps
from halve.kernels.sampling import SamplingBatch
from halve.models import Decoder
from halve.models.names import Module, modules
from halve.search.front import choices_of, tables
from halve.search.sensitivity import Part
from halve.search.solver import front

NATIVE = "int8,int6-g32,int6-g64,int6-g128,int5-g32,int5-g64,int5-g128,int4-g32,int4-g64,int4-g128,int3-g32,int3-g64"
PORTABLE = "int8,int4-g32,int4-g64,int4-g128"
ROUNDS = 21


def stored_in(bench: Bench, choices: Mapping[str, Choice], portable: bool) -> dict[str, Format]:
    """The format of every module of the small model."""
    found = dict(bench.source)
    for part in bench.studied(portable).parts(bench.config)[0]:
        if (choice := choices.get(part.name)) is not None and choice.method is not None:
            found |= {m.name: FORMATS[choice.format] for m in part.modules}
    return found


def stand_ins(bench: Bench, part: Part) -> list[Module]:
    """The modules of the large shape that are stored as this part of the small model is."""
    if part.group is None:
        return []
    marked = {m.name: FORMATS["bf16"] for m in modules(bench.config)} | {m.name: FORMATS["fp32"] for m in part.modules}
    found = mapped(marked, bench.config, LLAMA_1B)
    return [m for m in modules(LLAMA_1B) if found[m.name].name == "fp32"]


def size_of(fmt: Format, module: Module) -> int:
    """Bytes of a module; int8 where a format does not fit, as `mapped` has it."""
    return (FORMATS["int8"] if fmt.scaled and fmt.refusal(module.shape[1]) else fmt).size_bytes(module.shape)


def decoder_of(bench: Bench, choices: Mapping[str, Choice], portable: bool) -> Decoder:
    """The large shape, stored so."""
    formats = mapped(stored_in(bench, choices, portable), bench.config, LLAMA_1B)
    return Decoder(
        LLAMA_1B.with_kv_format("bf16"),
        NativeOps(activations="int8"),
        Mixed({module: fmt.name for module, fmt in formats.items()}),
    )


def in_turns(one: Decoder, other: Decoder) -> tuple[list[float], list[float]]:
    """Seconds of a decode step of each at batch 1."""
    batch = decode_batch(1, CONTEXT - 1, LLAMA_1B.vocab_size)
    caches = [d.new_cache(CONTEXT // BLOCK, BLOCK) for d in (one, other)]
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 3):
        for decoder, cache, times in zip((one, other), caches, taken, strict=True):
            began = time.perf_counter()
            decoder.sample(batch, cache, np.zeros(1, np.int32), SamplingBatch.greedy(1))
            times.append(time.perf_counter() - began)
    return taken[0][3:], taken[1][3:]


def plain_models(bench: Bench, names: list[str], portable: bool) -> dict[str, dict[str, Any]]:
    """Each format for all of the model, by the better of two methods."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        both = []
        for method in ("clip", "gptq"):
            choices = uniform(bench, name, method, portable)
            both.append(bench.ours(choices, portable) | {"choices": choices, "method": method})
        found[name] = min(both, key=lambda one: one["kl"])
        print(f"{name:10} {found[name]['method']:5} KL {found[name]['kl']:.5f}", flush=True)
    return found


def tuned_plans(bench: Bench, portable: bool, lowest: float, highest: float, how_many: int) -> list[dict[str, Any]]:
    """Plans of the front whose losses lie between two, tuned. cost: bytes of a token of the large shape."""
    parts, sensitivity = bench.studied(portable).parts(bench.config)
    there = {part.name: stand_ins(bench, part) for part in parts}
    costs, losses = tables(parts, sensitivity, lambda part, fmt: float(sum(size_of(fmt, m) for m in there[part.name])))
    points = front(costs, losses, num_points=96)
    wanted = np.geomspace(max(lowest, points[-1].loss, 1e-6), highest, how_many)
    nearest = {min(points, key=lambda p, w=w: abs(np.log(max(p.loss, 1e-9) / w))).chosen for w in wanted}
    found = []
    for point in (p for p in points if p.chosen in nearest):
        choices = choices_of(parts, sensitivity, point)
        made = bench.ours(choices, portable, tuned=True)
        found.append(made | {"choices": choices, "cost": point.cost, "predicted": point.loss})
        print(f"plan of {point.cost / 1e6:.0f} MB there: KL {made['kl']:.5f}", flush=True)
    return found


def row_of(bench: Bench, found: dict[str, Any], plans: list[dict[str, Any]], portable: bool) -> dict[str, Any]:
    """A format beside the cheapest plan that is as close."""
    row = {"method": found["method"], "kl": found["kl"], "ratio": None}
    close = [p for p in plans if p["kl"] <= found["kl"]]
    if not close:
        return row
    plan = min(close, key=lambda p: p["cost"])
    pair = [decoder_of(bench, one["choices"], portable) for one in (found, plan)]
    one, other = in_turns(*pair)
    ratio = ratio_of_medians(other, one)
    formats = mapped(stored_in(bench, found["choices"], portable), bench.config, LLAMA_1B)
    size = sum(size_of(formats[m.name], m) for m in modules(LLAMA_1B))
    return row | {
        "plan_kl": plan["kl"], "ms": 1e3 * median(one), "plan_ms": 1e3 * median(other),
        "ratio": [ratio.low, ratio.value, ratio.high], "bytes_ratio": plan["cost"] / size,
    }  # fmt: skip


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--formats")
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--tune-steps", type=int, default=TUNE_STEPS)
    parser.add_argument("--tune-seconds", type=float, default=600.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    portable = options.portable
    names = (options.formats or (PORTABLE if portable else NATIVE)).split(",")
    with open_checkpoint(options.model) as checkpoint, tempfile.TemporaryDirectory() as folder:
        bench = opened(checkpoint, Path(folder), options)
        plain = plain_models(bench, names, portable)
        values = [found["kl"] for found in plain.values()]
        plans = tuned_plans(bench, portable, min(values), 1.5 * max(values), options.points)
        rows: dict[str, Any] = {}
        for name, found in plain.items():
            row = rows[name] = row_of(bench, found, plans, portable)
            if row["ratio"] is None:
                print(f"{name:10} KL {row['kl']:.5f}: no plan that was made is as close", flush=True)
                continue
            low, value, high = row["ratio"]
            print(
                f"{name:10} KL {row['kl']:.5f}, plan {row['plan_kl']:.5f}: {row['plan_ms']:.2f} of {row['ms']:.2f} ms, "
                f"{value:.3f} [{low:.3f}, {high:.3f}], bytes {row['bytes_ratio']:.3f}",
                flush=True,
            )
    ratios = [row["ratio"][1] for row in rows.values() if row["ratio"]]
    record = {
        "question": "cost_at_equal_kl", "value": max(ratios, default=None), "model": options.model.name,
        "portable": portable, "formats": rows, "tokens": int(sum(map(len, bench.sealed))),
        "plans": [{"kl": p["kl"], "predicted": p["predicted"], "bytes_there": p["cost"]} for p in plans],
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
