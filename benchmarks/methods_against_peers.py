"""How close to the original are other people's compressors, our methods and the search's plan, at equal bytes?

For each format, KL(original || smaller) in nats per token on sealed text, with intervals by bootstrap over documents:
what llm-compressor, AutoRound and GPTQModel make of the model with our calibration text, each in the Python of its own
environment; the same format by our rtn (R0), clip (R1), gptq (R2), and by gptq with scales and norms tuned (R4); and
the search's mixed plan within the same bytes, with and without tuning. They leave the embedding table, which is the
head of a tied model, in 16 bits, and so do our rows that are called portable; native ones may store it in less. All
models are run in float32 by the same kernels, read back from disk. A matrix that a format does not fit stays as it is.

    python benchmarks/methods_against_peers.py MODEL [--formats int4-g32,int4-g128] [--env PYTHON]... [--made DIR]

--env: the Python of an environment with a peer; may be given again. A peer that none of them has is left out and said.
--made: where the peers' models are kept, and taken from when they are there. Prints a table, and one JSON line last.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_peer import PEERS

from halve.api.making import TUNE_STEPS
from halve.api.progress import SILENT
from halve.api.study import Question, Studied, statistics_of, study
from halve.api.texts import Texts, prepare_texts
from halve.checkpoint import (
    Checkpoint,
    TensorWriter,
    open_checkpoint,
    quantization_config,
    weight_specs,
    weight_tensors,
)
from halve.compress import Choice, Statistics, apply_plan, grouped_plan
from halve.compress.tune import tune, write_tuned
from halve.core.plan import Plan
from halve.evaluate import compare, quality
from halve.evaluate.scorer import DecoderScorer
from halve.formats import FORMATS, Format, Weight
from halve.kernels.reference import TorchOps
from halve.models import ModelConfig, load_config, load_decoder, stored_formats
from halve.models.names import modules, vectors
from halve.models.sizes import bytes_per_token
from halve.search.front import bytes_cost, choices_of, tables
from halve.search.sensitivity import parts_of
from halve.search.solver import solve
from halve.text import Tokenizer

ROUNDED = {"activations": "fp32", "kv_cache": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model, its text, and what is measured of it once. question: of the search, for native plans."""

    checkpoint: Checkpoint
    config: ModelConfig
    source: Mapping[str, Format]
    texts: Texts
    sealed: Sequence[Any]
    original: DecoderScorer
    statistics: Statistics
    question: Question
    folder: Path
    tune_steps: int
    tune_s: float
    known: dict[bool, Studied] = field(default_factory=dict)

    def studied(self, portable: bool) -> Studied:
        """What every option costs; what is known of it already is not measured again."""
        if portable not in self.known:
            own = self.folder / str(portable)
            own.mkdir()
            self.known[portable] = study(replace(self.question, portable=portable), self.original, own, SILENT)
        return self.known[portable]

    def score(self, directory: Path) -> dict[str, float]:
        """KL with its interval, and the bytes of a token with scales of 16 bits."""
        with open_checkpoint(directory) as made:
            config = load_config(made).with_kv_format("fp32")
            scorer = DecoderScorer(load_decoder(made, config, TorchOps(widened=True)))
            scores = compare(self.original, scorer, self.sealed, window_tokens=self.texts.window_tokens)
            size = bytes_per_token(config, stored_formats(made, config))
        found = quality(scores, num_resamples=1000).kl_mean
        return {"kl": found.value, "low": found.low, "high": found.high, "bytes": size}

    def plan(self, choices: Mapping[str, Choice], portable: bool) -> Plan:
        """Of choices by group; what has none stays."""
        return grouped_plan(self.config, choices, portable=portable, **ROUNDED)  # type: ignore[arg-type]

    def ours(self, choices: Mapping[str, Choice], portable: bool, *, tuned: bool = False) -> dict[str, float]:
        """What a plan makes, or what comes of it when its scales and norms learn."""
        plan, statistics = self.plan(choices, portable), self.statistics
        with tempfile.TemporaryDirectory() as folder:
            made, after = Path(folder) / "made", Path(folder) / "tuned"
            energies, hessians = statistics.energies, statistics.hessians
            apply_plan(self.checkpoint, self.config, plan, made, energies=energies, hessians=hessians)
            if not tuned:
                return self.score(made)
            with open_checkpoint(made) as bundle:
                config = load_config(bundle).with_kv_format("fp32")
                smaller = load_decoder(bundle, config, TorchOps(widened=False))
                found = tune(
                    self.original.decoder,
                    smaller,
                    self.texts.calibration,
                    window_tokens=self.texts.window_tokens,
                    steps=self.tune_steps,
                    seconds=self.tune_s,
                )
                write_tuned(bundle, config, plan, found, after)
            return self.score(after) | {"tune_s": round(found.record.seconds, 1), "steps": found.record.steps}


