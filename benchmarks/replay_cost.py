"""What does a chat trace cost on a 1B shape with compressed weights, over bf16 in the same engine?

End-to-end seconds of a real replay: requests of the chat workload (512 tokens in, 256 out, all at once) through the
engine's scheduler, its paged cache and its kernels, in turns with the original, so that a drifting machine slows all
alike. Speed does not depend on what weights are, so a checkpoint of random weights will do, and nothing is said of its
quality:

    mapped    a trained model's certified plan (BUNDLE), each part of it for the same part here at the same depth
    int4      int4-g32 weights, int8 activations, int8 keys and values: uncertified

The aims: at most 0.55 of the original for `mapped`, at most 0.40 for `int4` (better 0.25).

    python benchmarks/replay_cost.py MODEL BUNDLE --work DIR [--requests 8] [--scale 0.25] [--rounds 3]

MODEL: a checkpoint of the large shape in bf16. DIR: where the two compressed models are written, and found again.
--scale: of all lengths, so that a replay takes seconds; it is told with the result. Prints a table, one JSON line last.
"""

import argparse
import json
import math
import os
import sys
from decimal import Decimal
from pathlib import Path
from statistics import median

from halve import load
from halve.api.bundle import read_plan
from halve.api.replayed import play
from halve.api.shape_cost import mapped
from halve.api.versus.figures import usd_per_mtok
from halve.api.workloads import PRESETS
from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan
from halve.core.plan import Activations, KVCache, Plan, WeightRule, Weights
from halve.core.workload import Workload
from halve.formats import FORMATS, Format
from halve.hardware import detect_cpu
from halve.models import load_config, stored_formats
from halve.models.names import modules
from halve.models.sizes import bytes_per_token

INT4 = "int4-g32"


def make(model: Path, directory: Path, plan: Plan) -> None:
    """Write a compressed model, rounded to nearest, unless the same one is there."""
    found = directory / "halve" / "plan.json"
    if found.exists() and found.read_text() == plan.to_json():
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(model) as checkpoint:
        apply_plan(checkpoint, load_config(checkpoint), plan, directory)


def reference(model: Path, directory: Path) -> None:
    """The same files, run with activations and cache in bf16: a plain checkpoint would run them in float32, slower."""
    (directory / "halve").mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.is_file() and not (directory / path.name).exists():
            (directory / path.name).symlink_to(path.resolve())
    plan = Plan(activations=Activations(format="bf16"), kv_cache=KVCache(format="bf16"))
    (directory / "halve" / "plan.json").write_text(plan.to_json())


def plan_of(formats: dict[str, Format], activations: str, kv_cache: str) -> Plan:
    """A plan that names every module."""
    rules = tuple(
        WeightRule(pattern=name, format=fmt.name, method="rtn" if fmt.scaled else None) for name, fmt in formats.items()
    )
    return Plan(
        weights=Weights(rules=rules),
        activations=Activations(format=activations),  # type: ignore[arg-type]
        kv_cache=KVCache(format=kv_cache),  # type: ignore[arg-type]
    )


def main() -> None:
    """Make, replay in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--price-per-hour", type=Decimal, default=Decimal("0.17"))
    parser.add_argument("--make-only", action="store_true", help="write the compressed models and end")
    options = parser.parse_args()
    with open_checkpoint(options.model) as large, open_checkpoint(options.bundle) as small:
        config, source = load_config(large), stored_formats(large, load_config(large))
        plan = read_plan(small)
        small_config = load_config(small, plan)
        formats = mapped(stored_formats(small, small_config), small_config, config)
    formats = {m.name: formats[m.name] for m in modules(config)}
    plans = {
        "mapped": plan_of(formats, plan.activations.format, plan.kv_cache.format),
        "int4": plan_of({m.name: FORMATS[INT4] for m in modules(config)}, "int8", "int8"),
    }
    for name, one in plans.items():
        make(options.model, options.work / name, one)
    if options.make_only:
        return
    reference(options.model, options.work / "bf16")
    preset = PRESETS["chat"]
    workload = Workload.poisson(
        requests_per_s=math.inf,
        num_requests=options.requests,
        prompt_tokens=round(preset.prompt_tokens * options.scale),
        output_tokens=round(preset.output_tokens * options.scale),
    )
    models = {name: load(options.work / name, keep=True) for name in ("bf16", *plans)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for done in range(-1, options.rounds):  # the first one warms up, with a part of the requests
        names = list(models) if done % 2 == 0 else list(models)[::-1]
        for name in names:
            asked = workload.first(1) if done < 0 else workload
            played = play(models[name], asked, math.inf, seed=done + 1)
            print(f"round {done} {name}: {played.num_tokens} tokens in {played.seconds:.2f} s", file=sys.stderr)
            if done >= 0:
                seconds[name].append(played.seconds / played.num_tokens)
    record = {
        "question": "replay_cost",
        "model": options.model.name,
        "plan_of": options.bundle.name,
        "requests": options.requests,
        "prompt_tokens": workload.requests[0].prompt_tokens,
        "output_tokens": workload.requests[0].output_tokens,
        "rounds": options.rounds,
        "usd_per_hour": str(options.price_per_hour),
        "hardware": detect_cpu().model,
        "load": os.getloadavg(),
        "results": {},
    }
    sizes = {"bf16": source, **{n: {r.pattern: FORMATS[r.format] for r in p.weights.rules} for n, p in plans.items()}}
    for name, taken in seconds.items():
        each = [one / other for one, other in zip(taken, seconds["bf16"], strict=True)]
        usd = usd_per_mtok(options.price_per_hour, 1 / median(taken))
        record["results"][name] = {  # type: ignore[index]
            "tok_s": 1 / median(taken),
            "usd_per_mtok": usd,
            "ratio": median(each),
            "low": min(each),
            "high": max(each),
            "bytes_ratio": bytes_per_token(config, sizes[name]) / bytes_per_token(config, source),
            "certified": False,
            "cache": models[name].plan.kv_cache.format,
        }
        print(
            f"{name:8} {1 / median(taken):8.1f} tok/s  ${usd:.3f} a million  "
            f"{median(each):.3f} of bf16 [{min(each):.3f}, {max(each):.3f}]"
        )
    print(json.dumps(record))
    for one in models.values():
        one.close()


if __name__ == "__main__":
    main()
