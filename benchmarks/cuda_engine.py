"""How close does the engine on CUDA come to what the card can do, and what does a million tokens cost on it?

A decoder of a known shape is made of random weights on the card itself; speed does not depend on them. Bounds: a decode
step reads every weight and the keys and values of its sequences, so it takes at least bytes / bandwidth seconds, where
the bandwidth is that of a large copy, measured in the same run (bytes read and written). A prompt is bound by
arithmetic. Parts:

    a  one sequence at a context of 128: tokens/s of graph replays alone and of the whole engine, which also plans,
       chooses the token and brings it to the host; both as a fraction of the bandwidth bound
    b  many sequences, 1000 tokens in and 1000 out, in steady state: prefill rate of prompts, decode rate of a full
       batch at contexts from 1000 to 2000, and
           output tokens/s = 1 / (1 / decode_tok_s + 1000 / 1000 / prefill_tok_s)
       which says what the two rates add up to when neither waits for the other; it is a formula over two measurements
    e  a real run of the engine, --sequences requests of 1000 in / 1000 out that arrive at once, until all are done or
       --run-seconds are over; output tokens by wall time, ramp-up and drain included. Without --sequences as many as
       memory holds and, by the rates of b, are done in time
    c  dollars per million output tokens at --usd-per-hour, from b and e

    python benchmarks/cuda_engine.py [--shape llama-3.1-8b] [--formats bf16,int4-g128,fp8,int8] [--parts a,b,e,c]
        [--usd-per-hour 3.50] [--sequences N] [--seconds 190]

Each format runs in a process of its own, so that one that fails takes no other with it. Before them all, processes
side by side with one layer compile what will run (Triton keeps it on disk). Prints progress on stderr and one JSON line
last.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "layers": 32,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "layers": 16,
    },
    "tiny": {  # for a look at the code, on any machine
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "layers": 2,
    },
}
# Weights -> activations and cache of the plan. Weights below 8 bits meet bf16 activations on CUDA.
PLANS = {"bf16": ("fp32", "bf16"), "fp8": ("fp8", "fp8"), "int8": ("int8", "int8"), "int4-g128": ("fp32", "int8")}
BARS = {"bf16": 0.80, "int4-g128": 0.65}  # of the bandwidth bound, part a
PUBLISHED = {  # TensorRT-LLM 1.0, docs/source/performance/perf-overview.md: Llama 3.1 8B FP8, 1000 in / 1000 out
    "H200": {"engine": "TensorRT-LLM 1.0", "model": "Llama-3.1-8B FP8", "output_tok_s": 17744},
    "H100": {"engine": "TensorRT-LLM 1.0", "model": "Llama-3.1-8B FP8", "output_tok_s": 15220},
}
BLOCK = 16
CONTEXT = 4096
PROMPT, OUTPUT = 1000, 1000
SHORT_CONTEXT = 128
DECODE_STEPS = 128  # of part a
DECODES = 4  # steps of one sample of part b
MOST_SEQUENCES = 1024
PREFILL_TOKENS = 8192  # of a step
SEQUENCES = 256  # of part e where part b says nothing
SHARES = 6  # processes that compile ahead what part e comes through


def say(*words: object) -> None:
    """Progress."""
    print(f"[{time.strftime('%H:%M:%S')}]", *words, file=sys.stderr, flush=True)


def make_decoder(shape: dict[str, int], weights: str, device: str, num_layers: int) -> Any:
    """A decoder whose weights are random and never were on the host."""
    import torch

    from halve.formats import FORMATS
    from halve.kernels.cuda.ops import CudaOps
    from halve.kernels.cuda.packing import CudaMatrix, to_cells
    from halve.kernels.cuda.workspace import workspace
    from halve.models import Decoder, LayerSpec, ModelConfig
    from halve.models.config import Rope

    activations, kv_format = PLANS[weights]

    class Made:
        """Names shapes; `MadeOps` fills them."""

        def weight(self, module: str, wanted: tuple[int, int]) -> Any:
            return wanted

        def vector(self, name: str, wanted: tuple[int]) -> Any:
            return np.ones(wanted, np.float32)

        def forget(self) -> None:
            """Nothing is held."""

    class MadeOps(CudaOps):
        """The same kernels over random matrices."""

        def linear(self, weight: Any, bias: Any = None) -> CudaMatrix:
            fmt, place = FORMATS[weights], self.torch_device
            workspace(place)
            kind = self.activations_of(fmt)
            out_features, in_features = weight
            scale = None
            if fmt.scaled:
                groups = in_features // fmt.group_size if fmt.group_size else 1
                dtype = torch.bfloat16 if kind == "bf16" else torch.float32
                scale = torch.full((groups, out_features), 0.02 / (1 << (fmt.bits - 2)), dtype=dtype, device=place)
            if fmt.name == "bf16":
                codes = torch.empty(weight, dtype=torch.bfloat16, device=place).normal_(std=0.02)
            elif fmt.kind == "int":
                most = 1 << (fmt.bits - 1)
                codes = torch.randint(-most, most, weight, dtype=torch.int8, device=place)
                if kind == "bf16":
                    codes = torch.cat([to_cells(part, fmt.bits) for part in torch.split(codes, 8192)])
            else:  # bits of e4m3 from -1.875 to 1.875
                codes = torch.randint(0, 64, weight, dtype=torch.uint8, device=place)
                codes |= torch.randint(0, 2, weight, dtype=torch.uint8, device=place) << 7
                codes = codes.view(torch.float8_e4m3fn)
            return CudaMatrix(
                format=fmt,
                shape=tuple(weight),
                activations=kind,
                codes=codes,
                scale=scale,
                group_size=fmt.group_size or 0,
            )

        def table(self, weight: Any) -> Any:
            class Table:
                codes = torch.empty(weight, dtype=torch.bfloat16, device=self.torch_device).normal_(std=0.02)
                scale = None

            return Table

    sizes = {key: value for key, value in shape.items() if key != "layers"}
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        context=CONTEXT,
        rms_norm_eps=1e-5,
        tied=False,
        attention_bias=False,
        mlp_bias=False,
        layers=(LayerSpec(rope=Rope(theta=500000.0), kv_format=kv_format),) * num_layers,
        **sizes,
    )
    return Decoder(config, MadeOps(device, activations=activations), Made())


class Clock:
    """Seconds on the device between two points; on the host where there is no card."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.cuda = torch, device.startswith("cuda")

    def seconds(self, run: Any) -> float:
        """Run and wait for it."""
        if not self.cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


