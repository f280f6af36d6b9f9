import ctypes
import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import torch

from halve.core.errors import KernelError
from halve.formats import FORMATS
from halve.kernels.cuda import ahead, driver, gemv, nvrtc, product_rows
from halve.kernels.cuda.packing import CudaMatrix, concatenate, pack, pack_fp8
from halve.kernels.cuda.products import Activations, Norm, project
from halve.kernels.dispatch import Spec
from tests.kernels.cuda.test_products import (
    AMPERE,
    DEVICE,
    HOPPER,
    OLD,
    UNIT_OF_FEW,
    UNIT_OF_PLANES,
    assert_near,
    device_of,
    exact,
    make_activations,
    make_weight,
)

ON_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SINGLE_PLANE = [n for n, f in FORMATS.items() if n == "bf16" or (f.scaled and f.bits in (2, 4, 8))]
NVRTC = nvrtc.Compiler(None, (13, 0), (80, 86, 89, 90, 100))


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(nvrtc, "find", lambda: NVRTC)


def spec(name="int4-g128", **fields):
    return Spec(op="project", **{"format": FORMATS[name], "activations": "bf16", "num_tokens": 1, **fields})


@pytest.mark.parametrize(
    ("device", "spec", "reason"),
    [
        (OLD, spec(), "sm_80"),
        (device_of("cpu", "sm_80"), spec(), "needs a CUDA device"),
        (AMPERE, spec("fp8", activations="fp8"), "sm_89"),
        (AMPERE, spec("int8-g32", activations="int8"), "groups of 64 inputs or more, not 32"),
        (AMPERE, spec("int8", activations="int8", in_features=96), "multiples of 64, not 96"),
        (AMPERE, spec("int6-g64"), "codes of 6 bits, which lie in two planes"),
        (AMPERE, spec("int3-g32"), "codes of 3 bits"),
        (AMPERE, spec(num_tokens=9), "takes 8 tokens at most, not 9"),
        (AMPERE, spec(out_features=24), "needs out_features in multiples of 16, not 24"),
        (AMPERE, spec(in_features=192), "needs in_features in multiples of 128, not 192"),
        (AMPERE, spec("int2-g32", in_features=128), "multiples of 256, not 128"),
        (AMPERE, spec("fp8", in_features=96), "multiples of 64, not 96"),
        (AMPERE, spec("bf16", in_features=48), "multiples of 32, not 48"),
        (
            device_of("cuda", "sm_80", "sm_120"),
            spec(),
            r"NVRTC 13.0 compiles for [80, 86, 89, 90, 100], not for sm_120",
        ),
    ],
)
def test_the_row_says_why_it_refuses(device, spec, reason, compiler):
    assert reason in gemv.refusal(device, spec)


@pytest.mark.parametrize("name", SINGLE_PLANE)
def test_the_row_takes_few_tokens_of_formats_in_one_plane(name, compiler):
    for device in (AMPERE, HOPPER):
        assert gemv.refusal(device, spec(name, num_tokens=8, out_features=48, in_features=512)) is None


def test_a_machine_without_nvrtc_is_told_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "_paths", lambda: [str(tmp_path / "libnvrtc.so.13")])
    nvrtc.find.cache_clear()
    try:
        reason = gemv.refusal(AMPERE, spec())
    finally:
        nvrtc.find.cache_clear()
    assert "no NVRTC in" in reason
    assert str(tmp_path / "libnvrtc.so.13") in reason
    assert "CUDA_HOME" in reason


def test_nothing_stands_in_for_a_device_on_a_cpu():
    device = product_rows.cuda_device("cpu")
    assert "CUDA device" in gemv.refusal(device, spec())


# The kernel itself, its words of the machine said in C++.

