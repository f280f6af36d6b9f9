"""What the products and all else of a step cost on this device, measured once for a model's shapes and kept on disk.

A step of T tokens, of which R rows are sampled, is predicted as

    sum over layers and groups of product(shape, format, T) + head(format, R) + rest(T)
        + answer_pairs * pair(answers) + prompt_pairs * pair(T)

pairs: keys that queries meet. Those of tokens that are each of a sequence of its own, the answers, are read from the
cache once for each; a prompt's are read once for many of its queries, whatever else is in its step.

product: a fused group's product with the rounding of its input, timed as part of a program of `kernels/program.py`,
over as many different matrices as the model has layers, after reading as much other memory as the rest of the model
takes (or a cache could hold): what a step finds in the caches, a measurement finds there. rest, pair: whole steps of a
decoder of random weights with the same shapes, less their products timed in turn with them, at a short and at a long
context; up to 32 tokens each of a sequence of its own, as when answers are made, beyond them of one, as in a prompt.
Between measured token counts times are taken along a straight line.
"""

import hashlib
import json
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from halve.core.errors import ConfigError
from halve.core.record import from_json, to_json
from halve.engine.scheduler import Step as PlannedStep
from halve.formats import FORMATS, Format, Weight
from halve.formats.base import SCALE_DTYPE
from halve.kernels.native import NativeOps
from halve.kernels.native_cache import Step
from halve.kernels.native_rows import Linear
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.program import Program
from halve.kernels.sampling import SamplingBatch
from halve.models import Decoder, ModelConfig
from halve.models.compiled import CompiledSteps
from halve.models.names import FusedGroup, head_group, layer_groups

log = logging.getLogger("halve.search")

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROWS = (1, 2, 4, 8, 16, 32)
REPEATS = 15
WAKE_RUNS = 3
TYPICAL_BITS = 5  # of a weight in the rest of a model
FEW_REPEATS, FEW_WORDS = 5, 1 << 23  # where so much memory is read before each
LEAST_REPEATS, LONG_S = 3, 0.01  # what takes this long varies less
BLOCK = 16
MOST_FLUSHED = 640 << 20  # bytes read between two timings, at most: twice the largest caches there are
MOST_COPIES_BYTES = 256 << 20
PRODUCTS = ("prepare", "product", "reduce")
MOST_DECODES = 32  # tokens that are each of a sequence of their own
FEWEST_PROMPT = 64  # from here on they are measured as one prompt's
NEAR = BLOCK  # tokens before a short context's last


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Seconds at rising counts, straight between them and beyond the last."""

    counts: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.counts, self.counts[1:], strict=False))
        if not self.counts or len(self.counts) != len(self.seconds) or not rising:
            raise ConfigError(f"device table: counts {self.counts!r:.80} need as many seconds, and must rise")
        if not all(0 <= s < float("inf") for s in self.seconds):
            raise ConfigError(f"device table: seconds {self.seconds!r:.80} must be finite, 0 or more")

    def at(self, count: float) -> float:
        """Seconds at a count."""
        counts, seconds = self.counts, self.seconds
        if count <= counts[0] or len(counts) == 1:
            return seconds[0]
        i = min(bisect_left(counts, count), len(counts) - 1)
        share = (count - counts[i - 1]) / (counts[i] - counts[i - 1])
        return seconds[i - 1] + share * max(0.0, seconds[i] - seconds[i - 1])


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTable:
    """Seconds on one device for one model's shapes.

    device: what they hold for (`device_key`). products: by kind of group and format, over tokens; `lm_head` over rows.
    rest: over tokens. pair: of a query's key, all layers together, over tokens.
    """

    device: Mapping[str, str]
    num_layers: int
    products: Mapping[str, Mapping[str, Line]]
    rest: Line
    pair: Line
    version: int = 1

    def group_s(self, kind: str, fmt: str, count: float) -> float:
        """Seconds of one group's product for so many tokens (of the head: rows). Raises ConfigError if unmeasured."""
        found = self.products.get(kind, {}).get(fmt)
        if found is None:
            raise ConfigError(f"device table: no times of {kind} in {fmt}; measure it again")
        return found.at(count)


