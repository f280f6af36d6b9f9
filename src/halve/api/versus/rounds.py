"""Engines take turns on one machine: loaded once, then round by round at every measure, beside the machine's ceilings.

Machines drift by a factor of two within minutes, so nothing is compared across time. In each round every engine has
one turn at a measure, directly one after another, and each turn has a read loop and arithmetic loops right before and
after it. Each engine is stopped outside its turns. A turn above what the machine gave beside it is refused as
mismeasured; a round in which other processes used the processors is repeated, and marked if it does not get better.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from halve.api.progress import Progress
from halve.api.versus.engines import Request, Settings
from halve.api.versus.figures import (
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
    prefill_rate,
    steps_within,
    turn_of,
)
from halve.api.versus.processes import Found, Others, Worker, WorkerError
from halve.api.versus.replay import Replay, next_load, replay_of, requests_at
from halve.core.workload import ServiceLevel, Workload
from halve.hardware import detect_cpu
from halve.kernels.ceilings import ARITHMETIC, Arena, gmac_s, loop_for
from halve.kernels.native_library import library

log = logging.getLogger("halve.bench")

TextOf = Callable[[Sequence[int]], tuple[list[int], str]]


@dataclass
class Contestant:
    """One engine with one model. path: a file, a directory or a URL. failed: what it said instead of an answer."""

    name: str
    kind: str
    path: str
    found: Mapping[bool, Found]  # how it is started, for batches (False) and for serving requests (True)
    work: Work
    shape: Mapping[str, int]  # that its model must have
    expert_cache: int | None = None  # bytes, of a sparse model that Halve runs; the rest of its experts lies on disk
    format: str | None = None
    version: str | None = None
    how: str | None = None  # requests that come one by one are served
    load_s: float | None = None
    peak_bytes_at_batch_1: int | None = None
    peak_bytes: int | None = None
    new_tokens: dict[str, int] = field(default_factory=dict)  # of a turn, by measure
    failed: str | None = None
    worker: Worker | None = None

    @property
    def here(self) -> bool:
        """Whether it runs on this machine as far as we know, within this machine's limits."""
        return self.kind != "openai"


class Machine:
    """The ceilings of this machine, on as many threads as the engines get. Raises KernelError without the C++ part."""

    def __init__(self, threads: int) -> None:
        library()  # refuses here, before anything is loaded
        self.threads = threads
        self.device = detect_cpu()
        self.loops = {what: loop for what in ARITHMETIC if (loop := loop_for(what, self.device))}
        self.arena = Arena()
        self.cached_bytes = last_level_cache_bytes()
        self.samples: list[Ceiling] = []

    def ceiling(self) -> Ceiling:
        """A sample of all of them, a fifth of a second or so."""
        read = max(self.arena.read_gb_s(self.threads) for _ in range(2))
        return Ceiling(read, {what: gmac_s(loop, self.threads) for what, loop in self.loops.items()})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How turns are taken. seconds: of a decoding turn, about. disturbed_above: cores that other processes may use."""

    rounds: int
    seconds: float
    disturbed_above: float
    repeats: int  # of a disturbed turn


class Turns:
    """Contestants that take turns on a machine; the base of both kinds of rounds."""

    def __init__(self, machine: Machine, contestants: Sequence[Contestant], rules: Rules) -> None:
        self.machine, self.rules = machine, rules
        self.running = {c.name: c for c in contestants if c.failed is None}

    @contextmanager
    def loaded(self, settings: Settings, logs: Path, progress: Progress) -> Iterator[None]:
        """Load every engine; one that does not load says why in `failed`, and the others go on. Ends them all."""
        with ExitStack() as stack:
            with progress.task("Loading engines", "engines") as advance:
                for done, contestant in enumerate(list(self.running.values())):
                    advance(done, len(self.running))
                    log.info("loading %s", contestant.name)
                    self._load(contestant, settings, logs, stack)
            try:
                yield
            finally:
                for contestant in self.running.values():
                    if contestant.worker and (peak := contestant.worker.peak_bytes) is not None:
                        contestant.peak_bytes = max(peak, contestant.peak_bytes or 0)
                    contestant.worker = None

    def _load(self, contestant: Contestant, settings: Settings, logs: Path, stack: ExitStack) -> None:
        found = contestant.found[settings.serving]
        file = logs / f"{contestant.name.replace('/', '_').replace(':', '_')}{'_serving' * settings.serving}.log"
        try:
            settings = dataclasses.replace(settings, command=found.command, expert_cache=contestant.expert_cache)
            worker = Worker(contestant.kind, contestant.path, settings, python=found.python, log=file)
            contestant.worker = stack.enter_context(worker)
            told = worker.loaded
            contestant.load_s = told["load_s"]
            contestant.version = contestant.version or told["version"]
            contestant.format = contestant.format or told["format"]
            if settings.serving:
                contestant.how = told["how"]
            for name, value in told["shape"].items():
                if contestant.shape.get(name, value) != value:
                    raise WorkerError(f"it has another model: {name} {value} instead of {contestant.shape[name]}")
        except WorkerError as error:
            self.drop(contestant, str(error))

    def drop(self, contestant: Contestant, reason: str) -> None:
        """Go on without an engine that broke, and tell why."""
        log.warning("%s: %s", contestant.name, reason)
        contestant.failed = reason
        if contestant.worker is not None:
            contestant.worker.close()
            contestant.worker = None
        del self.running[contestant.name]

    def watched(
        self, contestant: Contestant, requests: Sequence[Request]
    ) -> tuple[list[tuple[float, int]], Ceiling, float | None]:
        """One engine's turn between two samples of the ceilings: arrivals, the faster sample, cores of others."""
        assert contestant.worker is not None
        before = self.machine.ceiling()
        others = Others({c.name: c.worker for c in self.running.values() if c.worker})
        arrivals = contestant.worker.serve(requests)
        used = others.cores() if contestant.here else None
        ceiling = Ceiling.faster(before, self.machine.ceiling())
        self.machine.samples.append(ceiling)
        return arrivals, ceiling, used


