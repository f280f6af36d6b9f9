"""Do two engines in two processes, on the same cores, fight for them?

Each decodes one sequence, the team of each as strong as there are cores. Both want all cores all the time, so each can
have half: the bound is that both together make as many tokens as one alone, less what switching between processes and
sharing the caches takes. A fight would show as time burnt: a thread that spins for one of its team that the system has
put aside keeps the core from the other process, and a token takes more seconds of processor time. Aims: together at
least 0.9 of one alone, and no step slower than 10 times the median alone (a step can always wait for a time slice of
the other process, some milliseconds). A third process would take from one alone more than from two: turns during which
others used more than 5 % of the machine are run again, and if that does not end the share is told (Linux).

Two models: the one that ships, whose steps are short and wait most, and one of random weights whose steps read memory.
Turns alternate: one alone, both, the other alone, both. Medians over rounds.

    python benchmarks/two_processes.py [--models tiny-en,random] [--seconds 3] [--rounds 3] [--threads N]

Prints a table, and one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

import halve
from halve.engine import EngineConfig, EngineCore, ModelRunner, Request, SamplingParams
from halve.formats import FORMATS, Weight
from halve.hardware import detect_cpu
from halve.kernels.native import NativeOps
from halve.kernels.ops import Array
from halve.models import Decoder, LayerSpec, ModelConfig
from halve.models.config import Rope
from halve.models.embedded import embedded_model_path
from kernels import random_weight

MODELS = ("tiny-en", "random")
PROMPT, ANSWER = 32, 480  # tokens
TRIES, UNDISTURBED = 4, 0.05  # of the machine, for others
AIMS = {"together": 0.9, "worst_step": 10}


class RandomWeights:
    """A `WeightSource` of random bits in int4-g32; speed does not depend on them."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """A matrix."""
        return random_weight(FORMATS["int4-g32"], shape, self.rng)

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A norm's gain."""
        return np.ones(shape, np.float32)

    def forget(self) -> None:
        """Nothing was kept."""


def random_model(num_threads: int | None) -> Decoder:
    """Some 0.3 billion weights, 180 MB."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=1024,
        intermediate_size=4096,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=32000,
        context=2048,
        rms_norm_eps=1e-5,
        tied=False,
        attention_bias=False,
        mlp_bias=False,
        layers=(LayerSpec(rope=Rope(theta=10000.0)),) * 16,
    )
    return Decoder(config, NativeOps(activations="int8", num_threads=num_threads), RandomWeights())


def decode(core: EngineCore, seconds: float) -> list[float]:
    """Decode one sequence after the other for so long; seconds of each step that made a token from a token."""
    steps: list[float] = []
    ids = tuple(range(5, 5 + PROMPT))
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    ending = time.perf_counter() + seconds
    for number in range(10**9):
        core.add(Request(request_id=str(number), prompt_token_ids=ids, sampling=params))
        core.step()
        while core.has_unfinished:
            started = time.perf_counter()
            core.step()
            steps.append(time.perf_counter() - started)
            if started >= ending:
                core.abort(str(number))
                core.step()
                return steps
    raise AssertionError


def child(name: str, num_threads: int | None) -> None:
    """Load a model, then decode for the seconds that each line of stdin says, and tell of the steps."""
    decoder = (
        random_model(num_threads)
        if name == "random"
        else halve.load(embedded_model_path(), num_threads=num_threads).decoder
    )
    runner = ModelRunner(decoder, num_blocks=(PROMPT + ANSWER) // 16 + 1, block_size=16)
    core = EngineCore(runner, None, EngineConfig(max_num_seqs=1))
    decode(core, 0.5)
    print("ready", flush=True)
    for line in sys.stdin:
        busy = time.process_time()
        steps = decode(core, float(line))
        busy = time.process_time() - busy
        told = {"tokens_s": len(steps) / sum(steps), "median_s": median(steps), "worst_s": max(steps)}
        told |= {"cpu_s": busy, "cpu_s_per_token": busy / len(steps)}
        print(json.dumps(told | {"p99_s": quantiles(steps, n=100)[98]}), flush=True)


class Process:
    """An engine in a process of its own."""

    def __init__(self, name: str, num_threads: int | None) -> None:
        words = [sys.executable, __file__, "--child", name]
        words += [] if num_threads is None else ["--threads", str(num_threads)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ready(self) -> None:
        """Wait until the model is loaded."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit("an engine did not start; what it said is above")

    def start(self, seconds: float) -> None:
        """Let it decode."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def told(self) -> dict[str, float]:
        """What its steps took."""
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))


def busy_s() -> float:
    """Seconds of processor time that the whole machine was busy so far; 0 where the system does not say."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk


