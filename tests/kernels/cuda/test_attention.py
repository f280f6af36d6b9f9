"""Attention on CUDA against float64 over what the cache holds; without a device by Triton's interpreter."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from halve.core.errors import KernelError
from halve.kernels.cuda import attention
from halve.kernels.cuda.cache import CudaCache, cache_block_bytes
from halve.kernels.ops import AttentionSpec
from halve.kernels.reference import round_kv_int8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["bf16", "fp8", "int8"]


def spec_of(heads=4, kv_heads=2, head_dim=64, window=None, kv_format="bf16"):
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, window=window, kv_format=kv_format)


def rounded(x, kv_format):
    """Keys or values float32 [T, G, D] as the cache holds them, float64."""
    if kv_format == "int8":
        return round_kv_int8(x).double()
    if kv_format == "fp8":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).double()
    return x.to(torch.bfloat16).double()


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def store(cache, k, v, slots):
    """Write keys and values float32 [T, G, D] to the memory of a cache as its file says that they lie."""
    P = cache.block_size
    for x, into, scales in ((k, cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        codes = x
        if cache.kv_format == "int8":
            scale = (x.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16).float()
            codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
            for t, slot in enumerate(slots):
                scales[slot // P, :, slot % P] = scale[t, :, 0].to(torch.bfloat16)
        codes = codes.clamp(-448, 448) if cache.kv_format == "fp8" else codes
        stored = codes.to(into.dtype)
        bits, new = (into.view(torch.uint8), stored.view(torch.uint8)) if into.itemsize == 1 else (into, stored)
        for t, slot in enumerate(slots):
            if into is cache.values and cache.kv_format != "bf16":
                bits[slot // P, :, :, slot % P] = new[t]
            else:
                bits[slot // P, :, slot % P] = new[t]


class Scene:
    """Sequences of given lengths, their last `asked` tokens new, all in a cache over shuffled blocks."""

    def __init__(self, spec, lengths, asked=None, *, block_size=16, seed=0, spread=1.0):
        rng = np.random.default_rng(seed)
        self.spec, self.lengths, self.asked = spec, lengths, asked or [1] * len(lengths)
        widest = max(1, *(math.ceil(n / block_size) for n in lengths))
        num_blocks = len(lengths) * widest + 1
        order = rng.permutation(num_blocks)[: len(lengths) * widest].reshape(len(lengths), widest).astype(np.int32)
        cache = CudaCache(num_blocks, block_size, spec, "cpu")
        for tensor in cache.tensors:  # a block's former owner may have left NaN
            tensor.view(torch.uint8).fill_(0x7F if spec.kv_format == "fp8" else 0xFF)
        self.keys, self.values = [], []
        for s, n in enumerate(lengths):
            k, v = (
                torch.from_numpy(rng.standard_normal((n, spec.num_kv_heads, spec.head_dim)) * spread).float()
                for _ in "kv"
            )
            store(cache, k, v, [int(order[s, i // block_size]) * block_size + i % block_size for i in range(n)])
            self.keys.append(rounded(k, spec.kv_format))
            self.values.append(rounded(v, spec.kv_format))
            order[s, math.ceil(n / block_size) :] = -1
            if spec.window is not None:  # an engine may give blocks back that nobody sees
                order[s, : max(0, n - self.asked[s] + 1 - spec.window) // block_size] = -1
        self.tables = torch.from_numpy(order).to(DEVICE)
        self.cache = CudaCache(num_blocks, block_size, spec, DEVICE)
        for to, source in zip(self.cache.tensors, cache.tensors, strict=True):
            to.view(torch.uint8).copy_(source.view(torch.uint8))
        q = rng.standard_normal((sum(self.asked), spec.num_heads * spec.head_dim)) * spread
        self.q = torch.from_numpy(q).to(torch.bfloat16).to(DEVICE)

    def expected(self, sinks=None):
        """Float64 [T, H * D], and the largest value of each row's head, which bounds what rounding does."""
        outs, start = [], 0
        spec = self.spec
        group = spec.num_heads // spec.num_kv_heads
        for n, asked, k, v in zip(self.lengths, self.asked, self.keys, self.values, strict=True):
            q = self.q[start : start + asked].cpu().double().view(asked, spec.num_heads, spec.head_dim)
            start += asked
            scores = torch.einsum("ahd,nhd->han", q, k.repeat_interleave(group, 1)) / math.sqrt(spec.head_dim)
            own = torch.arange(n - asked, n)[:, None]
            key = torch.arange(n)[None, :]
            seen = key <= own
            if spec.window is not None:
                seen &= key > own - spec.window
            scores = scores.masked_fill(~seen, -math.inf)
            if sinks is not None:
                sink = sinks.cpu().double().view(-1, 1, 1).expand(-1, asked, 1)
                p = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
            else:
                p = scores.softmax(-1)
            outs.append(
                torch.einsum("han,nhd->ahd", p, v.repeat_interleave(group, 1)).reshape(
                    asked, spec.num_heads * spec.head_dim
                )
            )
        return torch.cat(outs) if outs else torch.empty(0)

    def tolerance(self):
        """Probabilities and the result are rounded to bf16, each by at most 2^-8 of the largest value; float32
        scores of size 20 and exp2 add less than 2^-16."""
        largest = max(float(v.abs().max()) for v in self.values if v.numel())
        return (2.0**-8 + 2.0**-8 + 2.0**-16) * largest


