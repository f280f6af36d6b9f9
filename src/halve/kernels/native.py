"""`Ops` in our own C++ on the CPU: numpy arrays outside, plain rows inside, no torch.

The C++ (csrc/) is one library with a plain C interface, called by ctypes with addresses as integers, at about half a
microsecond a call. It holds the same rows for each instruction set; the best that the device does not refuse is
chosen when a weight is prepared. Nothing reaches C++ before its type, shape and indices were checked here.

Every row works in float32, and a product is a sum over the exact values of `Weight.dequantize`: a row widens codes
to float (code times scale, exact: 8 bits times 8 bits) and multiplies. With n = in_features, L lanes (4 on baseline,
8 on avx2, 16 on avx512) and eps = 2^-24, adding takes min(n, 1024) / L steps within a lane, log2(L) over the lanes
and n / 1024 over stretches, and every product rounds once at most, so

    |y - y_exact| <= Isa.linear_error_steps(n) * eps * (|bias| + sum |x| |w|) + (n + 1) * 2^-149 (subnormals).

The order of that sum depends on n and the instruction set alone: a token's result is the same for any number of
threads and whatever tokens are beside it.
"""

import ctypes
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from halve.core.errors import ConfigError, KernelError
from halve.formats import FORMATS, Format, Weight
from halve.formats.base import widen
from halve.hardware import Device, detect_cpu
from halve.hardware.detect import usable_cores
from halve.kernels.dispatch import Kernel, Spec, choose
from halve.kernels.native_cache import BLOCK_SIZE, KVCache, Step, attention_record, in_own_blocks, kv_write_record
from halve.kernels.native_checks import check_attention, check_batch, check_copies, floats, int32, within
from halve.kernels.native_library import LIBRARY, available, library
from halve.kernels.ops import Array, AttentionSpec, TokenBatch

log = logging.getLogger("halve.kernels")

MAX_THREADS = 1024
ACTIVATIONS = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set that the rows are compiled for. number: its place in the C++ table."""

    name: str
    number: int
    lanes: int
    features: tuple[str, ...]

    def linear_error_steps(self, in_features: int) -> int:
        """Roundings on the longest path of a product's sum, bias included: see the top of this file."""
        within = math.ceil(min(in_features, 1024) / self.lanes)
        return within + int(math.log2(self.lanes)) + math.ceil(in_features / 1024) + 2


