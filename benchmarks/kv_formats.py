"""What do keys and values in int8 and int4 cost in quality, and what does rotating the keys bring?

A trained model on the sealed part of the shipped text, run by the engine's own steps over its paged cache (half of each
window as a prompt, half decoded token by token), against the same model in float32 without a cache by the reference.
Weights and activations are as the checkpoint has them: all that differs is the cache. KL is in nats a token. The model
without a rotation runs on the reference, since no kernel leaves it out; so do the others there, to be compared with it.
Beside them: how far the C++ is from the reference, KL(reference || C++) with both caches in the same format.

    python benchmarks/kv_formats.py [MODEL] [--documents 60] [--formats bf16,int8,int4]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from halve.api.model import cache_blocks
from halve.api.texts import WINDOW_TOKENS, encode, shipped_sealed
from halve.checkpoint import open_checkpoint
from halve.core.certificate import Measured
from halve.core.plan import KVCache
from halve.engine import EngineConfig
from halve.evaluate import compare, quality
from halve.evaluate.scorer import DecoderScorer, EngineScorer
from halve.kernels import reference
from halve.kernels.native import NativeOps
from halve.kernels.ops import Array, Ops
from halve.models.embedded import embedded_model_path
from halve.models.load import load_config, load_decoder
from halve.text import Tokenizer


def figures(original: DecoderScorer, smaller: EngineScorer | DecoderScorer, documents: list[Array]) -> dict[str, str]:
    """KL, perplexity ratio and flips, each with its interval over documents."""
    found = quality(compare(original, smaller, documents, window_tokens=WINDOW_TOKENS), num_resamples=1000)

    def told(one: Measured) -> str:
        return f"{one.value:.4g} [{one.low:.4g}, {one.high:.4g}]"

    return {"kl": told(found.kl_mean), "ppl_ratio": told(found.ppl_ratio), "flips": told(found.flip_rate)}


def main() -> None:
    """Measure every format; one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(embedded_model_path()))
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--formats", default="bf16,int8,int4")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, str]] = {}
    with open_checkpoint(args.model) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        documents = [t for t in encode(shipped_sealed(), tokenizer, vocab_size=config.vocab_size) if len(t) > 64]
        documents = documents[: args.documents]
        torch_ops, native = reference.TorchOps("cpu", widened=True), NativeOps()
        original = DecoderScorer(load_decoder(checkpoint, config, torch_ops), keep_bytes=1 << 30)
        engine = EngineConfig()

        def measure(name: str, cache: KVCache, ops: Ops) -> None:
            kept = config.with_kv_format(cache.formats(config.num_layers))
            served = EngineScorer(
                load_decoder(checkpoint, kept, ops), engine, num_blocks=cache_blocks(kept, engine, None)
            )
            results[name] = figures(original, served, documents)
            print(name, results[name], file=sys.stderr, flush=True)

        formats = args.formats.split(",")
        for name in formats:
            measure(name, KVCache(format=name), native)
        half = ["int8" if i % 2 == 0 else "int4" for i in range(config.num_layers)]
        measure("int8 and int4 in turn", KVCache.of_layers(half), native)
        measure("int4, reference", KVCache(format="int4"), torch_ops)
        for name in formats:
            kept = config.with_kv_format(name)
            one, other = (DecoderScorer(load_decoder(checkpoint, kept, ops)) for ops in (torch_ops, native))
            results[f"C++ from the reference in {name}"] = figures(one, other, documents)
            print(name, "C++ from the reference", results[f"C++ from the reference in {name}"], file=sys.stderr)
        reference.ROUND_KEYS = {**reference.ROUND_KEYS, "int4": reference.round_kv_int4}
        measure("int4 without rotation, reference", KVCache(format="int4"), torch_ops)
    tokens = int(np.sum([len(t) - 1 for t in documents]))
    print(json.dumps({"question": "kv_formats", "model": Path(args.model).name, "tokens": tokens, "found": results}))


if __name__ == "__main__":
    main()