def decoded(scene, sinks=None, **options):
    out = attention.decode(scene.q, scene.cache, scene.tables, ints(scene.lengths), scene.spec, sinks=sinks, **options)
    return out.cpu().double()


def prefilled(scene, sinks=None, **options):
    offsets = ints([0, *np.cumsum(scene.asked).tolist()])
    out = attention.prefill(
        scene.q, scene.cache, scene.tables, offsets, ints(scene.lengths), scene.spec, sinks=sinks, **options
    )
    return out.cpu().double()


def agree(found, scene, sinks=None):
    error = (found - scene.expected(sinks)).abs().max()
    assert error <= scene.tolerance()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 80), (4, 1, 96), (8, 1, 128)])
def test_decode_agrees_with_float64_for_every_group_and_head_size(kv_format, heads, kv_heads, head_dim):
    scene = Scene(spec_of(heads, kv_heads, head_dim, kv_format=kv_format), [1, 129, 0, 200])
    scene.asked = [1, 1, 0, 1]
    q, scene.q = scene.q, scene.q[[0, 1, 3]]
    expected = scene.expected()
    scene.q = q
    found = decoded(scene)
    assert not found[2].any()
    assert (found[[0, 1, 3]] - expected).abs().max() <= scene.tolerance()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window", [1, 40])
def test_decode_sees_its_window_alone_and_sinks_take_their_share(kv_format, window):
    scene = Scene(spec_of(4, 2, 64, window, kv_format), [1, 65, 200], seed=1)
    sinks = torch.linspace(-2, 3, 4, device=DEVICE)
    agree(decoded(scene, sinks), scene, sinks)


def test_decode_of_whole_sequences_has_nothing_to_join():
    scene = Scene(spec_of(6, 2, 64), [1, 200, 70], seed=2, block_size=64)
    sinks = torch.linspace(-2, 3, 6, device=DEVICE)
    whole = attention.decode_scratch(3, scene.spec, DEVICE, 1)
    agree(decoded(scene, scratch=whole), scene)
    agree(decoded(scene, sinks, scratch=whole), scene, sinks)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_the_last_part_of_a_sequence_joins_all_and_leaves_its_counter_at_zero(kv_format):
    scene = Scene(spec_of(6, 2, 64, kv_format=kv_format), [1, 2500, 700], seed=2, block_size=64)
    sinks = torch.linspace(-2, 3, 6, device=DEVICE)
    parts = attention.decode_scratch(3, scene.spec, DEVICE, 5)
    for _ in range(2):
        agree(decoded(scene, scratch=parts), scene)
        agree(decoded(scene, sinks, scratch=parts), scene, sinks)
        assert not parts.counters.any()


def test_decode_cuts_sequences_until_the_device_is_full_and_no_further(monkeypatch):
    monkeypatch.setattr(attention, "_num_sms", lambda device: 132)
    wanted = {1: 33, 2: 16, 8: 4, 16: 2, 17: 1, 32: 1, 1024: 1}
    assert {n: attention.num_splits(n, spec_of(32, 8), torch.device("cuda")) for n in wanted} == wanted


