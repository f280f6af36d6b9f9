"""`Ops` in our own C++ on the CPU: numpy arrays outside, plain rows inside, no torch.

The C++ (csrc/) is one library with a plain C interface, called by ctypes with addresses as integers, at about half a
microsecond a call. It holds the same rows for each instruction set; the best that the device does not refuse is
chosen when a weight is prepared. Nothing reaches C++ before its type, shape and indices were checked here.
The rows, and how far they may be off, are in native_rows.py.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from halve.core.errors import ConfigError, KernelError
from halve.formats import Format, Weight
from halve.formats.activations import activations_for
from halve.hardware import Device, detect_cpu
from halve.kernels.arena import Arena
from halve.kernels.dispatch import Choice, Kernel, Spec, choose
from halve.kernels.native_cache import BLOCK_SIZE, KVCache, Step, in_own_blocks
from halve.kernels.native_checks import check_attention, check_batch, check_copies, floats, int32, within
from halve.kernels.native_library import library
from halve.kernels.native_rows import ACTIVATIONS, ISAS, PLAIN, Linear, as_vector, format_rows, plain_rows
from halve.kernels.ops import Allocate, Array, AttentionSpec, Packed, TokenBatch
from halve.kernels.packed import LAYOUT_VERSION, PackedMatrix, adopt, pack, packing_refusal
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.kernels.sampling import check as check_sampling
from halve.kernels.team import grow

log = logging.getLogger("halve.kernels")


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
        self._arena = Arena()
        self._last_batch: tuple[Any, Step, int] | None = None
        self._run: dict[str, Callable[..., Array]] = {
            op: partial(self._choose(op).run, threads=self.num_threads) for op in PLAIN
        }
        self._sample: Callable[..., Sampled] = partial(self._choose("sample").run, threads=self.num_threads)

    def _choose(self, op: str) -> Kernel:
        return self._chosen(op, choose(plain_rows(op), self.device, Spec(op=op)))

    def _choose_format(self, op: str, accepted: Format, activations: str = "fp32") -> Kernel:
        spec = Spec(op=op, format=accepted, activations=activations)
        return self._chosen(f"{op} {accepted.name}", choose(format_rows(op, accepted), self.device, spec))

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
        """Bring a matrix into the kernels' layout; `linear` and `table` take the result in the weight's place.

        allocate: gives the memory; None takes it in huge pages, where small matrices lie side by side.
        """
        return pack(weight, allocate or self._arena.take, self.num_threads)

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
        vector = None if bias is None else as_vector(bias)
        return Linear(kernel, self.isa, weight.format, self._matrix(weight), vector, activations)

    def table(self, weight: Weight | Packed) -> tuple[Kernel, PackedMatrix]:
        """Prepare an embedding table [vocab, hidden] for `embed`."""
        return self._choose_format("embed", weight.format), self._matrix(weight)

    def vector(self, values: Array) -> Array:
        """A float32 copy."""
        return as_vector(values)

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
        """round(x) @ weight.T + bias, [T, in] -> [T, out]; the error bounds are at the top of native_rows.py."""
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
        blocks of 16 with a head size that 16 divides is multiplied in whole numbers where it has avx2 or dotprod
        (csrc/attention_int8.h): max |q| * max sum |k| / sqrt(D) / 65534 more in d and max |v| / 500 in the output. int4
        in such blocks with a head size that 32 divides likewise (csrc/attention_int4.h), / 254 in d; its q and k are
        those rotated by the Hadamard matrix of n, the largest power of two that divides D, which takes
        (log2(n) + 2) * eps * sum |q| / sqrt(n) * max sum |k| / sqrt(D) more in d, with q as given.
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
