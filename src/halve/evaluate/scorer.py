"""Our own decoder as a `LogitSource`, so that it is judged by the same code as any other engine."""

from collections.abc import Iterator

import torch

from halve.kernels.ops import Array, Buffer, TokenBatch
from halve.models import Decoder

CHUNK_LOGITS = 1 << 22  # logits made at a time: 16 MiB of float32, which the allocator reuses


class DecoderScorer:
    """Logits of whole token sequences by a decoder, without a cache; keys and values are still rounded as planned.

    keep_bytes: how many bytes of final hidden states to remember, for a model that is asked about the same text
    again and again, as the original is for each candidate; only its head runs then.
    """

    def __init__(self, decoder: Decoder, *, keep_bytes: int = 0) -> None:
        self.decoder = decoder
        self.vocab_size = decoder.config.vocab_size
        self._kept: dict[bytes, Buffer] = {}
        self._room = keep_bytes // (4 * decoder.config.hidden_size)  # in tokens

    def logits(self, tokens: Array) -> Iterator[Array]:
        """tokens int32 [T] -> float32 chunks [t, vocab] that cover every position in order."""
        ops = self.decoder.ops
        hidden = self._hidden(tokens)
        step = max(1, CHUNK_LOGITS // self.vocab_size)
        for start in range(0, len(tokens), step):
            with torch.inference_mode():
                part = self.decoder.logits(hidden[start : start + step])
                yield ops.to_host(part)

    def _hidden(self, tokens: Array) -> Buffer:
        key = tokens.tobytes()
        if key in self._kept:
            return self._kept[key]
        with torch.inference_mode():
            hidden = self.decoder.hidden(TokenBatch.whole([tokens]))
        if len(tokens) <= self._room:
            self._kept[key] = hidden
            self._room -= len(tokens)
        return hidden