def peers_of(pythons: Sequence[str]) -> dict[str, tuple[str, str] | str]:
    """For each peer the Python that has it and its version, or why it is left out."""
    script = Path(__file__).with_name("run_peer.py")

    @cache
    def version(python: str, peer: str) -> str | None:
        done = subprocess.run([python, script, peer], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    found: dict[str, tuple[str, str] | str] = {}
    for peer, (package, _) in PEERS.items():
        having = ((python, version(python, peer)) for python in pythons)
        first = next(((python, v) for python, v in having if v is not None), None)
        found[peer] = first or f"no environment given by --env has {package}"
    return found


def run_peer(bench: Bench, peer: str, python: str, name: str, windows: Path, out: Path) -> str | None:
    """Make a peer's model; why not, where it fails."""
    fmt = FORMATS[name]
    layers = [m for m in modules(bench.config) if m.name.startswith("model.layers.")]
    job = {
        "peer": peer,
        "model": str(bench.checkpoint.path.resolve()),
        "windows": str(windows.resolve()),
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "skip": [m.name for m in layers if fmt.refusal(m.shape[1])],
        "seed": 0,
        "out": str(out.resolve()),
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        script = str(Path(__file__).with_name("run_peer.py"))
        done = subprocess.run([python, script, file.name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    shutil.rmtree(out, ignore_errors=True)
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    raised = [
        line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)
    ]  # a progress bar may come behind it
    return f"it failed: {(raised or lines or [f'status {done.returncode}'])[-1]}"


def score_peer(bench: Bench, made: Path, name: str) -> dict[str, float]:
    """Of what a peer wrote; GPTQ's layout is written again as we read it."""
    made = made if (made / "config.json").exists() else next(made.glob("*/config.json")).parent
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    if config["quantization_config"]["quant_method"] != "gptq":
        return bench.score(made)
    with tempfile.TemporaryDirectory() as folder:
        from_gptq(bench, made, FORMATS[name], out := Path(folder) / "model")
        return bench.score(out)


def peer_bytes(bench: Bench, name: str) -> int:
    """Of a token in a peer's model: computed in float32, it is saved so, but runs with the original's tables."""
    stored = dict(bench.source)
    for module in modules(bench.config):
        if module.name.startswith("model.layers.") and not FORMATS[name].refusal(module.shape[1]):
            stored[module.name] = FORMATS[name]
    return bytes_per_token(bench.config, stored)


def from_gptq(bench: Bench, made: Path, fmt: Format, out: Path) -> None:
    """A model in GPTQ's layout as compressed-tensors has it: the same codes and scales.

    qweight int32 [in * bits / 32, out], codes along the inputs, lowest bits first, unsigned; scales fp16 [groups, out].
    """
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in sorted(made.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if not key.endswith(".g_idx")}  # noqa: SIM118
    weights = {}
    for module in modules(bench.config):
        if (words := tensors.get(f"{module.name}.qweight")) is None:
            weights[module.name] = bench.checkpoint.read_weight(module.name, module.shape)
            continue
        codes = np.ascontiguousarray(words.T).view(np.uint32)
        scale = np.ascontiguousarray(tensors[f"{module.name}.scales"].T)
        weights[module.name] = Weight(format=fmt, shape=module.shape, codes=codes, scale=scale)
    specs: dict[str, Any] = {}
    for module in modules(bench.config):
        for name, array in weight_tensors(module.name, weights[module.name], portable=True).items():
            specs[name] = ({"uint32": "I32", "int32": "I32", "float16": "F16"}.get(str(array.dtype)), array.shape)
        if not weights[module.name].format.scaled:
            specs |= weight_specs(module.name, weights[module.name].format, module.shape, portable=True)
    for name, _ in vectors(bench.config):
        info = bench.checkpoint.reader.info(name)
        specs[name] = (info.dtype, info.shape)
    out.mkdir()
    with TensorWriter(out, specs) as writer:
        for module in modules(bench.config):
            for name, array in weight_tensors(module.name, weights[module.name], portable=True).items():
                writer.write(name, array)
        for name, _ in vectors(bench.config):
            writer.write(name, bench.checkpoint.reader.read(name))
    formats = {name: weight.format.name for name, weight in weights.items()}
    config = dict(bench.checkpoint.config) | {"quantization_config": quantization_config(formats, portable=True)}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")


def uniform(bench: Bench, name: str, method: str, portable: bool) -> dict[str, Choice]:
    """A format for every group that it fits; a portable plan keeps its tables."""
    found = {}
    for part in parts_of(bench.config):
        kept = portable and (part.group is None or part.group.kind == "lm_head")
        if not kept and not FORMATS[name].refusal(part.modules[0].shape[1]):
            table = part.group is None and method == "gptq"
            found[part.name] = Choice(format=name, method="clip" if table else method)  # type: ignore[arg-type]
    return found


def mixed(bench: Bench, like: Mapping[str, Choice], portable: bool) -> dict[str, Choice]:
    """The plan of least loss within the bytes of another."""
    parts, sensitivity = bench.studied(portable).parts(bench.config)
    costs, losses = tables(parts, sensitivity, bytes_cost)
    whole = parts_of(bench.config)
    stored = {p.name: bench.source[p.modules[0].name].name for p in whole}
    budget = sum(bytes_cost(p, FORMATS[like[p.name].format if p.name in like else stored[p.name]]) for p in whole)
    return choices_of(parts, sensitivity, solve(losses, costs, budget))


def rows_of(bench: Bench, name: str, tuned: bool) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Our rows of a format, by name; a function makes each."""
    peers = uniform(bench, name, "gptq", True)
    for portable in (True, False):
        kind = "portable" if portable else "native"
        choices = uniform(bench, name, "gptq", portable)
        for method in ("rtn", "clip", "gptq"):
            yield f"{kind} {method}", partial(bench.ours, uniform(bench, name, method, portable), portable)
        yield f"{kind} mixed", lambda c=choices, p=portable: bench.ours(mixed(bench, c, p), p)
        if tuned:
            yield f"{kind} gptq, tuned", partial(bench.ours, choices, portable, tuned=True)
            yield f"{kind} mixed, tuned", lambda c=choices, p=portable: bench.ours(mixed(bench, c, p), p, tuned=True)
    # Within the bytes of the peers' files, whose table has 16 bits.
    yield "native mixed, portable's bytes", lambda: bench.ours(mixed(bench, peers, False), False)


def slug(peer: str, name: str) -> str:
    """A directory's name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{peer} {name}".lower())


def show(name: str, row: str, found: Mapping[str, float]) -> None:
    """One row as it is found."""
    size = f"{found['bytes']:.0f} bytes a token"
    print(f"{name:9} {row:31} KL {found['kl']:.5f} [{found['low']:.5f}, {found['high']:.5f}]  {size}", flush=True)


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="int4-g32,int4-g128")
    parser.add_argument("--env", action="append", default=[], metavar="PYTHON")
    parser.add_argument("--made", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rows", default="", help="a pattern: only our rows that it matches")
    parser.add_argument("--tune-steps", type=int, default=TUNE_STEPS)
    parser.add_argument("--tune-seconds", type=float, default=600.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with open_checkpoint(options.model) as checkpoint, tempfile.TemporaryDirectory() as folder:
        bench = opened(checkpoint, Path(folder), options)
        made = options.made or Path(folder) / "peers"
        made.mkdir(exist_ok=True)
        window = bench.texts.window_tokens
        parts = [d[i : i + window] for d in bench.texts.calibration for i in range(0, len(d), window)]
        np.savez(windows := Path(folder) / "windows.npz", *(part for part in parts if len(part) > 1))
        peers = peers_of(options.env)
        results: dict[str, dict[str, Any]] = {}
        left_out: dict[str, str] = {}
        for name in options.formats.split(","):
            rows = results[name] = {}
            for peer, having in peers.items():
                out, started = made / slug(peer, name), time.perf_counter()
                failed: str | None = None
                if not out.exists():
                    failed = having if isinstance(having, str) else run_peer(bench, peer, having[0], name, windows, out)
                if failed is not None:
                    left_out[f"{peer}, {name}"] = failed
                    print(f"{name:9} {peer:31} left out: {failed}", flush=True)
                    continue
                took = round(time.perf_counter() - started, 1)
                version = having[1] if isinstance(having, tuple) else None
                found = score_peer(bench, out, name) | {"bytes": peer_bytes(bench, name)}
                rows[peer] = found | {"version": version, "took_s": took}
                show(name, peer, rows[peer])
            for row, make in rows_of(bench, name, tuned=options.tune_steps > 0):
                if re.search(options.rows, row):
                    rows[row] = make()
                    show(name, row, rows[row])
    record = {
        "question": "methods_against_peers",
        "value": value_of(results, set(PEERS)),
        "model": options.model.name,
        "tokens": int(sum(map(len, bench.sealed))),
        "calibration_tokens": int(sum(map(len, parts))),
        "tune_steps": options.tune_steps,
        "formats": results,
        "left_out": left_out,
    }
    print(json.dumps(record))


def opened(checkpoint: Checkpoint, folder: Path, options: argparse.Namespace) -> Bench:
    """Read the text, split as the search splits it, and calibrate."""
    config = load_config(checkpoint).with_kv_format("fp32")
    tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
    texts = prepare_texts(options.text, tokenizer, config, selected=True)
    original = DecoderScorer(load_decoder(checkpoint, config, TorchOps(widened=True)), keep_bytes=1 << 29)
    question = Question(
        checkpoint=checkpoint,
        config=config,
        source=stored_formats(checkpoint, config),
        method="auto",
        portable=False,
        device="cpu",
        texts=texts,
        model_sha256=checkpoint.sha256(lambda done, total: None),
        activations=("fp32",),
        kv_caches=("fp32",),
    )
    (own := folder / "statistics").mkdir()
    statistics = statistics_of(checkpoint, config, texts, "cpu", own, own, SILENT, hessians=True)
    ends = np.cumsum([len(t) for t in texts.sealed])
    return Bench(
        checkpoint=checkpoint,
        config=config,
        source=question.source,
        texts=texts,
        sealed=texts.sealed[: int(np.searchsorted(ends, options.tokens)) + 1],
        original=original,
        statistics=statistics,
        question=question,
        folder=folder,
        tune_steps=options.tune_steps,
        tune_s=options.tune_seconds,
    )


def value_of(results: Mapping[str, Mapping[str, Mapping[str, float]]], peers: set[str]) -> float | None:
    """The worst, over the formats, of our best portable row's KL over the best peer's; None without both."""
    ratios = []
    for rows in results.values():
        ours = [found["kl"] for row, found in rows.items() if row.startswith("portable")]
        theirs = [found["kl"] for row, found in rows.items() if row in peers]
        if ours and theirs:
            ratios.append(min(ours) / min(theirs))
    return max(ratios, default=None)


if __name__ == "__main__":
    main()
