"""The catalogue that ships, one's own file before it, and what estimates make of it."""

import re
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from halve.core.errors import ConfigError
from halve.core.workload import ServiceLevel, Workload, WorkloadRequest
from halve.economics.catalogue import Age, load_catalogue, own_prices
from halve.economics.presets import PRESETS, QUANTILES, find_preset, preset_of
from halve.economics.roofline import Assumptions, DoesNotFitError, Throughput, estimate, scaled, step_seconds
from halve.economics.shapes import SHAPES, find_shape
from halve.economics.validation import known_error, validate

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def catalogue():
    return load_catalogue(shipped_alone=True)


def test_devices_that_one_does_not_own_are_there(catalogue):
    for name in (
        "H100", "H200", "B200", "MI300X", "L4", "L40S", "A10G", "RTX 4090", "TPU v5e", "TPU v6e", "Inferentia2",
        "Gaudi 3", "MTIA v2", "Graviton4", "EPYC-9554", "Apple-M4-Max",
    ):  # fmt: skip
        assert catalogue.device(name).source
    for name in ("p5.48xlarge", "p5en.48xlarge", "a3-highgpu-8g", "ND96isr_H200_v5", "g6e.xlarge", "c7a.large"):
        assert catalogue.machines(name)


def test_no_price_is_made_up_and_each_says_where_it_is_from(catalogue):
    for price in catalogue.prices:
        assert price.source
        assert price.usd_per_hour is None or price.usd_per_hour > 0
    unknown = [p for p in catalogue.prices if p.usd_per_hour is None]
    assert {p.instance for p in unknown} >= {"a3-highgpu-8g", "ct6e-standard-1t"}
    assert catalogue.machines("TPU v6e")[-1].usd_per_hour is None


def test_a_price_gets_stale(catalogue):
    (price,) = catalogue.machines("c7a.large")
    assert price.as_of == date(2026, 8, 22)
    assert not Age.of(price.as_of, date(2026, 11, 20)).is_stale
    old = Age.of(price.as_of, date(2026, 11, 21))
    assert str(old).endswith("91 days old, stale")
    assert old.to_plain() == {"as_of": "2026-08-22", "age_days": 91, "stale": True}
    undated = next(p for p in catalogue.prices if p.as_of is None)
    assert undated.age.is_stale
    assert "of no known day" in str(undated.age)