@dataclass(frozen=True, eq=False)
class PlannedTimes:
    """Step times of one plan: what `halve.engine.simulate` runs on. formats: of each group, by its name."""

    table: DeviceTable
    formats: Mapping[str, str]
    _cache: dict[int, float] = field(default_factory=dict)

    def of(self, num_tokens: int, num_rows: int, num_pairs: float) -> float:
        """Seconds of a step of answers alone, or of a prompt alone."""
        return self._without_pairs(num_tokens, num_rows) + num_pairs * self._pair_s(num_tokens)

    def of_step(self, step: PlannedStep) -> float:
        """Seconds of a planned step."""
        answers, prompts = 0, 0
        answer_pairs, prompt_pairs = 0.0, 0.0
        for chunk in step.chunks:
            count = chunk.num_tokens + len(chunk.draft)
            pairs = count * chunk.start + count * (count + 1) / 2
            if count == 1:
                answers, answer_pairs = answers + 1, answer_pairs + pairs
            else:
                prompts, prompt_pairs = prompts + count, prompt_pairs + pairs
        met = answer_pairs * self._pair_s(min(answers, MOST_DECODES)) if answers else 0.0
        if prompts:
            met += prompt_pairs * self._pair_s(max(prompts, FEWEST_PROMPT))
        return self._without_pairs(answers + prompts, step.num_sampled) + met

    def _without_pairs(self, num_tokens: int, num_rows: int) -> float:
        if num_tokens not in self._cache:
            self._cache[num_tokens] = self.table.rest.at(num_tokens) + sum(
                self.table.group_s(name.rpartition(".")[2], fmt, num_tokens)
                for name, fmt in self.formats.items()
                if name.startswith("layers.")
            )
        head = self.table.group_s("lm_head", self.formats["lm_head"], num_rows) if num_rows else 0.0
        return self._cache[num_tokens] + head

    def _pair_s(self, num_tokens: int) -> float:
        """Of a query's key. It falls with tokens that share what is read, so that it is not a `Line`'s rising one."""
        pair = self.table.pair
        return float(np.interp(num_tokens, pair.counts, pair.seconds))


def device_key(config: ModelConfig, ops: NativeOps, kv_format: str | Sequence[str], version: str) -> dict[str, str]:
    """What measured times depend on: the machine, what runs on it, and the shapes."""
    kv_formats = [kv_format] if isinstance(kv_format, str) else kv_format
    shapes = [config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim]
    return {
        "model": ops.device.model,
        "features": " ".join(sorted(ops.device.features)),
        "isa": ops.isa.name,
        "threads": str(ops.num_threads),
        "halve": version,
        "activations": ops.activations,
        "kv_cache": " ".join(dict.fromkeys(kv_formats) if len(set(kv_formats)) == 1 else kv_formats),
        "shapes": " ".join(map(str, [*shapes, config.vocab_size, config.num_layers])),
    }


def device_table(
    config: ModelConfig,
    ops: NativeOps,
    formats: Iterable[str],
    *,
    kv_format: str | Sequence[str],
    folder: Path | None,
    version: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> DeviceTable:
    """The table of a model's shapes on this device, from disk as far as it is there, else measured and kept.

    formats: that products are needed in, where they fit. kv_format: of the cache, or of each layer's. folder: where
    tables are kept; None keeps none. version: of Halve. A file of another machine, or broken, is measured again, and
    that is said.
    """
    key = device_key(config, ops, kv_format, version)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = None if folder is None else folder / f"{name}.json"
    table = _read(path, key) if path is not None and path.exists() else None
    wanted = {k: _fitting(g, formats) for k, g in _kinds(config).items()}
    have = {k: set(table.products.get(k, {})) if table else set() for k in wanted}
    if table is None or any(wanted[k] - have[k] for k in wanted):
        table = _measure(config.with_kv_format(kv_format), ops, wanted, key, table, progress)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".new")
                temporary.write_text(to_json(table))
                temporary.replace(path)
            except OSError as error:
                log.warning("device table is not kept: %s: %s", path, error.strerror)
    return table


