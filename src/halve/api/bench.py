"""The verb `bench`: how fast a model is here, beside what the machine can do and the engines one would take instead.

Bounds. A step of decoding reads every weight once, whatever the batch, and multiplies each with every sequence's
activations; a prompt does the same with its tokens for a batch. So a step takes at least

    max(weight bytes / memory's rate, sequences * weights / arithmetic's rate)  seconds.

At batch 1 memory decides (1.24e9 weights of 4.5 bits are 0.7 GB: 50 tokens/s at 35 GB/s), for prompts arithmetic
(0.97e9 multiply-adds a token: 200 tokens/s at 190 GMAC/s), in between whichever is slower. Keys, values and attention's
own products are left out, so the bounds are below the truth by some percent at these lengths.

    decode    tokens/s of a batch with up to 128 tokens of context and 4 to 64 new ones (as many as `seconds` allow),
              while all sequences are decoding. Their prompts are computed before the rounds and kept by the engine's
              prefix cache; ONNX Runtime, which cannot go back, goes on from the round before instead.
    prefill   tokens/s of a prompt of up to 512 new tokens until its first answer
    replay    tokens/s of answers to requests that come as in a trace, at the highest load that keeps a time per token
    memory    peak resident bytes of the engine's processes; pages of mapped files count, and what each engine sets
              aside for keys and values

How turns are taken: `versus/rounds.py`; figures: `versus/figures.py`, `versus/replay.py`; engines: `versus/engines.py`,
`versus/servers.py`.
"""

import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Self

from halve.api.facts import environment, versions
from halve.api.progress import SILENT, Progress
from halve.api.versus.chart import write_plot
from halve.api.versus.engines import Settings
from halve.api.versus.entrants import entrants, model_name
from halve.api.versus.figures import Measure
from halve.api.versus.record import Benched, ceilings_of, facts_of, rounds_of, rows, workload_facts
from halve.api.versus.rounds import Batches, Contestant, Machine, Replays, Rules, TextOf
from halve.api.versus.words import Words
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.core.errors import ConfigError, OutputError
from halve.core.record import to_json
from halve.core.units import parse_bytes
from halve.core.workload import ServiceLevel, Workload
from halve.data import read_trace
from halve.hardware import Topology, default_threads, read_topology
from halve.models import ModelConfig, load_config
from halve.text import Tokenizer

