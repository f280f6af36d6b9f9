"""Our own decoder as a `LogitSource`, so that it is judged by the same code as any other engine."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from halve.engine import EngineConfig
from halve.engine.forced import Piece, forced
from halve.kernels.ops import Array, Buffer, TokenBatch
from halve.models import Decoder

CHUNK_LOGITS = 1 << 22  # logits made at a time: 16 MiB of float32, which the allocator reuses
LEAST_ROWS = 128  # but so many rows: a head of a large vocabulary takes as long to read as it multiplies these
WAVE_LOGITS = 1 << 26  # logits of windows that an engine runs ahead: 256 MiB
BATCH_TOKENS = 2048  # tokens of short windows that run as one flat batch


def rows_at_a_time(vocab_size: int) -> int:
    """Rows of logits that are made at once."""
    return max(LEAST_ROWS, CHUNK_LOGITS // vocab_size)


class DecoderScorer:
    """Logits of whole token sequences by a decoder, without a cache; keys and values are still rounded as planned.

    keep_bytes: how many bytes of final hidden states to remember, for a model that is asked about the same text
    again and again, as the original is for each candidate; only its head runs then.
    """

    def __init__(self, decoder: Decoder, *, keep_bytes: int = 0) -> None:
        self.decoder = decoder
        self.vocab_size = decoder.config.vocab_size
        self._kept: dict[bytes, Buffer] = {}
        self._ready: dict[bytes, Buffer] = {}  # of the batch that ran last, each taken once
        self._expected: deque[Array] = deque()
        self._room = keep_bytes // (4 * decoder.config.hidden_size)  # in tokens

    def let_go(self) -> None:
        """Free the memory of the decoder's layers: from now on only what was asked and kept can be asked again."""
        self.decoder = self.decoder.copied()
        self.decoder.layers = []

    def expect(self, windows: Sequence[Array]) -> None:
        """Announce the windows that `logits` will be asked for, in order; others may still be asked."""
        self._expected = deque(windows)

    def logits(self, tokens: Array) -> Iterator[Array]:
        """tokens int32 [T] -> float32 chunks [t, vocab] that cover every position in order."""
        ops = self.decoder.ops
        hidden = self._hidden(tokens)
        step = rows_at_a_time(self.vocab_size)
        for start in range(0, len(tokens), step):
            with torch.inference_mode():
                part = ops.to_host(self.decoder.logits(hidden[start : start + step]))
            yield part  # outside: a generator that is left halfway would leave torch in inference mode

    def states(self, window: Array) -> Buffer:
        """Final hidden states of a window, for `rows`."""
        return self._hidden(window)

    def rows(self, parts: Sequence[tuple[Buffer, int, int]]) -> Array:
        """Logits float32 [rows, vocab] of positions from one to another of windows that have these states."""
        asked = [states[start:stop] for states, start, stop in parts]
        joined = torch.cat(asked) if isinstance(asked[0], torch.Tensor) else np.concatenate(asked)
        with torch.inference_mode():
            return self.decoder.ops.to_host(self.decoder.logits(joined))

    def _hidden(self, tokens: Array) -> Buffer:
        key = tokens.tobytes()
        if key in self._kept:
            return self._kept[key]
        if key not in self._ready:
            self._run(self._next_batch(tokens))
        hidden = self._ready.pop(key)
        if len(tokens) <= self._room:
            self._kept[key] = hidden
            self._room -= len(tokens)
        return hidden

    def _next_batch(self, tokens: Array) -> list[Array]:
        """The window asked for and those expected after it that are still to be computed, up to BATCH_TOKENS."""
        batch, keys, size = [tokens], {tokens.tobytes()}, len(tokens)
        while self._expected and size + len(self._expected[0]) <= BATCH_TOKENS:
            window = self._expected.popleft()
            key = window.tobytes()
            if key not in keys and key not in self._kept:
                batch.append(window)
                keys.add(key)
                size += len(window)
        return batch

    def _run(self, batch: list[Array]) -> None:
        with torch.inference_mode():
            hidden = self.decoder.hidden(TokenBatch.whole(batch))
        self._ready, start = {}, 0
        for window in batch:
            self._ready[window.tobytes()] = hidden[start : start + len(window)]
            start += len(window)


class EngineScorer:
    """Logits of a decoder as it is served: by the engine's own steps over its paged cache, texts side by side.

    config: how the engine divides its steps. num_blocks, block_size: of its cache; None for as many as can be filled.
    """

    def __init__(
        self, decoder: Decoder, config: EngineConfig, *, num_blocks: int | None = None, block_size: int = 16
    ) -> None:
        self.decoder, self.config = decoder, config
        self.vocab_size = decoder.config.vocab_size
        self._num_blocks, self._block_size = num_blocks, block_size
        self.num_tokens = self.num_decoded = 0  # that ran, and of them one by one
        self._expected: deque[Array] = deque()
        self._ready: dict[bytes, Array] = {}

    def steps(self, windows: Sequence[Array]) -> Iterator[list[Piece]]:
        """The windows side by side; half of each runs as a prompt, half as an answer."""
        if not windows:
            return
        for pieces in forced(
            self.decoder, windows, self.config, num_blocks=self._num_blocks, block_size=self._block_size
        ):
            self.num_tokens += sum(len(piece.logits) for piece in pieces)
            self.num_decoded += sum(len(piece.logits) for piece in pieces if len(piece.logits) == 1)
            yield pieces

    def expect(self, windows: Sequence[Array]) -> None:
        """Announce the windows that `logits` will be asked for, in order; others may still be asked."""
        self._expected = deque(windows)

    def logits(self, tokens: Array) -> Iterator[Array]:
        """tokens int32 [T] -> float32 chunks [t, vocab]; with it run those expected next, as far as memory allows."""
        key = tokens.tobytes()
        if key not in self._ready:
            self._run(self._next_batch(tokens))
        yield self._ready.pop(key)

    def _next_batch(self, tokens: Array) -> list[Array]:
        batch = {tokens.tobytes(): tokens}
        size = len(tokens)
        if self._expected and np.array_equal(self._expected[0], tokens):
            self._expected.popleft()
        while self._expected and len(batch) < self.config.max_num_seqs:
            size += len(self._expected[0])
            if size * self.vocab_size > WAVE_LOGITS:
                break
            window = self._expected.popleft()
            batch.setdefault(window.tobytes(), window)
        return list(batch.values())

    def _run(self, batch: list[Array]) -> None:
        found = [np.empty((len(window), self.vocab_size), np.float32) for window in batch]
        for pieces in self.steps(batch):
            for piece in pieces:
                found[piece.index][piece.start : piece.start + len(piece.logits)] = piece.logits
        self._ready = {window.tobytes(): logits for window, logits in zip(batch, found, strict=True)}
