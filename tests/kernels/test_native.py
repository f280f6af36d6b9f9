"""Every row of the C++ that this machine runs, against float64 numpy and against `Weight.dequantize`."""

import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import ConfigError, KernelError
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.activations import activations_for, int8_rows
from halve.formats.base import BF16
from halve.hardware import detect_cpu
from halve.kernels import native, native_library, native_rows, team
from halve.kernels.native import NativeOps

EPS = 2.0**-24
SUBNORMAL = 2.0**-149
RUNNABLE = [isa for isa in native_rows.ISAS if set(isa.features) <= detect_cpu().features]
every_isa = pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
every_activations = pytest.mark.parametrize("activations", ["fp32", "int8"])
every_format = pytest.mark.parametrize("name", FORMATS)


@cache
def ops_for(isa, num_threads=1, activations="fp32"):
    device = replace(detect_cpu(), features=frozenset(isa.features))
    return NativeOps(device, num_threads=num_threads, activations=activations)


def make_weight(name, shape, *, seed=0, scale=0.02):
    """A weight whose codes cover the whole range of the format, with scales around `scale`."""
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    scales = (rng.uniform(0.5, 1.5, fmt.scale_shape(shape)) * scale).astype(BF16) if fmt.scaled else None
    if fmt.kind == "float":
        size = 1.0 if fmt.scaled else scale
        return Weight(
            format=fmt, shape=shape, codes=(rng.standard_normal(shape) * size).astype(fmt.dtype), scale=scales
        )
    codes = rng.integers(-(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1), shape).astype(np.int8)
    return Weight(format=fmt, shape=shape, codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits), scale=scales)


def make_x(rows, width, *, seed=1, size=1.0):
    return (np.random.default_rng(seed).standard_normal((rows, width)) * size).astype(np.float32)


def assert_within_bound(isa, y, x, weight, bias=None, activations="fp32"):
    """The bounds of native_rows.py's docstring, with k * eps grown to k * eps / (1 - k * eps) as k roundings may."""
    rounding, steps = activations_for(weight.format, activations), isa.float_error_steps(x.shape[1])
    w, x = weight.dequantize().astype(np.float64), x.astype(np.float64)
    if rounding == "int8":
        codes, scale = int8_rows(x.astype(np.float32))
        x, steps = codes * scale.astype(np.float64)[:, None], isa.dot_error_steps(x.shape[1], weight.format)
    exact, size = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias is not None:
        exact, size = exact + bias, size + np.abs(bias)
    bound = steps * EPS / (1 - steps * EPS) * size + (x.shape[1] + 1) * SUBNORMAL
    assert (np.abs(y - exact) <= bound).all(), (np.abs(y - exact) / bound).max()


def widths(fmt):
    if fmt.group_size is None:
        return (1, 31, 33, 97, 1024, 1037, 2050)
    return (fmt.group_size, 3 * fmt.group_size, 1024 + fmt.group_size)


@every_isa
@every_format
@every_activations
def test_products_stay_within_the_derived_bound_at_odd_shapes(isa, name, activations):
    ops = ops_for(isa, activations=activations)
    for width in widths(FORMATS[name]):
        for out, rows in ((1, 1), (3, 5), (17, 3), (200, 1), (33, 64), (16, 7)):
            weight, x = make_weight(name, (out, width)), make_x(rows, width)
            assert_within_bound(isa, ops.project(ops.linear(weight), x), x, weight, activations=activations)


@every_isa
@every_format
@pytest.mark.parametrize(("scale", "size"), [(1e-40, 1e30), (1e30, 1e-30), (1e-30, 1e-12), (1.0, 1e-42), (-0.02, 1.0)])
@every_activations
def test_products_stay_within_the_bound_at_extreme_scales(isa, name, scale, size, activations):
    scale = np.clip(scale, 1e-7, 1e4) if name == "fp16" else scale  # what fp16 holds
    ops = ops_for(isa, activations=activations)
    weight, x = make_weight(name, (17, 384), scale=scale), make_x(5, 384, size=size)
    assert_within_bound(isa, ops.project(ops.linear(weight), x), x, weight, activations=activations)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    groups=st.integers(1, 6),
    beyond=st.integers(0, 31),
    out=st.integers(1, 40),
    rows=st.integers(0, 14),
    seed=st.integers(0, 1000),
    with_bias=st.booleans(),
    activations=st.sampled_from(["fp32", "int8"]),
)
def test_products_of_any_shape_stay_within_the_bound(name, groups, beyond, out, rows, seed, with_bias, activations):
    group = FORMATS[name].group_size
    width = groups * group if group else groups * 32 + beyond
    weight, x = make_weight(name, (out, width), seed=seed), make_x(rows, width, seed=seed)
    bias = np.random.default_rng(seed).standard_normal(out).astype(np.float32) if with_bias else None
    for isa in RUNNABLE:
        ops = ops_for(isa, activations=activations)
        y = ops.project(ops.linear(weight, bias), x)
        assert y.shape == (rows, out)
        assert_within_bound(isa, y, x, weight, bias, activations)