_AVX2 = ("avx2", "fma", "f16c")
ISAS = (  # best first
    Isa("avx512", 2, 16, (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")),
    Isa("avx2", 1, 8, _AVX2),
    Isa("baseline", 0, 4, ()),
)


class _MatrixRecord(ctypes.Structure):
    """`Matrix` of csrc/rows.h."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
    )


_KIND_FLOAT32, _KIND_FLOAT16, _KIND_BF16, _KIND_INT4, _KIND_INT8 = range(5)


class Matrix:
    """A stored matrix [out, in] as the rows take it; it keeps alive what its addresses point at.

    fp32, fp16, bf16: as stored. int4 in groups: the packed words of the file. Other integers: one int8 a weight (as
    stored in 8 bits, else unpacked once). fp8: widened to float32 once, four bytes a weight; it has no row of its own.
    """

    def __init__(self, weight: Weight, bias: Array | None = None) -> None:
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise KernelError(
                f"a product needs a matrix [out, in], got shape {weight.shape}; take one expert at a time"
            )
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise KernelError(f"bias has shape {bias.shape}; a matrix {weight.shape} needs ({self.out_features},)")
        self.bias = None if bias is None else _vector(bias)
        kind, codes = _stored(weight)
        self.codes = np.require(codes, requirements=["C", "A"])
        self.scale = None
        if weight.scale is not None and kind in (_KIND_INT4, _KIND_INT8):
            self.scale = np.require(weight.scale, requirements=["C", "A"])
        self.record = _MatrixRecord(
            self.out_features,
            self.in_features,
            weight.format.group_size or self.in_features,
            self.codes.ctypes.data,
            None if self.scale is None else self.scale.ctypes.data,
            kind,
        )
        self.address = ctypes.addressof(self.record)


def _stored(weight: Weight) -> tuple[int, Array]:
    if weight.format.kind == "int":
        return (_KIND_INT4, weight.codes) if weight.format.bits == 4 else (_KIND_INT8, weight.unpacked_codes())
    match weight.format.name:
        case "fp16":
            return _KIND_FLOAT16, weight.codes
        case "bf16":
            return _KIND_BF16, weight.codes
    return _KIND_FLOAT32, weight.dequantize() if weight.format.scaled else weight.codes


def _vector(values: Array) -> Array:
    return np.array(widen(np.asarray(values)), np.float32, order="C")


def _call(name: str, isa: Isa, *arguments: Any) -> None:
    """Call the C++ function; arrays go as their addresses, None as a null pointer."""
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    if getattr(library(), f"halve_{name}")(isa.number, *values):
        raise KernelError(
            f"{name}: this build of {LIBRARY} has no rows for {isa.name}; reinstall halve on this machine"
        )


def _linear(isa: Isa, matrix: Matrix, x: Array, threads: int) -> Array:
    y = np.empty((len(x), matrix.out_features), np.float32)
    _call("linear", isa, matrix.address, x, matrix.bias, y, len(x), threads)
    return y


def _embed(isa: Isa, matrix: Matrix, ids: Array, threads: int) -> Array:
    y = np.empty((len(ids), matrix.in_features), np.float32)
    _call("embed", isa, matrix.address, ids, y, len(ids), threads)
    return y


def _rms_norm(isa: Isa, x: Array, gain: Array, eps: float, *, threads: int) -> Array:
    y = np.empty_like(x)
    _call("rms_norm", isa, x, gain, y, *x.shape, eps, threads)
    return y


def _rope(isa: Isa, x: Array, cos: Array, sin: Array, *, head_dim: int, threads: int) -> Array:
    y = np.empty_like(x)
    _call("rope", isa, x, cos, sin, y, len(x), x.shape[1] // head_dim, head_dim, threads)
    return y


def _pairwise(name: str, isa: Isa, x: Array, y: Array, *, threads: int) -> Array:
    out = np.empty_like(x)
    _call(name, isa, x, y, out, x.size, threads)
    return out


def _round_bf16(isa: Isa, x: Array, *, threads: int) -> Array:
    out = np.empty_like(x)
    _call("round_bf16", isa, x, out, x.size, threads)
    return out


def _kv_write(isa: Isa, cache: KVCache, step: Step, k: Array, v: Array, *, threads: int) -> None:
    record = kv_write_record(cache, step, k, v)
    _call("kv_write", isa, ctypes.addressof(record), threads)


def _copy_blocks(isa: Isa, cache: KVCache, pairs: Array, *, threads: int) -> None:
    _call("copy_blocks", isa, cache.address, pairs, len(pairs), threads)


def _attention(
    isa: Isa, cache: KVCache, step: Step, q: Array, *, spec: AttentionSpec, sinks: Array | None, threads: int
) -> Array:
    out = np.empty_like(q)
    record = attention_record(cache, step, q, out, spec, sinks)
    scratch = np.empty(library().halve_attention_scratch(ctypes.addressof(record)), np.uint8)
    record.scratch = scratch.ctypes.data
    _call("attention", isa, ctypes.addressof(record), threads)
    return out


_PLAIN: Mapping[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "kv_write": _kv_write,
    "copy_blocks": _copy_blocks,
    "attention": _attention,
    "add": partial(_pairwise, "add"),
    "silu_mul": partial(_pairwise, "silu_mul"),
    "round_bf16": _round_bf16,
}


def _refusal(isa: Isa, accepted: Format | None, device: Device, spec: Spec) -> str | None:
    if spec.format != accepted:
        return f"takes {accepted and accepted.name}, not {spec.format and spec.format.name}"
    if device.kind != "cpu":
        return f"needs a cpu; {device.name} is {device.kind}"
    missing = [feature for feature in isa.features if feature not in device.features]
    return f"needs {', '.join(missing)}" if missing else None


def _rows(op: str, accepted: Format | None = None) -> list[Kernel]:
    """The rows of one operation and format, best instruction set first."""
    suffix = f"_{accepted.name.replace('-', '_')}" if accepted else ""
    run = {"linear": _linear, "embed": _embed, **_PLAIN}[op]
    return [
        Kernel(
            name=f"native_{isa.name}{suffix}",
            op=op,
            refusal=partial(_refusal, isa, accepted),
            run=partial(run, isa),
            prepare=Matrix if accepted else None,
        )
        for isa in ISAS
    ]


TABLE: list[Kernel] = [
    *(row for op in ("linear", "embed") for accepted in FORMATS.values() for row in _rows(op, accepted)),
    *(row for op in _PLAIN for row in _rows(op)),
]


def format_report(device: Device) -> list[dict[str, Any]]:
    """For every format, the row that runs its products on `device` and why others don't (for `halve doctor`)."""
    absent = available()
    report = []
    for accepted in FORMATS.values():
        chosen, refused = None, []
        for row in _rows("linear", accepted):
            reason = absent or row.refusal(device, Spec(op="linear", format=accepted))
            if reason is None:
                chosen = row.name
                break
            refused.append({"kernel": row.name, "reason": reason})
        report.append({"op": "linear", "format": accepted.name, "kernel": chosen, "refused": refused})
    return report


class NativeOps:
    """`Ops` in C++ on the CPU; buffers are float32 numpy arrays. See `halve.kernels.ops.Ops` for each operation.

    device: a description of this processor; one with fewer features takes lesser rows. num_threads: None for every
    core this process may use; the team of threads is one for the process, and a call that finds it busy works alone.
    Raises KernelError without the C++ library or when `device` is not this machine's, ConfigError on bad settings.
    """

    name = "native"

    def __init__(
        self, device: Device | None = None, *, activations: str = "fp32", num_threads: int | None = None
    ) -> None:
        team = library()
        here = detect_cpu()
        self.device = device or here
        if claimed := sorted(self.device.features - here.features):
            raise KernelError(f"device {self.device.model!r} claims {claimed}, which this machine ({here.model}) lacks")
        if activations not in ACTIVATIONS:
            raise ConfigError(f"activations: {activations!r} is not one of {list(ACTIVATIONS)}")
        self.activations = activations
        self.num_threads = usable_cores() if num_threads is None else num_threads
        if not 1 <= self.num_threads <= MAX_THREADS:
            raise ConfigError(f"num_threads: {num_threads} is not between 1 and {MAX_THREADS}")
        if (strength := team.halve_grow_team(self.num_threads)) < self.num_threads:
            log.warning("the system gave %d of %d threads; products run on those", strength, self.num_threads)
        self.kernels: dict[str, str] = {}
        self._last_batch: tuple[Any, Step, int] | None = None
        self._run: dict[str, Callable[..., Array]] = {
            op: partial(self._choose(op).run, threads=self.num_threads) for op in _PLAIN
        }

    def _choose(self, op: str, accepted: Format | None = None) -> Kernel:
        spec = Spec(op=op, format=accepted, activations=self.activations)
        choice = choose(_rows(op, accepted), self.device, spec)
        key = f"{op} {accepted.name}" if accepted else op
        if key not in self.kernels:
            log.info("%s runs on %s; refused: %s", key, choice.kernel.name, dict(choice.refused) or "none")
            self.kernels[key] = choice.kernel.name
        return choice.kernel

    def linear(self, weight: Weight, bias: Array | None = None) -> tuple[Kernel, Matrix]:
        """Prepare a matrix [out, in] for `project`."""
        return self._choose("linear", weight.format), Matrix(weight, bias)

    def table(self, weight: Weight) -> tuple[Kernel, Matrix]:
        """Prepare an embedding table [vocab, hidden] for `embed`."""
        return self._choose("embed", weight.format), Matrix(weight)

    def vector(self, values: Array) -> Array:
        """A float32 copy."""
        return _vector(values)

    from_host = vector

    def to_host(self, buffer: Array) -> Array:
        """The buffer itself."""
        return buffer

    def embed(self, table: tuple[Kernel, Matrix], token_ids: Array) -> Array:
        """[T] -> [T, hidden]. Raises KernelError for an id outside the table."""
        kernel, matrix = table
        ids = int32("token_ids", token_ids, (None,))
        within("token id", ids, matrix.out_features, "the tokenizer and the model do not belong together")
        return kernel.run(matrix, ids, self.num_threads)  # type: ignore[no-any-return]

    def rms_norm(self, x: Array, gain: Array, eps: float) -> Array:
        """Each row over its root mean square, times gain."""
        x = floats("x", x, (None, None))
        return self._run["rms_norm"](x, floats("gain", gain, (x.shape[1],)), eps)

    def project(self, linear: tuple[Kernel, Matrix], x: Array) -> Array:
        """round(x) @ weight.T + bias; the error bound is at the top of this file."""
        kernel, matrix = linear
        x = floats("x", x, (None, matrix.in_features))
        if self.activations == "bf16":
            x = self._run["round_bf16"](x)
        return kernel.run(matrix, x, self.num_threads)  # type: ignore[no-any-return]

    def rope(self, x: Array, cos: Array, sin: Array, head_dim: int) -> Array:
        """Rotate pairs (i, i + D/2) of each head."""
        x = floats("x", x, (None, None))
        if head_dim < 2 or head_dim % 2 or x.shape[1] % head_dim:
            raise KernelError(f"rope: head_dim {head_dim} must be even and divide the width {x.shape[1]}")
        angles = (len(x), head_dim // 2)
        return self._run["rope"](x, floats("cos", cos, angles), floats("sin", sin, angles), head_dim=head_dim)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        batch: TokenBatch,
        spec: AttentionSpec,
        cache: KVCache | None,
        sinks: Array | None = None,
    ) -> Array:
        """Causal softmax attention over whole sequences or a paged cache; k, v as rounded to spec.kv_format.

        With s the largest sum |q| |k| / sqrt(D) of a query, n positions and eps = 2^-24, weights of the softmax are off
        by a factor of e^d, d = (D + 16) * eps * s + 16 * eps, and the output by (2 d + (2 n + 16) eps) max |v|. int8 in
        blocks of 16 with a head size that 16 divides is multiplied in whole numbers where the processor has avx2
        (csrc/attention_int8.h): max |q| * max sum |k| / sqrt(D) / 65534 more in d and max |v| / 1000 in the output.
        A token's bits do not depend on other sequences, on how its own was cut into steps, or on threads; only on the
        instruction set and the block size.

        Raises KernelError, before anything is written, for a slot, block or position that does not exist.
        """
        check_attention(spec)
        q = floats("q", q, (batch.num_tokens, spec.num_heads * spec.head_dim))
        k = floats("k", k, (batch.num_tokens, spec.num_kv_heads * spec.head_dim))
        v = floats("v", v, k.shape)
        sinks = None if sinks is None else floats("sinks", sinks, (spec.num_heads,))
        step, own_blocks = self._checked(batch, spec, cache)
        if cache is None:
            cache = KVCache(own_blocks, BLOCK_SIZE, spec)
        self._run["kv_write"](cache, step, k, v)
        return self._run["attention"](cache, step, q, spec=spec, sinks=sinks)

    def _checked(self, batch: TokenBatch, spec: AttentionSpec, cache: KVCache | None) -> tuple[Step, int]:
        """`check_batch`, once for all layers of a step: by the batch's bytes, not by which object it is.

        Without a cache: the step over blocks of its own, and how many.
        """
        arrays = (batch.positions, batch.cu_seqlens, batch.slot_mapping, batch.block_tables)
        seen = [None if a is None else (a.dtype.str, a.shape, a.tobytes()) for a in arrays]
        key = (seen, spec, cache and cache.kind)
        if self._last_batch is None or self._last_batch[0] != key:
            checked, own_blocks = check_batch(batch, spec, cache), 0
            if cache is None:
                checked, own_blocks = in_own_blocks(checked)
            self._last_batch = key, Step(checked), own_blocks
        return self._last_batch[1:]

    def silu_mul(self, gate: Array, up: Array) -> Array:
        """silu(gate) * up."""
        gate = floats("gate", gate, (None, None))
        return self._run["silu_mul"](gate, floats("up", up, gate.shape))

    def add(self, x: Array, y: Array) -> Array:
        """Sum of two buffers."""
        x = floats("x", x, (None, None))
        return self._run["add"](x, floats("y", y, x.shape))

    def take_rows(self, x: Array, rows: Array) -> Array:
        """The rows of x, in that order."""
        return x[np.asarray(rows, np.intp)]

    def kv_cache(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVCache:
        """Blocks of keys and values in the spec's format, zero."""
        check_attention(spec)
        return KVCache(num_blocks, block_size, spec)

    def copy_blocks(self, cache: KVCache, pairs: Array) -> None:
        """Copy whole blocks. Raises KernelError, before anything is written, for pairs that are not so."""
        self._run["copy_blocks"](cache, check_copies(pairs, cache.num_blocks))