def test_ones_own_file_goes_before_what_ships(tmp_path, monkeypatch):
    path = tmp_path / "prices.toml"
    path.write_text(
        '[[device]]\nname = "Mine"\nkind = "gpu"\nmemory_gb = 24\nbandwidth_gb_s = 900\nrates = { bf16 = 100 }\n'
        'source = "a sticker"\n[[price]]\ncloud = "aws"\ninstance = "c7a.large"\ndevice = "EPYC-9R14"\n'
        'region = "us-east-1"\nusd_per_hour = 0.05\nkind = "on_demand"\nsource = "my contract"\nas_of = 2026-11-01\n'
    )
    monkeypatch.setenv("HALVE_PRICES", str(path))
    assert own_prices() == path
    found = load_catalogue()
    assert found.device("mine").bandwidth_gb_s == 900
    (price,) = found.machines("c7a.large")
    assert (price.usd_per_hour, price.source) == (Decimal("0.05"), "my contract")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[price]]\ncloud = 1", "missing"),
        ("[[prices]]\n", "unknown key; did you mean 'price'?"),
        ("version = 9", "version 9 was written by a newer Halve"),
        ("not toml", "not TOML"),
        (
            '[[price]]\ncloud = "a"\ninstance = "b"\ndevice = "H100"\nregion = "c"\nkind = "daily"\nsource = "d"',
            "'daily' is none of on_demand, spot, reserved",
        ),
        (
            '[[price]]\ncloud = "a"\ninstance = "b"\ndevice = "H1000"\nregion = "c"\nkind = "spot"\nsource = "d"',
            "device 'H1000' is not known; did you mean",
        ),
        (
            '[[price]]\ncloud = "a"\ninstance = "b"\ndevice = "H100"\nregion = "c"\nkind = "spot"\nsource = "d"\n'
            "usd_per_hour = -2",
            "must be from 0.000001",
        ),
        (
            '[[price]]\ncloud = "a"\ninstance = "b"\ndevice = "H100"\nregion = "c"\nkind = "spot"\nsource = "d"\n'
            'as_of = "soon"',
            "must be a day",
        ),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_rule(text, said, tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_catalogue(path)
    assert said in str(error.value)
    assert "prices.toml" in str(error.value)


def test_an_unknown_device_is_offered_the_nearest(catalogue):
    with pytest.raises(ConfigError, match=r"device 'H300': not in the catalogue; did you mean '[A-Z]"):
        catalogue.device("H300")


def test_a_step_by_hand(catalogue):
    """15.01 GB at 0.7 * 3350 GB/s and 32 layers of 40 us: 7.68 ms."""
    seconds = step_seconds(catalogue.device("H100"), find_shape("llama-3.1-8b"), 1, 0, Assumptions())
    assert seconds == pytest.approx(15.01e9 / (0.7 * 3350e9) + 32 * 40e-6, rel=1e-3)


def test_experts_are_read_as_tokens_come_to_them():
    """Of Mixtral's 8 experts one token reads 2, and many tokens read all."""
    shape = SHAPES["mixtral-8x7b"]
    beside = shape.parameters - shape.table_parameters - shape.expert_parameters
    assert shape.read_bytes(1) == pytest.approx(2 * (beside + shape.expert_parameters / 4))
    assert shape.read_bytes(1000) == pytest.approx(2 * (beside + shape.expert_parameters))


def test_what_does_not_fit_says_so_with_the_way_out(catalogue):
    with pytest.raises(DoesNotFitError, match=r"141\.1 GB of weights .* do not fit 80 GB \(H100\); use fewer bits"):
        estimate(catalogue.device("H100"), find_shape("llama-3.3-70b"), prompt_tokens=1000, output_tokens=200)
    with pytest.raises(DoesNotFitError, match="the nearest that it can keep is"):
        estimate(
            catalogue.device("L4"), find_shape("llama-3.1-8b"), prompt_tokens=99, output_tokens=9, time_per_token_s=0.01
        )


def test_a_service_level_makes_batches_smaller(catalogue):
    device, shape = catalogue.device("H200"), find_shape("llama-3.1-8b").quantized(8, kv_bits=8)
    free = estimate(device, shape, prompt_tokens=1000, output_tokens=1000)
    bound = estimate(device, shape, prompt_tokens=1000, output_tokens=1000, time_per_token_s=0.02)
    assert bound.sequences < free.sequences
    assert bound.time_per_token_s <= 0.02 < free.time_per_token_s


def test_a_measurement_is_carried_to_another_device_by_its_share_of_the_estimate():
    def rates(prefill, decode, sequences=4, origin="x"):
        return Throughput(
            prefill_tok_s=prefill, decode_tok_s=decode, sequences=sequences, basis="measured", origin=origin
        )

    found = scaled(rates(80, 40), rates(100, 50), rates(1000, 400, 9))
    assert (found.prefill_tok_s, found.decode_tok_s, found.sequences, found.basis) == (800, 320, 9, "scaled")


def test_the_roofline_is_held_to_published_figures_and_the_page_says_how_far():
    rows = validate()
    assert len(rows) >= 8
    assert len({row.published.source for row in rows}) >= 4
    text = (DOCS / "ECONOMICS.md").read_text(encoding="utf-8")
    for row in rows:
        line = f"| {row.published.tok_s:,.4g} | {row.estimated:,.4g} | {row.factor:.2f} |"
        assert line in text, f"docs/ECONOMICS.md lacks {line}"
    for sparse in (False, True):
        assert f"{known_error(sparse=sparse):.2f}" in re.findall(r"factor of (\d\.\d\d)", text)


@pytest.mark.parametrize("name", PRESETS)
def test_requests_of_a_preset_are_as_long_as_its_trace(name):
    preset = find_preset(name)
    assert len(preset.prompt) == len(preset.output) == len(QUANTILES)
    made = preset.workload(4000, 10.0, ServiceLevel())
    assert made.num_prompt_tokens / 4000 == pytest.approx(preset.mean_prompt, rel=0.15)
    assert made.num_output_tokens / 4000 == pytest.approx(preset.mean_output, rel=0.35)
    assert made.duration_s == pytest.approx(400, rel=0.1)


def test_statistics_of_a_trace_by_hand():
    sizes = {"prompt_tokens": 10, "output_tokens": 4}
    sharing = [WorkloadRequest(arrival_s=60.0 * i, prefix_blocks=(0,), **sizes) for i in range(6)]
    requests = (*sharing, WorkloadRequest(arrival_s=360.0, **sizes))
    preset = preset_of(Workload(name="mine", requests=requests, block_tokens=5))
    assert (preset.mean_prompt, preset.mean_output, preset.peak) == (10, 4, 1)
    assert preset.cached_share == pytest.approx(5 * 5 / 70)
    with pytest.raises(ConfigError, match=r"workload 'chats': .* did you mean 'chat'\?"):
        find_preset("chats")
