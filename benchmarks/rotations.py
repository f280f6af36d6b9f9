"""Would weights lose less if a Hadamard rotation were folded into them before they are rounded?

    heads   values of each head are rotated, and o rotates them back (SpinQuant's R2, arXiv:2405.16406)
    stream  everything that reads or writes the residual stream is rotated, norms folded into what follows them
            (QuaRot, arXiv:2404.00456); a tied table and head become two matrices

Both leave the float32 model as it is (`itself` says how nearly). Each format and method then rounds all products, and
tables and head to int8, and KL(original || smaller) is told in nats on sealed text, beside that of the plain model.
Nothing here is part of the package: docs/LOG.md says why.

    python benchmarks/rotations.py MODEL [--formats int4-g32,int4-g128,int3-g32] [--methods clip,gptq] [--tokens 15000]

Prints a line for each, and one JSON line last.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halve.api.progress import SILENT
from halve.api.study import statistics_of
from halve.api.texts import Texts, prepare_texts
from halve.checkpoint import Checkpoint, TensorWriter, open_checkpoint
from halve.compress import Choice, Statistics, apply_plan, grouped_plan
from halve.compress.apply import carry_files, write_text
from halve.evaluate import compare, quality
from halve.evaluate.scorer import DecoderScorer
from halve.formats import FORMATS
from halve.kernels.reference import TorchOps
from halve.models import CheckpointSource, ModelConfig, load_config, load_decoder
from halve.models.names import EMBEDDING, FINAL_NORM, LM_HEAD, layer_norms, modules, vectors
from halve.search.sensitivity import parts_of
from halve.text import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
KINDS: tuple[tuple[str, ...], ...] = ((), ("heads",), ("stream",), ("heads", "stream"))
READS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
WRITES = ("self_attn.o_proj", "mlp.down_proj")


def hadamard(size: int) -> Array:
    """Orthogonal [size, size]: blocks of the largest power of two that divides it."""
    block = size & -size
    rows = np.ones((1, 1))
    while len(rows) < block:
        rows = np.block([[rows, rows], [rows, -rows]])
    return np.kron(np.eye(size // block), rows / np.sqrt(block))


def rotate_heads(weights: dict[str, Array], config: ModelConfig) -> None:
    """Values by a rotation of each head, what reads them by the same."""
    size, turn = config.head_dim, hadamard(config.head_dim)
    for layer in range(config.num_layers):
        value, output = (f"model.layers.{layer}.self_attn.{name}" for name in ("v_proj", "o_proj"))
        v, o = weights[value], weights[output]
        weights[value] = np.einsum("ij,gjk->gik", turn, v.reshape(-1, size, v.shape[1])).reshape(v.shape)
        weights[output] = np.einsum("hgj,ij->hgi", o.reshape(len(o), -1, size), turn).reshape(o.shape)


def rotate_stream(weights: dict[str, Array], gains: dict[str, Array], config: ModelConfig) -> None:
    """The residual stream; gains become one, and a tied head a matrix of its own."""
    signs = np.random.default_rng(0).choice([-1, 1], config.hidden_size)
    turn = hadamard(config.hidden_size) * signs[:, None]
    weights[LM_HEAD] = (weights[EMBEDDING if config.tied else LM_HEAD] * gains[FINAL_NORM]) @ turn
    weights[EMBEDDING] = weights[EMBEDDING] @ turn
    gains[FINAL_NORM][:] = 1
    for layer in range(config.num_layers):
        for norm, names in zip(layer_norms(layer), READS, strict=True):
            for name in (f"model.layers.{layer}.{n}" for n in names):
                weights[name] = (weights[name] * gains[norm]) @ turn
            gains[norm][:] = 1
        for name in (f"model.layers.{layer}.{n}" for n in WRITES):
            weights[name] = turn.T @ weights[name]


def write_rotated(checkpoint: Checkpoint, config: ModelConfig, kinds: Sequence[str], out: Path) -> None:
    """The model in float32, rotated."""
    source, raw = CheckpointSource(checkpoint), dict(checkpoint.config)
    weights = {m.name: checkpoint.read_weight(m.name, m.shape).dequantize().astype(np.float64) for m in modules(config)}
    gains = {name: source.vector(name, shape).astype(np.float64) for name, shape in vectors(config)}
    if "heads" in kinds:
        rotate_heads(weights, config)
    if "stream" in kinds:
        rotate_stream(weights, gains, config)
        raw["tie_word_embeddings"] = False
    tensors = {f"{name}.weight": values for name, values in weights.items()} | gains
    out.mkdir()
    with TensorWriter(out, {name: ("F32", values.shape) for name, values in tensors.items()}) as writer:
        for name, values in tensors.items():
            writer.write(name, values.astype(np.float32))
    write_text(out / "config.json", json.dumps(raw))
    carry_files(checkpoint, out)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The original, the text, and where files go."""

    original: DecoderScorer
    texts: Texts
    sealed: Sequence[Array]
    folder: Path

    def kl(self, path: Path, activations: str = "fp32") -> dict[str, float]:
        """Of a model on disk."""
        with open_checkpoint(path) as checkpoint:
            config = load_config(checkpoint).with_kv_format("fp32")
            smaller = DecoderScorer(load_decoder(checkpoint, config, TorchOps(activations=activations, widened=True)))
            scores = compare(self.original, smaller, self.sealed, window_tokens=self.texts.window_tokens)
        found = quality(scores, num_resamples=500).kl_mean
        return {"kl": found.value, "low": found.low, "high": found.high}

    def rounded(self, path: Path, statistics: Statistics, name: str, method: str, out: Path) -> Path:
        """A model on disk, all products in one format."""
        with open_checkpoint(path) as checkpoint:
            config = load_config(checkpoint).with_kv_format("fp32")
            choices = {}
            for part in parts_of(config):
                table = part.name in ("embedding", "lm_head")
                fits = not table and not FORMATS[name].refusal(part.modules[0].shape[1])
                how = "rtn" if table else method
                choices[part.name] = Choice(format=name if fits else "int8", method=how)  # type: ignore[arg-type]
            plan = grouped_plan(config, choices, portable=False, activations="fp32", kv_cache="fp32")
            out.mkdir()
            apply_plan(checkpoint, config, plan, out, energies=statistics.energies, hessians=statistics.hessians)
        return out


