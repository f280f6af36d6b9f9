"""Rows of a table: the first that does not refuse runs, and the others say why not."""

import pytest

from halve.core.errors import KernelError
from halve.formats import FORMATS
from halve.hardware import Device
from halve.kernels import native_rows
from halve.kernels.dispatch import Kernel, Spec, choose

DEVICE = Device(
    name="cpu",
    kind="cpu",
    model="a test",
    features=frozenset({"avx2"}),
    num_cores=1,
    memory_bytes=1,
    machine="x86_64",
)


def row(name, reason=None, op="linear"):
    return Kernel(name=name, op=op, refusal=lambda device, spec: reason, run=lambda: name)


def test_the_first_row_that_does_not_refuse_is_chosen_and_the_reasons_before_it_are_kept():
    table = [row("fast", "needs avx512f"), row("other", op="embed"), row("plain"), row("slow")]
    choice = choose(table, DEVICE, Spec(op="linear", format=FORMATS["int8"]))
    assert choice.kernel.name == "plain"
    assert choice.refused == (("fast", "needs avx512f"),)


def test_when_every_row_refuses_the_error_names_operation_format_device_and_reasons():
    with pytest.raises(KernelError, match=r"linear of int8 on cpu \(a test\): \[\('fast', 'needs avx512f'\)\]"):
        choose([row("fast", "needs avx512f")], DEVICE, Spec(op="linear", format=FORMATS["int8"]))


def test_an_operation_without_any_row_is_an_error():
    with pytest.raises(KernelError, match=r"no kernel runs conv on cpu.*no row for it"):
        choose([row("fast")], DEVICE, Spec(op="conv"))


def test_names_of_native_rows_are_unique_for_each_operation():
    names = [(kernel.op, kernel.name) for kernel in native_rows.TABLE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("op", "rows"), [("linear", "float"), ("embed", "rows")])
@pytest.mark.parametrize("name", FORMATS)
def test_the_native_table_has_a_baseline_row_for_every_format(op, rows, name):
    bare = Device(name="cpu", kind="cpu", model="any", features=frozenset(), num_cores=1, memory_bytes=1, machine="x")
    choice = choose(native_rows.TABLE, bare, Spec(op=op, format=FORMATS[name]))
    assert choice.kernel.name == f"native_baseline_{rows}_{name.replace('-', '_')}"


@pytest.mark.parametrize("isa", native_rows.ISAS, ids=lambda isa: isa.name)
def test_a_native_row_needs_exactly_the_features_of_its_instruction_set(isa):
    device = Device(
        name="cpu",
        kind="cpu",
        model="any",
        features=frozenset(isa.features),
        num_cores=1,
        memory_bytes=1,
        machine="x86_64",
    )
    choice = choose(native_rows.TABLE, device, Spec(op="linear", format=FORMATS["int4-g32"]))
    assert choice.kernel.name == f"native_{isa.name}_float_int4_g32"
    better = [reason for name, reason in choice.refused if name.endswith("_int4_g32")]
    assert len(better) == native_rows.ISAS.index(isa)
    assert all(reason.startswith("needs ") for reason in better)


def test_a_row_of_one_format_refuses_another_and_a_device_that_is_no_cpu():
    gpu = Device(
        name="cuda:0", kind="cuda", model="H200", features=frozenset(), num_cores=1, memory_bytes=1, machine="cuda"
    )
    baseline = next(k for k in native_rows.TABLE if k.op == "linear" and k.name == "native_baseline_float_int8")
    assert baseline.refusal(DEVICE, Spec(op="linear", format=FORMATS["fp32"])) == "takes int8, not fp32"
    assert baseline.refusal(gpu, Spec(op="linear", format=FORMATS["int8"])) == "needs a cpu; cuda:0 is cuda"
