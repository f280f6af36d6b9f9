"""Toy models over a paged memory of their own: what lies in a wrong slot, or is read from one, changes the tokens."""

import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from halve.engine import Completion, EngineCore, Request, SamplingParams, StepOutput
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch, sample


class ToyRunner:
    """Logits are random numbers keyed by the hash of all tokens up to the row, read back through the block table."""

    batch_invariant = True

    def __init__(self, vocab_size: int = 50, context: int = 64, num_blocks: int = 32, block_size: int = 4) -> None:
        self.vocab_size, self.context = vocab_size, context
        self.num_blocks, self.block_size = num_blocks, block_size
        self.memory = np.full(num_blocks * block_size, -1, np.int64)
        self.batches: list[TokenBatch] = []
        self.num_copied = 0

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        return sample(self.logits(batch, rows), sampling)

    def logits(self, batch: TokenBatch, rows: Array) -> Array:
        assert batch.slot_mapping is not None
        assert batch.block_tables is not None
        for array in (batch.token_ids, batch.positions, batch.cu_seqlens, batch.slot_mapping, batch.block_tables, rows):
            assert array.dtype == np.int32
        assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens
        self.memory[batch.slot_mapping] = batch.token_ids
        self.batches.append(batch)
        logits = [self.next(self.read(batch, int(row))) for row in rows]
        return np.array(logits, np.float32).reshape(len(rows), self.vocab_size)

    def copy_blocks(self, pairs: Array) -> None:
        assert pairs.dtype == np.int32
        assert not set(pairs[:, 0].tolist()) & set(pairs[:, 1].tolist())
        blocks = self.memory.reshape(self.num_blocks, self.block_size)
        blocks[pairs[:, 1]] = blocks[pairs[:, 0]]
        self.num_copied += len(pairs)

    def read(self, batch: TokenBatch, row: int) -> Array:
        """Tokens 0..own of the row's sequence, as the memory has them."""
        sequence = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
        positions = np.arange(batch.positions[row] + 1)
        blocks = batch.block_tables[sequence][positions // self.block_size]
        assert (blocks >= 0).all()
        return self.memory[blocks * self.block_size + positions % self.block_size]

    def next(self, token_ids: Array) -> Array:
        key = zlib.crc32(token_ids.astype(np.int64).tobytes())
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(self.vocab_size)


class ScriptedRunner(ToyRunner):
    """Continues a prompt of one token, `n`, with the n-th script."""

    def __init__(self, vocab_size: int, scripts: Mapping[int, Sequence[int]], **sizes: int) -> None:
        super().__init__(vocab_size, **sizes)
        self.scripts = scripts

    def next(self, token_ids: Array) -> Array:
        script = self.scripts[int(token_ids[0])]
        return np.eye(self.vocab_size)[script[len(token_ids) - 1]]


class StubRunner:
    """As cheap as a runner can be: the next token follows from the last one and its position."""

    batch_invariant = True

    def __init__(
        self, vocab_size: int = 1000, context: int = 2048, num_blocks: int = 1024, block_size: int = 16
    ) -> None:
        self.vocab_size, self.context = vocab_size, context
        self.num_blocks, self.block_size = num_blocks, block_size

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        token_ids = (batch.token_ids[rows] * 31 + batch.positions[rows] * 7 + 1) % self.vocab_size
        none = np.empty((len(rows), 0), np.float32)
        return Sampled(token_ids.astype(np.int32), np.full(len(rows), np.nan, np.float32), none.astype(np.int32), none)

    def copy_blocks(self, pairs: Array) -> None:
        pass


def request(name: str, prompt: Iterable[int], *, priority: int = 0, **sampling: object) -> Request:
    params = SamplingParams(**sampling)
    return Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, priority=priority)


def run_steps(core: EngineCore) -> list[StepOutput]:
    """Step until nothing is unfinished."""
    outputs = []
    while core.has_unfinished:
        outputs += core.step()
        core.check_invariants()
    return outputs


def completions(outputs: Iterable[StepOutput]) -> dict[tuple[str, int], Completion]:
    """By request and index."""
    answers: dict[tuple[str, int], list[StepOutput]] = {}
    for output in outputs:
        answers.setdefault((output.request_id, output.index), []).append(output)
    return {key: Completion.from_outputs(answer) for key, answer in answers.items()}


def finish(core: EngineCore, requests: Iterable[Request]) -> list[Completion]:
    """The completions of requests, in their order, the answers of one side by side."""
    order = list(requests)
    for one in order:
        core.add(one)
    done = completions(run_steps(core))
    return [done[one.request_id, index] for one in order for index in range(one.sampling.n)]


def alone(prompt: Sequence[int], num_tokens: int, runner: ToyRunner | None = None) -> tuple[int, ...]:
    """What the toy says greedily, without any engine."""
    toy, tokens = runner or ToyRunner(), list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(toy.next(np.array(tokens)).argmax()))
    return tuple(tokens[len(prompt) :])