def _read(path: Path, key: Mapping[str, str]) -> DeviceTable | None:
    try:
        table = from_json(DeviceTable, path.read_text(encoding="utf-8"), str(path))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        log.warning("device table can't be read and is measured again: %s", error)
        return None
    if dict(table.device) != dict(key):
        changed = sorted(k for k in key if table.device.get(k) != key[k])
        log.warning("%s: a table of another %s; it is measured again", path, ", ".join(changed))
        return None
    return table


def _kinds(config: ModelConfig) -> dict[str, FusedGroup]:
    return {group.kind: group for group in (*layer_groups(config, 0).values(), head_group(config))}


def _fitting(group: FusedGroup, formats: Iterable[str]) -> set[str]:
    return {f for f in formats if not any(FORMATS[f].refusal(m.shape[1]) for m in group.members)}


class _Random:
    """A `WeightSource` of random weights of one format: only shapes and formats matter here."""

    def __init__(self, fmt: Format) -> None:
        self.format = fmt
        self._made: dict[tuple[str, tuple[int, int]], Weight] = {}

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """A matrix of that shape, the same for the same shape."""
        fmt = self.format if self.format.refusal(shape[1]) is None else FORMATS["int8"]
        if (fmt.name, shape) not in self._made:
            self._made[fmt.name, shape] = random_weight(fmt, shape)
        return self._made[fmt.name, shape]

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """Ones."""
        return np.ones(shape, np.float32)

    def forget(self) -> None:
        """Nothing is read."""


def random_weight(fmt: Format, shape: tuple[int, int]) -> Weight:
    """Any codes at all, with scales that keep products small."""
    rng = np.random.default_rng(0)
    codes_shape = fmt.codes_shape(shape)
    if fmt.kind == "float":
        values = (rng.standard_normal(codes_shape, np.float32) * 0.02).astype(fmt.dtype)
    else:
        values = np.frombuffer(rng.bytes(int(np.prod(codes_shape)) * fmt.dtype.itemsize), fmt.dtype).reshape(
            codes_shape
        )
    scale = np.full(fmt.scale_shape(shape), 0.02 / 2**fmt.bits, SCALE_DTYPE) if fmt.scaled else None
    return Weight(format=fmt, shape=shape, codes=values, scale=scale)


def _measure(
    config: ModelConfig,
    ops: NativeOps,
    wanted: Mapping[str, set[str]],
    key: dict[str, str],
    old: DeviceTable | None,
    progress: Callable[[int, int], None] | None,
) -> DeviceTable:
    bench = _Bench(config, ops)
    products = {k: dict(v) for k, v in old.products.items()} if old else {}
    todo = [(k, f) for k, formats in wanted.items() for f in sorted(formats - set(products.get(k, {})))]
    for done, (kind, name) in enumerate(todo):
        line = bench.head(FORMATS[name]) if kind == "lm_head" else bench.group(kind, FORMATS[name])
        products.setdefault(kind, {})[name] = line
        if progress:
            progress(done + 1, len(todo))
    rest, pair = (old.rest, old.pair) if old else bench.rest()
    return DeviceTable(device=key, num_layers=config.num_layers, products=products, rest=rest, pair=pair)