@every_isa
@every_format
def test_one_hot_inputs_read_back_exactly_what_the_stored_bits_mean(isa, name):
    weight = make_weight(name, (19, 128))
    y = ops_for(isa).project(ops_for(isa).linear(weight), np.eye(128, dtype=np.float32))
    np.testing.assert_array_equal(y.T, weight.dequantize())


@every_isa
def test_int4_takes_the_low_nibble_first_and_code_is_nibble_minus_eight(isa):
    words = np.array([[0x76543210, 0xFEDCBA98, 0x00000000, 0xFFFFFFFF]], np.uint32)
    weight = Weight(
        format=FORMATS["int4-g32"], shape=(1, 32), codes=words, scale=np.array([[0.5]]).astype(ml_dtypes.bfloat16)
    )
    codes = [*range(-8, 8), *[-8] * 8, *[7] * 8]
    y = ops_for(isa).project(ops_for(isa).linear(weight), np.eye(32, dtype=np.float32))
    assert y[:, 0].tolist() == [code * 0.5 for code in codes]


@every_isa
@every_format
def test_a_row_gives_the_same_bits_alone_and_among_others_on_any_number_of_threads(isa, name):
    weight, x = make_weight(name, (200, 1152)), make_x(64, 1152)
    together = ops_for(isa).project(ops_for(isa).linear(weight), x)
    for threads in (1, 2, 3):
        ops = ops_for(isa, threads)
        linear = ops.linear(weight)
        np.testing.assert_array_equal(ops.project(linear, x), together)
        for rows in (1, 2, 3, 4, 5, 6, 7, 13):
            np.testing.assert_array_equal(ops.project(linear, x[:rows].copy()), together[:rows])


@every_isa
def test_bf16_activations_are_rounded_to_nearest_even_before_the_product(isa):
    weight = make_weight("fp32", (7, 96))
    x = make_x(4, 96)
    x.view(np.uint32)[0, :4] = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF]  # ties, above a tie, to infinity
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    fp32, bf16 = ops_for(isa), ops_for(isa, 1, "bf16")
    finite, wanted = x[1:].copy(), rounded[1:].copy()
    np.testing.assert_array_equal(bf16.project(bf16.linear(weight), finite), fp32.project(fp32.linear(weight), wanted))
    one_hot = np.diag(x[0]).astype(np.float32)[:3]
    identity = Weight(format=FORMATS["fp32"], shape=(96, 96), codes=np.eye(96, dtype=np.float32))
    np.testing.assert_array_equal(np.diag(bf16.project(bf16.linear(identity), one_hot)), rounded[0, :3])


@every_isa
def test_nan_and_infinity_are_carried_through(isa):
    ops, weight = ops_for(isa, 1, "bf16"), make_weight("bf16", (5, 40))
    x = make_x(3, 40)
    x[0, 39], x[1, 0] = np.nan, np.inf
    y = ops.project(ops.linear(weight), x)
    assert np.isnan(y[0]).all()
    assert np.isinf(y[1]).all()
    assert np.isfinite(y[2]).all()


@every_isa
@every_format
def test_embedding_gathers_exactly_the_dequantized_rows(isa, name):
    weight, ids = make_weight(name, (50, 128)), np.array([49, 0, 7, 7, 31], np.int32)
    np.testing.assert_array_equal(ops_for(isa).embed(ops_for(isa).table(weight), ids), weight.dequantize()[ids])


@every_isa
def test_every_half_that_exists_is_widened_exactly(isa):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    weight = Weight(format=FORMATS["fp16"], shape=(256, 256), codes=bits.view(np.float16))
    table = ops_for(isa).table(weight)
    got = ops_for(isa).embed(table, np.arange(256, dtype=np.int32))
    np.testing.assert_array_equal(got, bits.view(np.float16).astype(np.float32))


