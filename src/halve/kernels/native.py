"""`Ops` in our own C++ on the CPU: numpy arrays outside, plain rows inside, no torch.

The C++ (csrc/) is one library with a plain C interface, called by ctypes with addresses as integers, at about half a
microsecond a call. It holds the same rows for each instruction set; the best that the device does not refuse is
chosen when a weight is prepared. Nothing reaches C++ before its type, shape and indices were checked here.

Weights lie packed (packed.py), once, for every row below. Two kinds of rows multiply them:

**float**: activations are floats (`fp32`, or rounded to `bf16`), a weight is widened to what `Weight.dequantize` means,
and sums are float32: stretches of 64 inputs one after the other, then the stretches. With n = in_features and
eps = 2^-24 that is at most n's share of a stretch and all stretches, and every product rounds once at most, so

    |y - y_exact| <= float_error_steps(n) * eps * (|bias| + sum |x| |w|) + (n + 1) * 2^-149 (subnormals)

with y_exact the product of the activations as rounded.

**dot**: activations are rounded to int8 (csrc/prepare.h) and meet the weights' integer codes exactly; sums of a run
of inputs (a group, or less on avx2) become floats, are scaled and added, one rounding a run, so that

    |y - y_exact| <= dot_error_steps(n, run) * eps * (|bias| + sum |x8| |w|) + (n + 1) * 2^-149

with x8 the activations as rounded and y_exact the product with them.

On avx512bf16, bf16 activations meet bf16 (and fp8) weights in its dot product, within the float bound, subnormals aside:
there (n + 1) * 2^-149 is (n + 1) * 2^-126.

The order of a sum depends on n, the format and the instruction set alone: a token's result is the same for any number
of threads and whatever tokens are beside it.
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
from halve.formats.activations import activations_for
from halve.formats.base import widen
from halve.hardware import Device, detect_cpu
from halve.kernels.dispatch import Choice, Kernel, Spec, choose
from halve.kernels.native_cache import BLOCK_SIZE, KVCache, Step, attention_record, in_own_blocks, kv_write_record
from halve.kernels.native_checks import check_attention, check_batch, check_copies, floats, int32, within
from halve.kernels.native_library import LIBRARY, available, library
from halve.kernels.native_sampling import SamplingWork
from halve.kernels.ops import Allocate, Array, AttentionSpec, Packed, TokenBatch
from halve.kernels.packed import LAYOUT_VERSION, PackedMatrix, adopt, pack, packing_refusal
from halve.kernels.products import ROUNDINGS, Codes, InputLayout, PrepareRecord, product_record, rows_of
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.kernels.sampling import check as check_sampling
from halve.kernels.team import grow

log = logging.getLogger("halve.kernels")

ACTIVATIONS = tuple(ROUNDINGS)
BF16_WEIGHTS = ("bf16", "fp8")  # what lies as bf16 when it is packed


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set that the rows are compiled for. number: its place in the C++ table."""

    name: str
    number: int
    features: tuple[str, ...]
    tiles: bool = True  # int8 activations meet integer codes as integers

    def float_error_steps(self, in_features: int) -> int:
        """Roundings on the longest path of a float product's sum, bias and scale included: see the top of this file."""
        return min(in_features, 64) + math.ceil(in_features / 64) + 3

    def dot_error_steps(self, in_features: int, fmt: Format) -> int:
        """The same for int8 activations."""
        if not self.tiles:
            return self.float_error_steps(in_features) + 2
        return math.ceil(in_features / (self.run_inputs(fmt) or in_features)) + 5

    @property
    def multiplies_bf16(self) -> bool:
        """Whether it has a dot product of bf16 numbers."""
        return self.name == "avx512bf16"

    @property
    def pairs(self) -> bool:
        """Whether products of bytes are added in pairs, in 16 bits."""
        return self.name == "avx2"

    def run_inputs(self, fmt: Format) -> int | None:
        """Inputs that are summed as integers before they are scaled; None for all."""
        group = fmt.group_size
        if group is None or not self.pairs or fmt.bits == 8:
            return group
        return {6: 16, 5: 32}.get(fmt.bits, min(group, 64))


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
ISAS = (  # best first
    Isa("avx512bf16", 3, (*_AVX512, "avx512_bf16")),
    Isa("avx512", 2, _AVX512),
    Isa("avx2", 1, _AVX2),
    Isa("baseline", 0, (), tiles=False),
)


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A matrix prepared for products by one kernel. activations: how its input is rounded before it."""

    kernel: Kernel
    isa: Isa
    format: Format
    matrix: PackedMatrix
    bias: Array | None
    activations: str

    @property
    def layout(self) -> InputLayout:
        """What the product's input takes."""
        codes = None
        if self.activations == "int8" and self.isa.tiles:
            codes = Codes(bits=self.matrix.bits, run=self.isa.run_inputs(self.format), pairs=self.isa.pairs)
        bf16 = self.isa.multiplies_bf16 and self.activations == "bf16" and self.format.name in BF16_WEIGHTS
        return InputLayout(width=self.matrix.in_features, rounding=self.activations, codes=codes, bf16=bf16)