class Batches(Turns):
    """Rounds of decoding at sizes of a batch, and of a prompt."""

    def __init__(
        self,
        machine: Machine,
        contestants: Sequence[Contestant],
        rules: Rules,
        measures: Sequence[Measure],
        *,
        vocab_size: int,
        text_of: TextOf | None,
    ) -> None:
        super().__init__(machine, contestants, rules)
        self.measures, self.vocab_size, self.text_of = measures, vocab_size, text_of
        self.rng = np.random.default_rng(0)
        self.prompts = {m.name: self.new_prompts(m) for m in measures}
        self.cells: dict[str, list[Cell]] = {m.name: [] for m in measures}

    def new_prompts(self, measure: Measure) -> list[Request]:
        """Random tokens; every sequence its own."""
        shape = (measure.batch, measure.prompt)
        drawn: list[list[int]] = self.rng.integers(self.vocab_size // 100, self.vocab_size * 9 // 10, shape).tolist()
        told = [self.text_of(ids) if self.text_of else (ids, None) for ids in drawn]
        return [Request(ids, measure.new_tokens, text=text) for ids, text in told]

    def run(self, progress: Progress) -> None:
        """Warm up, then take all rounds."""
        total = len(self.measures) * (self.rules.rounds + 1)
        with progress.task("Decoding and prompts", "turns") as advance:
            for i, measure in enumerate(self.measures):
                advance(i, total)
                log.info("warming up, %s", measure.name)
                for contestant in list(self.running.values()):
                    try:
                        self._warm_up(contestant, measure)
                    except WorkerError as error:
                        self.drop(contestant, str(error))
            for number in range(self.rules.rounds):
                for i, measure in enumerate(self.measures):
                    advance(len(self.measures) * (number + 1) + i, total)
                    self.cells[measure.name].append(self._undisturbed_cell(measure, number))

    def _warm_up(self, contestant: Contestant, measure: Measure) -> None:
        """Compute the prompts that rounds start from, and choose how many tokens fit into a turn."""
        assert contestant.worker is not None
        contestant.new_tokens[measure.name] = measure.new_tokens
        if measure.is_prefill:
            contestant.worker.serve(self.new_prompts(measure))
        else:
            prompts, few = self.prompts[measure.name], min(5, measure.new_tokens)
            contestant.worker.serve(_asking(prompts, 2))
            arrivals = contestant.worker.serve(_asking(prompts, few))
            with suppress(MismeasuredError):  # so fast that few tokens are no batch: then all of them
                rate = decode_rate(arrivals, measure.batch, few)[1]
                contestant.new_tokens[measure.name] = steps_within(self.rules.seconds, 1 / rate, measure.new_tokens)
        if measure.batch == 1:
            contestant.peak_bytes_at_batch_1 = contestant.worker.peak_bytes

    def _turn(self, contestant: Contestant, measure: Measure, prompts: Sequence[Request]) -> Turn:
        new_tokens = contestant.new_tokens[measure.name]
        arrivals, ceiling, others = self.watched(contestant, _asking(prompts, new_tokens))
        if measure.is_prefill:
            tok_s, steps_s = prefill_rate(arrivals, measure.prompt)
        else:
            tok_s, steps_s = decode_rate(arrivals, measure.batch, new_tokens)
        return turn_of(
            measure,
            tok_s,
            steps_s,
            contestant.work,
            ceiling,
            cached_bytes=self.machine.cached_bytes,
            others=others,
            stored=contestant.format,
            here=contestant.here,
        )

    def _cell(self, measure: Measure, round_number: int) -> Cell:
        """Every engine's turn at a measure."""
        prompts = self.new_prompts(measure) if measure.is_prefill else self.prompts[measure.name]
        cell = Cell({})
        for name in in_turn(list(self.running), round_number):
            try:
                cell.turns[name] = self._turn(self.running[name], measure, prompts)
            except MismeasuredError as error:
                cell.refused[name] = str(error)
            except WorkerError as error:
                cell.refused[name] = str(error)
                self.drop(self.running[name], str(error))
        cell.disturbed = is_disturbed(cell, self.rules.disturbed_above)
        return cell

    def _undisturbed_cell(self, measure: Measure, round_number: int) -> Cell:
        """A cell, again where others disturbed it, as often as the rules allow; the best of the attempts."""
        best = self._cell(measure, round_number)
        for attempt in range(self.rules.repeats):
            if not best.disturbed:
                break
            best = better(best, self._cell(measure, round_number))
            best.attempts = attempt + 2
        told = ", ".join(f"{name} {turn.tok_s:.1f}" for name, turn in best.turns.items())
        note = " (disturbed)" if best.disturbed else ""
        log.info("round %d, %s, tokens/s: %s%s", round_number + 1, measure.name, told, note)
        for name, reason in best.refused.items():
            log.warning("%s, %s: refused: %s", measure.name, name, reason)
        return best


class Replays(Turns):
    """Rounds in which every engine replays the workload, each at the load that its earlier rounds ask for."""

    def __init__(
        self,
        machine: Machine,
        contestants: Sequence[Contestant],
        rules: Rules,
        workload: Workload,
        *,
        vocab_size: int,
        text_of: TextOf | None,
    ) -> None:
        super().__init__(machine, contestants, rules)
        self.workload, self.vocab_size, self.text_of = workload, vocab_size, text_of
        self.level: ServiceLevel = workload.service_level
        self.done: dict[str, list[Replay]] = {name: [] for name in self.running}
        self.refused: dict[str, list[str]] = {name: [] for name in self.running}
        self.seed = 0

    def run(self, progress: Progress) -> None:
        """Warm up with the first request, then take all rounds."""
        with progress.task("Replaying requests", "rounds") as advance:
            for contestant in list(self.running.values()):
                try:
                    assert contestant.worker is not None
                    contestant.worker.serve(self._requests(None)[:1])
                except WorkerError as error:
                    self.drop(contestant, str(error))
            for number in range(self.rules.rounds):
                advance(number, self.rules.rounds)
                for name in in_turn(list(self.running), number):
                    self._round(self.running[name], number)

    def _requests(self, load: float | None) -> list[Request]:
        """Prompts that no engine has seen, since all keep prefixes."""
        self.seed += 1
        return requests_at(self.workload, load, vocab_size=self.vocab_size, seed=self.seed, text_of=self.text_of)

    def _round(self, contestant: Contestant, number: int) -> None:
        done = self.done[contestant.name]
        load = next_load(done) if done else None
        if done and load is None:
            return
        try:
            replay = self._undisturbed(contestant, load)
        except MismeasuredError as error:
            self.refused[contestant.name].append(str(error))
            log.warning("%s: replay refused: %s", contestant.name, error)
        except WorkerError as error:
            self.refused[contestant.name].append(str(error))
            self.drop(contestant, str(error))
        else:
            done.append(replay)
            at = "all at once" if load is None else f"{load:.3g} requests/s"
            kept = "kept" if replay.keeps else "not kept"
            note = " (disturbed)" if replay.disturbed else ""
            log.info(
                "round %d, replay, %s: %s: %.1f tokens/s, level %s%s",
                *(number + 1, contestant.name, at, replay.tok_s, kept, note),
            )

    def _undisturbed(self, contestant: Contestant, load: float | None) -> Replay:
        """A replay, again where others disturbed it, as often as the rules allow; the least disturbed one."""
        attempts = []
        for _ in range(self.rules.repeats + 1):
            requests = self._requests(load)
            arrivals, ceiling, others = self.watched(contestant, requests)
            replay = replay_of(
                requests,
                arrivals,
                load,
                self.level,
                work=contestant.work,
                ceiling=ceiling,
                others=others,
                stored=contestant.format,
                here=contestant.here,
            )
            attempts.append(replay)
            if others is None or others <= self.rules.disturbed_above:
                break
        best = min(attempts, key=lambda r: r.others or 0.0)
        disturbed = best.others is not None and best.others > self.rules.disturbed_above
        return dataclasses.replace(best, disturbed=disturbed, attempts=len(attempts))


def _asking(prompts: Sequence[Request], new_tokens: int) -> list[Request]:
    return [dataclasses.replace(request, new_tokens=new_tokens) for request in prompts]


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Of the first processor; 0 where the system does not say."""
    sizes = [p.read_text().strip() for p in root.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)
