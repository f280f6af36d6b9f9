"""Measures what a device table holds: products, all else of a step, and the engine around it.

A product is timed as part of a program of `kernels/program.py`, over as many different matrices as the model has layers
where memory is waited for, after reading as much other memory as the rest of the model takes (or a cache could hold):
what a step finds in the caches, a measurement finds there. All else: whole steps of a decoder of random weights with
the same shapes, less their products timed in turn with them, at a short and at a long context; up to MOST_DECODES
tokens each of a sequence of its own, as when answers are made, beyond them of one, as in a prompt.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from halve.engine import EngineConfig, EngineCore, Request, SamplingParams
from halve.formats import FORMATS, Format, Weight
from halve.formats.base import SCALE_DTYPE
from halve.kernels.native import NativeOps
from halve.kernels.native_cache import Step
from halve.kernels.native_rows import Linear
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.program import Program
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.models import Decoder, ModelConfig
from halve.models.compiled import CompiledSteps
from halve.models.config import Experts
from halve.models.moe import ROUTED
from halve.models.names import layer_groups
from halve.search.line import Line

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROWS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 15
WAKE_RUNS = 3
TYPICAL_BITS = 5  # of a weight in the rest of a model
FEW_REPEATS, FEW_WORDS = 5, 1 << 23  # where so much memory is read before each
LEAST_REPEATS, LONG_S, LONG_LONG_S = 3, 0.01, 0.1  # what takes this long varies less
BLOCK = 16
MOST_FLUSHED = 640 << 20  # bytes read between two timings, at most: twice the largest caches there are
MOST_COPIES_BYTES = 256 << 20
COMPUTES = 64  # tokens from which on a product multiplies for longer than it waits for memory
FEW_COPIES = 2
PRODUCTS = ("prepare", "product", "reduce", "experts")
MOST_DECODES = 32  # tokens that are each of a sequence of their own
FEWEST_PROMPT = 64  # from here on they are measured as one prompt's
NEAR = BLOCK  # tokens before a short context's last
SEQUENCES = (1, 8, 32, 64)  # that the engine's own work is timed with
ENGINE_STEPS = 64


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


def _undisturbed(seconds: Iterable[float]) -> float:
    """The lower third: what else runs on a machine only ever adds, and the lowest of all may be luck."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 3]


