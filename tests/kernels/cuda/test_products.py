import importlib.util
from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from halve.core.errors import KernelError
from halve.formats import FORMATS, Weight, pack_codes
from halve.hardware import Device
from halve.kernels.cuda import libraries
from halve.kernels.cuda.configs import Config
from halve.kernels.cuda.launching import launch, launch_persistent, splits_of
from halve.kernels.cuda.packing import activations_refusal, concatenate, pack, pack_fp8
from halve.kernels.cuda.product_rows import TABLE, cuda_device, cuts, runnable
from halve.kernels.cuda.products import Activations, grouped_project, project
from halve.kernels.cuda.workspace import workspace
from halve.kernels.dispatch import Spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPRESSED = [name for name, fmt in FORMATS.items() if fmt.scaled]
UNIT_OF_PLANES = 2.0**-13  # tokens are rounded to a 16256th of their group's largest
UNIT_OF_FEW = 2.0**-20  # tensor cores cut bits off where a code's offset cancels
BF16 = 2.0**-8  # a rounding to bf16 changes a value by half of this, at most


def make_weight(name, shape, seed=0, spread=1.0):
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    if fmt.kind == "int":
        half = 1 << (fmt.bits - 1)
        codes = rng.integers(-half, half, shape).astype(np.int8)
        codes = codes if fmt.bits == 8 else pack_codes(codes, fmt.bits)
    else:
        codes = rng.standard_normal(shape).astype(fmt.dtype)
    scale = None
    if fmt.scaled:
        scale = np.exp(spread * rng.standard_normal(fmt.scale_shape(shape))).astype(ml_dtypes.bfloat16)
    return Weight(format=fmt, shape=shape, codes=codes, scale=scale)


