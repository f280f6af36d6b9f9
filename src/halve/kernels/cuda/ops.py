"""`Ops` on a CUDA device by our Triton kernels; buffers are bf16 tensors. Its rows and what they refuse: rows.py.

Between operations the stream is bf16 and sums are float32, so that results differ from `TorchOps` by roundings of
2^-9 in the stream. Matrices that share their input are one matrix in memory (`fuse`), of which each member is a part.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from halve.core.errors import ConfigError, KernelError
from halve.formats import Format, Weight
from halve.kernels.cuda import attention, elementwise, products, sampling
from halve.kernels.cuda.cache import CudaCache
from halve.kernels.cuda.packing import CudaMatrix, concatenate, pack
from halve.kernels.cuda.product_rows import cuda_device
from halve.kernels.cuda.products import Activations, Norm
from halve.kernels.cuda.rows import ACTIVATIONS, KERNEL_ACTIVATIONS, TABLE
from halve.kernels.cuda.staging import Arrival
from halve.kernels.dispatch import Spec, choose
from halve.kernels.ops import Array, AttentionSpec, Packed, TokenBatch
from halve.kernels.reference import Matrix, TorchOps
from halve.kernels.sampling import Sampled, SamplingBatch, broken, unsampled

log = logging.getLogger("halve.kernels")

STEP_BYTES = 2 << 30  # activations, logits and workspaces of a step
OWN_BLOCK = 64  # tokens a block of the cache that a step without one makes


@dataclass(frozen=True, eq=False)
class Part:
    """Outputs start:end of a matrix that several projections of one input share."""

    whole: CudaMatrix
    start: int
    end: int


class Product:
    """All products of one input, as few launches as their formats allow.

    after: what becomes of the output before anyone adds it to the stream (a sum over ranks), or None.
    """

    def __init__(self, linears: Sequence[Part | CudaMatrix], after: Callable[[Tensor], Tensor] | None = None) -> None:
        matrices = [linear.whole if isinstance(linear, Part) else linear for linear in linears]
        self.matrices = list(dict.fromkeys(matrices))
        self.after = after
        self.activations = {matrix.activations for matrix in self.matrices}
        self.out_features = sum(matrix.out_features for matrix in self.matrices)

    def of_norm(self, x: Tensor, gain: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """project(rms_norm(x)), [T, in] -> bf16 [T, out], or in the type of `out`."""
        if len(self.activations) == 1:
            (kind,) = self.activations
            if kind == "bf16" and len(self.matrices) == 1:
                return self._project({kind: Activations(x, norm=Norm(gain, eps))}, out)
            return self._project({kind: Activations(*elementwise.rms_norm(x, gain, eps, activations=kind))}, out)
        normed = elementwise.rms_norm(x, gain, eps, activations="bf16").values
        return self._project({kind: ready(normed, kind) for kind in self.activations}, out)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """x += project(y): y bf16 [T, in] into the stream bf16 [T, out]."""
        (matrix,) = self.matrices
        self._add(x, matrix, ready(y, matrix.activations))

    def add_gated_to(self, x: Tensor, gate_up: Tensor) -> None:
        """x += project(silu(gate) * up), gate and up side by side in bf16 [T, 2 * in]."""
        (matrix,) = self.matrices
        self._add(x, matrix, Activations(*elementwise.silu_mul(gate_up, activations=matrix.activations)))

    def _add(self, x: Tensor, matrix: CudaMatrix, y: Activations) -> None:
        if self.after is None:
            products.project(matrix, y, out=x, add=x)
        else:
            x += self.after(products.project(matrix, y))

    def _project(self, inputs: dict[str, Activations], out: Tensor | None) -> Tensor:
        if self.after is not None and out is not None:
            x = next(iter(inputs.values())).values
            own = torch.empty(len(x), self.out_features, dtype=out.dtype, device=x.device)
            return out.copy_(self.after(self._each(inputs, own)))
        result = self._each(inputs, out)
        return result if self.after is None else self.after(result)

    def _each(self, inputs: dict[str, Activations], out: Tensor | None) -> Tensor:
        if len(self.matrices) == 1:
            result = products.project(self.matrices[0], inputs[self.matrices[0].activations], out=out)
        else:
            first = next(iter(inputs.values())).values
            shape = (len(first), self.out_features)
            result = torch.empty(shape, dtype=torch.bfloat16, device=first.device) if out is None else out
            start = 0
            for matrix in self.matrices:
                end = start + matrix.out_features
                products.project(matrix, inputs[matrix.activations], out=result[:, start:end])
                start = end
        return result


class CudaOps:
    """`Ops` in Triton on a CUDA device. See `halve.kernels.ops.Ops` for each operation."""

    name = "cuda"
    batch_invariant = False  # a product of many tokens adds in another order than one of few

    def __init__(self, device: str = "cuda", *, activations: str = "fp32") -> None:
        """Compute on a CUDA device; on `cpu` only under Triton's interpreter, for tests.

        activations: the plan's; what becomes of them: rows.py. Raises ConfigError for others, KernelError when torch
        does not reach the device.
        """
        if activations not in ACTIVATIONS:
            raise ConfigError(f"activations: {activations!r} is not one of {list(ACTIVATIONS)}")
        self.device = cuda_device(device)
        # With a number, as `torch.cuda.set_device` wants it.
        self.torch_device = torch.device(f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device)
        self.activations = activations
        self.kernels: dict[str, str] = {}
        self._reference = TorchOps(device)
        if self.torch_device.type == "cuda":
            torch.cuda.set_device(self.torch_device)  # for operations one by one, in this thread
        self._shared: tuple[CudaMatrix, Tensor, Tensor] | None = None

    def linear(self, weight: Weight | Packed, bias: Array | None = None) -> CudaMatrix:
        """Prepare a matrix [out, in] for `project`."""
        if isinstance(weight, Packed):
            raise KernelError("a matrix packed for other kernels can't run on CUDA; give the weight as stored")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise KernelError(f"bias has shape {bias.shape}; a matrix {weight.shape} needs ({weight.shape[0]},)")
        return pack(weight, self.torch_device, activations=self.activations_of(weight.format), bias=bias)

    def activations_of(self, fmt: Format) -> str:
        """What products with a format are multiplied with: the row that runs them is chosen here, and logged."""
        choice = choose(TABLE, self.device, Spec(op="linear", format=fmt, activations=self.activations))
        key, kernel = f"linear {fmt.name}", choice.kernel.name
        if key not in self.kernels:
            log.info("%s runs on %s; refused: %s", key, kernel, dict(choice.refused) or "none")
            self.kernels[key] = kernel
        return KERNEL_ACTIVATIONS[kernel]

    def fuse(self, linears: Sequence[CudaMatrix]) -> list[Part | CudaMatrix]:
        """Members of one group as parts of one matrix, where they are alike; else as they are."""
        alike = {
            (m.format.name, m.activations, m.group_size, None if m.scale is None else m.scale.dtype) for m in linears
        }
        if len(linears) == 1 or len(alike) > 1:
            return list(linears)
        whole, start = concatenate(linears), 0
        parts: list[Part | CudaMatrix] = []
        for linear in linears:
            parts.append(Part(whole, start, start + linear.out_features))
            start += linear.out_features
        return parts

    def table(self, weight: Weight | Packed) -> Matrix:
        """Prepare an embedding table [vocab, hidden] for `embed`: as stored, integers in one byte each."""
        if isinstance(weight, Packed):
            raise KernelError("a table packed for other kernels can't run on CUDA; give the weight as stored")
        self.kernels[f"embed {weight.format.name}"] = "torch"
        return Matrix(weight, self.torch_device)

    def vector(self, values: Array) -> Tensor:
        """A float32 vector on the device."""
        return self._reference.vector(values)

    def from_host(self, values: Array) -> Tensor:
        """bf16 on the device."""
        return self._reference.vector(values).to(torch.bfloat16)

    def to_host(self, buffer: Tensor) -> Array:
        """A float32 numpy array."""
        return self._reference.to_host(buffer)

    def embed(self, table: Matrix, token_ids: Array) -> Tensor:
        """[T] -> [T, hidden]."""
        return self.embed_on_device(table, self._ints(token_ids))

    def embed_on_device(self, table: Matrix, token_ids: Tensor) -> Tensor:
        """int32 [T] on the device -> [T, hidden], without a copy from the host."""
        if table.scale is None:
            return F.embedding(token_ids, table.codes).to(torch.bfloat16)
        return table.dense(token_ids).to(torch.bfloat16)

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * gain."""
        return elementwise.rms_norm(x, gain, eps, activations="bf16").values

    def project(self, linear: Part | CudaMatrix, x: Tensor) -> Tensor:
        """round(x) @ weight.T + bias. Parts of one matrix that ask in turn for the same x share one product."""
        if isinstance(linear, CudaMatrix):
            return products.project(linear, ready(x, linear.activations))
        if self._shared is None or self._shared[0] is not linear.whole or self._shared[1] is not x:
            self._shared = linear.whole, x, self.project(linear.whole, x)
        result = self._shared[2][:, linear.start : linear.end].contiguous()
        if linear.end == linear.whole.out_features:
            self._shared = None  # the last to ask; x may change afterwards
        return result

    def rope(self, x: Tensor, cos: Array, sin: Array, head_dim: int) -> Tensor:
        """Rotate pairs (i, i + D/2) of each head, in float32."""
        return self._reference.rope(x.float(), cos, sin, head_dim).to(torch.bfloat16)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: TokenBatch,
        spec: AttentionSpec,
        cache: CudaCache | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal softmax attention over whole sequences or a paged cache; fp32 caches are kept in bf16."""
        spec = kept(spec)
        lengths = batch.positions[batch.cu_seqlens[1:] - 1] + 1
        slots, tables = batch.slot_mapping, batch.block_tables
        if cache is None:
            blocks = -(-lengths // OWN_BLOCK)
            cache = CudaCache(int(blocks.sum()), OWN_BLOCK, spec, self.torch_device)
            first = np.cumsum(blocks) - blocks
            tables = np.minimum(first[:, None] + np.arange(blocks.max()), blocks.sum() - 1)
            slots = np.repeat(first, np.diff(batch.cu_seqlens)) * OWN_BLOCK + batch.positions
        positions, slots_, tables_, cu, lengths_ = (
            self._ints(a) for a in (batch.positions, slots, tables, batch.cu_seqlens, lengths)
        )
        qkv = torch.cat((q, k, v), dim=1)
        turned = attention.rope_and_write(qkv, cache, positions, slots_, None, spec)
        return attention.prefill(turned, cache, tables_, cu, lengths_, spec, sinks=sinks)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return (F.silu(gate.float()) * up.float()).to(torch.bfloat16)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return x + y

    def take_rows(self, x: Tensor, rows: Array) -> Tensor:
        """x[rows]."""
        return x.index_select(0, self._ints(rows))

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """A token for every row."""
        return self.choose(logits.float(), batch)[1]()

    def choose(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Callable[[], Sampled]]:
        """Tokens int32 [R] on the device, and what waits for them and tells all of `Sampled`.

        logits: float32 [R, vocab], read before this returns or by what it launched.
        """
        if batch.plain_greedy:
            ids, told = elementwise.argmax(logits), []
            arrival = Arrival([ids])
        else:
            found = sampling.sample(logits, batch)
            ids = torch.where(found.status == 0, found.token_ids, -1 - found.status)
            told = [t for t in (found.logprobs, found.top_ids, found.top_logprobs) if t is not None]
            arrival = Arrival([ids, *told])

        def finish() -> Sampled:
            sampled, (here, *others) = unsampled(batch, logits.shape[1]), arrival.wait()
            if (here < 0).any():
                row = int(np.flatnonzero(here < 0)[0])
                raise broken(row, int(-1 - here[row]))
            return Sampled(here, *others) if told else replace(sampled, token_ids=here)

        return ids, finish

    def on_device(self) -> AbstractContextManager[Any]:
        """Make this device the current one of the thread: Triton launches there."""
        return torch.cuda.device(self.torch_device) if self.torch_device.type == "cuda" else nullcontext()

    def spare_bytes(self) -> int:
        """Free memory of the card, less a tenth of it and what a step of many tokens takes."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return max(0, int(0.9 * free) - STEP_BYTES)

    def kv_cache(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> CudaCache:
        """Blocks of keys and values in the spec's format, zero; bf16 for fp32."""
        return CudaCache(num_blocks, block_size, kept(spec), self.torch_device)

    def copy_blocks(self, cache: CudaCache, pairs: Array) -> None:
        """Copy whole blocks."""
        cache.copy_blocks(self._ints(pairs).long())

    def _ints(self, values: Any) -> Tensor:
        here = torch.from_numpy(np.ascontiguousarray(values, np.int32))
        if self.torch_device.type == "cuda":
            here = here.pin_memory()  # from other memory a copy would wait for the device
        return here.to(self.torch_device, non_blocking=True)


def kept(spec: AttentionSpec) -> AttentionSpec:
    """The attention that runs here: a cache of fp32 is kept in bf16, as queries, keys and values come."""
    if spec.chunk is not None:
        raise KernelError(f"attention in chunks of {spec.chunk} is not computed on CUDA; run on the CPU, or on torch")
    return replace(spec, kv_format="bf16") if spec.kv_format == "fp32" else spec


def ready(x: Tensor, activations: str) -> Activations:
    """bf16 rows [T, K] as a product takes them."""
    return Activations(x) if activations == "bf16" else Activations(*elementwise.quantize(x, activations))
