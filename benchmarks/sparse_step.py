"""How close does a step of a sparse model come to the bytes that it must read, and to llama.cpp's?

Layers of Qwen3-30B-A3B's shape (hidden 2048, 32 heads over 4 of 128, 128 experts of 768, 8 for a token), random
weights in one format, int8 activations, on the C++ kernels. Bounds: a step reads attention's weights and those of each
expert that some token asks for; a loop of reads, on the same threads and in turns with the steps, says how fast that
can be. `grouped` is the same for the experts' products alone.

    python benchmarks/sparse_step.py [--layers 8] [--format int4-g32] [--batches 1,8,32] [--rounds 9]
        [--llama DIRECTORY]

--llama: where llama.cpp's `llama-bench` and `llama-batched-bench` lie. They then run the same weights as a GGUF file in
Q4_0, by the same number of threads at the same context, in turns with ours; it takes the package `gguf`, memory for
both models and a few minutes to write the file.

Prints progress on stderr and one JSON line last.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from zlib import crc32

import numpy as np

from halve.formats import FORMATS, Weight
from halve.formats.integer import pack_codes
from halve.hardware import detect_cpu
from halve.kernels import ceilings
from halve.kernels.native import NativeOps
from halve.kernels.ops import TokenBatch
from halve.kernels.sampling import SamplingBatch
from halve.models.compiled import CompiledSteps
from halve.models.config import Experts, LayerSpec, ModelConfig, Rope
from halve.models.decoder import Decoder
from halve.models.names import groups, layer_norms, qk_norms, router_name

SHAPE = {"hidden_size": 2048, "num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "vocab_size": 4096}
EXPERTS = Experts(num_experts=128, top_k=8, intermediate_size=768, renormalize=True)
CONTEXT = 256
BLOCK = 16


SCALE = 2.0**-7


class Random:
    """Weights that nobody trained, rounded already; the same for the same name."""

    def __init__(self, fmt: str) -> None:
        self.format = FORMATS[fmt]
        self.words: dict[tuple[int, int], np.ndarray] = {}

    def codes(self, module: str, shape: tuple[int, int]) -> np.ndarray:
        """Each matrix has the codes of one of its shape, rows moved on by a number of its own.

        Their mean is zero: with another one all tokens would be alike, and would go to the same experts.
        """
        if shape not in self.words:
            most = 1 << (self.format.bits - 1)
            self.words[shape] = np.random.default_rng(0).integers(1 - most, most, shape, dtype=np.int8)
        return np.roll(self.words[shape], crc32(module.encode()) % shape[0], axis=0)

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """A matrix."""
        fmt, codes = self.format, self.codes(module, shape)
        groups_ = shape[1] // (fmt.group_size or shape[1])
        scale = np.full((shape[0], groups_), SCALE, np.float32).astype(FORMATS["bf16"].dtype)
        return Weight(
            format=fmt, shape=shape, codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits), scale=scale
        )

    def vector(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Gains of one; routers that spread tokens evenly."""
        if len(shape) == 2:
            return np.random.default_rng(crc32(name.encode())).standard_normal(shape).astype(np.float32)
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


def config_of(num_layers: int) -> ModelConfig:
    """So many layers."""
    layer = LayerSpec(rope=Rope(theta=1e6), experts=EXPERTS, qk_norm="head")
    return ModelConfig(
        architecture="Qwen3MoeForCausalLM", intermediate_size=768, context=CONTEXT, rms_norm_eps=1e-6, tied=False,
        attention_bias=False, mlp_bias=False, layers=(layer,) * num_layers, **SHAPE,
    )  # fmt: skip


