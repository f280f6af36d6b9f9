"""How much closer is a mixed plan to the original than one format for all, at the same bytes read for a token?

For each format, the whole model in it by rounding to nearest (rtn), by clip and by gptq; then the plan that the search
makes within the bytes of that format. KL(original || smaller) in nats per token on sealed text, which neither
calibration nor search saw, and the plan's less gptq's on the same documents; weights alone are rounded. Of a sparse
model also the plan in which all experts of a layer are alike. A group that a
format does not fit takes int8, in all of them. With `--speed`, gptq and the plan also decode in turns, so that equal
bytes are held against measured seconds.

    python benchmarks/quality_at_equal_bytes.py MODEL [--formats int4-g32,int3-g32] [--text FILE] [--tokens 20000]
        [--speed]

Prints a table, and one JSON line last.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from halve.api.model import load
from halve.api.progress import SILENT
from halve.api.study import Question, study
from halve.api.texts import prepare_texts
from halve.api.trial import in_turns
from halve.checkpoint import open_checkpoint
from halve.compress import Choice, apply_plan, grouped_plan, resolve
from halve.core.certificate import Measured
from halve.evaluate import compare, quality
from halve.evaluate.fidelity import PairedScores
from halve.evaluate.scorer import DecoderScorer
from halve.evaluate.side_by_side import against_reference
from halve.formats import FORMATS
from halve.kernels.reference import TorchOps
from halve.models import load_config, load_decoder, stored_formats
from halve.search import bytes_per_token
from halve.search.front import bytes_cost, choices_of, tables
from halve.search.sensitivity import parts_of
from halve.search.solver import solve
from halve.text import Tokenizer


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="int4-g32,int3-g32")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--speed", action="store_true")
    return parser.parse_args()


def said(found: Measured) -> str:
    """A figure with its interval."""
    return f"{found.value:.5f} [{found.low:.5f}, {found.high:.5f}]"


def less(one: PairedScores, other: PairedScores, vocab_size: int) -> Measured:
    """KL of one less that of the other, on the same documents."""
    found = against_reference(other, one, vocab_size=vocab_size).kl_difference
    assert found is not None
    return found


def decode_ratio(folder: Path) -> Measured:
    """Seconds of a decoded token of the plan over gptq's, in turns."""
    models = [load(folder / method, device="cpu", keep=False) for method in ("gptq", "mixed")]
    found = in_turns(models, SILENT)
    for model in models:
        model.close()
    if found.disturbed:
        print("others ran while it was timed", flush=True)
    return found.decode


def main() -> None:
    """Measure, print a table and the record."""
    options = read_options()
    torch.set_num_threads(1)
    rounded = {"activations": "fp32", "kv_cache": "fp32"}
    with open_checkpoint(options.model) as checkpoint, tempfile.TemporaryDirectory() as folder:
        config = load_config(checkpoint).with_kv_format("fp32")
        source = stored_formats(checkpoint, config)
        texts = prepare_texts(
            options.text, Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size), config, selected=True
        )
        original = DecoderScorer(load_decoder(checkpoint, config, TorchOps(widened=True)), keep_bytes=1 << 29)
        question = Question(
            checkpoint=checkpoint,
            config=config,
            source=source,
            method="auto",
            portable=False,
            device="cpu",
            texts=texts,
            model_sha256=checkpoint.sha256(lambda done, total: None),
            activations=("fp32",),
            kv_caches=("fp32",),
        )
        started = time.perf_counter()
        studied = study(question, original, Path(folder), SILENT)
        study_s = time.perf_counter() - started
        ends = np.cumsum([len(t) for t in texts.sealed])
        sealed = texts.sealed[: int(np.searchsorted(ends, options.tokens)) + 1]

        def kl(choices: dict[str, Choice], out: Path) -> tuple[float, float, float, int]:
            plan = grouped_plan(config, choices, portable=False, **rounded)
            statistics = studied.statistics
            apply_plan(checkpoint, config, plan, out, energies=statistics.energies, hessians=statistics.hessians)
            with open_checkpoint(out) as made:
                smaller = DecoderScorer(load_decoder(made, load_config(made, plan), TorchOps(widened=True)))
                scores = compare(original, smaller, sealed, window_tokens=texts.window_tokens)
            scored[out.name] = scores
            found = quality(scores, num_resamples=1000).kl_mean
            return found.value, found.low, found.high, bytes_per_token(config, resolve(plan, config), source)

        results: dict[str, dict[str, dict[str, float]]] = {}
        differences: dict[str, Measured] = {}
        ratios: dict[str, Measured] = {}
        scored: dict[str, PairedScores] = {}
        whole = parts_of(config)
        ways = {"mixed": studied.parts(config)}
        if config.sparse:
            ways["alike"] = whole, studied.sensitivity
        for name in options.formats.split(","):
            rows = {}
            for method in ("rtn", "clip", "gptq"):
                choices = {
                    p.name: Choice(
                        format="int8" if FORMATS[name].refusal(p.modules[0].shape[1]) else name,
                        method="clip" if p.name == "embedding" and method == "gptq" else method,
                    )
                    for p in whole
                }
                rows[method] = kl(choices, Path(folder) / name / method)
            budget = sum(bytes_cost(p, FORMATS[choices[p.name].format]) for p in whole)
            for way, (parts, sensitivity) in ways.items():
                costs, losses = tables(parts, sensitivity, bytes_cost)
                plan = choices_of(parts, sensitivity, solve(losses, costs, budget))
                rows[way] = kl(plan, Path(folder) / name / way)
            results[name] = {m: {"kl": v, "low": a, "high": b, "bytes": size} for m, (v, a, b, size) in rows.items()}
            for method, (value, low, high, size) in rows.items():
                print(f"{name:10} {method:6} KL {value:.5f} [{low:.5f}, {high:.5f}]  {size} bytes a token", flush=True)
            differences[name] = less(scored["mixed"], scored["gptq"], config.vocab_size)
            print(f"{name:10} mixed less gptq {said(differences[name])}", flush=True)
            if options.speed:
                ratios[name] = decode_ratio(Path(folder) / name)
                print(f"{name:10} a decoded token of mixed takes {said(ratios[name])} of gptq's time", flush=True)
    first = results[options.formats.split(",")[0]]
    print(f"the study took {study_s:.0f} s")
    record = {
        "question": "quality_at_equal_bytes",
        "value": first["mixed"]["kl"] / first["gptq"]["kl"],
        "model": options.model.name,
        "tokens": int(sum(map(len, sealed))),
        "study_s": study_s,
        "formats": results,
        "kl_differences": {name: asdict(found) for name, found in differences.items()},
        "decode_ratios": {name: asdict(found) for name, found in ratios.items()},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