def turn(processes: list[Process], seconds: float) -> list[dict[str, float]]:
    """Let these decode at once, again while others disturb them; with the share of the machine that others used."""
    for _ in range(TRIES):
        busy, started = busy_s(), time.perf_counter()
        for process in processes:
            process.start(seconds)
        told = [process.told() for process in processes]
        machine = (time.perf_counter() - started) * (os.cpu_count() or 1)
        others = max(0.0, busy_s() - busy - sum(one["cpu_s"] for one in told)) / machine
        if others <= UNDISTURBED:
            break
    return [one | {"others": others} for one in told]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model, alone and twice."""
    alone, both = [], []
    with ExitStack() as stack:
        pair = [stack.enter_context(Process(name, options.threads)) for _ in range(2)]
        for process in pair:
            process.ready()
        for _ in range(options.rounds):
            for one in pair:
                alone += turn([one], options.seconds)
                both.append(turn(pair, options.seconds))
    rate, step = (median(a[key] for a in alone) for key in ("tokens_s", "median_s"))
    sums = [sum(b["tokens_s"] for b in turns) / rate for turns in both]
    each = [b["tokens_s"] / rate for turns in both for b in turns]
    together = [b for turns in both for b in turns]
    result = {
        "model": name,
        "alone_tokens_s": rate,
        "together": {"value": median(sums), "low": min(sums), "high": max(sums)},
        "each": {"value": median(each), "low": min(each), "high": max(each)},
        "cpu_s_per_token": {
            "alone": median(a["cpu_s_per_token"] for a in alone),
            "together": median(b["cpu_s_per_token"] for b in together),
        },
        "others": {"alone": max(a["others"] for a in alone), "together": max(b["others"] for b in together)},
        "median_step_s": {"alone": step, "together": median(b["median_s"] for b in together)},
        "p99_over_median_alone": {
            "alone": median(a["p99_s"] for a in alone) / step,
            "together": median(b["p99_s"] for b in together) / step,
        },
        "worst_over_median_alone": {
            "alone": max(a["worst_s"] for a in alone) / step,
            "together": max(b["worst_s"] for b in together) / step,
        },
    }
    print(
        f"{name:8} alone {rate:.1f} tokens/s, steps of {1000 * step:.2f} ms; together {median(sums):.2f} of it "
        f"[{min(sums):.2f}, {max(sums):.2f}], each {median(each):.2f} [{min(each):.2f}, {max(each):.2f}], processor "
        f"time a token {result['cpu_s_per_token']['together'] / result['cpu_s_per_token']['alone']:.2f}; "
        f"of that step, p99 {result['p99_over_median_alone']['together']:.1f}, "
        f"worst {result['worst_over_median_alone']['together']:.1f} "
        f"(alone {result['p99_over_median_alone']['alone']:.1f} and {result['worst_over_median_alone']['alone']:.1f}); "
        f"others at most {result['others']['alone']:.0%} and {result['others']['together']:.0%}",
        flush=True,
    )
    return result


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of one turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each process; all cores by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.threads)
        return
    results = [measure(name, options) for name in options.models.split(",")]
    device = detect_cpu()
    record = {
        "question": "two_processes",
        "results": results,
        "aims": AIMS,
        "runs": options.rounds * 2,
        "seconds": options.seconds,
        "hardware": f"{device.model}, {device.num_cores} cores",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/two_processes.py --seconds {options.seconds} --rounds {options.rounds}",
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
