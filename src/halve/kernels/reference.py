"""The definition of every operation, in torch: any device torch reaches, differentiable, plain rather than fast.

Compressed weights stay compressed in memory and are widened for each product, so a model costs its stored bytes
(sub-8-bit integers: one byte a weight) plus one float32 matrix at a time.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from halve.core.errors import ConfigError, KernelError
from halve.formats import Weight
from halve.formats.activations import LARGEST_FP8, SMALLEST_ABSMAX, activations_for
from halve.formats.base import BF16, FP8
from halve.hardware import Device, detect_cpu
from halve.kernels.dispatch import Kernel, Spec, choose
from halve.kernels.ops import KV_GROUP, Array, AttentionSpec, Packed, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch, sample

SMALLEST_SCALE = 2.0**-126  # of int8: the smallest normal float; one below it is 0


def round_kv_int8(x: Tensor) -> Tensor:
    """Keys or values in int8: round float32 [..., D] with one bf16 scale for each D, and widen it again.

    scale = absmax / 127 rounded to bf16, 0 below 2^-126; code = x / scale to nearest even. Error of an element: at most
    scale / 2, and absmax where the scale is 0.
    """
    scale = (x.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16).to(torch.float32)
    scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
    codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
    return codes * scale


def hadamard(x: Tensor) -> Tensor:
    """Rotate float32 [..., D] by the orthonormal Walsh-Hadamard matrix; it is its own inverse.

    Where D is no power of two, runs of the largest that divides it are rotated, each for itself. Sums are taken stage
    by stage, as the C++ takes them, so that both round the same numbers. Source: arXiv:2404.00456.
    """
    size = x.shape[-1] & -x.shape[-1]
    apart = 1
    while apart < size:
        first, second = x.reshape(*x.shape[:-1], -1, 2, apart).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).reshape(x.shape)
        apart *= 2
    return x * torch.tensor(1 / math.sqrt(size), dtype=torch.float32, device=x.device)


def round_kv_int4(x: Tensor) -> Tensor:
    """Values in int4: round float32 [..., D] with one bf16 scale for each KV_GROUP of D, and widen it again.

    scale = m / -8 rounded to bf16, m the number of largest magnitude (of both signs, the positive one), 0 below 2^-126
    in magnitude; code = x / scale to nearest even, within -8..7. So m keeps its size and all 16 codes are used. Error
    of an element: at most half the scale, a whole one where it has the other sign and m's magnitude, and |m| where the
    scale is 0.
    """
    groups = []
    for start in range(0, x.shape[-1], KV_GROUP):
        group = x[..., start : start + KV_GROUP]  # the last may be shorter
        high, low = group.amax(-1, keepdim=True), group.amin(-1, keepdim=True)
        scale = (torch.where(high >= -low, high, low) / -8).to(torch.bfloat16).to(torch.float32)
        scale = torch.where(scale.abs() < SMALLEST_SCALE, 0.0, scale)
        codes = (group / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
        groups.append(codes * scale)
    return torch.cat(groups, dim=-1)


def round_keys_int4(x: Tensor) -> Tensor:
    """Keys in int4: rotated by `hadamard`, rounded as values are, and rotated back.

    The rotation spreads a dim that is large in every key over all dims, where it costs no scale. Kernels keep keys
    rotated and rotate queries instead, which leaves every score as it is. Source: arXiv:2404.00456.
    """
    return hadamard(round_kv_int4(hadamard(x)))


def round_rows_int8(x: Tensor) -> Tensor:
    """Activations in int8: round float32 rows [T, K] with one float32 scale each, and widen them again.

    The same bits as codes * scale of `halve.formats.activations.int8_rows`, which says what becomes of zeros, NaN and
    infinity. The gradient goes straight through, as it does through bf16. Source: arXiv:1308.3432.
    """
    return _round_rows(x, 127, torch.round)


def round_rows_fp8(x: Tensor) -> Tensor:
    """The same in fp8: the bits of codes * scale of `halve.formats.activations.fp8_rows`."""
    return _round_rows(x, float(LARGEST_FP8), round_fp8)


def _round_rows(x: Tensor, largest: float, to_code: Callable[[Tensor], Tensor]) -> Tensor:
    absmax = x.abs().amax(-1, keepdim=True)
    levels = torch.full_like(absmax, largest)  # a tensor: by a plain number torch divides by way of a reciprocal
    broken = ~x.isfinite().all(-1, keepdim=True)
    some = ~broken & (absmax >= float(SMALLEST_ABSMAX))
    inverse = torch.where(some, levels / absmax, 0.0)
    scale = torch.where(some, absmax / levels, 0.0).masked_fill(broken, math.nan)
    rounded = to_code(torch.where(some, x, 0.0) * inverse) * scale
    return rounded.detach() + (x - x.detach()) if x.requires_grad else rounded


def round_fp8(x: Tensor) -> Tensor:
    """Round float32 to e4m3, to nearest even, and widen it again; beyond 448 it becomes 448."""
    largest = float(LARGEST_FP8)
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).to(torch.float32)


def round_bf16(x: Tensor) -> Tensor:
    """Round float32 to bf16, to nearest even, and widen it again."""
    return x.to(torch.bfloat16).to(torch.float32)


Rounding = Callable[[Tensor], Tensor]
ROUND_INPUT: Mapping[str, Rounding] = {
    "fp32": lambda x: x,
    "bf16": round_bf16,
    "int8": round_rows_int8,
    "fp8": round_rows_fp8,
}
ROUND_KV: Mapping[str, Rounding] = {
    "fp32": lambda x: x,
    "bf16": round_bf16,
    "int8": round_kv_int8,
    "int4": round_kv_int4,
    "fp8": round_fp8,
}
ROUND_KEYS: Mapping[str, Rounding] = {**ROUND_KV, "int4": round_keys_int4}
# What a format of one byte or less stands for, exactly.
STORED = {name: torch.bfloat16 if name in ("bf16", "fp8") else torch.float32 for name in ROUND_KV}
DENSE_VALUES = 1 << 26  # of a matrix that are widened at once for a product: a head of many tokens has more
QUERY_CHUNK = 256  # queries whose scores are held at once where torch's fused attention does not apply


def to_torch(values: Array, device: torch.device) -> Tensor:
    """Copy a stored array to a torch tensor of the same element type (bf16 and fp8 included)."""
    owned = np.array(values, order="C")  # a copy: tensors outlive memory maps, and torch wants writable memory
    if owned.dtype == BF16:
        return torch.from_numpy(owned.view(np.uint16)).view(torch.bfloat16).to(device)
    if owned.dtype == FP8:
        return torch.from_numpy(owned.view(np.uint8)).view(torch.float8_e4m3fn).to(device)
    return torch.from_numpy(owned).to(device)


class Matrix:
    """A stored matrix on the device; `dense` gives its float32 values. Source: `Weight.dequantize`.

    round_input: what becomes of a product's input.
    """

    def __init__(
        self,
        weight: Weight,
        device: torch.device,
        bias: Tensor | None = None,
        *,
        widened: bool = False,
        activations: str = "fp32",
    ) -> None:
        self.codes = to_torch(weight.unpacked_codes(), device)
        self.scale = None if weight.scale is None else to_torch(weight.scale, device).float()
        self.bias = bias
        self.round_input = ROUND_INPUT[activations]
        if widened:
            self.codes, self.scale = self.dense(), None

    def dense(self, rows: Tensor | slice | None = None) -> Tensor:
        """Float32 [out, in], or those rows."""
        codes = self.codes if rows is None else self.codes[rows]
        values = codes.to(torch.float32)  # no copy where it is float32 already
        if self.scale is None:
            return values
        scale = self.scale if rows is None else self.scale[rows]
        groups = scale.shape[-1]
        return (values.view(*values.shape[:-1], groups, -1) * scale[..., None]).view(values.shape)


def _project(matrix: Matrix, x: Tensor) -> Tensor:
    x, (outputs, width) = matrix.round_input(x), matrix.codes.shape[-2:]
    at_once = max(1, DENSE_VALUES // width)
    if outputs <= at_once or (matrix.scale is None and matrix.codes.dtype == torch.float32):
        return F.linear(x, matrix.dense(), matrix.bias)
    parts = [F.linear(x, matrix.dense(slice(i, i + at_once))) for i in range(0, outputs, at_once)]
    product = torch.cat(parts, dim=-1)
    return product if matrix.bias is None else product + matrix.bias


def _embed(matrix: Matrix, token_ids: Tensor) -> Tensor:
    return matrix.dense(token_ids)


def _never(device: Device, spec: Spec) -> str | None:
    return None


TABLE = [
    Kernel(name="torch_reference", op="linear", refusal=_never, run=_project, prepare=Matrix),
    Kernel(name="torch_reference", op="embed", refusal=_never, run=_embed, prepare=Matrix),
]


def torch_device(name: str) -> Device:
    """Describe a torch device. Raises KernelError when torch does not reach it."""
    device = torch.device(name)
    if device.type == "cpu":
        return detect_cpu()
    module = torch.get_device_module(device.type)
    if not module.is_available():
        raise KernelError(f"device {name!r}: torch {torch.__version__} reaches no {device.type} device here; use cpu")
    properties = module.get_device_properties(device) if hasattr(module, "get_device_properties") else None
    return Device(
        name=name,
        kind=device.type,
        model=getattr(properties, "name", device.type),
        features=frozenset(),
        num_cores=getattr(properties, "multi_processor_count", 0),
        memory_bytes=getattr(properties, "total_memory", 0),
        machine=device.type,
    )


class TorchOps:
    """`Ops` on a torch device; buffers are float32 tensors. See `halve.kernels.ops.Ops` for each operation."""

    name = "torch"
    batch_invariant = False  # its matrix products choose another order of summing for another number of rows

    def __init__(self, device: str = "cpu", *, activations: str = "fp32", widened: bool = False) -> None:
        """Compute on a torch device.

        activations: format that the input of every projection is rounded to (`halve.core.plan.Activations`).
        widened: keep weights in float32, which spares the work of widening them for each product and costs four bytes
        a weight. Raises KernelError when torch does not reach the device, ConfigError for other activations.
        """
        if activations not in ROUND_INPUT:
            raise ConfigError(f"activations: {activations!r} is not one of {list(ROUND_INPUT)}")
        self.device = torch_device(device)
        self.torch_device = torch.device(device)
        self.activations = activations
        self.widened = widened
        self.kernels: dict[str, str] = {}

    def linear(self, weight: Weight | Packed, bias: Array | None = None) -> tuple[Kernel, Matrix]:
        """Prepare a matrix [out, in] for `project`."""
        return self._prepare("linear", weight, None if bias is None else self.vector(bias))

    def table(self, weight: Weight | Packed) -> tuple[Kernel, Matrix]:
        """Prepare an embedding table [vocab, hidden] for `embed`."""
        return self._prepare("embed", weight)

    def _prepare(self, op: str, weight: Weight | Packed, bias: Tensor | None = None) -> tuple[Kernel, Matrix]:
        if isinstance(weight, Packed):
            raise KernelError("a matrix packed for other kernels can't run on torch; give the weight as stored")
        activations = activations_for(weight.format, self.activations)
        kernel = choose(TABLE, self.device, Spec(op=op, format=weight.format, activations=activations)).kernel
        self.kernels[f"{op} {weight.format.name}"] = kernel.name
        assert kernel.prepare is not None
        return kernel, kernel.prepare(weight, self.torch_device, bias, widened=self.widened, activations=activations)

    def vector(self, values: Array) -> Tensor:
        """A float vector on the device."""
        return to_torch(np.asarray(values, np.float32), self.torch_device)

    from_host = vector

    def to_host(self, buffer: Tensor) -> Array:
        """A float32 numpy array."""
        return buffer.detach().float().cpu().numpy()

    def embed(self, table: tuple[Kernel, Matrix], token_ids: Array) -> Tensor:
        """[T] -> [T, hidden]."""
        kernel, matrix = table
        return kernel.run(matrix, self._index(token_ids))  # type: ignore[no-any-return]

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * gain."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain

    def project(self, linear: tuple[Kernel, Matrix], x: Tensor) -> Tensor:
        """round(x) @ weight.T + bias."""
        kernel, matrix = linear
        return kernel.run(matrix, x)  # type: ignore[no-any-return]

    def rope(self, x: Tensor, cos: Array, sin: Array, head_dim: int) -> Tensor:
        """Rotate pairs (i, i + D/2) of each head."""
        heads_THD = x.view(len(x), -1, head_dim)
        first, second = heads_THD.chunk(2, dim=-1)
        cos_T1C, sin_T1C = self.vector(cos)[:, None, :], self.vector(sin)[:, None, :]
        turned = torch.cat((first * cos_T1C - second * sin_T1C, second * cos_T1C + first * sin_T1C), dim=-1)
        return turned.reshape(x.shape)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: TokenBatch,
        spec: AttentionSpec,
        cache: tuple[Tensor, Tensor] | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal softmax attention over whole sequences or a paged cache."""
        q_THD = q.view(len(q), spec.num_heads, spec.head_dim)
        k_TGD = ROUND_KEYS[spec.kv_format](k.view(len(k), spec.num_kv_heads, spec.head_dim))
        v_TGD = ROUND_KV[spec.kv_format](v.view(len(v), spec.num_kv_heads, spec.head_dim))
        if cache is not None:
            slots = self._index(batch.slot_mapping)
            for stored, new in zip(cache, (k_TGD, v_TGD), strict=True):
                stored.view(-1, spec.num_kv_heads, spec.head_dim)[slots] = new.detach().to(stored.dtype)
        outputs = []
        for s in range(batch.num_sequences):
            start, end = int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1])
            keys, values = k_TGD[start:end], v_TGD[start:end]
            if cache is not None:
                keys, values = self._gather(cache, batch, s, int(batch.positions[end - 1]) + 1, spec)
            outputs.append(_attend(q_THD[start:end], keys, values, spec, sinks))
        return torch.cat(outputs).reshape(q.shape)

    def _gather(
        self, cache: tuple[Tensor, Tensor], batch: TokenBatch, s: int, length: int, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        assert batch.block_tables is not None
        block_size = cache[0].shape[1]
        blocks = self._index(batch.block_tables[s, : math.ceil(length / block_size)])
        shape = (-1, spec.num_kv_heads, spec.head_dim)
        keys, values = (stored[blocks].view(shape)[:length].float() for stored in cache)
        return keys, values

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return F.silu(gate) * up

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return x + y

    def take_rows(self, x: Tensor, rows: Array) -> Tensor:
        """x[rows]."""
        return x[self._index(rows)]

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """A token for every row, by the definition, on the host."""
        return sample(self.to_host(logits), batch)

    def kv_cache(self, num_blocks: int, block_size: int, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Keys and values [B, P, G, D] in the spec's format."""
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        keys, values = (torch.zeros(shape, dtype=STORED[spec.kv_format], device=self.torch_device) for _ in "kv")
        return keys, values

    def copy_blocks(self, cache: tuple[Tensor, Tensor], pairs: Array) -> None:
        """Copy whole blocks."""
        for stored in cache:
            stored[self._index(pairs[:, 1])] = stored[self._index(pairs[:, 0])]

    def _index(self, values: Array | None) -> Tensor:
        assert values is not None, "a batch over a cache has slot_mapping and block_tables"
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.torch_device)


def _attend(q_NHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """One sequence: the last N of M positions ask, [N, H, D] over [M, G, D] -> [N, H, D]."""
    repeat = spec.num_heads // spec.num_kv_heads
    k_HMD = k_MGD.transpose(0, 1).repeat_interleave(repeat, dim=0)
    v_HMD = v_MGD.transpose(0, 1).repeat_interleave(repeat, dim=0)
    q_HND = q_NHD.transpose(0, 1)
    n, m = q_HND.shape[1], k_HMD.shape[1]
    if sinks is None and spec.window is None and spec.chunk is None and n == m:
        fused = F.scaled_dot_product_attention(q_HND[None], k_HMD[None], v_HMD[None], is_causal=True)
        return fused[0].transpose(0, 1)
    parts = []
    key_position = torch.arange(m, device=q_NHD.device)
    for start in range(0, n, QUERY_CHUNK):
        own = torch.arange(m - n + start, m - n + min(start + QUERY_CHUNK, n), device=q_NHD.device)
        seen = key_position[None, :] <= own[:, None]
        if spec.window is not None:
            seen &= key_position[None, :] > own[:, None] - spec.window
        if spec.chunk is not None:
            seen &= key_position[None, :] >= (own[:, None] // spec.chunk) * spec.chunk
        scores = q_HND[:, start : start + QUERY_CHUNK] @ k_HMD.transpose(1, 2) / math.sqrt(spec.head_dim)
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            sink = sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
            probabilities = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            probabilities = scores.softmax(-1)
        parts.append(probabilities @ v_HMD)
    return torch.cat(parts, dim=1).transpose(0, 1)


def format_report(device: Device) -> list[dict[str, Any]]:
    """For every format, the row of this table that runs its products on `device` (for `halve doctor`)."""
    from halve.formats import FORMATS

    report = []
    for fmt in FORMATS.values():
        choice = choose(TABLE, device, Spec(op="linear", format=fmt))
        report.append({"op": "linear", "format": fmt.name, "kernel": choice.kernel.name, "refused": []})
    return report