def test_decode_of_padding_leaves_zeros_in_one_part_and_in_several():
    scene = Scene(spec_of(2, 1, 64), [0, 3], [1, 1])
    sinks = torch.zeros(2, device=DEVICE)
    for scratch in (attention.decode_scratch(2, scene.spec, DEVICE, n) for n in (1, 3)):
        assert not decoded(scene, scratch=scratch)[0].any()
        assert not decoded(scene, sinks, scratch=scratch)[0].any()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (3, 1, 80), (4, 1, 128)])
def test_prefill_mixes_chunks_and_single_tokens(kv_format, heads, kv_heads, head_dim):
    lengths, asked = [1, 100, 70], [1, 99, 1]
    scene = Scene(spec_of(heads, kv_heads, head_dim, kv_format=kv_format), lengths, asked, seed=3)
    agree(prefilled(scene), scene)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window", [1, 50])
def test_prefill_sees_windows_and_sinks(kv_format, window):
    scene = Scene(spec_of(4, 2, 64, window, kv_format), [150, 1, 90], [80, 1, 3], seed=4)
    sinks = torch.linspace(-2, 3, 4, device=DEVICE)
    agree(prefilled(scene, sinks), scene, sinks)


def test_prefill_skips_sequences_without_rows_and_leaves_padding_alone():
    scene = Scene(spec_of(2, 1, 64), [20, 33, 40], [3, 0, 40], seed=5)
    padded = torch.cat((scene.q, scene.q[:5]))
    out = torch.full_like(padded, 7.0)
    cu_seqlens, seq_lens = ints([0, 3, 3, 43]), ints(scene.lengths)
    attention.prefill(padded, scene.cache, scene.tables, cu_seqlens, seq_lens, scene.spec, out=out)
    agree(out[:43].cpu().double(), scene)
    assert (out[43:] == 7).all()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_scores_of_hundreds_stay_finite(kv_format):
    scene = Scene(spec_of(2, 1, 64, kv_format=kv_format), [90], [90], seed=6, spread=20.0)
    assert prefilled(scene).isfinite().all()
    scene = Scene(spec_of(2, 1, 64, kv_format=kv_format), [90], seed=6, spread=20.0)
    assert decoded(scene).isfinite().all()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("head_dim", [80, 128])
def test_keys_turn_and_go_where_they_belong(kv_format, head_dim):
    spec = spec_of(3, 1, head_dim, kv_format=kv_format)
    num_tokens, block_size = 5, 16
    wide = torch.from_numpy(np.random.default_rng(7).standard_normal((num_tokens, 6 * head_dim))).to(torch.bfloat16)
    qkv = wide[:, : 5 * head_dim]  # rows at a stride
    positions, slots = [0, 5, 3, 9, 2], [17, 40, -1, 3, 31]
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(10, dtype=torch.float32)[:, None] * frequency
    table = torch.cat((angles.cos(), angles.sin()), -1)
    x = qkv.float().view(num_tokens, 5, head_dim)
    cos, sin = angles.cos()[positions][:, None], angles.sin()[positions][:, None]
    first, second = x[:, :4].chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    cache, expected = (CudaCache(3, block_size, spec, device) for device in (DEVICE, "cpu"))
    q = attention.rope_and_write(wide.to(DEVICE)[:, : 5 * head_dim], cache, ints(positions), ints(slots),
                                 table.to(DEVICE), spec)  # fmt: skip
    assert torch.equal(q.cpu().view(num_tokens, 3, head_dim), turned[:, :3].to(torch.bfloat16))
    written = [t for t, slot in enumerate(slots) if slot >= 0]
    store(expected, turned[written, 3:], x[written, 4:], [slots[t] for t in written])
    if kv_format != "fp8":
        for found, right in zip(cache.tensors, expected.tensors, strict=True):
            assert torch.equal(found.cpu().view(torch.uint8), right.view(torch.uint8))
        return
    shape = {"block_size": block_size, "kv_format": "fp8", "key_scales": None, "value_scales": None}
    exact = SimpleNamespace(keys=torch.zeros(cache.keys.shape), values=torch.zeros(cache.values.shape), **shape)
    store(exact, turned[written, 3:], x[written, 4:], [slots[t] for t in written])
    for name in ("keys", "values"):
        agree_in_fp8(getattr(cache, name).cpu(), getattr(expected, name), getattr(exact, name))