def _undisturbed(seconds: Iterable[float]) -> float:
    """The lower third: what else runs on a machine only ever adds, and the lowest of all may be luck."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 3]


class _Bench:
    """A decoder of random weights, its cache, and memory to read between timings."""

    def __init__(self, config: ModelConfig, ops: NativeOps) -> None:
        self.config, self.ops = config, ops
        self.most = min(max(TOKENS), config.context - 1)
        self.tokens = tuple(t for t in TOKENS if t <= self.most) or (1,)
        self.decoder = Decoder(config, ops, _Random(FORMATS["int4-g32"]))
        self.far = max(1, min(self.most, 512) - 1)
        per = self.far // BLOCK + 1
        self.cache = self.decoder.new_cache(max(MOST_DECODES * per, (self.most + self.far) // BLOCK + 1), BLOCK)
        self.steps = CompiledSteps(self.decoder, ops, self.cache)
        self.waker = self._waker()
        self.batches = {t: self._batch(t) for t in self.tokens}
        self.other = np.ones(min(MOST_FLUSHED, self._rest_bytes()) // 8, np.uint64)

    def _batch(self, num_tokens: int, start: int = 0) -> TokenBatch:
        """Tokens of one sequence from `start` on."""
        positions = np.arange(start, start + num_tokens, dtype=np.int32)
        return TokenBatch(
            token_ids=(positions % self.config.vocab_size).astype(np.int32),
            positions=positions,
            cu_seqlens=np.array([0, num_tokens], np.int32),
            slot_mapping=positions,
            block_tables=np.arange(-(-(start + num_tokens) // BLOCK), dtype=np.int32)[None],
        )

    def _waker(self) -> Program:
        """A product as small as can be divided among threads."""
        program = Program(self.ops, self.most, max(ROWS))
        linear = self.ops.linear(random_weight(FORMATS["int8"], (512, 64)))
        ready = program.prepare(program.floats(64), linear.layout, gain=np.ones(64, np.float32), eps=1e-5)
        program.product(ready, [linear], [program.floats(512)])
        return program

    def group(self, kind: str, fmt: Format) -> Line:
        """One group's product, its input rounded, by tokens."""
        group = layer_groups(self.config, 0)[kind]  # type: ignore[index]
        size = sum(fmt.size_bytes(m.shape) for m in group.members)
        copies = max(1, min(self.config.num_layers, MOST_COPIES_BYTES // size))
        source = _Random(fmt)
        sets = [[self.ops.linear(source.weight(m.name, m.shape)) for m in group.members] for _ in range(copies)]
        program = Program(self.ops, self.most, 1)
        x = program.floats(group.members[0].shape[1])
        x[:] = np.random.default_rng(0).standard_normal(x.shape, np.float32)
        gain = np.ones(x.shape[1], np.float32) if kind in ("qkv", "gate_up") else None
        outputs = [program.floats(m.shape[0]) for m in group.members]
        for linears in sets:
            self._product(program, kind, x, linears, outputs, gain)
        rest = self._rest_bytes() - copies * size
        return self._line(program, self.tokens, rest, copies, rows=False)

    def _product(
        self, program: Program, kind: str, x: Array, linears: list[Linear], outputs: list[Array], gain: Array | None
    ) -> None:
        ready = program.prepare(x, linears[0].layout, gain=gain, eps=1e-5)
        if kind == "gate_up":
            program.product(ready, linears, outputs[:1], gated=True)
        else:
            program.product(ready, linears, outputs, add=kind in ("o", "down"))

    def head(self, fmt: Format) -> Line:
        """The last product and the likeliest token, by rows."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        linear = self.ops.linear(random_weight(fmt, shape))
        program = Program(self.ops, self.most, max(ROWS))
        x = program.floats(self.config.hidden_size)
        x[:] = 1
        gain = np.ones(self.config.hidden_size, np.float32)
        ready = program.prepare(x, linear.layout, gain=gain, eps=1e-5, of_rows=True)
        program.likeliest(ready, linear)
        rows = tuple(r for r in ROWS if r <= self.most)
        return self._line(program, rows, self._rest_bytes() - fmt.size_bytes(shape), 1, rows=True)

    def _rest_bytes(self) -> int:
        """Of a whole model in TYPICAL_BITS."""
        weights = self.config.vocab_size * self.config.hidden_size
        for group in layer_groups(self.config, 0).values():
            weights += self.config.num_layers * sum(m.shape[0] * m.shape[1] for m in group.members)
        return TYPICAL_BITS * weights // 8

    def _line(self, program: Program, counts: Sequence[int], rest_bytes: int, copies: int, *, rows: bool) -> Line:
        words = max(0, rest_bytes) // 8  # as much as there is
        seconds = []
        for count in counts:
            batch = self.batches.get(count) or self._batch(count)
            step = self._checked(batch)
            wanted = np.arange(count, dtype=np.int32) if rows else np.zeros(1, np.int32)

            def once(step: Step = step, batch: TokenBatch = batch, wanted: Array = wanted) -> float:
                self.other[:words].sum()
                for _ in range(WAKE_RUNS):  # threads that fell asleep while memory was read are awake in a step
                    self.waker.run(step, batch.token_ids, wanted[:1])
                started = time.perf_counter()
                program.run(step, batch.token_ids, wanted)
                return time.perf_counter() - started

            first = once()
            repeats = REPEATS if words < FEW_WORDS else FEW_REPEATS
            repeats = repeats if first < LONG_S else LEAST_REPEATS
            seconds.append(_undisturbed(once() for _ in range(repeats)) / copies)
        return Line(counts=tuple(counts), seconds=tuple(seconds))

    def _checked(self, batch: TokenBatch) -> Step:
        return self.steps.program(batch, np.zeros(1, np.int32), full=False)[1]

    def rest(self) -> tuple[Line, Line]:
        """All but products of whole steps, less what their pairs take; and what a pair takes."""
        rest, pair = [], []
        for count in self.tokens:
            seconds, pairs = [], []
            for start in self._contexts(count):
                batch = self._decodes(count, start) if count <= MOST_DECODES else self._batch(count, start)
                seconds.append(self._others(batch))
                pairs.append(float((batch.positions + 1).sum()))
            slope = max(0.0, seconds[1] - seconds[0]) / (pairs[1] - pairs[0]) if pairs[1] > pairs[0] else 0.0
            pair.append(slope)
            rest.append(max(0.0, seconds[0] - pairs[0] * slope))
        return Line(counts=self.tokens, seconds=tuple(rest)), Line(counts=self.tokens, seconds=tuple(pair))

    def _contexts(self, count: int) -> tuple[int, int]:
        """Positions of the first token at a short and at a long context."""
        if count <= MOST_DECODES:
            return min(NEAR, self.far), self.far
        return 0, max(0, min(self.far, self.config.context - count))

    def _decodes(self, num_sequences: int, position: int) -> TokenBatch:
        """A token of each of some sequences, all at one position."""
        per = position // BLOCK + 1
        tables = np.arange(num_sequences * per, dtype=np.int32).reshape(num_sequences, per)
        return TokenBatch(
            token_ids=np.arange(num_sequences, dtype=np.int32) % self.config.vocab_size,
            positions=np.full(num_sequences, position, np.int32),
            cu_seqlens=np.arange(num_sequences + 1, dtype=np.int32),
            slot_mapping=(tables[:, position // BLOCK] * BLOCK + position % BLOCK).astype(np.int32),
            block_tables=tables,
        )

    def _others(self, batch: TokenBatch) -> float:
        """A whole step as the engine makes it, less its products."""
        rows, sampling = np.array([batch.num_tokens - 1], np.int32), SamplingBatch.greedy(1)
        if batch.num_sequences > 1:
            rows, sampling = np.arange(batch.num_tokens, dtype=np.int32), SamplingBatch.greedy(batch.num_tokens)
        program, step = self.steps.program(batch, rows, full=False)
        part = program.part(PRODUCTS)
        found = []
        for _ in range(3 * REPEATS + 1):
            started = time.perf_counter()
            self.steps.sample(batch, rows, sampling)
            middle = time.perf_counter()
            part.run(step, batch.token_ids, rows)
            found.append(2 * middle - started - time.perf_counter())
        return max(0.0, _undisturbed(found[1:]))