def _vector(values: Array) -> Array:
    return np.array(widen(np.asarray(values)), np.float32, order="C")


def _call(name: str, isa: Isa, *arguments: Any) -> None:
    """Call the C++ function; arrays go as their addresses, None as a null pointer."""
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    if getattr(library(), f"halve_{name}")(isa.number, *values):
        raise KernelError(
            f"{name}: this build of {LIBRARY} has no rows for {isa.name}; reinstall halve on this machine"
        )


def _project(isa: Isa, linear: Linear, x: Array, threads: int) -> Array:
    layout = linear.layout
    record, arrays = layout.allocate(max(len(x), 1))
    prepare = PrepareRecord(
        x=x.ctypes.data, out=record, x_stride=layout.width, width=layout.width, rounding=ROUNDINGS[layout.rounding]
    )
    _call("prepare", isa, ctypes.addressof(prepare), len(x), threads)
    y = np.empty((len(x), linear.matrix.out_features), np.float32)
    product = product_record(
        record, [linear.matrix], [linear.bias], [rows_of(y)], rounding=layout.rounding, rows=len(x)
    )
    _call("product", isa, ctypes.addressof(product), threads)
    del arrays  # lived until here
    return y


def _embed(isa: Isa, matrix: PackedMatrix, ids: Array, threads: int) -> Array:
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


def _sample(isa: Isa, logits: Array, batch: SamplingBatch, *, threads: int) -> Sampled:
    work = SamplingWork(logits, batch, threads)
    _call("sample", isa, work.address, threads)
    return work.result()


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


def _refusal(isa: Isa, accepted: Format | None, activations: tuple[str, ...], device: Device, spec: Spec) -> str | None:
    if spec.format != accepted:
        return f"takes {accepted and accepted.name}, not {spec.format and spec.format.name}"
    if spec.activations not in activations:
        return f"takes {' or '.join(activations)} activations, not {spec.activations}"
    if device.kind != "cpu":
        return f"needs a cpu; {device.name} is {device.kind}"
    missing = [feature for feature in isa.features if feature not in device.features]
    return f"needs {', '.join(missing)}" if missing else None


def _rows(op: str) -> list[Kernel]:
    """The rows of an operation without a format, best instruction set first."""
    return [
        Kernel(
            name=f"native_{isa.name}",
            op=op,
            refusal=partial(_refusal, isa, None, ACTIVATIONS),
            run=partial(_sample if op == "sample" else _PLAIN[op], isa),
        )
        for isa in ISAS
    ]


def _format_rows(op: str, accepted: Format) -> list[Kernel]:
    """The rows of products or tables of one format, best instruction set first."""
    suffix = accepted.name.replace("-", "_")
    kinds = [("float", ACTIVATIONS[:2])] if op == "linear" else [("rows", ACTIVATIONS)]
    if op == "linear" and accepted.kind == "int":
        kinds.append(("dot", ("int8",)))
    bf16 = op == "linear" and accepted.name in BF16_WEIGHTS
    return [
        Kernel(
            name=f"native_{isa.name}_dot_{suffix}",
            op=op,
            refusal=partial(_refusal, isa, accepted, ("bf16",)),
            run=partial(_project, isa),
        )
        for isa in ISAS
        if bf16 and isa.multiplies_bf16
    ] + [
        Kernel(
            name=f"native_{isa.name}_{kind}_{suffix}",
            op=op,
            refusal=partial(_refusal, isa, accepted, activations),
            run=partial(_project if op == "linear" else _embed, isa),
        )
        for kind, activations in kinds
        for isa in ISAS
    ]


TABLE: list[Kernel] = [
    *(row for op in ("linear", "embed") for accepted in FORMATS.values() for row in _format_rows(op, accepted)),
    *(row for op in (*_PLAIN, "sample") for row in _rows(op)),
]