KERNELS = [  # format (and activations), outputs, inputs, tokens, cut, programs, whether bias and residual are added
    ("int4-g128", 96, 1024, 5, gemv.cut(2, 4, 3), 2, True),
    ("int4-g128", 32, 640, 1, gemv.cut(1, 8, 4), 2, False),
    ("int4-g32", 64, 640, 8, gemv.cut(4, 2, 3), 1, False),
    ("int2-g32", 32, 1024, 2, gemv.cut(1, 3, 3), 2, False),
    ("int8", 32, 640, 1, gemv.cut(1, 4, 3), 1, True),
    ("int8-g128", 32, 640, 3, gemv.cut(1, 3, 3), 2, False),
    ("fp8", 32, 320, 5, gemv.cut(1, 2, 3), 2, False),
    ("bf16", 32, 640, 5, gemv.cut(2, 4, 3), 1, True),
    ("int4-g32", 32, 640, 1, gemv.cut(1, 3, 3), 1, True),
    ("int4-g64", 64, 640, 2, gemv.cut(2, 2, 3), 2, False),
    ("int4-g128", 64, 896, 2, gemv.cut(4, 3, 3), 1, True),
    ("int8 int8", 64, 640, 5, gemv.cut(2, 4, 3), 2, True),
    ("int8 int8", 32, 192, 1, gemv.cut(1, 4, 3), 1, False),
    ("int8-g128 int8", 32, 640, 3, gemv.cut(1, 3, 3), 2, False),
    ("fp8 fp8", 64, 640, 8, gemv.cut(4, 2, 3), 1, True),
]


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@pytest.fixture
def on_cpu(tmp_path):
    """Compile the kernel for a CPU and run it there."""

    def run(matrix, x, out, add, cut, programs):
        fixed = gemv.macros(
            matrix, len(out), cut, wide=out.dtype == torch.float32, add=add is not None, norm=x.norm is not None
        )
        library = tmp_path / "gemv.so"
        words = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-include", "tests/kernels/cuda/gemv_host.hpp"]
        words += [f"-D{key}={value}" for key, value in fixed.items()]
        subprocess.run(["g++", *words, "-x", "c++", str(gemv.SOURCES[1]), "-o", str(library)], check=True, timeout=120)
        ctypes.CDLL(str(library)).run(programs, 32 * cut.warps, *gemv._parameters(matrix, x, out, add))

    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernel for a CPU")
    return run


@pytest.mark.parametrize(
    ("name", "rows", "width", "tokens", "cut", "programs", "more"), KERNELS, ids=[f"{k[0]}-T{k[3]}" for k in KERNELS]
)
def test_the_kernel_agrees_with_float64_on_a_cpu(name, rows, width, tokens, cut, programs, more, on_cpu):
    name, activations = (*name.split(), "bf16")[:2]
    weight = make_weight(name, (rows, width))
    bias = np.linspace(-1, 1, rows).astype(np.float32) if more else None
    matrix = pack(weight, "cpu", bias=bias, activations=activations)
    generator = torch.Generator().manual_seed(1)
    x, dense = make_activations(activations, tokens, width, device="cpu")
    add = torch.randn((tokens, rows), generator=generator).to(torch.bfloat16) if more else None
    kind = torch.bfloat16 if more else torch.float32
    out = torch.full((tokens, rows + 2), float("nan"), dtype=kind)[:, 1:-1]
    on_cpu(matrix, x, out, add, cut, programs)
    extra = None if bias is None else torch.from_numpy(bias).double() + add.double()
    unit = UNIT_OF_PLANES if gemv.in_planes(matrix, tokens) else 2.0**-22
    assert_near(out, dense, exact(weight), extra=extra, rounded=more, unit=unit)


