from halve.kernels.cuda import ceilings


def test_every_rate_is_measured_or_refused_with_a_reason():
    calls = []
    found = ceilings.measure("cpu", copy_bytes=1 << 20, side=64, samples=3, progress=lambda *done: calls.append(done))
    assert found.copy_gb_s.low <= found.copy_gb_s.value <= found.copy_gb_s.high
    assert found.copy_gb_s.n == 3
    rates = {"bf16": found.bf16_tflop_s, "fp8": found.fp8_tflop_s, "int8": found.int8_top_s}
    assert {name for name, rate in rates.items() if rate is None} == found.refused.keys()
    assert found.bf16_tflop_s is not None
    assert len(calls) == calls[-1][0] == calls[-1][1] == 3 - len(found.refused)


def test_a_rate_that_torch_refuses_is_null_with_torchs_own_reason(monkeypatch):
    def refuse(device, side):
        raise RuntimeError("no such product\nmore")

    monkeypatch.setattr(ceilings, "_fp8", refuse)
    found = ceilings.measure("cpu", copy_bytes=1 << 20, side=64, samples=3)
    assert found.fp8_tflop_s is None
    assert found.refused["fp8"] == "no such product"
