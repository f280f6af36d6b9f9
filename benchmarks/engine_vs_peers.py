"""How fast is Halve's engine beside the engines that a user would take instead, and beside what the machine can do?

Bounds. A step of decoding reads every weight once, whatever the batch, and multiplies each with every sequence's
activations; a prompt does the same with its tokens for a batch. So a step takes at least

    max(weight bytes / memory's rate, sequences * weights / arithmetic's rate)  seconds.

At batch 1 memory decides (1.24e9 weights of 4.5 bits are 0.7 GB: 50 tokens/s at 35 GB/s), for prompts arithmetic
(0.97e9 multiply-adds a token: 200 tokens/s at 190 GMAC/s), in between whichever is slower. Keys, values and attention's
own products are left out, so the bounds are below the truth by some percent at these lengths.

Method. Machines drift by a factor of two within minutes, so nothing is compared across time. In each round every
engine has one turn at a measure, directly one after another, and each turn has a read loop and arithmetic loops right
before and after it (`halve.kernels.ceilings`). Told are medians over rounds: tokens/s, the fraction of the ceilings
beside it, and the ratio of Halve to each peer within a round. Each engine lives in a process of its own, loaded before
the rounds and stopped (SIGSTOP) outside its turns, so that no engine's waiting threads spin beside another. All see the
same prompts of random tokens; every sequence must have exactly the tokens that were asked for.

    decode    tokens/s of a batch with 128 tokens of context and 4 to 64 new ones (as many as --seconds allow), while
              all sequences are decoding. Their prompts are computed before the rounds and kept by the engine's prefix
              cache; ONNX Runtime, which cannot go back, goes on from the round before instead (context up to 384).
    prefill   tokens/s of a prompt of 512 new tokens until its first answer
    memory    peak resident bytes of the engine's process once it has loaded and done batch 1 and the prompt, and at the
              end; pages of mapped files count, and what each engine sets aside for keys and values (about 1 GB)

A figure above what the machine gave beside it is refused as mismeasured. A round in which other processes used more
than --disturbed-above cores is repeated, and left out if it does not get better.

    python benchmarks/engine_vs_peers.py BUNDLE... --vs llama.cpp:model.gguf --vs onnx:DIR --vs openvino:DIR
        --vs vllm:DIR --peers-env DIR [--save docs/results/NAME.json]

It needs an idle machine, minutes, and memory for all the models at once. On a machine that is not idle, give all of it
a real-time priority (`chrt -r 10 python ...`), which the workers inherit.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.versus.engines import ENGINES, Prompts
from benchmarks.versus.figures import (
    Ceiling,
    Cell,
    Measure,
    MismeasuredError,
    Turn,
    Work,
    better,
    decode_rate,
    in_turn,
    is_disturbed,
    plain,
    prefill_rate,
    ratios_of,
    rows_of,
    spread,
    steps_within,
    turn_of,
)
from benchmarks.versus.processes import Others, Worker, WorkerError, find_python
from benchmarks.versus.table import table

from halve.checkpoint import open_checkpoint
from halve.core.errors import HalveError
from halve.hardware import detect_cpu
from halve.kernels.ceilings import ARITHMETIC, Arena, gmac_s, loop_for
from halve.models import ModelConfig, load_config
from halve.models.names import num_parameters

CONTEXT, PROMPT, NEW_TOKENS = 128, 512, 64  # tokens
WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".data", ".bin")


@dataclass
class Contestant:
    """One engine with one model. failed: what it said instead of loading."""

    name: str
    kind: str
    path: Path
    worker: Worker | None = None
    work: Work | None = None
    peak_bytes_at_batch_1: int = 0
    new_tokens: dict[str, int] = field(default_factory=dict)  # of a turn, by measure
    failed: str | None = None


class Bench:
    """Contestants over one machine."""

    def __init__(
        self, contestants: Sequence[Contestant], measures: Sequence[Measure], args: argparse.Namespace
    ) -> None:
        self.args, self.measures = args, measures
        self.contestants = {c.name: c for c in contestants if c.worker}
        self.device = detect_cpu()
        self.loops = {what: loop for what in ARITHMETIC if (loop := loop_for(what, self.device))}
        self.arena = Arena()
        self.cached_bytes = last_level_cache_bytes()
        self.vocab_size = args.config.vocab_size
        self.rng = np.random.default_rng(0)
        self.prompts = {m.name: self.new_prompts(m) for m in measures}
        self.ceilings: list[Ceiling] = []

    def new_prompts(self, measure: Measure) -> Prompts:
        """Random tokens; every sequence its own."""
        shape = (measure.batch, measure.prompt)
        prompts: Prompts = self.rng.integers(self.vocab_size // 100, self.vocab_size * 9 // 10, shape).tolist()
        return prompts

    def ceiling(self) -> Ceiling:
        """A sample of all of them, a fifth of a second or so."""
        threads = self.args.threads
        read = max(self.arena.read_gb_s(threads) for _ in range(2))
        return Ceiling(read, {what: gmac_s(loop, threads) for what, loop in self.loops.items()})

    def warm_up(self, contestant: Contestant) -> None:
        """Compute the prompts that rounds start from, and choose how many tokens fit into a turn."""
        assert contestant.worker is not None
        for measure in self.measures:
            say(f"  {contestant.name}: {measure.name}")
            if measure.is_prefill:
                contestant.worker.generate(self.new_prompts(measure), 1)
                contestant.new_tokens[measure.name] = 1
            else:
                prompts = self.prompts[measure.name]
                contestant.worker.generate(prompts, 2)
                rate = decode_rate(contestant.worker.generate(prompts, 5), measure.batch, 5)[1]
                fits = steps_within(self.args.seconds, 1 / rate, measure.new_tokens)
                contestant.new_tokens[measure.name] = fits
            if measure.batch == 1:
                contestant.peak_bytes_at_batch_1 = contestant.worker.peak_bytes

    def drop(self, contestant: Contestant, reason: str) -> None:
        """Go on without an engine that broke, and tell why."""
        say(f"  {contestant.name} broke: {reason}")
        contestant.failed = reason
        assert contestant.worker is not None
        contestant.worker.close()
        contestant.worker = None
        del self.contestants[contestant.name]

    def turn(self, contestant: Contestant, measure: Measure, prompts: Prompts) -> Turn:
        """One engine's turn between two samples of the ceilings. Raises MismeasuredError."""
        assert contestant.worker is not None
        assert contestant.work is not None
        new_tokens = contestant.new_tokens[measure.name]
        others = Others({c.name: c.worker for c in self.contestants.values() if c.worker})
        before = self.ceiling()
        arrivals = contestant.worker.generate(prompts, new_tokens)
        ceiling = Ceiling.faster(before, self.ceiling())
        self.ceilings.append(ceiling)
        if measure.is_prefill:
            tok_s, steps_s = prefill_rate(arrivals, measure.prompt)
        else:
            tok_s, steps_s = decode_rate(arrivals, measure.batch, new_tokens)
        cached, used = self.cached_bytes, others.cores()
        return turn_of(measure, tok_s, steps_s, contestant.work, ceiling, cached_bytes=cached, others=used)

    def cell(self, measure: Measure, round_number: int) -> Cell:
        """Every engine's turn at a measure."""
        prompts = self.new_prompts(measure) if measure.is_prefill else self.prompts[measure.name]
        cell = Cell({})
        for name in in_turn(list(self.contestants), round_number):
            try:
                cell.turns[name] = self.turn(self.contestants[name], measure, prompts)
            except MismeasuredError as error:
                cell.refused[name] = str(error)
            except WorkerError as error:
                cell.refused[name] = str(error)
                self.drop(self.contestants[name], str(error))
        cell.disturbed = is_disturbed(cell, self.args.disturbed_above)
        return cell

    def undisturbed_cell(self, measure: Measure, round_number: int) -> Cell:
        """A cell, again where others disturbed it, as often as --repeats allows; the best of the attempts."""
        best = self.cell(measure, round_number)
        for attempt in range(self.args.repeats):
            if not best.disturbed:
                break
            again = self.cell(measure, round_number)
            best = better(best, again)
            best.attempts = attempt + 2
        told = ", ".join(f"{name} {turn.tok_s:.1f}" for name, turn in best.turns.items())
        say(f"  {measure.name}: {told}{' (disturbed)' if best.disturbed else ''}")
        for name, reason in best.refused.items():
            say(f"  {measure.name}: {name} refused: {reason}")
        return best