def copy_bandwidth(clock: Clock, device: str) -> dict[str, float]:
    """GB/s of a copy of 4 GiB, read and written bytes together: median and fastest of 9."""
    import torch

    size = (4 << 30) if clock.cuda else (64 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rates = sorted(2 * size / clock.seconds(lambda: target.copy_(source)) / 1e9 for _ in range(10))
    return {"gb_s": median(rates), "fastest_gb_s": rates[-1], "bytes": size}


def matrix_bytes(decoder: Any) -> int:
    """Bytes of weights that a decode step reads."""
    from halve.kernels.cuda.ops import Product

    products = [Product(p.linears) for p in decoder.projections()]
    return sum(m.size_bytes for product in products for m in product.matrices)


def kv_bytes_per_token(decoder: Any) -> int:
    """Bytes of keys and values of one token, as the cache keeps them."""
    return int(decoder.config.kv_cache_bytes_per_token)


def engine_over(decoder: Any, num_blocks: int, max_num_seqs: int) -> Any:
    """An engine in this thread."""
    from halve.engine import AheadModelRunner, EngineConfig, EngineCore

    runner = AheadModelRunner(decoder, num_blocks=num_blocks, block_size=BLOCK)
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_tokens_per_step=max(PREFILL_TOKENS, max_num_seqs),
        max_prefill_beside_decode=None,
    )
    return EngineCore(runner, config=config)


def add_requests(core: Any, count: int, prompt: int, output: int, vocab: int) -> None:
    """Requests of random tokens that run to their full length."""
    from halve.engine import Request, SamplingParams

    rng = np.random.default_rng()  # prompts that were there before would be found in the prefix cache
    for i in range(count):
        ids = tuple(rng.integers(0, vocab, prompt).tolist())
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        core.add(Request(request_id=f"{time.monotonic_ns()}-{i}", prompt_token_ids=ids, sampling=sampling))