@every_isa
@pytest.mark.parametrize("width", [1, 7, 8, 65, 2048])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e30])
def test_rms_norm_agrees_with_float64(isa, width, size):
    x, gain = make_x(3, width, size=size), make_x(1, width, seed=2)[0]
    exact = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * gain
    # One rounding of the scale (summed in double) and two products.
    np.testing.assert_allclose(ops_for(isa).rms_norm(x, gain, 1e-5), exact, rtol=4 * EPS, atol=4 * SUBNORMAL)


@every_isa
@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
def test_rope_rotates_half_split_pairs(isa, head_dim):
    x, half = make_x(5, 3 * head_dim), head_dim // 2
    angles = make_x(5, half, seed=3).astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = np.split(x.astype(np.float64).reshape(5, 3, head_dim), 2, axis=-1)
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    exact = np.concatenate((a * c - b * s, b * c + a * s), axis=-1).reshape(x.shape)
    # Two products and a sum: at most two roundings of |a| + |b|.
    np.testing.assert_allclose(ops_for(isa).rope(x, cos, sin, head_dim), exact, rtol=0, atol=4 * EPS * np.abs(x).max())


@every_isa
@pytest.mark.parametrize("width", [1, 15, 16, 5000])
def test_silu_mul_agrees_with_float64(isa, width):
    gate, up = make_x(3, width, size=10), make_x(3, width, seed=2)
    gate[:, 0] = [0.0, -200.0, 200.0]
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(-wide)) * up
    # exp within 2 ulp, then a sum, a quotient and a product; below -88 the result is tiny, not exact.
    np.testing.assert_allclose(ops_for(isa).silu_mul(gate, up), exact, rtol=8 * EPS, atol=1e-35)


@every_isa
def test_silu_of_extreme_values_is_the_limit(isa):
    gate = np.array([[-3e38, -1e4, -88.4, 88.4, 3e38, 0.0]], np.float32)
    got = ops_for(isa).silu_mul(gate, np.ones_like(gate))
    np.testing.assert_allclose(got, [[0, 0, 0, 88.4, 3e38, 0]], rtol=1e-6, atol=2)
    assert np.isnan(ops_for(isa).silu_mul(np.full((1, 3), np.nan, np.float32), np.ones((1, 3), np.float32))).all()


@every_isa
def test_add_is_exact_and_take_rows_copies_rows(isa):
    x, y, ops = make_x(300, 129), make_x(300, 129, seed=2), ops_for(isa)
    np.testing.assert_array_equal(ops.add(x, y), x + y)
    taken = ops.take_rows(x, np.array([2, 0, 2]))
    np.testing.assert_array_equal(taken, x[[2, 0, 2]])
    assert not np.shares_memory(taken, x)


def test_buffers_come_to_the_device_and_back_as_float32_copies():
    ops, values = NativeOps(num_threads=1), make_x(2, 3).astype(ml_dtypes.bfloat16)
    vector = ops.vector(values)
    assert vector.dtype == np.float32
    source = make_x(2, 3)
    assert not np.shares_memory(ops.from_host(source), source)
    np.testing.assert_array_equal(ops.to_host(ops.from_host(source)), source)


# What comes in from outside


def test_buffers_of_the_wrong_type_shape_or_layout_are_refused():
    ops, weight = NativeOps(num_threads=1), make_weight("int8", (4, 8))
    linear, x = ops.linear(weight), make_x(3, 8)
    unaligned = np.zeros(3 * 8 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 8)
    for wrong, message in (
        (x.astype(np.float64), "x: expected a numpy array of float32, got float64"),
        ([[1.0] * 8], "x: expected a numpy array of float32, got list"),
        (x[:, :7].copy(), r"x: expected shape \['any', 8\], got \(3, 7\)"),
        (x[0], r"x: expected shape"),
        (make_x(8, 3).T, "x: expected C-contiguous"),
        (unaligned, "x: expected C-contiguous aligned"),
    ):
        with pytest.raises(KernelError, match=message):
            ops.project(linear, wrong)
    with pytest.raises(KernelError, match="gain: expected shape"):
        ops.rms_norm(x, x[0, :4].copy(), 1e-5)
    with pytest.raises(KernelError, match="up: expected shape"):
        ops.silu_mul(x, x[:2])
    with pytest.raises(KernelError, match="y: expected shape"):
        ops.add(x, x[:2])
    with pytest.raises(KernelError, match="cos: expected shape"):
        ops.rope(x, x, x, 8)
    for head_dim in (3, 0, 16):
        with pytest.raises(KernelError, match=rf"head_dim {head_dim} must be even and divide the width 8"):
            ops.rope(x, x, x, head_dim)