def say(text: str) -> None:
    """Talk goes to standard error."""
    print(text, file=sys.stderr, flush=True)


def last_level_cache_bytes() -> int:
    """Of the first processor; 0 where the system does not say."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def weight_bytes(path: Path) -> int:
    """Bytes of the weight files of a model, whatever engine it is for. Raises WorkerError where there are none."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in WEIGHT_FILES]
    if size := sum(p.stat().st_size for p in files if p.suffix in WEIGHT_FILES):
        return size
    raise WorkerError(f"{path}: no weight files ({', '.join(WEIGHT_FILES)}) there")


def work_of(contestant: Contestant, config: ModelConfig) -> Work:
    """What a model of this shape asks of the machine. Every weight file is read once a step.

    The table of an untied model is looked up, not read: its share of the weights is taken off the bytes.
    """
    table, parameters = config.vocab_size * config.hidden_size, num_parameters(config)
    read = 1.0 if config.tied else 1 - table / parameters
    layers = parameters - table * (1 if config.tied else 2)
    return Work(round(weight_bytes(contestant.path) * read), layers, table)


def start(contestant: Contestant, args: argparse.Namespace, logs: Path, stack: ExitStack) -> None:
    """Load an engine; one that does not load says why in `failed`, and the others go on."""
    say(f"loading {contestant.name}")
    log = logs / f"{contestant.name.replace('/', '_').replace(':', '_')}.log"
    try:
        contestant.work = work_of(contestant, args.config)
        python = find_python(contestant.kind, args.peers_env)
        worker = Worker(contestant.kind, contestant.path, python=python, cpus=args.cpus, log=log)
        contestant.worker = stack.enter_context(worker)
    except WorkerError as error:
        contestant.failed = str(error)
        say(f"  {contestant.name} does not load: {error}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, warm up, take the rounds; the record."""
    contestants = [Contestant(f"halve:{p.name}", "halve", p) for p in args.bundles]
    contestants += [Contestant(f"{kind}:{path.name}", kind, path) for kind, path in args.vs]
    measures = [Measure(f"decode_b{b}", b, CONTEXT, NEW_TOKENS) for b in args.decode]
    measures.insert(1, Measure(f"prefill_{PROMPT}", 1, PROMPT, 1))  # with batch 1, before larger batches take memory
    with ExitStack() as stack:
        logs = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for contestant in contestants:
            start(contestant, args, logs, stack)
        bench = Bench(contestants, measures, args)
        say("warming up")
        for contestant in list(bench.contestants.values()):
            try:
                bench.warm_up(contestant)
            except WorkerError as error:
                bench.drop(contestant, str(error))
        cells: dict[str, list[Cell]] = {m.name: [] for m in measures}
        for number in range(args.rounds):
            say(f"round {number + 1} of {args.rounds}")
            for measure in measures:
                cells[measure.name].append(bench.undisturbed_cell(measure, number))
        return record_of(args, contestants, bench, cells)


def record_of(
    args: argparse.Namespace, contestants: Sequence[Contestant], bench: Bench, cells: dict[str, list[Cell]]
) -> dict[str, Any]:
    """Everything that was found, as one JSON object."""
    names = list(bench.contestants)
    ours = [c.name for c in contestants if c.kind == "halve" and c.worker]
    peers = [c.name for c in contestants if c.kind != "halve" and c.worker]
    rates = {f"{what}_gmac_s": spread([c.gmac_s[what] for c in bench.ceilings]) for what in bench.loops}
    device = bench.device
    return {
        "question": "engine_vs_peers",
        "hardware": f"{device.model}, {device.num_cores} cores",
        "features": sorted(device.features),
        "threads": args.threads,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": command(sys.argv),
        "engines": [
            {
                "engine": c.name,
                "version": c.worker.loaded["version"] if c.worker else None,
                "failed": c.failed,
                "work": asdict(c.work) if c.work else None,
                "load_s": c.worker.loaded["load_s"] if c.worker else None,
                "peak_bytes_at_batch_1": c.peak_bytes_at_batch_1 or None,
                "peak_bytes": c.worker.peak_bytes if c.worker else None,
                "new_tokens": c.new_tokens,
            }
            for c in contestants
        ],
        "ceilings": {"read_gb_s": spread([c.read_gb_s for c in bench.ceilings]), **rates},
        "runs": [row for m in bench.measures for row in rows_of(m, cells[m.name], names)],
        "ratios": [row for m in bench.measures for row in ratios_of(m, cells[m.name], ours, peers)],
        "rounds": plain(cells),
    }


def command(words: Sequence[str]) -> str:
    """The command line with the last part of every path: where things lie on this machine is nobody's business."""
    return shlex.join(["python", *(re.sub(r"/[^:]*/", "", word) for word in words)])


def commit() -> str | None:
    """Of this source tree, with a plus where files differ from it; None where there is no git."""
    here = Path(__file__).parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or None


def peer(text: str) -> tuple[str, Path]:
    """Read KIND:PATH."""
    kind, _, path = text.partition(":")
    kinds = [k for k in ENGINES if k != "halve"]
    if kind not in kinds or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND:PATH with a kind of {', '.join(kinds)}")
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no {path}")
    return kind, Path(path).resolve()


def sizes(text: str) -> list[int]:
    """Read batch sizes, rising."""
    found = sorted({int(part) for part in text.split(",")})
    if found[:1] != [1] or found[-1] > 32:
        raise argparse.ArgumentTypeError(f"{text!r} must name batch 1 and none above 32")
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=lambda p: Path(p).resolve(), help="models for Halve, same shape")
    parser.add_argument("--vs", action="append", default=[], type=peer, metavar="KIND:PATH", help="a peer's model")
    parser.add_argument("--peers-env", action="append", default=[], type=Path, help="a virtual environment, or many")
    parser.add_argument("--decode", type=sizes, default=[1, 8, 32], help="batch sizes (1,8,32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a decoding turn, about (3)")
    parser.add_argument("--threads", type=int, default=detect_cpu().num_cores, help="for every engine (all cores)")
    parser.add_argument("--disturbed-above", type=float, default=0.15, help="cores that others may use (0.15)")
    parser.add_argument("--repeats", type=int, default=2, help="of a disturbed round (2)")
    parser.add_argument("--logs", type=Path, help="an existing folder for what the engines print")
    parser.add_argument("--save", type=Path, help="also write the record there")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.repeats < 0 or args.seconds <= 0:
        parser.error("--rounds must be 1 or more, --repeats 0 or more, --seconds above 0")
    args.cpus = detect_cpus(args.threads, parser)
    return args


def detect_cpus(threads: int, parser: argparse.ArgumentParser) -> list[int]:
    """The processors that every worker is held to."""
    usable = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(usable):
        parser.error(f"--threads {threads} is not between 1 and the {len(usable)} cores of this process")
    return usable[:threads]


def main() -> None:
    """Measure; a table and one JSON line last."""
    args = parse()
    try:
        with open_checkpoint(args.bundles[0]) as checkpoint:
            args.config = load_config(checkpoint)
        if args.config.context <= PROMPT:
            sys.exit(f"{args.bundles[0]}: a context of {args.config.context} holds no prompt of {PROMPT} tokens")
        record = run(args)
    except HalveError as error:
        sys.exit(f"engine_vs_peers: {error}")
    print(table(record))
    text = json.dumps(record)
    if args.save:
        args.save.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