class Llama:
    """llama.cpp with the same weights. directory: where its tools lie."""

    def __init__(self, directory: Path, config: ModelConfig, source: Random, folder: Path, threads: int) -> None:
        self.directory, self.file, self.threads = directory, folder / "model.gguf", threads
        self._write(config, source)

    def _write(self, config: ModelConfig, source: Random) -> None:
        import gguf

        writer = gguf.GGUFWriter(self.file, "qwen3moe", use_temp_file=True)
        writer.add_block_count(config.num_layers)
        writer.add_context_length(2 * CONTEXT)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(1e6)
        writer.add_expert_count(EXPERTS.num_experts)
        writer.add_expert_used_count(EXPERTS.top_k)
        writer.add_expert_feed_forward_length(EXPERTS.intermediate_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        kind = gguf.GGMLQuantizationType.Q4_0

        def add(name: str, parts: list[np.ndarray]) -> None:
            blocks = np.stack([q4_0(codes) for codes in parts]) if len(parts) > 1 else q4_0(parts[0])
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)

        def floats(name: str, ours: str, *shape: int) -> None:
            writer.add_tensor(f"{name}.weight", source.vector(ours, shape))

        table = (config.vocab_size, config.hidden_size)
        add("token_embd", [source.codes("model.embed_tokens", table)])
        add("output", [source.codes("lm_head", table)])
        floats("output_norm", "norm", config.hidden_size)
        for layer in range(config.num_layers):
            blk, hidden = f"blk.{layer}", config.hidden_size
            norms = (*layer_norms(layer), *qk_norms(layer))
            sizes = (hidden, hidden, config.head_dim, config.head_dim)
            for name, ours, size in zip(
                ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"), norms, sizes, strict=True
            ):
                floats(f"{blk}.{name}", ours, size)
            floats(f"{blk}.ffn_gate_inp", router_name(config, layer), EXPERTS.num_experts, hidden)
            for group in groups(config):
                if group.layer != layer:
                    continue
                found: dict[str, list[np.ndarray]] = {}
                for module in group.members:
                    leaf = module.name.rpartition(".")[2].removesuffix("_proj")
                    found.setdefault(leaf, []).append(source.codes(module.name, module.shape))
                for leaf, parts in found.items():
                    name = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.get(leaf)
                    add(f"{blk}.{name or f'ffn_{leaf}_exps'}", parts)
            say(f"layer {layer + 1} of {config.num_layers} for llama.cpp")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def tokens_s(self, size: int) -> float:
        """Tokens a second that it decodes, all sequences together, at about the same context."""
        tokens = CONTEXT // 16
        common = ["-m", str(self.file), "-t", str(self.threads)]
        if size == 1:
            command = ["llama-bench", *common, "-p", "0", "-n", str(tokens), "-d", str(CONTEXT - tokens), "-r", "1"]
            (found,) = json.loads(self._run([*command, "-o", "json"]))
            return float(found["avg_ts"])
        lengths = ["-npp", str(CONTEXT - tokens), "-ntg", str(tokens), "-npl", str(size), "-c", str(size * CONTEXT)]
        lines = self._run(
            ["llama-batched-bench", *common, *lengths, "-tb", str(self.threads), "--output-format", "jsonl"]
        ).splitlines()
        return float(json.loads(next(line for line in lines if line.startswith("{")))["speed_tg"])

    def _run(self, command: list[str]) -> str:
        tool, *rest = command
        done = subprocess.run([self.directory / tool, *rest], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
        return done.stdout


def q4_0(codes: np.ndarray) -> np.ndarray:
    """int8 codes [N, K] as llama.cpp's blocks of 32: a scale in float16, then 16 bytes, the first 16 codes low."""
    grouped = (codes + 8).astype(np.uint8).reshape(len(codes), -1, 2, 16)
    scale = np.full((*grouped.shape[:2], 1), SCALE, np.float16).view(np.uint8)
    return np.concatenate([scale, grouped[:, :, 0] | grouped[:, :, 1] << 4], axis=2).reshape(len(codes), -1)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--llama", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The record."""
    config = config_of(options.layers)
    ops = NativeOps(activations="int8")
    started = time.perf_counter()
    source = Random(options.format)
    decoder = Decoder(config, ops, source, lambda done, total: say(f"layer {done} of {total}"))
    say(f"made in {time.perf_counter() - started:.0f} s")
    llama = Llama(options.llama, config, source, folder, ops.num_threads) if options.llama else None
    fmt = FORMATS[options.format]
    sizes = {"expert": 0, "beside": 0}
    for group in groups(config):
        for module in group.members:
            sizes["beside" if module.expert is None else "expert"] += fmt.size_bytes(module.shape)
    one_expert = sizes["expert"] / (options.layers * EXPERTS.num_experts)
    beside = sizes["beside"] + options.layers * 4 * EXPERTS.num_experts * SHAPE["hidden_size"]

    rng = np.random.default_rng(1)
    arena = ceilings.Arena()
    results: dict[str, dict[str, object]] = {}
    for size in map(int, options.batches.split(",")):
        cache = decoder.new_cache(size * CONTEXT // BLOCK, BLOCK)
        wanted = np.arange(size, dtype=np.int32)
        compiled = CompiledSteps(decoder, ops, cache)
        steps, grouped, loops, reads, theirs = [], [], [], [], []
        for _ in range(options.rounds + 2):
            batch = batch_of(size, rng)
            before = [c.reads for c in decoder.expert_counts()]
            at = time.perf_counter()
            decoder.sample(batch, cache, wanted, SamplingBatch.greedy(size))
            steps.append(time.perf_counter() - at)
            reads.append(sum(c.reads - b for c, b in zip(decoder.expert_counts(), before, strict=True)))
            program, step = compiled.program(batch, wanted, full=False)
            program.run(step, batch.token_ids, wanted)
            part = program.part({"experts"})
            at = time.perf_counter()
            part.run(step, batch.token_ids, wanted)
            grouped.append(time.perf_counter() - at)
            loops.append(arena.read_gb_s(ops.num_threads))
        for _ in range(3 if llama else 0):
            assert llama is not None
            theirs.append(llama.tokens_s(size))
            for warm in range(-2, 3):  # the first steps behind another process find nothing in the caches
                at = time.perf_counter()
                decoder.sample(batch, cache, wanted, SamplingBatch.greedy(size))
                if warm >= 0:
                    steps.append(time.perf_counter() - at)
                    loops.append(arena.read_gb_s(ops.num_threads))
        steps, grouped, loops, reads = steps[2:], grouped[2:], loops[2:], reads[2:]
        experts = median(reads) * one_expert
        loop = median(loops)
        results[str(size)] = result = {
            "step_ms": spread([1e3 * s for s in steps]),
            "tokens_s": spread([size / s for s in steps]),
            "experts_per_layer": median(reads) / options.layers,
            "bytes": beside + experts,
            "loop_gb_s": spread(loops),
            "fraction": (beside + experts) / median(steps) / 1e9 / loop,
            "grouped_ms": spread([1e3 * s for s in grouped]),
            # Seconds of the last layers' products, which all found their rows sorted alike: over reading their bytes.
            "grouped_over_reading": median(grouped) * loop * 1e9 / experts,
            "llama_cpp_tokens_s": spread(theirs) if theirs else None,
        }
        say(size, json.dumps(result))
    device = detect_cpu()
    return {
        "question": "sparse_step", "hardware": device.model, "threads": ops.num_threads, "layers": options.layers,
        "format": options.format, "results": results, "command": " ".join(Path(w).name for w in sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def spread(values: list[float]) -> list[float]:
    """Lowest, median and highest."""
    return [min(values), median(values), max(values)]


if __name__ == "__main__":
    main()