def part_a(decoder: Any, clock: Clock, gb_s: float, steps: int) -> dict[str, Any]:
    """One sequence."""
    core = engine_over(decoder, 64, 1)
    vocab = decoder.config.vocab_size
    add_requests(core, 1, SHORT_CONTEXT, 4, vocab)  # compiles, and records the graph
    while core.has_unfinished:
        core.step()
    add_requests(core, 1, SHORT_CONTEXT, steps + 4, vocab)
    while core.metrics().num_computed_tokens < 2 * SHORT_CONTEXT + 3 + 3:
        core.step()
    before, started = core.metrics().num_computed_tokens, time.perf_counter()
    while core.has_unfinished:
        core.step()
    engine_tok_s = (core.metrics().num_computed_tokens - before) / (time.perf_counter() - started)
    captured = decoder._captured
    recorded = 1 in captured.recorded
    replay_tok_s = None
    if recorded:

        def replays() -> None:
            for _ in range(16):
                captured.replay(1)

        replays()
        replay_tok_s = 16 / median(clock.seconds(replays) for _ in range(7))
    read = matrix_bytes(decoder) + (SHORT_CONTEXT + steps // 2) * kv_bytes_per_token(decoder)
    bound = gb_s * 1e9 / read
    return {
        "context": SHORT_CONTEXT,
        "steps": steps,
        "bytes_per_token": read,
        "bound_tok_s": bound,
        "graph": recorded,
        "graph_tok_s": replay_tok_s,
        "graph_fraction": None if replay_tok_s is None else replay_tok_s / bound,
        "engine_tok_s": engine_tok_s,
        "engine_fraction": engine_tok_s / bound,
    }


def decode_batch(count: int, num_blocks: int, rng: np.random.Generator) -> Any:
    """A step of one token for each of `count` sequences whose contexts lie evenly from PROMPT to PROMPT + OUTPUT."""
    from halve.kernels.ops import TokenBatch

    positions = (PROMPT + (np.arange(count) * OUTPUT) // count).astype(np.int32)
    rng.shuffle(positions)
    width = -(-(PROMPT + OUTPUT) // BLOCK)
    tables = rng.permutation(num_blocks)[: count * width].reshape(count, width).astype(np.int32)
    return TokenBatch(
        token_ids=rng.integers(0, 100, count).astype(np.int32),
        positions=positions,
        cu_seqlens=np.arange(count + 1, dtype=np.int32),
        slot_mapping=tables[np.arange(count), positions // BLOCK] * BLOCK + positions % BLOCK,
        block_tables=tables,
    )


def prefill_batch(num_blocks: int, rng: np.random.Generator) -> Any:
    """A step of as many whole prompts as it holds."""
    from halve.kernels.ops import TokenBatch

    count, width = PREFILL_TOKENS // PROMPT, -(-PROMPT // BLOCK)
    tables = rng.permutation(num_blocks)[: count * width].reshape(count, width).astype(np.int32)
    positions = np.tile(np.arange(PROMPT, dtype=np.int32), count)
    of = np.repeat(np.arange(count), PROMPT)
    return TokenBatch(
        token_ids=rng.integers(0, 100, count * PROMPT).astype(np.int32),
        positions=positions,
        cu_seqlens=np.arange(0, (count + 1) * PROMPT, PROMPT, dtype=np.int32),
        slot_mapping=(tables[of, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
        block_tables=tables,
    )


def most_sequences(decoder: Any, device: str) -> tuple[int, int]:
    """Sequences of full length that the card's memory holds, as a graph's bucket, and their blocks."""
    from halve.models.captured import BUCKETS

    spare = decoder.ops.spare_bytes() if device.startswith("cuda") else 64 << 20
    per_sequence = -(-(PROMPT + OUTPUT) // BLOCK) * BLOCK * kv_bytes_per_token(decoder)
    most = max(1, min(MOST_SEQUENCES, spare // per_sequence))
    count = max(b for b in BUCKETS if b <= most)
    return count, count * -(-(PROMPT + OUTPUT) // BLOCK)


def part_b(decoder: Any, clock: Clock, device: str, gb_s: float, rounds: int) -> dict[str, Any]:
    """Steady state of many sequences."""
    from halve.kernels.sampling import SamplingBatch

    count, num_blocks = most_sequences(decoder, device)
    cache = decoder.new_cache(num_blocks, BLOCK)
    rng = np.random.default_rng(1)
    prompts, decodes = prefill_batch(num_blocks, rng), decode_batch(count, num_blocks, rng)
    last = prompts.cu_seqlens[1:] - 1

    def prefill() -> None:
        decoder.submit(prompts, cache, last, SamplingBatch.greedy(len(last)))

    def decode() -> None:
        for _ in range(DECODES):  # the host prepares a step while the card works at the one before, as in the engine
            decoder.submit(decodes, cache, np.arange(count), SamplingBatch.greedy(count))

    for run in (prefill, prefill, decode, decode):
        clock.seconds(run)
    prefill_s = [clock.seconds(prefill) for _ in range(rounds)]
    decode_s = [clock.seconds(decode) / DECODES for _ in range(rounds)]
    prefill_tok_s, decode_tok_s = prompts.num_tokens / median(prefill_s), count / median(decode_s)
    read = matrix_bytes(decoder) + int(decodes.positions.sum() + count) * kv_bytes_per_token(decoder)
    return {
        "sequences": count,
        "prefill_tokens_per_step": prompts.num_tokens,
        "prefill_tok_s": prefill_tok_s,
        "prefill_step_s": [min(prefill_s), median(prefill_s), max(prefill_s)],
        "decode_tok_s": decode_tok_s,
        "decode_step_s": [min(decode_s), median(decode_s), max(decode_s)],
        "decode_bytes_per_step": read,
        "decode_bandwidth_fraction": read / median(decode_s) / (gb_s * 1e9),
        "graph": count in decoder._captured.recorded,
        "output_tok_s": 1 / (1 / decode_tok_s + PROMPT / OUTPUT / prefill_tok_s),
        "formula": "1 / (1 / decode_tok_s + prompt / output / prefill_tok_s)",
    }


def fitting_sequences(b: dict[str, Any], run_seconds: float) -> int:
    """Sequences, a graph's bucket, that part e comes through within four fifths of its time by the rates of part b.

    A step of decode is taken to be as long as its sequences are many, and no shorter than half of the one measured.
    """
    from halve.models.captured import BUCKETS

    if "decode_tok_s" not in b:
        return SEQUENCES
    step_s = b["sequences"] / b["decode_tok_s"]

    def seconds(count: int) -> float:
        return count * PROMPT / b["prefill_tok_s"] + OUTPUT * step_s * max(0.5, count / b["sequences"])

    fits = [n for n in BUCKETS if n <= b["sequences"] and seconds(n) <= 0.8 * run_seconds]
    return max(fits, default=1)


def run_buckets(decoder: Any, sequences: int, share: int) -> None:
    """A step of every bucket that a run of so many sequences comes through, so that part e compiles nothing.

    share: which of the buckets, every `SHARES`th from there on.
    """
    from halve.kernels.sampling import SamplingBatch
    from halve.models.captured import BUCKETS

    counts = [b for b in BUCKETS if b <= max(sequences, 1)][share::SHARES]
    if not counts:
        return
    num_blocks = counts[-1] * -(-(PROMPT + OUTPUT) // BLOCK)
    cache, rng = decoder.new_cache(num_blocks, BLOCK), np.random.default_rng(2)
    for count in counts:
        batch = decode_batch(count, num_blocks, rng)
        decoder.submit(batch, cache, np.arange(count), SamplingBatch.greedy(count)).result()


def part_e(decoder: Any, device: str, sequences: int, output: int, run_seconds: float) -> dict[str, Any]:
    """A real run of the engine."""
    most, num_blocks = most_sequences(decoder, device)
    sequences = min(sequences, most)
    core = engine_over(decoder, num_blocks, sequences)
    add_requests(core, sequences, PROMPT, output, decoder.config.vocab_size)
    started = time.perf_counter()
    deadline, told, first, stopped = started + run_seconds, 0, None, False
    steps: list[float] = []
    while core.has_unfinished:
        before = time.perf_counter()
        outputs = core.step()
        now = time.perf_counter()
        steps.append(now - before)
        told += len(outputs)
        if told and first is None:
            first = now - started
        if now > deadline:
            stopped = True
            break
    wall = time.perf_counter() - started
    metrics = core.metrics()
    return {
        "sequences": sequences,
        "prompt": PROMPT,
        "output": output,
        "stopped_early": stopped,
        "wall_s": wall,
        "output_tokens": told,
        "output_tok_s": told / wall,
        "first_token_s": first,
        "num_steps": metrics.num_steps,
        "num_preemptions": metrics.num_preemptions,
        "step_ms": [1e3 * min(steps), 1e3 * median(steps), 1e3 * max(steps)],
        "graphs": decoder._captured.recorded,
    }


def tune(decoder: Any, classes: list[int]) -> int:
    """Measure the cuts of each kind of product; the choices are kept on disk."""
    from halve.kernels.cuda import tuning
    from halve.kernels.cuda.ops import Product

    seen: set[tuple[int, ...]] = set()
    for projection in decoder.projections():
        for matrix in Product(projection.linears).matrices:
            if matrix.shape not in seen:
                seen.add(matrix.shape)
                tuning.tune(matrix, classes)
    return len(seen)


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """One format in this process."""
    import torch

    started = time.perf_counter()
    shape, device = SHAPES[options.shape], options.device
    clock = Clock(device)
    bandwidth = {"gb_s": 1.0} if options.compile_only else copy_bandwidth(clock, device)
    gc.collect()
    if clock.cuda:
        torch.cuda.empty_cache()
    decoder = make_decoder(shape, options.one, device, 1 if options.compile_only else shape["layers"])
    if clock.cuda:
        torch.cuda.synchronize()
    made_s = time.perf_counter() - started
    say(options.one, f"made {matrix_bytes(decoder) / 1e9:.2f} GB of matrices, {made_s:.1f} s after the start")
    result: dict[str, Any] = {
        "weights": options.one,
        "activations": PLANS[options.one][0],
        "kv_cache": PLANS[options.one][1],
        "matrix_bytes": matrix_bytes(decoder),
        "kv_bytes_per_token": kv_bytes_per_token(decoder),
        "copy": bandwidth,
    }
    if clock.cuda:
        major, minor = torch.cuda.get_device_capability()
        result |= {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "torch": torch.__version__}
    if options.tune and not options.compile_only:
        result["tuned_products"] = tune(decoder, [1, PREFILL_TOKENS])
    gb_s = bandwidth["gb_s"]
    parts = options.parts.split(",")
    short = options.compile_only

    def real_run() -> dict[str, Any]:
        if short:
            run_buckets(decoder, options.sequences or MOST_SEQUENCES, options.share)
            forget(decoder, clock)
        count = options.sequences or fitting_sequences(result.get("b", {}), options.run_seconds)
        return part_e(decoder, device, count, 3 if short else OUTPUT, options.run_seconds)

    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "a": lambda: part_a(decoder, clock, gb_s, 4 if short else DECODE_STEPS),
        "b": lambda: part_b(decoder, clock, device, gb_s, 1 if short else 6),
        "e": real_run,
    }
    for part, run in runs.items():
        if part in parts and (part != "e" or options.one == options.real_run):
            try:
                result[part] = run()
            except Exception as error:  # the other parts are still worth having
                traceback.print_exc()
                result[part] = {"error": f"{type(error).__name__}: {error}"[:500]}
            say(options.one, part, json.dumps(result[part]))
            forget(decoder, clock)
    result["kernels"] = dict(decoder.ops.kernels)
    result["process_s"] = time.perf_counter() - started
    return result


def forget(decoder: Any, clock: Clock) -> None:
    """Free graphs and cache of the part before."""
    decoder._captured = None
    gc.collect()
    if clock.cuda:
        with contextlib.suppress(RuntimeError):  # of a part that broke the device, and has told so
            clock.torch.cuda.synchronize()
            clock.torch.cuda.empty_cache()


def start(options: argparse.Namespace, name: str, parts: str, *more: str) -> "subprocess.Popen[str]":
    """A process for one format; its last line of stdout is its result."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--one", name, "--shape", options.shape, "--parts", parts]
    command += ["--device", options.device, "--real-run", options.real_run]
    command += [] if options.sequences is None else ["--sequences", str(options.sequences)]
    command += ["--run-seconds", str(options.run_seconds), *(["--tune"] if options.tune else []), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=None, text=True, env=environment)


def finish(process: "subprocess.Popen[str]", timeout_s: float) -> dict[str, Any]:
    """What it printed, or why it did not."""
    try:
        output, _ = process.communicate(timeout=max(timeout_s, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"not done within {timeout_s:.0f} s"}
    lines = output.strip().splitlines()
    if process.returncode or not lines:
        return {"error": f"exit code {process.returncode}; see stderr"}
    return json.loads(lines[-1])  # type: ignore[no-any-return]


def prices(results: dict[str, dict[str, Any]], usd_per_hour: float) -> Iterator[tuple[str, dict[str, float]]]:
    """Dollars per million output tokens; prompts are part of the price."""
    for name, result in results.items():
        rates = {part: result[part]["output_tok_s"] for part in ("b", "e") if "output_tok_s" in result.get(part, {})}
        if rates:
            yield name, {part: usd_per_hour / (rate * 3600) * 1e6 for part, rate in rates.items()}


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--formats", default="bf16,int4-g128,fp8,int8")
    parser.add_argument("--parts", default="a,b,e,c")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=None, help="of part e; as many as fit")
    parser.add_argument("--real-run", default="fp8", help="the format of part e")
    parser.add_argument("--run-seconds", type=float, default=45.0, help="when part e stops at the latest")
    parser.add_argument("--usd-per-hour", type=float, default=None)
    parser.add_argument("--seconds", type=float, default=190.0, help="for all of it; what does not fit is left out")
    parser.add_argument("--tune", action="store_true", help="measure cuts of products first; takes minutes")
    parser.add_argument("--no-warm", action="store_true", help="do not compile ahead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options)))
        return
    began = time.monotonic()
    names = options.formats.split(",")
    if unknown := sorted(set(names) - PLANS.keys()):
        parser.error(f"--formats: {unknown} not among {sorted(PLANS)}")
    warm: dict[str, Any] = {}
    if not options.no_warm:
        say("compiling", *names)
        jobs = [(name, part, 0) for name in names for part in options.parts.split(",") if part in "ab"]
        if "e" in options.parts.split(",") and options.real_run in names:
            jobs += [(options.real_run, "e", share) for share in range(SHARES)]
        processes = {
            f"{name} {part} {share}": start(options, name, part, "--compile-only", "--share", str(share))
            for name, part, share in jobs
        }
        deadline = began + 0.5 * options.seconds
        warm = {name: finish(process, deadline - time.monotonic()) for name, process in processes.items()}
        for name, outcome in warm.items():
            if "error" in outcome:
                say(name, "did not compile ahead:", outcome["error"])
    compiled_s = time.monotonic() - began
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        left = options.seconds - (time.monotonic() - began)
        if left < 15:
            results[name] = {"error": f"left out: {left:.0f} of {options.seconds:.0f} s remained"}
            continue
        say("measuring", name)
        results[name] = finish(start(options, name, options.parts), left)
    card = next((r["device"] for r in results.values() if "device" in r), options.device)
    report: dict[str, Any] = {
        "question": "cuda_engine",
        "shape": options.shape,
        "hardware": card,
        "results": results,
        "compile_s": compiled_s,
        "wall_s": time.monotonic() - began,
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }
    report["bars"] = {
        name: {"bar": bar, "graph_fraction": results[name]["a"].get("graph_fraction")}
        for name, bar in BARS.items()
        if "a" in results.get(name, {})
    }
    report["published"] = next((known for key, known in PUBLISHED.items() if key in card), None)
    if "c" in options.parts.split(",") and options.usd_per_hour is not None:
        report["usd_per_hour"] = options.usd_per_hour
        report["usd_per_mtok_output"] = dict(prices(results, options.usd_per_hour))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