def make_activations(kind, tokens, width, seed=1, device=DEVICE):
    """Activations on the device, and what they stand for in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((tokens, width), generator=generator)
    if kind == "bf16":
        values = x.to(torch.bfloat16)
        return Activations(values.to(device)), values.double()
    scale = torch.exp(torch.randn(tokens, generator=generator))
    values = (x * 40).round().clamp(-127, 127).to(torch.int8) if kind == "int8" else x.to(torch.float8_e4m3fn)
    return Activations(values.to(device), scale.to(device)), values.double() * scale.double()[:, None]


def exact(weight):
    return torch.from_numpy(weight.dequantize()).double()


def assert_near(out, x, weights, *, kind="bf16", extra=None, rounded=True, unit=2.0**-22):
    """Against float64: one float32 rounding for each of the sums' terms, and the output's own rounding.

    fp8 sums on a device are kept in 14 bits between promotions, so that 128 terms may each lose 2^-13.
    """
    expected = x @ weights.T
    if extra is not None:
        expected = expected + extra
    magnitude = x.abs() @ weights.T.abs() + (0 if extra is None else extra.abs())
    unit = 2.0**-13 if kind == "fp8" and DEVICE == "cuda" else unit
    bound = unit * magnitude + (BF16 * expected.abs() if rounded else 0) + 1e-30
    error = (out.double().cpu() - expected).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("name", [*COMPRESSED, "bf16"])
@pytest.mark.parametrize(("tokens", "blocks"), [(1, 9), (17, 5)])
def test_a_product_of_every_format_agrees_with_float64(name, tokens, blocks):
    width = blocks * (FORMATS[name].group_size or 24)
    weight = make_weight(name, (70, width))
    x, dense = make_activations("bf16", tokens, width)
    out = torch.empty((tokens, 70), device=DEVICE)
    project(pack(weight, DEVICE), x, out)
    assert_near(out, dense, exact(weight), rounded=False)


@pytest.mark.parametrize("name", ["int4-g128", "int4-g32", "int2-g32", "int8", "fp8", "bf16"])
@pytest.mark.parametrize(("tokens", "wide"), [(1, True), (2, False), (5, True), (8, False)])
def test_a_product_of_few_tokens_agrees_with_float64(name, tokens, wide):
    """Of sizes that the row of few tokens takes, where there is a device for it."""
    weight = make_weight(name, (48, 512))
    x, dense = make_activations("bf16", tokens, 512)
    add = torch.linspace(-9, 9, 48 * tokens).view(tokens, 48).to(torch.bfloat16).to(DEVICE)
    out = torch.empty((tokens, 48), dtype=torch.float32 if wide else torch.bfloat16, device=DEVICE)
    extra = add.double().cpu() + 1
    project(pack(weight, DEVICE, bias=np.ones(48)), x, out, add=add)
    unit = UNIT_OF_PLANES if name.startswith("int4") and tokens <= 2 else UNIT_OF_FEW
    assert_near(out, dense, exact(weight), extra=extra, rounded=not wide, unit=unit)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("int8", "int8"), ("int8-g32", "int8"), ("int8-g64", "int8"), ("int8-g128", "int8"), ("fp8", "fp8")],
)
@pytest.mark.parametrize("tokens", [1, 17, 130])
def test_a_product_of_rounded_activations_agrees_with_float64(name, kind, tokens):
    weight = make_weight(name, (72, 384))
    x, dense = make_activations(kind, tokens, 384)
    out = project(pack(weight, DEVICE, activations=kind), x)
    assert out.dtype == torch.bfloat16
    assert_near(out, dense, exact(weight), kind=kind)


@pytest.mark.parametrize("name", ["int4-g32", "int6-g64", "fp8"])
def test_scales_of_extreme_size_keep_their_weights(name):
    weight = make_weight(name, (33, 256), spread=20)
    x, dense = make_activations("bf16", 2, 256)
    assert_near(project(pack(weight, DEVICE), x), dense, exact(weight))


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_scales_of_other_files_are_kept_exactly(kind):
    made = make_weight("int4-g32", (16, 64))
    scale = np.random.default_rng(3).uniform(0.01, 1, made.scale.shape).astype(kind)
    weight = Weight(format=made.format, shape=made.shape, codes=made.codes, scale=scale)
    x, dense = make_activations("bf16", 2, 64)
    out = torch.empty((2, 16), device=DEVICE)
    project(pack(weight, DEVICE), x, out)
    assert_near(out, dense, exact(weight), rounded=False)


CUTS = [
    ("int4-g128", "bf16", Config(bt=8, bn=64, cols=32, unroll=2, programs_a_sm=40, stages=3)),
    ("int3-g64", "bf16", Config(bt=16, bn=32, cols=32, programs_a_sm=40, warps=2)),
    ("int8-g128", "int8", Config(bt=16, bn=64, cols=128, unroll=1, programs_a_sm=40)),
    ("fp8", "fp8", Config(bt=16, bn=64, cols=128, unroll=2, programs_a_sm=40)),
    ("bf16", "bf16", Config(bt=16, bn=32, cols=64, swizzle=2)),
    ("int4-g32", "bf16", Config(bt=32, bn=32, cols=32, swizzle=8)),
]


@pytest.mark.parametrize(("name", "kind", "config"), CUTS, ids=[f"{n}-{c.bt}x{c.bn}" for n, _, c in CUTS])
def test_every_way_to_cut_a_product_gives_it_whole(name, kind, config):
    weight = make_weight(name, (70, 1024))
    matrix = pack(weight, DEVICE, activations=kind)
    x, dense = make_activations(kind, 20, 1024)
    out = torch.empty((20, 70), dtype=torch.bfloat16, device=DEVICE)
    for _ in range(2):  # the second finds the counters as the first left them
        out.zero_()
        launch(matrix, x, out, None, config)
        assert_near(out, dense, exact(weight), kind=kind)
    assert not workspace(matrix.codes.device).counters.any()


def test_a_split_product_is_the_same_to_the_bit_each_time():
    matrix = pack(make_weight("int4-g64", (64, 2048)), DEVICE)
    x, _ = make_activations("bf16", 4, 2048)
    config = Config(bt=8, bn=64, cols=32, programs_a_sm=64)
    first, second = (torch.empty((4, 64), device=DEVICE) for _ in range(2))
    launch(matrix, x, first, None, config)
    launch(matrix, x, second, None, config)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["int4-g64", "bf16"])
def test_bias_and_residual_are_added_before_the_one_rounding(name):
    weight = make_weight(name, (40, 192))
    bias = np.linspace(-3, 3, 40).astype(np.float32)
    x, dense = make_activations("bf16", 5, 192)
    add = torch.linspace(-9, 9, 200).view(5, 40).to(torch.bfloat16).to(DEVICE)
    extra = torch.from_numpy(bias).double() + add.double().cpu()
    out = project(pack(weight, DEVICE, bias=bias), x, add, add=add)  # in place
    assert out is add
    assert_near(out, dense, exact(weight), extra=extra)


def test_rows_of_a_wider_buffer_are_read_and_written_in_place():
    weight = make_weight("int4-g32", (24, 96))
    wide = torch.randn((6, 128), generator=torch.Generator().manual_seed(5)).to(torch.bfloat16).to(DEVICE)
    out = torch.full((6, 50), 7, dtype=torch.bfloat16, device=DEVICE)
    project(pack(weight, DEVICE), Activations(wide[:, 16:112]), out[:, 3:27])
    assert_near(out[:, 3:27], wide[:, 16:112].double().cpu(), exact(weight))
    assert (out[:, :3] == 7).all()
    assert (out[:, 27:] == 7).all()


def test_no_tokens_give_no_rows():
    matrix = pack(make_weight("int4-g32", (24, 96)), DEVICE)
    out = project(matrix, Activations(torch.empty((0, 96), dtype=torch.bfloat16, device=DEVICE)))
    assert out.shape == (0, 24)


@pytest.mark.parametrize(
    ("name", "kind"), [("int4-g32", "bf16"), ("int3-g64", "bf16"), ("fp8", "fp8"), ("bf16", "bf16")]
)
def test_matrices_side_by_side_give_their_products_side_by_side(name, kind):
    weights = [make_weight(name, (rows, 192), seed) for seed, rows in enumerate((24, 8, 40))]
    biases = [None, np.ones(8, np.float32), None]
    matrix = concatenate([pack(w, DEVICE, activations=kind, bias=b) for w, b in zip(weights, biases, strict=True)])
    x, dense = make_activations(kind, 3, 192)
    assert matrix.shape == (72, 192)
    extra = torch.cat([torch.zeros(24), torch.ones(8), torch.zeros(40)]).double().expand(3, 72)
    assert_near(project(matrix, x), dense, torch.cat([exact(w) for w in weights]), kind=kind, extra=extra)


def test_matrices_of_different_scale_types_are_joined():
    first, made = make_weight("int4-g32", (8, 64)), make_weight("int4-g32", (8, 64), 1)
    second = Weight(format=made.format, shape=made.shape, codes=made.codes, scale=made.scale.astype(np.float32) * 1.01)
    x, dense = make_activations("bf16", 2, 64)
    out = torch.empty((2, 16), device=DEVICE)
    project(concatenate([pack(first, DEVICE), pack(second, DEVICE)]), x, out)
    assert_near(out, dense, torch.cat([exact(first), exact(second)]), rounded=False)


def test_matrices_of_different_formats_are_not_joined():
    with pytest.raises(KernelError, match="must share format"):
        concatenate([pack(make_weight(n, (8, 64)), DEVICE) for n in ("int4-g32", "int4-g64")])


@pytest.mark.parametrize("scale", ["one", "rows", "blocks"])
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_fp8_takes_one_scale_or_one_a_row_or_one_a_block(scale, kind):
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn((200, 320), generator=generator).to(torch.float8_e4m3fn)
    shape = {"one": (), "rows": (200,), "blocks": (2, 3)}[scale]
    scales = torch.exp(torch.randn(shape, generator=generator))
    if scale == "blocks":
        wide = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :320]
    else:
        wide = scales.reshape(-1, 1)
    x, dense = make_activations(kind, 5, 320)
    out = project(pack_fp8(codes.to(DEVICE), scales.to(DEVICE), activations=kind), x)
    assert_near(out, dense, codes.double() * wide.double(), kind=kind)


def test_fp8_scales_of_another_shape_are_refused():
    with pytest.raises(KernelError, match=r"expected one, \[200\] or \[2, 3\]"):
        pack_fp8(torch.zeros((200, 320), dtype=torch.float8_e4m3fn), torch.ones(7))


GROUPED = [
    ("int4-g32", "bf16"),
    ("int4-g128", "bf16"),
    ("int6-g32", "bf16"),
    ("bf16", "bf16"),
    ("fp8", "fp8"),
    ("int8", "int8"),
]


@pytest.mark.parametrize(("name", "kind"), GROUPED)
@pytest.mark.parametrize("counts", [(0, 5, 0, 1, 23), (0, 0, 0, 0, 1), (7, 0, 0, 90, 0)])
def test_every_expert_multiplies_its_own_rows(name, kind, counts):
    weight = make_weight(name, (5, 40, 256))
    bias = np.random.default_rng(0).standard_normal((5, 40))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    x, dense = make_activations(kind, int(offsets[-1]), 256)
    experts = pack(weight, DEVICE, activations=kind, bias=bias)
    out = grouped_project(experts, x, torch.from_numpy(offsets).to(DEVICE))
    for e, (start, end) in enumerate(pairwise(offsets)):
        extra = torch.from_numpy(bias[e].astype(np.float32)).double().expand(end - start, 40)
        assert_near(out[start:end], dense[start:end], exact(weight)[e], kind=kind, extra=extra)


@pytest.mark.parametrize(
    "name", [name for name in COMPRESSED if "g32" in name] + ["int8", "fp8", "int3-g64", "int4-g128"]
)
def test_weights_are_widened_with_one_rounding(name):
    weight = make_weight(name, (70, 576 if "g64" in name else 640))
    matrix = pack(weight, DEVICE)
    out = torch.empty((50, weight.shape[1]), dtype=torch.bfloat16, device=DEVICE)
    libraries.widen_rows(matrix, 13, 50, out)
    assert torch.equal(out.float().cpu(), torch.from_numpy(weight.dequantize())[13:63].to(torch.bfloat16).float())


@pytest.mark.parametrize(("name", "kind"), [("int4-g32", "bf16"), ("int8", "int8"), ("fp8", "fp8"), ("bf16", "bf16")])
@pytest.mark.parametrize("residual", [False, True])
def test_every_row_of_this_device_agrees_with_float64(name, kind, residual):
    weight = make_weight(name, (256, 512))
    matrix = pack(weight, DEVICE, activations=kind, bias=np.linspace(-1, 1, 256))
    x, dense = make_activations(kind, 80, 512)
    add = torch.ones((80, 256), dtype=torch.bfloat16, device=DEVICE) if residual else None
    extra = torch.linspace(-1, 1, 256).double().expand(80, 256) + (1 if residual else 0)
    for row in runnable(matrix, 80, cuda_device(DEVICE), torch.bfloat16):
        out = torch.zeros((80, 256), dtype=torch.bfloat16, device=DEVICE)
        row.run(matrix, x, out, add, cuts(row, matrix, 80)[0])
        error = (out.double().cpu() - (dense @ exact(weight).T + extra)).abs()
        # torch's rows round the product, then the sum with the bias, then that with the residual; widened weights too
        bound = 2**-7 * (dense.abs() @ exact(weight).T.abs() + 2)
        assert (error <= bound).all(), row.name


@pytest.mark.parametrize(("name", "kind"), [("int8", "int8"), ("fp8", "fp8"), ("bf16", "bf16")])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_persistent_kernel_goes_through_all_tiles_and_their_edges(name, kind, shift):
    weight = make_weight(name, (80, 192))
    matrix = pack(weight, DEVICE, activations=kind, bias=np.ones(80))
    x, dense = make_activations(kind, 70, 192)
    if shift:  # rows that its descriptors can't reach
        wide = torch.zeros((70, 193), dtype=x.values.dtype, device=DEVICE)
        wide[:, 1:].view(torch.uint8 if kind != "bf16" else torch.int16).copy_(
            x.values.view(torch.uint8 if kind != "bf16" else torch.int16)
        )
        x = Activations(wide[:, 1:], x.scale)
    out = torch.zeros((70, 80), dtype=torch.bfloat16, device=DEVICE)
    add = torch.full((70, 80), 2, dtype=torch.bfloat16, device=DEVICE)
    config = Config(bt=32, bn=32, cols=128, swizzle=2, warps=4, stages=2, flatten=True)
    launch_persistent(matrix, x, out, add, config)
    assert_near(out, dense, exact(weight), kind=kind, extra=torch.full((70, 80), 3.0, dtype=torch.float64))


def test_torchs_rows_agree_with_float64_where_torch_runs_them_on_a_cpu():
    weight = make_weight("int4-g32", (96, 64))
    matrix = pack(weight, DEVICE)
    x, dense = make_activations("bf16", 80, 64)
    out = torch.zeros((80, 96), dtype=torch.bfloat16, device=DEVICE)
    libraries.widened(matrix, x, out, None)
    error = (out.double().cpu() - dense @ exact(weight).T).abs()
    assert (error <= BF16 * (dense.abs() @ exact(weight).T.abs())).all()


@pytest.mark.parametrize("residual", [False, True])
def test_sums_of_int8_are_scaled_with_bias_and_residual(residual):
    weight = make_weight("int8", (40, 64))
    matrix = pack(weight, DEVICE, activations="int8", bias=np.ones(40))
    x, dense = make_activations("int8", 80, 64)
    add = torch.full((80, 40), 2, dtype=torch.bfloat16, device=DEVICE) if residual else None
    out = torch.zeros((80, 40), dtype=torch.bfloat16, device=DEVICE)
    libraries.int8(matrix, x, out, add)
    assert_near(out, dense, exact(weight), extra=torch.full((80, 40), 3.0 if residual else 1.0, dtype=torch.float64))


def test_slabs_of_wide_matrices_begin_where_every_kernel_can(monkeypatch):
    firsts = []
    monkeypatch.setattr(libraries, "SLAB_ELEMENTS", 300 * 64)
    monkeypatch.setattr(libraries, "widen_rows", lambda m, first, rows, out: (firsts.append((first, rows)), out)[1])
    monkeypatch.setattr(libraries, "_multiply", lambda *_: None)
    matrix = pack(make_weight("int4-g32", (600, 64)), DEVICE)
    x, _ = make_activations("bf16", 80, 64)
    libraries.widened(matrix, x, torch.zeros((80, 600), dtype=torch.bfloat16, device=DEVICE), None)
    assert firsts == [(0, 256), (256, 256), (512, 88)]


def test_large_tiles_are_split_into_no_second_round():
    matrix = pack(make_weight("int8", (8, 4096)), DEVICE, activations="int8")
    large = Config(bt=128, bn=128, cols=128, programs_a_sm=10)
    assert splits_of(matrix, 7, large, torch.device("cpu")) == 2  # 20 programs over 7 tiles
    assert splits_of(matrix, 7, replace(large, bt=64), torch.device("cpu")) == 3


def device_of(kind, *features):
    return Device(
        name=kind, kind=kind, model="", features=frozenset(features), num_cores=1, memory_bytes=0, machine=kind
    )


OLD, AMPERE, HOPPER = device_of("cuda"), device_of("cuda", "sm_80"), device_of("cuda", "sm_80", "sm_89", "sm_90")


@pytest.mark.parametrize(
    ("row", "device", "spec", "reason"),
    [
        ("triton", OLD, {}, "sm_80"),
        ("triton", AMPERE, {"format": "fp8", "activations": "fp8"}, "sm_89"),
        ("triton", AMPERE, {"format": "int4-g32", "activations": "int8"}, "int8 activations meet int8 weights"),
        ("triton_persistent", AMPERE, {"format": "int8", "activations": "int8"}, "sm_90"),
        ("triton_persistent", HOPPER, {"format": "int8-g32", "activations": "int8"}, "one scale a row"),
        ("triton_persistent", HOPPER, {"format": "int8", "activations": "bf16"}, "as they are stored"),
        ("triton_persistent", HOPPER, {"format": "int8", "activations": "fp8"}, "fp8 activations meet fp8 weights"),
        ("triton_persistent", HOPPER, {"format": "int8", "activations": "int8", "in_features": 24}, "multiples of 16"),
        ("torch_scaled_mm", AMPERE, {"format": "fp8", "activations": "fp8"}, "sm_89"),
        ("torch_scaled_mm", AMPERE, {"format": "int8", "activations": "int8"}, "fp8 with fp8"),
        ("torch_int_mm", AMPERE, {"format": "fp8", "activations": "fp8"}, "int8 with int8"),
        ("torch_int_mm", AMPERE, {"format": "int8-g32", "activations": "int8"}, "one scale a row"),
        (
            "torch_int_mm",
            AMPERE,
            {"format": "int8", "activations": "int8", "out_features": 20},
            "multiples of 8, not 20",
        ),
        ("torch_int_mm", AMPERE, {"format": "int8", "activations": "int8", "num_tokens": 3}, "64 tokens"),
        ("torch_mm", AMPERE, {"format": "int8", "activations": "bf16"}, "bf16 with bf16"),
        ("widen_torch_mm", AMPERE, {"format": "bf16", "activations": "bf16"}, "widens compressed"),
    ],
)
def test_a_row_says_why_it_refuses(row, device, spec, reason):
    fields = {"activations": "bf16", **spec}
    if "format" in fields:
        fields["format"] = FORMATS[fields["format"]]
    kernel = next(k for k in TABLE if k.name == row)
    assert reason in kernel.refusal(device, Spec(op="project", **fields))


def test_torchs_rows_refuse_a_machine_without_a_device():
    row = next(k for k in TABLE if k.name == "torch_int_mm")
    spec = Spec(op="project", format=FORMATS["int8"], activations="int8")
    assert "CUDA device" in row.refusal(device_of("cpu"), spec)


@pytest.mark.parametrize("activations", ["int8", "fp8", "fp4"])
def test_a_matrix_is_not_packed_for_activations_that_it_does_not_meet(activations):
    with pytest.raises(KernelError, match="int4-g32 with activations"):
        pack(make_weight("int4-g32", (8, 64)), DEVICE, activations=activations)
    assert activations_refusal(FORMATS["int4-g32"], activations)


def test_a_vector_is_not_packed():
    with pytest.raises(KernelError, match=r"needs a matrix .*, got shape \(64,\)"):
        pack(Weight(format=FORMATS["bf16"], shape=(64,), codes=np.zeros(64, ml_dtypes.bfloat16)), DEVICE)


def test_operands_that_do_not_fit_are_named():
    matrix, stack = pack(make_weight("int8", (8, 64)), DEVICE), pack(make_weight("int8", (2, 8, 64)), DEVICE)
    whole = pack(make_weight("int8", (8, 64)), DEVICE, activations="int8")
    x, offsets = torch.zeros((2, 64), dtype=torch.bfloat16, device=DEVICE), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(KernelError, match=r"takes torch\.bfloat16 rows of 64 values"):
        project(matrix, Activations(x[:, :32]))
    with pytest.raises(KernelError, match="bf16 activations come with no scale"):
        project(matrix, Activations(x, torch.ones(2)))
    with pytest.raises(KernelError, match=r"int8 activations come with float32 scales \[2\], got None"):
        project(whole, Activations(x.to(torch.int8)))
    with pytest.raises(KernelError, match=r"out must be \[2, 8\]"):
        project(matrix, Activations(x), torch.zeros((2, 9), device=DEVICE))
    with pytest.raises(KernelError, match=r"add must be \[2, 8\]"):
        project(matrix, Activations(x), add=torch.zeros((3, 8), device=DEVICE))
    with pytest.raises(KernelError, match="multiplied by grouped_project"):
        project(stack, Activations(x))
    with pytest.raises(KernelError, match="use project"):
        grouped_project(matrix, Activations(x), offsets)
    with pytest.raises(KernelError, match=r"offsets must be int32 \[3\]"):
        grouped_project(stack, Activations(x), offsets.long())