PARTS = ("decode", "prefill", "replay")
CONTEXT, PROMPT, NEW_TOKENS = 128, 512, 64  # tokens, where the model's context has room
MOST_SEQUENCES = 32
SHARE = 0.95  # of the requests that must keep the time per token


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, and how.

    vs: `KIND:PATH` of engines with the same model: llama.cpp:FILE.gguf, onnx:DIR, openvino:DIR, vllm:DIR, halve:DIR,
    openai:URL (with #MODEL behind it where the server has several). peers_env: virtual environments that have them, or
    folders of such; PATH and this Python's own environment are looked at too.
    parts: of `PARTS`. batches: sizes for decoding, 1 to 32.
    trace: a file as `halve.data.read_trace` reads it; None for requests of one length. Of it the first trace_requests
    with at most trace_tokens of prompt and answer. tpot_ms: the time per token that 95 % of the requests must keep.
    rounds: of every measure, and at most so many loads of the replay. seconds: of a decoding turn, about.
    threads: of every engine; None for one a physical core. usd_per_hour: price of this machine, for $ a million tokens.
    disturbed_above: cores that other processes may use; a turn beside more is repeated `repeats` times, then marked.
    expert_cache: memory for the experts of the model itself (bytes, or "2GB"), which must be sparse; engines of `vs`
    have all in memory. logs: an existing directory for what engines print. plot: a file, .html or .svg; save: a file
    for the record.
    Raises ConfigError naming the option.
    """

    vs: tuple[str, ...] = ()
    peers_env: tuple[Path, ...] = ()
    parts: tuple[str, ...] = PARTS
    batches: tuple[int, ...] = (1, 8, 32)
    trace: Path | None = None
    trace_requests: int = 16
    trace_tokens: int = 1024
    tpot_ms: float = 200.0
    rounds: int = 3
    seconds: float = 3.0
    threads: int | None = None
    usd_per_hour: Decimal | None = None
    disturbed_above: float = 0.15
    repeats: int = 2
    expert_cache: int | str | None = None
    logs: Path | None = None
    plot: Path | None = None
    save: Path | None = None

    def __post_init__(self) -> None:
        if not self.parts or (wrong := sorted(set(self.parts) - set(PARTS))):
            raise ConfigError(f"parts: {', '.join(wrong) if self.parts else 'none'}; there are {', '.join(PARTS)}")
        if not self.batches or not all(1 <= size <= MOST_SEQUENCES for size in self.batches):
            raise ConfigError(f"batches: {list(self.batches)} must be one or more sizes from 1 to {MOST_SEQUENCES}")
        for name, least in (("rounds", 1), ("trace_requests", 1), ("trace_tokens", 2), ("repeats", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)} must be {least} or more")
        for name in ("seconds", "tpot_ms"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: {getattr(self, name)} must be above 0 and finite")
        if not self.disturbed_above >= 0:
            raise ConfigError(f"disturbed_above: {self.disturbed_above} must be 0 or more")
        if self.usd_per_hour is not None and not (self.usd_per_hour.is_finite() and self.usd_per_hour > 0):
            raise ConfigError(f"usd_per_hour: {self.usd_per_hour} must be above 0; leave it out where it is not known")
        if self.plot is not None and self.plot.suffix not in (".html", ".svg"):
            raise ConfigError(f"plot: {self.plot} must end in .html or .svg")
        for name in ("plot", "save"):
            path = getattr(self, name)
            if path is not None and not path.resolve().parent.is_dir():
                raise OutputError(f"{name}: {path}: there is no directory {path.resolve().parent}")
        if self.logs is not None and not self.logs.is_dir():
            raise OutputError(f"logs: {self.logs} is not a directory; make it first")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From loose arguments: None leaves a default, a list does for a tuple, words for a path or a price."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(options.keys() - known):
            raise ConfigError(f"bench: there is no {unknown[0]!r}; there are {', '.join(sorted(known))}")
        given = {name: value for name, value in options.items() if value is not None}
        for name in ("vs", "parts", "batches", "peers_env"):
            if name in given:
                given[name] = tuple(given[name])
        given["peers_env"] = tuple(map(Path, given.get("peers_env", ())))
        for name in ("trace", "logs", "plot", "save"):
            if name in given:
                given[name] = Path(given[name])
        if "usd_per_hour" in given:
            try:
                given["usd_per_hour"] = Decimal(str(given["usd_per_hour"]))
            except InvalidOperation:
                raise ConfigError(f"usd_per_hour: {given['usd_per_hour']!r} is not a number, such as 0.17") from None
        return cls(**given)


def bench(model: str | Path, *, progress: Progress = SILENT, **options: Any) -> Benched:
    """Measure a model on this machine, beside its ceilings and other engines. options: fields of `BenchOptions`.

    An engine that breaks is told in `engines`, and the others go on. Raises ConfigError for what can't be measured as
    asked, an engine that is not there included; DataError for a broken trace; KernelError without the C++ library.
    """
    asked = BenchOptions.of(**options)
    topology = read_topology()
    cpus = processors(asked.threads, topology)
    stages = [False] * bool({"decode", "prefill"} & {*asked.parts}) + [True] * ("replay" in asked.parts)
    with open_checkpoint(resolve(str(model))) as checkpoint:
        config = load_config(checkpoint)
        workload = workload_of(asked, config.context) if "replay" in asked.parts else None
        contestants = entrants(checkpoint, config, asked.vs, asked.peers_env, stages)
        if asked.expert_cache is not None:
            if not config.sparse:
                raise ConfigError(f"expert_cache: {config.architecture} has no experts; leave it out")
            contestants[0].expert_cache = parse_bytes(asked.expert_cache, "expert_cache")
        text_of = _text_of(checkpoint, config, contestants)
    machine = Machine(len(cpus))
    rules = Rules(
        rounds=asked.rounds,
        seconds=asked.seconds,
        disturbed_above=asked.disturbed_above,
        repeats=asked.repeats,
    )
    measures, vocab_size = measures_of(asked, config.context), config.vocab_size
    batches = Batches(machine, contestants, rules, measures, vocab_size=vocab_size, text_of=text_of)
    replays = None
    with tempfile.TemporaryDirectory() as folder:
        logs = asked.logs or Path(folder)
        if batches.measures:
            longest = max(measure.prompt + measure.new_tokens for measure in batches.measures)
            with batches.loaded(settings_of(config, cpus, longest, MOST_SEQUENCES, serving=False), logs, progress):
                batches.run(progress)
        if workload is not None:
            replays = Replays(machine, contestants, rules, workload, vocab_size=vocab_size, text_of=text_of)
            longest = max(request.prompt_tokens + request.output_tokens for request in workload.requests)
            sequences = min(MOST_SEQUENCES, len(workload.requests))
            with replays.loaded(settings_of(config, cpus, longest, sequences, serving=True), logs, progress):
                replays.run(progress)
    runs, ratios = rows(contestants, batches, replays, asked.usd_per_hour)
    rounds, replayed = rounds_of(batches, replays)
    result = Benched(
        runs=runs,
        ratios=ratios,
        engines=tuple(map(facts_of, contestants)),
        ceilings=ceilings_of(machine),
        device=environment("cpu"),
        features=tuple(sorted(machine.device.features)),
        threads=len(cpus),
        threads_reason=default_threads(topology).reason if asked.threads is None else "as asked for",
        usd_per_hour=None if asked.usd_per_hour is None else str(asked.usd_per_hour),
        workload=None if workload is None else workload_facts(workload),
        command=command_of(model, asked),
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        rounds=rounds,
        replays=replayed,
    )
    if asked.save is not None:
        asked.save.write_text(to_json(result), encoding="utf-8")
    if asked.plot is not None:
        write_plot(result, asked.plot)
    return result


def processors(threads: int | None, topology: Topology) -> list[int]:
    """The processors that every engine is held to: one of each physical core, then their hyper-threads.

    Raises ConfigError for more threads than there are processors.
    """
    if threads is None:
        return list(default_threads(topology).cpus)
    if not 1 <= threads <= len(topology.cpus):
        raise ConfigError(f"threads: {threads} is not between 1 and the {len(topology.cpus)} that this process may use")
    most = max(len(core.cpus) for core in topology.cores)
    every = [core.cpus[i] for i in range(most) for core in topology.cores if i < len(core.cpus)]
    return sorted(every[:threads])


def measures_of(asked: BenchOptions, context: int) -> list[Measure]:
    """Decoding at each size, and a prompt beside batch 1, before larger batches take memory."""
    start = min(CONTEXT, context // 4)
    measures = [
        Measure(f"decode_b{size}", size, start, min(NEW_TOKENS, context - start)) for size in sorted({*asked.batches})
    ]
    measures = measures if "decode" in asked.parts else []
    if "prefill" in asked.parts:
        tokens = min(PROMPT, context // 2)
        measures.insert(1, Measure(f"prefill_{tokens}", 1, tokens, 1))
    return measures


def workload_of(asked: BenchOptions, context: int) -> Workload:
    """The requests to replay. Raises ConfigError where the trace has none that fit."""
    level = ServiceLevel(time_per_token_s=asked.tpot_ms / 1000, share=SHARE)
    most = min(asked.trace_tokens, context)
    if asked.trace is None:
        prompt = max(min(CONTEXT, most // 2), 1)
        return Workload.poisson(
            requests_per_s=1.0,
            num_requests=asked.trace_requests,
            prompt_tokens=prompt,
            output_tokens=max(min(NEW_TOKENS, most - prompt), 1),
            service_level=level,
        )
    trace = read_trace(asked.trace, service_level=level)
    shortest = min(request.prompt_tokens + request.output_tokens for request in trace.requests)
    if shortest > most:
        raise ConfigError(
            f"trace_tokens: no request of {asked.trace} has at most {most} tokens, answer included; the shortest has "
            f"{shortest}, and the model's context holds {context}"
        )
    return trace.fitting(most).first(asked.trace_requests)


def settings_of(config: ModelConfig, cpus: Sequence[int], longest: int, sequences: int, *, serving: bool) -> Settings:
    """What every engine is given alike: room for so many sequences, in a cache of bf16 that none outgrows."""
    context = min(-(-(longest + 1) // 256) * 256, config.context)
    tokens = sequences * (context if serving else 2 * (CONTEXT + NEW_TOKENS))
    cache_bytes = tokens * config.with_kv_format("bf16").kv_cache_bytes_per_token
    return Settings(
        cpus=tuple(cpus),
        context=context,
        sequences=sequences,
        cache_gb=max(1, math.ceil(cache_bytes / 1e9)),
        serving=serving,
    )


def _text_of(checkpoint: Checkpoint, config: ModelConfig, contestants: Sequence[Contestant]) -> TextOf | None:
    """Makes prompts that can be said as text, where an engine may take no token ids."""
    if not any(found.takes_text for c in contestants for found in c.found.values()):
        return None
    return Words(Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size), config.vocab_size).of


def command_of(model: str | Path, asked: BenchOptions) -> str:
    """The command that measures this again, with the last part of every path: where things lie is nobody's business."""
    words = [Path(model).name if Path(model).exists() else str(model)]
    for option in fields(BenchOptions):
        name, value = option.name, getattr(asked, option.name)
        flag = "--" + {"batches": "batch"}.get(name, name).replace("_", "-")
        if value == option.default or name in ("logs", "plot", "save"):
            continue
        if name == "vs":
            parts = (one.partition(":") for one in value)
            words += [w for kind, _, path in parts for w in (flag, f"{kind}:{model_name(kind, path)}")]
        elif name == "peers_env":
            words += [word for one in value for word in (flag, one.name)]
        elif isinstance(value, tuple):
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag, value.name if isinstance(value, Path) else str(value)]
    return shlex.join(["halve", "bench", *words])