@pytest.mark.parametrize(("name", "tokens"), [("int4-g32", 2), ("int4-g128", 1)])
def test_a_product_norms_its_tokens_on_a_cpu(name, tokens, on_cpu):
    """Numbers of a norm and a gain as they come, with outliers and a token of nearly nothing."""
    weight, width = make_weight(name, (32, 640)), 640
    generator = torch.Generator().manual_seed(4)
    values = (torch.randn((tokens, width), generator=generator) * 3).to(torch.bfloat16)
    values[0, 5] = 400
    values[-1] *= 1e-3
    norm = Norm(torch.rand(width, generator=generator) + 0.5, 1e-5)
    add = torch.randn((tokens, 32), generator=generator).to(torch.bfloat16)
    out = torch.empty((tokens, 32), dtype=torch.bfloat16)
    on_cpu(pack(weight, "cpu"), Activations(values, norm=norm), out, add, gemv.cut(1, 4, 3), 1)
    wide = values.double()
    normed = wide * norm.gain.double() / (wide.square().mean(1, keepdim=True) + norm.eps).sqrt()
    largest = normed.view(tokens, -1, FORMATS[name].group_size).abs().amax(2, keepdim=True)
    bound = (largest.expand(-1, -1, FORMATS[name].group_size).flatten(1) / 32512) @ exact(weight).T.abs()
    error = (out.double() - (normed @ exact(weight).T + add.double())).abs()
    assert (error <= 1.01 * bound + 2.0**-8 * out.double().abs()).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_no_number_spoils_its_own_outputs_alone(broken, on_cpu):
    values = torch.randn((2, 256), generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    values[1, 77] = broken
    out = torch.empty((2, 32))
    on_cpu(pack(make_weight("int4-g64", (32, 256)), "cpu"), Activations(values), out, None, gemv.cut(1, 2, 3), 2)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_tokens_of_nothing_give_nothing(on_cpu):
    out = torch.full((1, 32), float("nan"))
    x = Activations(torch.zeros((1, 256), dtype=torch.bfloat16))
    on_cpu(pack(make_weight("int4-g128", (32, 256)), "cpu"), x, out, None, gemv.cut(2, 2, 3), 1)
    assert (out == 0).all()


# What is launched, seen by a driver of the test's.


class Driver:
    """Keeps what it is asked."""

    def __init__(self):
        self.asked, self.launched = [], []

    def __getattr__(self, name):
        return lambda *words: self.asked.append(name) or 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):  # noqa: N802
        found = ctypes.cast(config, ctypes.POINTER(driver.LaunchConfig)).contents
        kinds = [ctypes.c_void_p] * 8 + [ctypes.c_int] * 3 + [ctypes.c_longlong] * 4 + [ctypes.c_float]
        values = [ctypes.cast(p, ctypes.POINTER(k)).contents.value for p, k in zip(parameters, kinds, strict=True)]
        self.launched.append(
            {
                "grid": list(found.grid),
                "block": list(found.block),
                "shared": found.shared,
                "stream": found.stream,
                "ahead": [found.attributes[i].id for i in range(found.num_attributes)],
                "values": values,
            }
        )
        return 0


@pytest.fixture
def launched(monkeypatch, compiler):
    """A device that only the driver knows; what it launches."""
    fake = Driver()
    monkeypatch.setattr(driver, "driver", lambda: fake)
    monkeypatch.setattr(nvrtc, "compiled", lambda source, name, options, reached: f"{reached}".encode())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 77}))
    driver._primary.cache_clear()
    gemv._functions.forget()
    yield fake
    driver._primary.cache_clear()
    gemv._functions.forget()


def test_a_launch_has_the_products_sizes_and_places(launched):
    matrix = pack(make_weight("int4-g32", (96, 256)), "cpu", bias=np.ones(96))
    x, out = torch.zeros((3, 256), dtype=torch.bfloat16), torch.zeros((3, 96), dtype=torch.bfloat16)
    gemv.launch(matrix, Activations(x), out, out, gemv.cut(2, 8, 4))
    (seen,) = launched.launched
    before, after = (
        [t.data_ptr() for t in some] for some in ((matrix.codes, matrix.scale, matrix.bias, x), (out, out))
    )
    assert seen["values"] == [*before, None, None, *after, 3, 96, 256, 128, 256, 96, 96, 0.0]
    assert (seen["grid"], seen["block"], seen["stream"]) == ([3, 1, 1], [256, 1, 1], 77)
    assert seen["shared"] == 8 * (4 * 2 * (16 * 64 + 4 * 16 * 2) + 2 * 32 * 4 * 4)
    assert seen["ahead"] == []
    assert launched.asked.count("cuCtxPushCurrent_v2") == launched.asked.count("cuCtxPopCurrent_v2") == 1


