"""Whole numbers of a step on their way to the device, and its tokens on their way back, without waiting for either.

All that the host tells goes by one copy from pinned memory, and all that the device answers by one to pinned memory
and an event behind it, which is the only thing that anyone waits for. Memory on the host is used in turns, so that a
step can be prepared while the one before it is under way.
"""

from collections.abc import Sequence

import numpy as np
import torch

from halve.kernels.ops import Array

TURNS = 3
ALIGN = 4  # numbers: sections begin at multiples of 16 bytes, as vector loads want them


def section(length: int) -> int:
    """Numbers that a section of this length takes."""
    return -(-length // ALIGN) * ALIGN


class Staging:
    """int32 numbers from the host at a fixed place on the device: `ints`. capacity: how many there are room for.

    Where `grows`, the place may change when more are put than there was room for.
    """

    def __init__(self, device: torch.device, capacity: int, *, grows: bool = False) -> None:
        self.device, self.grows = device, grows
        self.ints = torch.zeros(max(capacity, ALIGN), dtype=torch.int32, device=device)
        self._pinned = [_pinned(1024, device) for _ in range(TURNS)]
        self._read = [_event(device) for _ in range(TURNS)]
        self._turn = 0

    def put(self, sections: Sequence[Array]) -> list[torch.Tensor]:
        """Bring arrays of int32 to the device, each in a section of its own from the start of `ints` on."""
        starts = np.cumsum([0, *(section(part.size) for part in sections)]).tolist()
        total = starts[-1]
        if total > len(self.ints):
            assert self.grows, "more than a graph's place holds"
            self.ints = torch.zeros(2 * total, dtype=torch.int32, device=self.device)
        self._turn = (self._turn + 1) % TURNS
        if (event := self._read[self._turn]) is not None:
            event.synchronize()  # the copy of three steps ago, long done
        if len(self._pinned[self._turn]) < total:
            self._pinned[self._turn] = _pinned(2 * total, self.device)
        host = self._pinned[self._turn]
        memory = host.numpy()
        for start, part in zip(starts, sections, strict=False):
            memory[start : start + part.size] = part.reshape(-1)
        self.ints[:total].copy_(host[:total], non_blocking=True)
        if event is not None:
            event.record()
        return [self.ints[start : start + part.size] for start, part in zip(starts, sections, strict=False)]


class Arrival:
    """Tensors of the device on their way to the host."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        device = tensors[0].device
        self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda") for t in tensors]
        for here, there in zip(self._host, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        self._event = _event(device)
        if self._event is not None:
            self._event.record()

    def wait(self) -> list[Array]:
        """The values, when they are here."""
        if self._event is not None:
            self._event.synchronize()
        return [t.numpy() for t in self._host]


def _pinned(length: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.int32, pin_memory=device.type == "cuda")


def _event(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
