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
from halve.kernels.native_checks import STORED, KVCache, check_attention, check_batch, floats, int32, within
from halve.kernels.native_library import LIBRARY, available, library
from halve.kernels.ops import Array, AttentionSpec, Packed, TokenBatch

log = logging.getLogger("halve.kernels")

MAX_THREADS = 1024
ACTIVATIONS = ("fp32", "bf16")
LAYOUT_VERSION = 1  # raised by whatever changes a byte of what `NativeOps.pack` makes


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

    def __init__(self, weight: Weight | Packed, bias: Array | None = None) -> None:
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise KernelError(
                f"a product needs a matrix [out, in], got shape {weight.shape}; take one expert at a time"
            )
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise KernelError(f"bias has shape {bias.shape}; a matrix {weight.shape} needs ({self.out_features},)")
        self.bias = None if bias is None else _vector(bias)
        kind, self.codes, self.scale = _unpacked(weight) if isinstance(weight, Packed) else _stored(weight)
        self.record = _MatrixRecord(
            self.out_features,
            self.in_features,
            weight.format.group_size or self.in_features,
            self.codes.ctypes.data,
            None if self.scale is None else self.scale.ctypes.data,
            kind,
        )
        self.address = ctypes.addressof(self.record)


def _kind(fmt: Format) -> int:
    if fmt.kind == "int":
        return _KIND_INT4 if fmt.bits == 4 else _KIND_INT8
    return {"fp16": _KIND_FLOAT16, "bf16": _KIND_BF16}.get(fmt.name, _KIND_FLOAT32)


def _stored(weight: Weight) -> tuple[int, Array, Array | None]:
    """Kind, codes and scales as the rows take them, views where nothing is converted."""
    kind, codes, scale = _kind(weight.format), weight.codes, weight.scale
    if kind == _KIND_INT8:
        codes = weight.unpacked_codes()
    elif kind == _KIND_FLOAT32 and weight.format.scaled:
        codes, scale = weight.dequantize(), None
    codes = np.require(codes, requirements=["C", "A"])
    return kind, codes, None if scale is None else np.require(scale, requirements=["C", "A"])