def test_token_ids_outside_the_table_are_refused():
    ops = NativeOps(num_threads=1)
    table = ops.table(make_weight("bf16", (10, 8)))
    for ids in ([3, -1], [10, 2]):
        with pytest.raises(KernelError, match=r"token id (-1|10) \(1 of 2\) is not in 0..9"):
            ops.embed(table, np.array(ids, np.int32))


def test_matrices_and_biases_that_do_not_fit_are_refused():
    ops = NativeOps(num_threads=1)
    with pytest.raises(KernelError, match=r"got shape \(2, 4, 8\); take one expert at a time"):
        ops.linear(make_weight("fp32", (2, 4, 8)))
    with pytest.raises(KernelError, match=r"bias has shape \(3,\); a matrix \(4, 8\) needs \(4,\)"):
        ops.linear(make_weight("fp32", (4, 8)), np.zeros(3, np.float32))


def test_weights_that_are_read_only_or_unaligned_in_a_file_are_taken():
    weight, x = make_weight("int4-g32", (5, 64)), make_x(2, 64)
    raw = b"x" + weight.codes.tobytes()
    mapped = replace(weight, codes=np.frombuffer(raw, np.uint32, offset=1).reshape(weight.codes.shape))
    ops = NativeOps(num_threads=1)
    np.testing.assert_array_equal(ops.project(ops.linear(mapped), x), ops.project(ops.linear(weight), x))


# Choosing, loading, threads


@every_isa
def test_a_device_with_fewer_features_takes_lesser_rows(isa):
    ops = ops_for(isa)
    ops.linear(make_weight("int4-g32", (4, 32)))
    ops.table(make_weight("bf16", (4, 32)))
    assert ops.kernels["linear int4-g32"] == f"native_{isa.name}_float_int4_g32"
    assert ops.kernels["embed bf16"] == f"native_{isa.name}_rows_bf16"
    assert ops.kernels["attention"] == f"native_{isa.name}"


def test_a_choice_is_logged_once_with_every_refusal(caplog):
    with caplog.at_level(logging.INFO, "halve.kernels"):
        ops = NativeOps(replace(detect_cpu(), features=frozenset()), num_threads=1)
        for seed in range(3):
            ops.linear(make_weight("int8", (4, 32), seed=seed))
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO and "linear int8" in r.getMessage()]
    assert len(lines) == 1
    assert "native_baseline_float_int8" in lines[0]
    assert "'native_avx2_float_int8': 'needs avx2, fma, f16c'" in lines[0]


def test_the_report_names_a_row_for_every_format_and_why_others_refuse():
    report = native_rows.format_report(replace(detect_cpu(), features=frozenset({"avx2", "f16c"})))
    assert [entry["format"] for entry in report] == list(FORMATS)
    assert all(entry.keys() == {"op", "format", "kernel", "refused"} and entry["op"] == "linear" for entry in report)
    int4 = next(entry for entry in report if entry["format"] == "int4-g32")
    assert int4["kernel"] == "native_baseline_dot_int4_g32"
    assert {"kernel": "native_avx2_dot_int4_g32", "reason": "needs fma"} in int4["refused"]
    cuda = native_rows.format_report(replace(detect_cpu(), name="cuda:0", kind="cuda"))
    assert all(entry["kernel"] is None for entry in cuda)
    for entry in cuda:
        every = [row.name for row in native_rows.format_rows("linear", FORMATS[entry["format"]])]
        assert [refused["kernel"] for refused in entry["refused"]] == every


def test_a_device_that_is_not_this_machine_is_refused():
    with pytest.raises(KernelError, match=r"claims \['amx_tile2'\], which this machine"):
        NativeOps(replace(detect_cpu(), features=frozenset({"amx_tile2"})))
    with pytest.raises(KernelError, match="needs a cpu; cuda:0 is cuda"):
        NativeOps(replace(detect_cpu(), name="cuda:0", kind="cuda"))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"activations: 'int4' is not one of \['fp32', 'bf16', 'int8'\]"):
        NativeOps(activations="int4")
    for wrong in (0, -1, 1025):
        with pytest.raises(ConfigError, match=f"num_threads: {wrong} is not between 1 and 1024"):
            NativeOps(num_threads=wrong)


