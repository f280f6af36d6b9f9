"""A batch of rows to sample as the C++ takes it: `Sampling` of csrc/rows.h, and the memory its threads work in."""

import ctypes
import threading

import numpy as np

from halve.kernels.native_library import library
from halve.kernels.ops import Array
from halve.kernels.sampling import Ragged, Sampled, SamplingBatch, broken, unsampled

_COLUMNS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "seed",
    "step",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "num_logprobs",
)


class _SamplingRecord(ctypes.Structure):
    """`Sampling` of csrc/rows.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _COLUMNS),
        *((f"{name}_{part}", ctypes.c_void_p) for name in ("prompt", "output", "bias") for part in ("ids", "offsets")),
        ("bias_values", ctypes.c_void_p),
        ("allowed", ctypes.c_void_p),
        ("most_logprobs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("token_ids", "logprobs", "top_ids", "top_logprobs")),
        *((name, ctypes.c_void_p) for name in ("status", "next", "scratch")),
    )


class SamplingWork:
    """One call's record; it keeps alive what its addresses point at. The batch was checked: `sampling.check`."""

    def __init__(self, logits: Array, batch: SamplingBatch, threads: int) -> None:
        self._sampled = unsampled(batch, logits.shape[1])
        self._status = np.zeros(batch.num_rows, np.int32)
        self._next = np.zeros(1, np.int64)
        self._arrays = {name: getattr(batch, name) for name in _COLUMNS} | {
            "logits": logits,
            **_ragged("prompt", batch.prompt_tokens),
            **_ragged("output", batch.output_tokens),
            **_ragged("bias", batch.bias_tokens),
            "bias_values": batch.bias_values,
            "allowed": batch.allowed,
            "token_ids": self._sampled.token_ids,
            "logprobs": self._sampled.logprobs,
            "top_ids": self._sampled.top_ids,
            "top_logprobs": self._sampled.top_logprobs,
            "status": self._status,
            "next": self._next,
            "scratch": _scratch(logits.shape[1], min(threads, batch.num_rows)),
        }
        addresses = {n: a.__array_interface__["data"][0] for n, a in self._arrays.items() if a is not None}
        sizes = {"rows": logits.shape[0], "vocab": logits.shape[1], "most_logprobs": self._sampled.top_ids.shape[1]}
        self.record = _SamplingRecord(**sizes, **addresses)
        self.address = ctypes.addressof(self.record)

    def result(self) -> Sampled:
        """The tokens, after the call. Raises HalveError for the first row that gave none."""
        if self._status.any():
            row = int(self._status.astype(bool).argmax())
            raise broken(row, int(self._status[row]))
        return self._sampled


def _ragged(name: str, tokens: Ragged | None) -> dict[str, Array]:
    return {} if tokens is None else {f"{name}_ids": tokens.ids, f"{name}_offsets": tokens.offsets}


class _Memory(threading.local):
    """Of each caller, so that the pages are warm at its next step; by vocabulary, the one used last at the end."""

    def __init__(self) -> None:
        self.scratch: dict[int, Array] = {}


_memory = _Memory()
_VOCABULARIES = 4  # that keep their memory: a model's, and numbers of candidates


def _scratch(vocab: int, threads: int) -> Array:
    """Memory for that many threads. Zero at first, and the C++ leaves its counts so, where this vocabulary has them."""
    size_bytes = threads * 1024 * library().halve_sampling_kib(vocab)
    held = _memory.scratch.pop(vocab, None)
    if held is None or held.nbytes < size_bytes:
        held = np.zeros(size_bytes // 8, np.float64)
    _memory.scratch[vocab] = held
    if len(_memory.scratch) > _VOCABULARIES:
        del _memory.scratch[next(iter(_memory.scratch))]
    return held