def _layout(fmt: Format, shape: tuple[int, ...]) -> tuple[dict[str, int], int]:
    """The record and the bytes of a packed matrix: codes, then scales on the next multiple of 64."""
    kind = _kind(fmt)
    width = {_KIND_FLOAT32: 32, _KIND_FLOAT16: 16, _KIND_BF16: 16, _KIND_INT4: 4, _KIND_INT8: 8}[kind]
    row_bytes = -(-shape[1] * width // 32) * 4 if kind == _KIND_INT4 else shape[1] * width // 8
    codes_bytes = shape[0] * row_bytes
    scale_at = -(-codes_bytes // 64) * 64
    scale_bytes = math.prod(fmt.scale_shape(shape)) * 2 if kind in (_KIND_INT4, _KIND_INT8) else 0
    record = {"kind": kind, "out": shape[0], "in": shape[1], "codes_bytes": codes_bytes, "scale_at": scale_at}
    return record, scale_at + scale_bytes if scale_bytes else codes_bytes


def _unpacked(packed: Packed) -> tuple[int, Array, Array | None]:
    if reason := _packed_refusal(packed):
        raise KernelError(f"a packed {packed.format.name} matrix {packed.shape}: {reason}; pack the weight again")
    codes, scale = packed.blob[: packed.record["codes_bytes"]], packed.blob[packed.record["scale_at"] :]
    return packed.record["kind"], codes, scale if scale.size else None


def _packed_refusal(packed: Packed) -> str | None:
    if len(packed.shape) != 2 or packed.format.refusal(packed.shape[-1]):
        return f"no matrix of format {packed.format.name}"
    record, size = _layout(packed.format, packed.shape)
    if dict(packed.record) != record:
        return f"its record is {dict(packed.record)}, expected {record}"
    if packed.blob.dtype != np.uint8 or packed.blob.shape != (size,) or packed.blob.ctypes.data % 64:
        return f"its blob is {packed.blob.dtype} {packed.blob.shape}, expected {size} bytes on a multiple of 64"
    return None


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


def _rounded(name: str, dtype: type[np.generic], isa: Isa, x: Array, *, threads: int) -> Array:
    out = np.empty(x.shape, dtype)
    _call(name, isa, x, out, x.size, threads)
    return out


def _attention(
    isa: Isa, q: Array, k: Array, v: Array, *, batch: TokenBatch, spec: AttentionSpec, sinks: Array | None, threads: int
) -> Array:
    """Keys and values as stored: the cache's [B, P, G, D] where the batch has block tables, else [T, G * D]."""
    tables = batch.block_tables
    out = np.empty_like(q)
    widest, block_size = (0, 1) if tables is None else (tables.shape[1], k.shape[1])
    sizes = (len(q), batch.num_sequences, widest, block_size, spec.num_heads, spec.num_kv_heads, spec.head_dim)
    settings = (spec.window or 0, spec.kv_format == "bf16", threads)
    _call("attention", isa, q, k, v, batch.positions, batch.cu_seqlens, tables, sinks, out, *sizes, *settings)
    return out


_PLAIN: Mapping[str, Callable[..., Array]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "attention": _attention,
    "add": partial(_pairwise, "add"),
    "silu_mul": partial(_pairwise, "silu_mul"),
    "to_bf16": partial(_rounded, "to_bf16", np.uint16),
    "round_bf16": partial(_rounded, "round_bf16", np.float32),
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
        self._last_batch: tuple[Any, TokenBatch] | None = None
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

    @property
    def layout(self) -> str:
        """The layout of `pack`: its version, and the instruction set that it is for."""
        best = next(isa for isa in ISAS if self.device.features.issuperset(isa.features))
        return f"native{LAYOUT_VERSION}-{best.name}"

    def pack(self, weight: Weight, take: Callable[[int], Array]) -> Packed:
        """Copy a matrix [out, in] into memory from `take` (bytes -> uint8, 64-byte aligned) as the rows read it."""
        _, codes, scale = _stored(weight)
        record, size = _layout(weight.format, weight.shape)
        blob = take(size)
        blob[: record["codes_bytes"]] = codes.reshape(-1).view(np.uint8)
        if scale is not None:
            blob[record["scale_at"] :] = scale.reshape(-1).view(np.uint8)
        return Packed(format=weight.format, shape=(weight.shape[0], weight.shape[1]), record=record, blob=blob)

    def refusal(self, packed: Packed) -> str | None:
        """Why this is not what `pack` makes, or None. Every size is checked, so that no row reads outside the blob."""
        return _packed_refusal(packed)

    def linear(self, weight: Weight | Packed, bias: Array | None = None) -> tuple[Kernel, Matrix]:
        """Prepare a matrix [out, in] for `project`."""
        return self._choose("linear", weight.format), Matrix(weight, bias)

    def table(self, weight: Weight | Packed) -> tuple[Kernel, Matrix]:
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
        """Causal softmax attention over whole sequences or a paged cache.

        Raises KernelError, before anything is written, for a slot, block or position that does not exist.
        """
        check_attention(spec)
        q = floats("q", q, (batch.num_tokens, spec.num_heads * spec.head_dim))
        k = floats("k", k, (batch.num_tokens, spec.num_kv_heads * spec.head_dim))
        v = floats("v", v, k.shape)
        sinks = None if sinks is None else floats("sinks", sinks, (spec.num_heads,))
        batch = self._checked(batch, spec, cache)
        if spec.kv_format == "bf16":
            k, v = self._run["to_bf16"](k), self._run["to_bf16"](v)
        if cache is not None:
            shape = (-1, spec.num_kv_heads, spec.head_dim)
            cache.k.reshape(shape)[batch.slot_mapping] = k.reshape(shape)
            cache.v.reshape(shape)[batch.slot_mapping] = v.reshape(shape)
            k, v = cache.k, cache.v
        return self._run["attention"](q, k, v, batch=batch, spec=spec, sinks=sinks)

    def _checked(self, batch: TokenBatch, spec: AttentionSpec, cache: KVCache | None) -> TokenBatch:
        """`check_batch`, once for all layers of a step: by the batch's bytes, not by which object it is."""
        arrays = (batch.positions, batch.cu_seqlens, batch.slot_mapping, batch.block_tables)
        seen = [None if a is None else (a.dtype.str, a.shape, a.tobytes()) for a in arrays]
        key = (seen, spec, cache and (cache.k.dtype, cache.k.shape))
        if self._last_batch is None or self._last_batch[0] != key:
            self._last_batch = key, check_batch(batch, spec, cache)
        return self._last_batch[1]

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
        """Keys and values [B, P, G, D] in the spec's format, zero."""
        check_attention(spec)
        shape, dtype = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim), STORED[spec.kv_format]
        return KVCache(np.zeros(shape, dtype), np.zeros(shape, dtype))