def agree_in_fp8(found, right, exact):
    """The same bits, or neighbours where a value lies between them within what two roundings to float32 move it.

    Where a tie goes is up to the host, too: not every torch rounds to the even one.
    """
    bits = [t.view(torch.uint8).to(torch.int16) for t in (found, right)]
    apart = bits[0] != bits[1]
    assert int((bits[0] - bits[1]).abs().max()) <= 1
    value, middle = exact[apart].double(), (found.float().double()[apart] + right.float().double()[apart]) / 2
    assert ((value - middle).abs() <= value.abs() * 2.0**-22).all(), (value, middle)


def test_without_a_table_nothing_turns_and_tiny_keys_of_int8_are_zeros():
    spec = spec_of(1, 1, 64, kv_format="int8")
    qkv = torch.randn(2, 3 * 64, generator=torch.Generator().manual_seed(0))
    qkv[1, 64:] *= 1e-37
    cache = CudaCache(1, 16, spec, DEVICE)
    out = torch.empty(2, 64, dtype=torch.bfloat16, device=DEVICE)
    q = attention.rope_and_write(qkv.to(DEVICE), cache, ints([9, 9]), ints([0, 1]), None, spec, out)
    assert q is out
    assert torch.equal(q.cpu(), qkv[:, :64].to(torch.bfloat16))
    assert int(cache.keys[0, 0, 0].abs().max()) == 127
    assert not cache.key_scales[0, 0, 1:].any()


def test_blocks_are_copied_whole():
    cache = CudaCache(4, 16, spec_of(kv_format="int8"), DEVICE)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).random_(generator=torch.Generator(DEVICE).manual_seed(0))
    before = [tensor.view(torch.uint8).clone() for tensor in cache.tensors]
    cache.copy_blocks(torch.tensor([[0, 3], [2, 1]], device=DEVICE))
    for tensor, old in zip(cache.tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), old[[0, 2, 2, 0]])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_cache_knows_its_bytes(kv_format):
    spec = spec_of(kv_format=kv_format)
    assert CudaCache(5, 32, spec, "cpu").nbytes == 5 * cache_block_bytes(spec, 32)


def test_what_has_no_kernels_or_does_not_fit_is_refused():
    with pytest.raises(KernelError, match="kv_format: 'fp32' has no CUDA kernels"):
        CudaCache(1, 16, spec_of(kv_format="fp32"), DEVICE)
    with pytest.raises(KernelError, match="block_size: 24 must be a power of two"):
        CudaCache(1, 24, spec_of(), DEVICE)
    spec = spec_of(2, 1, 64)
    cache = CudaCache(1, 16, spec, DEVICE)
    wrong = torch.zeros(1, 100, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(KernelError, match=r"qkv: \(1, 100\) is not \[T, 4 heads \* 64\]"):
        attention.rope_and_write(wrong, cache, ints([0]), ints([0]), None, spec)
    with pytest.raises(KernelError, match=r"q: torch.bfloat16 \(1, 100\) is not bf16 \[T, 2 heads \* 64\]"):
        attention.decode(wrong, cache, ints([[0]]), ints([1]), spec)
    q = torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(KernelError, match="cache: holds bf16, the layer wants fp8"):
        attention.decode(q, cache, ints([[0]]), ints([1]), spec_of(2, 1, 64, kv_format="fp8"))


def test_no_tokens_are_no_work():
    spec = spec_of(2, 1, 64)
    cache = CudaCache(1, 16, spec, DEVICE)
    q = torch.empty(0, 128, dtype=torch.bfloat16, device=DEVICE)
    none, tables = ints([]), torch.empty(0, 1, dtype=torch.int32, device=DEVICE)
    assert attention.decode(q, cache, tables, none, spec).shape == (0, 128)
    assert attention.prefill(q, cache, tables, ints([0]), none, spec).shape == (0, 128)
    qkv = torch.empty(0, 256, dtype=torch.bfloat16, device=DEVICE)
    assert attention.rope_and_write(qkv, cache, none, none, None, spec).shape == (0, 128)