def format_report(device: Device) -> list[dict[str, Any]]:
    """For every format, the row that runs its products on `device` and why others don't (for `halve doctor`)."""
    absent = available()
    report = []
    for accepted in FORMATS.values():
        chosen, refused = None, []
        spec = Spec(op="linear", format=accepted, activations=activations_for(accepted, "int8"))
        for row in _format_rows("linear", accepted):
            reason = absent or row.refusal(device, spec)
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
    batch_invariant = True  # each row of a product and each query is summed by itself, in an order of its own

    def __init__(
        self, device: Device | None = None, *, activations: str = "fp32", num_threads: int | None = None
    ) -> None:
        library()
        here = detect_cpu()
        self.device = device or here
        if claimed := sorted(self.device.features - here.features):
            raise KernelError(f"device {self.device.model!r} claims {claimed}, which this machine ({here.model}) lacks")
        if activations not in ACTIVATIONS:
            raise ConfigError(f"activations: {activations!r} is not one of {list(ACTIVATIONS)}")
        self.activations = activations
        self.isa = next(isa for isa in ISAS if set(isa.features) <= self.device.features)
        self.num_threads = grow(num_threads)
        self.kernels: dict[str, str] = {}
        self._last_batch: tuple[Any, Step, int] | None = None
        self._run: dict[str, Callable[..., Array]] = {
            op: partial(self._choose(op).run, threads=self.num_threads) for op in _PLAIN
        }
        self._sample: Callable[..., Sampled] = partial(self._choose("sample").run, threads=self.num_threads)

    def _choose(self, op: str) -> Kernel:
        return self._chosen(op, choose(_rows(op), self.device, Spec(op=op)))

    def _choose_format(self, op: str, accepted: Format, activations: str = "fp32") -> Kernel:
        spec = Spec(op=op, format=accepted, activations=activations)
        return self._chosen(f"{op} {accepted.name}", choose(_format_rows(op, accepted), self.device, spec))

    def _chosen(self, key: str, choice: Choice) -> Kernel:
        if key not in self.kernels:
            log.info("%s runs on %s; refused: %s", key, choice.kernel.name, dict(choice.refused) or "none")
            self.kernels[key] = choice.kernel.name
        return choice.kernel

    @property
    def layout(self) -> str:
        """The layout of `pack`, the same on every machine."""
        return f"native{LAYOUT_VERSION}"

    def pack(self, weight: Weight, allocate: Allocate | None = None) -> Packed:
        """Bring a matrix into the kernels' layout; `linear` and `table` take the result in the weight's place."""
        return pack(weight, allocate, self.num_threads)

    def refusal(self, packed: Packed) -> str | None:
        """Why this is not what `pack` makes, or None. Every size is checked, so that no row reads outside the blob."""
        return packing_refusal(packed)

    def _matrix(self, weight: Weight | Packed) -> PackedMatrix:
        return adopt(weight if isinstance(weight, Packed) else self.pack(weight))

    def linear(self, weight: Weight | Packed, bias: Array | None = None) -> Linear:
        """Prepare a matrix [out, in] for `project`."""
        if bias is not None and bias.shape != weight.shape[:1]:
            raise KernelError(f"bias has shape {bias.shape}; a matrix {weight.shape} needs ({weight.shape[0]},)")
        activations = activations_for(weight.format, self.activations)
        kernel = self._choose_format("linear", weight.format, activations)
        vector = None if bias is None else _vector(bias)
        return Linear(kernel, self.isa, weight.format, self._matrix(weight), vector, activations)

    def table(self, weight: Weight | Packed) -> tuple[Kernel, PackedMatrix]:
        """Prepare an embedding table [vocab, hidden] for `embed`."""
        return self._choose_format("embed", weight.format), self._matrix(weight)

    def vector(self, values: Array) -> Array:
        """A float32 copy."""
        return _vector(values)

    from_host = vector

    def to_host(self, buffer: Array) -> Array:
        """The buffer itself."""
        return buffer

    def embed(self, table: tuple[Kernel, PackedMatrix], token_ids: Array) -> Array:
        """[T] -> [T, hidden]. Raises KernelError for an id outside the table."""
        kernel, matrix = table
        ids = int32("token_ids", token_ids, (None,))
        within("token id", ids, matrix.out_features, "the tokenizer and the model do not belong together")
        return kernel.run(matrix, ids, self.num_threads)  # type: ignore[no-any-return]

    def rms_norm(self, x: Array, gain: Array, eps: float) -> Array:
        """Each row over its root mean square, times gain."""
        x = floats("x", x, (None, None))
        return self._run["rms_norm"](x, floats("gain", gain, (x.shape[1],)), eps)

    def project(self, linear: Linear, x: Array) -> Array:
        """round(x) @ weight.T + bias; the error bounds are at the top of this file."""
        x = floats("x", x, (None, linear.matrix.in_features))
        return linear.kernel.run(linear, x, self.num_threads)  # type: ignore[no-any-return]

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

    def sample(self, logits: Array, batch: SamplingBatch) -> Sampled:
        """A token for every row; how close to the definition: csrc/sampling.h."""
        check_sampling(logits, batch)
        return self._sample(logits, batch)

    def kv_cache(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> KVCache:
        """Blocks of keys and values in the spec's format, zero."""
        check_attention(spec)
        return KVCache(num_blocks, block_size, spec)

    def copy_blocks(self, cache: KVCache, pairs: Array) -> None:
        """Copy whole blocks. Raises KernelError, before anything is written, for pairs that are not so."""
        self._run["copy_blocks"](cache, check_copies(pairs, cache.num_blocks))
