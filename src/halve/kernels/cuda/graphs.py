"""What a step launches, recorded once and launched again by one call (CUDA graphs)."""

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graphs(Protocol):
    """Records launches; a fake one in tests just calls again."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches, without executing it; the result launches it on the stream that is current.

        Every kernel of `run` has run before, and its memory outlives the graph or is allocated inside `run`.
        """


class CudaGraphs:
    """CUDA graphs that share one pool of memory, since one replays at a time. Recording waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """As `Graphs.capture`. Raises RuntimeError where something in `run` can't be recorded."""
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it would free might belong to another graph, which must not be touched meanwhile
        try:
            with torch.cuda.stream(self._stream):
                # Other threads may go on allocating: only what this one does is recorded.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        self._pool = graph.pool()
        return graph.replay
