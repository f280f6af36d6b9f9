"""How close does a step of a sparse model come to the bytes that it must read?

Layers of Qwen3-30B-A3B's shape (hidden 2048, 32 heads over 4 of 128, 128 experts of 768, 8 for a token), random
weights in one format, int8 activations, on the C++ kernels. Bounds: a step reads attention's weights and those of each
expert that some token asks for; a loop of reads, on the same threads and in turns with the steps, says how fast that
can be.

    python benchmarks/sparse_step.py [--layers 4] [--format int4-g32] [--batches 1,8,32] [--rounds 9]

Prints progress on stderr and one JSON line last.
"""

import argparse
import json
import sys
import time
from statistics import median

import numpy as np

from halve.formats import FORMATS, Weight
from halve.formats.integer import pack_codes
from halve.hardware import detect_cpu
from halve.kernels import ceilings
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.models.config import Experts, LayerSpec, ModelConfig, Rope
from halve.models.decoder import Decoder
from halve.models.names import groups

SHAPE = {"hidden_size": 2048, "num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "vocab_size": 4096}
EXPERTS = Experts(num_experts=128, top_k=8, intermediate_size=768, renormalize=True)
CONTEXT = 256
BLOCK = 16


class Random:
    """Weights that nobody trained, rounded already."""

    def __init__(self, fmt: str) -> None:
        self.format = FORMATS[fmt]
        self.random = np.random.default_rng(0)
        self.words: dict[tuple[int, int], np.ndarray] = {}

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """Each matrix has the codes of one of its shape, rows moved on by a number of its own."""
        fmt = self.format
        if shape not in self.words:
            most = 1 << (fmt.bits - 1)
            codes = self.random.integers(-most, most, shape, dtype=np.int8)
            self.words[shape] = codes if fmt.bits == 8 else pack_codes(codes, fmt.bits)
        groups_ = shape[1] // (fmt.group_size or shape[1])
        scale = np.full((shape[0], groups_), 0.002, np.float32).astype(FORMATS["bf16"].dtype)
        codes = np.roll(self.words[shape], int(self.random.integers(shape[0])), axis=0)
        return Weight(format=fmt, shape=shape, codes=codes, scale=scale)

    def vector(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Gains of one; routers that spread tokens evenly."""
        if len(shape) == 2:
            return self.random.standard_normal(shape).astype(np.float32)
        return np.ones(shape, np.float32)

    def forget(self) -> None:
        """Nothing is held."""


def say(*words: object) -> None:
    """Progress."""
    print(*words, file=sys.stderr, flush=True)


def batch_of(size: int, rng: np.random.Generator) -> TokenBatch:
    """One token for each of `size` sequences at a context of CONTEXT - 1."""
    width = CONTEXT // BLOCK
    tables = np.arange(size * width, dtype=np.int32).reshape(size, width)
    positions = np.full(size, CONTEXT - 1, np.int32)
    return TokenBatch(
        token_ids=rng.integers(0, SHAPE["vocab_size"], size).astype(np.int32),
        positions=positions,
        cu_seqlens=np.arange(size + 1, dtype=np.int32),
        slot_mapping=tables[:, -1] * BLOCK + BLOCK - 1,
        block_tables=tables,
    )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    layer = LayerSpec(rope=Rope(theta=1e6), experts=EXPERTS, qk_norm="head")
    config = ModelConfig(
        architecture="Qwen3MoeForCausalLM", intermediate_size=768, context=CONTEXT, rms_norm_eps=1e-6, tied=False,
        attention_bias=False, mlp_bias=False, layers=(layer,) * options.layers, **SHAPE,
    )  # fmt: skip
    ops = NativeOps(activations="int8")
    started = time.perf_counter()
    decoder = Decoder(config, ops, Random(options.format), lambda done, total: say(f"layer {done} of {total}"))
    say(f"made in {time.perf_counter() - started:.0f} s")
    fmt = FORMATS[options.format]
    sizes = {"expert": 0, "beside": 0}
    for group in groups(config):
        for module in group.members:
            sizes["beside" if module.expert is None else "expert"] += fmt.size_bytes(module.shape)
    one_expert = sizes["expert"] / (options.layers * EXPERTS.num_experts)
    beside = sizes["beside"] + options.layers * 4 * EXPERTS.num_experts * SHAPE["hidden_size"]

    rng = np.random.default_rng(1)
    arena = ceilings.Arena()
    results = {}
    for size in map(int, options.batches.split(",")):
        cache = decoder.new_cache(size * CONTEXT // BLOCK, BLOCK)
        steps, loops, reads = [], [], []
        for _ in range(options.rounds + 2):
            batch = batch_of(size, rng)
            before = [(c.reads, c.steps) for c in decoder.expert_counts()]
            at = time.perf_counter()
            decoder.step(batch, cache, np.arange(size))
            steps.append(time.perf_counter() - at)
            reads.append(sum(c.reads - b[0] for c, b in zip(decoder.expert_counts(), before, strict=True)))
            loops.append(arena.read_gb_s(ops.num_threads))
        steps, loops, reads = steps[2:], loops[2:], reads[2:]
        read = beside + median(reads) * one_expert
        result = {
            "step_ms": [1e3 * min(steps), 1e3 * median(steps), 1e3 * max(steps)],
            "experts_per_layer": median(reads) / options.layers,
            "bytes": read,
            "gb_s": read / median(steps) / 1e9,
            "loop_gb_s": median(loops),
            "fraction": read / median(steps) / 1e9 / median(loops),
        }
        results[str(size)] = result
        say(size, json.dumps(result))
    device = detect_cpu()
    record = {
        "question": "sparse_step", "hardware": device.model, "threads": ops.num_threads, "layers": options.layers,
        "format": options.format, "results": results, "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
