"""Would skipping small neurons pay? Training-free activation sparsity (TEAL, arXiv:2408.14690) of down projections.

Of each layer the inputs of the down projection that are smallest by magnitude become zero, by a threshold of that layer
which calibration text sets. A kernel gains what it need not read: our weights lie in groups of 32 inputs with one
scale, so that a group is skipped only when all of its inputs are zero. For each share of zeros: KL(original || sparse)
in nats per token on sealed text, the share of whole groups that are zero, and what a kernel that could skip single
inputs would save of a token's bytes at most.

    python benchmarks/activation_sparsity.py MODEL [--text FILE] [--shares 0.25,0.4,0.5] [--tokens 20000]

Prints a line for each share, and one JSON line last.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from halve.api.texts import prepare_texts
from halve.checkpoint import open_checkpoint
from halve.evaluate import compare, quality
from halve.evaluate.scorer import DecoderScorer
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import load_config, load_decoder, stored_formats
from halve.models.sizes import bytes_per_token
from halve.text import Tokenizer

GROUP = 32


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--shares", default="0.25,0.4,0.5")
    parser.add_argument("--tokens", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with open_checkpoint(options.model) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        texts = prepare_texts(
            options.text,
            Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size),
            config,
            selected=False,
        )
        source = stored_formats(checkpoint, config)
        original = DecoderScorer(load_decoder(checkpoint, config, TorchOps(widened=True)), keep_bytes=1 << 29)
        decoder = load_decoder(checkpoint, config, TorchOps(widened=True))
    ends = np.cumsum([len(t) for t in texts.sealed])
    sealed = texts.sealed[: int(np.searchsorted(ends, options.tokens)) + 1]
    seen: dict[str, torch.Tensor] = {}
    thresholds: dict[str, float] = {}
    zeros: list[tuple[float, float]] = []
    downs = [layer.projections["down"] for layer in decoder.layers]
    for down in downs:
        down.hook = lambda group, x, outputs: seen.setdefault(group.name, x) is None or outputs
    with torch.inference_mode():
        decoder.hidden(TokenBatch.whole([t[:512] for t in texts.calibration[:32]]))
    down_bytes = sum(source[d.group.members[0].name].size_bytes(d.group.members[0].shape) for d in downs)
    most = down_bytes / bytes_per_token(config, source)

    def skipping(group, x, outputs):  # type: ignore[no-untyped-def]
        kept = x * (x.abs() >= thresholds[group.name])
        none = (kept == 0).float()
        zeros.append((float(none.mean()), float(none.view(len(x), -1, GROUP).amin(-1).mean())))
        return [decoder.ops.project(linear, kept) for linear in by_name[group.name].linears]

    by_name = {down.group.name: down for down in downs}
    rows = []
    for share in map(float, options.shares.split(",")):
        thresholds |= {name: float(x.abs().flatten()[:: max(1, x.numel() // 1_000_000)].quantile(share))
                       for name, x in seen.items()}  # fmt: skip
        zeros.clear()
        for down in downs:
            down.hook = skipping
        scores = compare(original, DecoderScorer(decoder), sealed, window_tokens=texts.window_tokens)
        found = quality(scores, num_resamples=1000).kl_mean
        single, whole = np.mean(zeros, axis=0)
        row = {"share": share, "zero_inputs": single, "zero_groups": whole, "kl": found.value, "low": found.low}
        rows.append(row | {"high": found.high, "most_saved": share * most})
        print(
            f"{share:.2f}: KL {found.value:.5f} [{found.low:.5f}, {found.high:.5f}], zero inputs {single:.3f}, "
            f"groups of {GROUP} {whole:.2g}, at most {share * most:.3f} of a token's bytes",
            flush=True,
        )
    print(json.dumps({"question": "activation_sparsity", "model": options.model.name, "rows": rows}))


if __name__ == "__main__":
    main()