def test_a_kernel_is_loaded_once_for_each_cut(launched):
    matrix = pack(make_weight("int8", (64, 128)), "cpu")
    x, out = torch.zeros((1, 128), dtype=torch.bfloat16), torch.zeros((1, 64), dtype=torch.float32)
    for cut in (gemv.cut(1, 8, 4), gemv.cut(1, 8, 4), gemv.cut(1, 8, 6)):
        gemv.launch(matrix, Activations(x), out, None, cut)
    assert launched.asked.count("cuModuleLoadData") == 2
    assert len(launched.launched) == 3


def test_programs_that_share_tiles_are_as_many_as_the_cut_says(launched):
    matrix = pack(make_weight("int8", (64, 128)), "cpu")
    x, out = torch.zeros((1, 128), dtype=torch.bfloat16), torch.zeros((1, 64), dtype=torch.float32)
    gemv.launch(matrix, Activations(x), out, None, gemv.cut(1, 8, 4, programs=1))
    assert launched.launched[0]["grid"] == [2, 1, 1]  # two multiprocessors


@pytest.mark.parametrize(("programmatic", "kinds"), [(True, [6]), (False, [])])
def test_a_launch_inside_a_capture_may_begin_ahead_where_devices_know_how(launched, monkeypatch, programmatic, kinds):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(gemv.ahead, "programmatic", lambda device: programmatic)
    matrix = pack(make_weight("bf16", (16, 64)), "cpu")
    x, out = torch.zeros((1, 64), dtype=torch.bfloat16), torch.zeros((1, 16), dtype=torch.bfloat16)
    gemv.launch(matrix, Activations(x), out, None, gemv.cut(1, 4, 4))
    assert launched.launched[0]["ahead"] == kinds
    assert launched.launched[0]["values"][1:3] == [None, None]


@pytest.mark.parametrize(("capability", "knows"), [((9, 0), True), ((10, 0), True), ((8, 9), False)])
def test_kernels_begin_ahead_from_sm_90_on(monkeypatch, capability, knows):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:0")
    expected = {"AHEAD": True, "launch_pdl": True} if knows else {"AHEAD": False}
    ahead.programmatic.cache_clear()
    try:
        assert ahead.launched(device) == expected
    finally:
        ahead.programmatic.cache_clear()
    assert ahead.launched(torch.device("cpu")) == {"AHEAD": False}


def test_an_error_of_the_driver_is_named(launched, monkeypatch):
    monkeypatch.setattr(Driver, "cuLaunchKernelEx", lambda *words: 1)
    matrix = pack(make_weight("bf16", (16, 64)), "cpu")
    x, out = torch.zeros((1, 64), dtype=torch.bfloat16), torch.zeros((1, 16), dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="cuLaunchKernelEx failed with code 1"):
        gemv.launch(matrix, Activations(x), out, None, gemv.cut(1, 4, 4))


@pytest.mark.parametrize("what", ["shifted", "float16"])
def test_operands_that_the_kernel_can_not_read_go_to_triton(launched, monkeypatch, what):
    seen = []
    monkeypatch.setattr(gemv.launching, "launch", lambda *words: seen.append(words))
    matrix = pack(make_weight("int8", (16, 64)), "cpu")
    wide = torch.zeros((2, 72), dtype=torch.bfloat16)
    out = torch.zeros((2, 16), dtype=torch.float16 if what == "float16" else torch.bfloat16)
    gemv.launch(matrix, Activations(wide[:, 1:65] if what == "shifted" else wide[:, :64]), out, None, gemv.cut(1, 4, 4))
    assert len(seen) == 1
    assert not launched.launched