class Stopwatch:
    """A decoder of random weights with a model's shapes, its cache, and memory to read between timings."""

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
        experts = self.config.layers[0].experts if kind in ROUTED else None

        def program_of(count: int) -> Program:
            program = Program(self.ops, self.most, 1)
            x = program.floats(group.members[0].shape[1])
            x[:] = np.random.default_rng(0).standard_normal(x.shape, np.float32)
            gain = np.ones(x.shape[1], np.float32) if kind.endswith(("qkv", "gate_up")) else None
            if experts is not None:
                self._of_experts(program, experts, x, sets[:count], gain)
                return program
            outputs = [program.floats(m.shape[0]) for m in group.members]
            for linears in sets[:count]:
                self._product(program, kind, x, linears, outputs, gain)
            return program

        program = program_of(copies)
        rest = self._rest_bytes() - copies * size
        waits = self._line(program, [t for t in self.tokens if t < COMPUTES], rest, copies, rows=False)
        if not (many := [t for t in self.tokens if t >= COMPUTES]):
            return waits.rising()
        few = min(copies, FEW_COPIES)
        program = program_of(few)
        return waits.followed_by(self._line(program, many, self._rest_bytes() - few * size, few, rows=False)).rising()

    def _product(
        self, program: Program, kind: str, x: Array, linears: list[Linear], outputs: list[Array], gain: Array | None
    ) -> None:
        ready = program.prepare(x, linears[0].layout, gain=gain, eps=1e-5)
        if kind.endswith("gate_up"):
            program.product(ready, linears, outputs[:1], gated=True)
        else:
            program.product(ready, linears, outputs, add=kind in ("o", "down"))

    def _of_experts(
        self, program: Program, experts: Experts, x: Array, sets: Sequence[list[Linear]], gain: Array | None
    ) -> None:
        """Products of every set's experts for tokens that a router sends to all of them alike; down where no gain."""
        logits = program.floats(experts.num_experts)
        logits[:] = np.random.default_rng(1).standard_normal(logits.shape, np.float32)
        counted, totals = np.zeros(experts.num_experts, np.int64), np.zeros(2, np.int64)
        places = program.route(logits, experts.top_k, renormalize=True, scale=1.0, counted=counted, totals=totals)
        per_token = 1 if gain is not None else experts.top_k
        width = len(sets[0]) // experts.num_experts
        output = program.floats(sets[0][0].matrix.out_features, per_token=experts.top_k)
        if per_token > 1:
            x = program.floats(x.shape[1], per_token=per_token)
            x[:] = np.random.default_rng(0).standard_normal(x.shape, np.float32)
        for linears in sets:
            each = [linears[i : i + width] for i in range(0, len(linears), width)]
            layout = linears[0].layout
            ready = program.prepare(x, layout, gain=gain, eps=1e-5, per_token=per_token)
            program.experts(ready, places, layout, each, output, brought=gain is not None, clamp=experts.clamp)

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
        return self._line(program, rows, self._rest_bytes() - fmt.size_bytes(shape), 1, rows=True).rising()

    def _rest_bytes(self) -> int:
        """Of a whole model in TYPICAL_BITS."""
        weights = self.config.vocab_size * self.config.hidden_size
        for group in layer_groups(self.config, 0).values():
            weights += self.config.num_layers * sum(m.shape[0] * m.shape[1] for m in group.members)
        return TYPICAL_BITS * weights // 8

    def _line(self, program: Program, counts: Sequence[int], rest_bytes: int, copies: int, *, rows: bool) -> Line:
        """Counts take turns, so that a bad moment of the machine is not one count's alone."""
        words = max(0, rest_bytes) // 8  # as much as there is
        timers = [self._timer(program, count, words, rows=rows) for count in counts]
        most = REPEATS if words < FEW_WORDS else FEW_REPEATS
        repeats = [most if once() < LONG_S else LEAST_REPEATS for once in timers]
        taken: list[list[float]] = [[] for _ in counts]
        for turn in range(max(repeats)):
            for once, wanted, seconds in zip(timers, repeats, taken, strict=True):
                if turn < wanted:
                    seconds.append(once())
        return Line(counts=tuple(counts), seconds=tuple(_undisturbed(seconds) / copies for seconds in taken))

    def _timer(self, program: Program, count: int, words: int, *, rows: bool) -> Callable[[], float]:
        """Runs the program for so many tokens behind so many words of other memory, and says how long it took."""
        batch = self.batches.get(count) or self._batch(count)
        step = self._checked(batch)
        wanted = np.arange(count, dtype=np.int32) if rows else np.zeros(1, np.int32)

        def once() -> float:
            self.other[:words].sum()
            for _ in range(WAKE_RUNS):  # threads that fell asleep while memory was read are awake in a step
                self.waker.run(step, batch.token_ids, wanted[:1])
            started = time.perf_counter()
            program.run(step, batch.token_ids, wanted)
            return time.perf_counter() - started

        return once

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

        def once() -> tuple[float, float]:
            """Seconds of all of it, and of what is no product."""
            started = time.perf_counter()
            self.steps.sample(batch, rows, sampling)
            middle = time.perf_counter()
            part.run(step, batch.token_ids, rows)
            return middle - started, 2 * middle - started - time.perf_counter()

        first = once()[0]
        repeats = 3 * REPEATS if first < LONG_S else REPEATS if first < LONG_LONG_S else LEAST_REPEATS
        return max(0.0, _undisturbed(once()[1] for _ in range(repeats)))


class _Stub:
    """A `Runner` whose model takes no time."""

    vocab_size, batch_invariant, block_size = 256, True, BLOCK

    def __init__(self, num_sequences: int) -> None:
        self.context = 4 * ENGINE_STEPS
        self.num_blocks = num_sequences * (self.context // BLOCK + 1)

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """The same token for every row."""
        num_rows = len(rows)
        return Sampled(
            token_ids=np.ones(num_rows, np.int32),
            logprobs=np.zeros(num_rows, np.float32),
            top_ids=np.zeros((num_rows, 0), np.int32),
            top_logprobs=np.zeros((num_rows, 0), np.float32),
        )

    def copy_blocks(self, pairs: Array) -> None:
        """Nothing lies in them."""


def engine_line() -> Line:
    """What an engine does itself in a step that decodes so many sequences: planning, batches, tokens told."""
    seconds = []
    for count in SEQUENCES:
        core = EngineCore(_Stub(count), None, EngineConfig(max_num_seqs=count, max_tokens_per_step=max(512, count)))
        sampling = SamplingParams(max_tokens=ENGINE_STEPS, ignore_eos=True)
        for i in range(count):
            core.add(Request(request_id=str(i), prompt_token_ids=(1, 2), sampling=sampling))
        taken = []
        while core.has_unfinished:
            started = time.perf_counter()
            core.step()
            taken.append(time.perf_counter() - started)
        seconds.append(_undisturbed(taken[2:-2]))
    return Line(counts=SEQUENCES, seconds=tuple(np.maximum.accumulate(seconds).tolist()))
