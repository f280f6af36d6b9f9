"""Stored arrays to the device: through pinned memory, in turns of two, so that a file is read while the bus works.

Packed words go as they are and are unpacked there: a card does in milliseconds what takes a processor seconds.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from halve.formats.base import BF16, FP8, Array
from halve.kernels.reference import to_torch

STAGE_BYTES = 64 << 20
TYPES = {
    BF16: torch.bfloat16,
    FP8: torch.float8_e4m3fn,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.uint32): torch.int32,  # the same bits
}


class Stage:
    """Two pinned buffers, used in turn."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self.events = [torch.cuda.Event() if pinned else None for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def send(self, content: Array, target: Tensor) -> None:
        """Copy bytes uint8 [n] to `target` uint8 [n]; returns when the last of them are on their way."""
        size = len(self.buffers[0])
        for start in range(0, len(content), size):
            self._turn = 1 - self._turn
            part, buffer, event = content[start : start + size], self.buffers[self._turn], self.events[self._turn]
            if event is not None:
                event.synchronize()
            buffer.numpy()[: len(part)] = part
            target[start : start + len(part)].copy_(buffer[: len(part)], non_blocking=True)
            if event is not None:
                event.record()


@cache
def _stage() -> Stage:
    return Stage(STAGE_BYTES, pinned=True)


def upload(values: Array, device: torch.device, stage: Stage | None = None) -> Tensor:
    """A stored array on the device, of the same bits; words of packed codes as int32."""
    if device.type != "cuda" and stage is None:
        return to_torch(values.view(np.int32) if values.dtype == np.uint32 else values, device)
    whole = np.ascontiguousarray(values)
    target = torch.empty(whole.nbytes, dtype=torch.uint8, device=device)
    (stage or _stage()).send(whole.reshape(-1).view(np.uint8), target)
    return target.view(TYPES[whole.dtype]).view(whole.shape)


def unpacked(words: Tensor, bits: int, width: int) -> Tensor:
    """Codes int8 [.., width] of packed words int32 [.., ceil(width * bits / 32)]: `formats.integer.unpack_codes`."""
    padded = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits))
    groups = padded.view(*words.shape[:-1], -1, bits)  # `bits` words hold 32 codes
    codes = torch.empty((*groups.shape[:-1], 32), dtype=torch.int8, device=words.device)
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = groups[..., word] >> offset
        if offset + bits > 32:
            value = value & ((1 << (32 - offset)) - 1) | groups[..., word + 1] << (32 - offset)
        codes[..., i] = (value & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.view(*words.shape[:-1], -1)[..., :width]