# How products are cut.

H200 = 132  # multiprocessors


def meta(name, shape):
    fmt = FORMATS[name]
    bits, groups = fmt.bits if fmt.scaled else 16, shape[1] // (fmt.group_size or shape[1])
    kind = torch.int16 if fmt.scaled else torch.bfloat16
    return CudaMatrix(
        format=fmt,
        shape=shape,
        activations="bf16",
        codes=torch.empty((shape[0], shape[1] * bits // 16), dtype=kind, device="meta"),
        scale=torch.empty((groups, shape[0]), dtype=torch.bfloat16, device="meta") if fmt.scaled else None,
        group_size=fmt.group_size or 0,
    )


@pytest.mark.parametrize(
    ("name", "shape", "tokens", "cut"),
    [
        ("int4-g128", (4096, 14336), 1, gemv.cut(2, 16, 3, 1, 1)),
        ("int4-g128", (4096, 14336), 4, gemv.cut(2, 16, 4)),
        ("int4-g128", (4096, 4096), 1, gemv.cut(2, 16, 3, 1, 1)),
        ("int4-g128", (8192, 28672), 2, gemv.cut(2, 16, 3, 1, 1)),
        ("int4-g128", (8192, 28672), 8, gemv.cut(4, 8, 4)),
        ("int4-g128", (8192, 28672), 5, gemv.cut(4, 8, 4)),
        ("int4-g128", (14336, 4096), 4, gemv.cut(2, 8, 4, 2)),
        ("int4-g128", (28672, 8192), 8, gemv.cut(2, 8, 4, 2)),
        ("int4-g32", (4096, 14336), 1, gemv.cut(2, 16, 3, 1, 1)),
        ("int4-g32", (4096, 14336), 8, gemv.cut(2, 16, 4)),
        ("int4-g32", (8192, 28672), 4, gemv.cut(2, 8, 4, 2)),
        ("int2-g32", (4096, 14336), 1, gemv.cut(2, 8, 6)),
        ("int8", (4096, 14336), 1, gemv.cut(1, 16, 4, 2)),
        ("fp8", (4096, 14336), 8, gemv.cut(2, 16, 4)),
        ("bf16", (4096, 14336), 1, gemv.cut(2, 16, 4)),
        ("bf16", (128256, 4096), 1, gemv.cut(2, 16, 3, 1, 1)),
    ],
)
def test_without_measurements_an_h200s_fastest_cut_runs(name, shape, tokens, cut, monkeypatch):
    monkeypatch.setattr(gemv, "num_sms", lambda device: H200)
    assert gemv.candidates(meta(name, shape), tokens)[0] == cut


@pytest.mark.parametrize("name", SINGLE_PLANE)
@pytest.mark.parametrize("shape", [(16, 512), (4096, 14336), (8208, 4096)])
def test_every_cut_divides_its_matrix_and_fits_shared_memory(name, shape, monkeypatch):
    matrix = meta(name, shape)
    for sms in (H200, 1024):
        monkeypatch.setattr(gemv, "num_sms", lambda device, sms=sms: sms)
        for limit in (227 << 10, 99 << 10):
            monkeypatch.setattr(gemv, "device_shared_bytes", lambda device, limit=limit: limit)
            for tokens in (1, 8):
                found = gemv.candidates(matrix, tokens)
                assert found
                assert len(set(found)) == len(found)
                for cut in found:
                    fixed = gemv.macros(matrix, tokens, cut, wide=True, add=True)
                    assert shape[0] % cut.bn == 0
                    assert gemv.shared_bytes(matrix, fixed) <= limit


# On a device.


@ON_DEVICE
@pytest.mark.parametrize(
    "name",
    ["int4-g128", "int4-g32", "int2-g32", "int8", "int8-g128", "fp8", "bf16", "int8 int8", "int8-g128 int8", "fp8 fp8"],
)
def test_cuts_agree_with_float64_on_a_device(name):
    """Of each number of tokens the default and another cut, so that all come up; compiled at once."""
    name, activations = (*name.split(), "bf16")[:2]
    weight = make_weight(name, (192, 2048))
    bias = np.linspace(-1, 1, 192).astype(np.float32)
    matrix, device = pack(weight, DEVICE, bias=bias, activations=activations), product_rows.cuda_device(DEVICE)
    tried = []
    for i, (tokens, kind) in enumerate(
        [(1, torch.float32), (2, torch.bfloat16), (5, torch.float32), (8, torch.bfloat16)]
    ):
        first, *others = gemv.candidates(matrix, tokens)
        assert product_rows.runnable(matrix, tokens, device, kind)[0].name == "cuda_gemv"
        tried += [(tokens, kind, cut) for cut in (first, *others[i::4])]
    with ThreadPoolExecutor(8) as threads:
        for tokens, kind, cut in tried:
            fixed = gemv.macros(matrix, tokens, cut, wide=kind == torch.float32, add=True)
            threads.submit(gemv._binary, tuple(fixed.items()), torch.cuda.get_device_capability())
    for tokens, kind, cut in tried:
        x, dense = make_activations(activations, tokens, 2048)
        add = torch.linspace(-9, 9, 192 * tokens).view(tokens, 192).to(torch.bfloat16).to(DEVICE)
        out = torch.full((tokens, 192), float("nan"), dtype=kind, device=DEVICE)
        gemv.launch(matrix, x, out, add, cut)
        extra = torch.from_numpy(bias).double() + add.double().cpu()
        rounded = kind == torch.bfloat16
        unit = UNIT_OF_PLANES if gemv.macros(matrix, tokens, cut, wide=False, add=True)["PLANES"] else UNIT_OF_FEW
        assert_near(out, dense, exact(weight), extra=extra, rounded=rounded, unit=unit, kind=activations)


@ON_DEVICE
@pytest.mark.parametrize("name", ["int4-g32", "fp8", "bf16"])
def test_products_of_a_graph_that_follow_each_other_wait_for_each_other(name):
    weight = make_weight(name, (512, 512))
    matrix = pack(weight, DEVICE)
    x = torch.randn((2, 512), device=DEVICE).to(torch.bfloat16)
    stream = torch.zeros((2, 512), dtype=torch.bfloat16, device=DEVICE)

    def step():
        """Each reads what the one before wrote; a norm between keeps numbers small."""
        torch.mul(x, 1, out=stream)
        for _ in range(8):
            inner = project(matrix, Activations(stream))
            project(matrix, Activations((inner.float() / inner.float().abs().amax()).to(torch.bfloat16)), stream)
            project(matrix, Activations(stream), inner)
            torch.div(inner, inner.abs().amax(), out=stream)

    step()
    torch.cuda.synchronize()
    expected = stream.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        stream.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(stream, expected)


@ON_DEVICE
def test_blocks_and_joined_matrices_are_read_as_they_lie_on_a_device():
    codes = torch.randn((208, 320), generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    scale = torch.rand((2, 3), generator=torch.Generator().manual_seed(3)) + 0.5
    wide = scale.repeat_interleave(128, 0)[:208].repeat_interleave(128, 1)[:, :320]
    matrix = pack_fp8(codes.to(DEVICE), scale.to(DEVICE), activations="bf16")
    x, dense = make_activations("bf16", 3, 320)
    out = torch.empty((3, 416), device=DEVICE)
    gemv.launch(concatenate([matrix, matrix]), x, out, None, gemv.cut(1, 4, 4))
    reference = codes.double() * wide.double()
    assert_near(out, dense, torch.cat([reference, reference]), rounded=False, unit=UNIT_OF_FEW)