@pytest.fixture
def fresh_library(monkeypatch):
    """Look for the library anew, before and after."""
    native_library.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native_library.library.cache_clear()


def test_without_the_library_the_reason_and_the_way_out_are_told(fresh_library):
    fresh_library.setattr(native_library, "library_paths", lambda: [Path("/nowhere/lib.so")])
    reason = native_rows.available()
    assert reason is not None
    assert "built without its C++ part" in reason
    assert "/nowhere/lib.so" in reason
    assert "reinstall halve" in reason
    with pytest.raises(KernelError, match=r"built without its C\+\+ part"):
        NativeOps()
    report = native_rows.format_report(detect_cpu())
    assert all(entry["kernel"] is None and entry["refused"][0]["reason"] == reason for entry in report)


def test_with_the_library_nothing_is_missing():
    assert native_rows.available() is None


def test_the_library_is_looked_for_beside_the_module_first_and_then_where_it_was_installed(monkeypatch):
    installed = SimpleNamespace(locate_file=lambda path: Path("/site-packages") / path)
    monkeypatch.setattr(native_library.metadata, "distribution", lambda name: installed)
    paths = native_library.library_paths()
    assert paths[0] == Path(native.__file__).with_name("libhalve_kernels.so")
    assert paths[1] == Path("/site-packages/halve/kernels/libhalve_kernels.so")

    def unknown(name):
        raise native_library.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(native_library.metadata, "distribution", unknown)
    assert native_library.library_paths() == paths[:1]


def test_a_library_of_another_interface_version_is_refused(monkeypatch):
    path = next(p for p in native_library.library_paths() if p.exists())
    monkeypatch.setattr(native_library, "ABI_VERSION", 999)
    with pytest.raises(KernelError, match=r"has interface version .*, this halve needs 999; reinstall halve"):
        native_library.open_library(path)


def test_a_file_that_is_no_library_of_ours_is_refused(tmp_path):
    text = tmp_path / "libhalve_kernels.so"
    text.write_text("not a library")
    with pytest.raises(KernelError, match="is not a library of halve's kernels"):
        native_library.open_library(text)


def test_an_instruction_set_that_was_not_built_is_an_error():
    with pytest.raises(KernelError, match="has no rows for sparc"):
        native_rows._rms_norm(native_rows.Isa("sparc", 9, 4, ()), make_x(1, 4), make_x(1, 4), 1e-5, threads=1)


def test_fewer_threads_than_asked_for_are_told(monkeypatch, caplog):
    monkeypatch.setattr(team, "library", lambda: SimpleNamespace(halve_grow_team=lambda threads: 1))
    with caplog.at_level(logging.WARNING, "halve.kernels"):
        NativeOps(num_threads=3)
    assert "the system gave 1 of 3 threads" in caplog.text


def test_calls_from_several_python_threads_at_once_give_the_same_bits():
    ops, x = NativeOps(num_threads=2), make_x(8, 1024)
    linear = ops.linear(make_weight("int4-g32", (256, 1024)))
    wanted, wrong = ops.project(linear, x), []

    def work():
        wrong.extend(1 for _ in range(40) if not np.array_equal(ops.project(linear, x), wanted))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run_python(script):
    """Run a script in an interpreter of its own and return what it printed."""
    src = str(Path(native.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([src, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", SETUP + script], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


SETUP = """
import os, sys, threading
import numpy as np
from halve.formats import FORMATS, Weight
from halve.kernels.native import NativeOps
ops = NativeOps(num_threads=3)
weight = Weight(format=FORMATS["fp32"], shape=(256, 512), codes=np.ones((256, 512), np.float32))
linear, x = ops.linear(weight), np.ones((4, 512), np.float32)
assert (ops.project(linear, x) == 512).all()
"""


def test_neither_torch_nor_transformers_is_loaded():
    assert run_python("print([m for m in ('torch', 'transformers') if m in sys.modules])") == "[]"


def test_forked_children_and_their_parent_go_on_computing():
    script = """
for _ in range(5):
    child = os.fork()
    if child == 0:
        good = all((ops.project(linear, x) == 512).all() for _ in range(20))
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (ops.project(linear, x) == 512).all()
print("done")
"""
    assert run_python(script) == "done"


def test_the_interpreter_exits_while_a_daemon_thread_computes():
    script = """
def forever():
    while True:
        ops.project(linear, x)
started = threading.Thread(target=forever, daemon=True)
started.start()
print("done")
"""
    assert run_python(script) == "done"