def main() -> None:
    """Rotate, round, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="int4-g32,int4-g128,int3-g32")
    parser.add_argument("--methods", default="clip,gptq")
    parser.add_argument("--tokens", type=int, default=15_000)
    options = parser.parse_args()
    formats, methods = options.formats.split(","), options.methods.split(",")
    results: dict[str, dict[str, dict[str, float]]] = {}
    with open_checkpoint(options.model) as checkpoint, tempfile.TemporaryDirectory() as made:
        config, folder = load_config(checkpoint).with_kv_format("fp32"), Path(made)
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        texts = prepare_texts(None, tokenizer, config, selected=True)
        ends = np.cumsum([len(text) for text in texts.sealed])
        bench = Bench(
            original=DecoderScorer(load_decoder(checkpoint, config, TorchOps(widened=True)), keep_bytes=1 << 29),
            texts=texts,
            sealed=texts.sealed[: int(np.searchsorted(ends, options.tokens)) + 1],
            folder=folder,
        )
        for kinds in KINDS:
            name = "+".join(kinds) or "plain"
            path = folder / name
            write_rotated(checkpoint, config, kinds, path)
            results[name] = {"itself": bench.kl(path)}
            with open_checkpoint(path) as rotated:
                own, kept = load_config(rotated).with_kv_format("fp32"), folder / f"{name}-statistics"
                kept.mkdir()
                statistics = statistics_of(rotated, own, texts, "cpu", kept, kept, SILENT, hessians="gptq" in methods)
            for fmt in formats:
                for method in methods:
                    out = bench.rounded(path, statistics, fmt, method, folder / f"{name}-{fmt}-{method}")
                    for activations in ("fp32", "int8"):
                        key = f"{fmt} {method} {activations}"
                        found = results[name][key] = bench.kl(out, activations)
                        found["of_plain"] = found["kl"] / results["plain"][key]["kl"]
                        span = f"[{found['low']:.5f}, {found['high']:.5f}]"
                        print(f"{name:13} {key:24} KL {found['kl']:.5f} {span} {found['of_plain']:.3f}", flush=True)
    record = {"question": "rotations", "model": options.model.name, "tokens": int(ends[len(bench.sealed) - 1])}
    print(json.dumps(record | {"results": results}))


if __name__ == "__main__":
    main()
