"""`price`, `breakeven`, `plan-hardware`: shapes, a real bundle, the command line, the page."""

import re
from datetime import date
from decimal import Decimal

import pytest

from halve.api.breakeven import breakeven
from halve.api.cost_report import write_report
from halve.api.costing import read_machines, read_service_level, read_subject, throughput_on
from halve.api.plan_hardware import plan_hardware
from halve.api.price import price
from halve.api.under_load import allowed_utilization
from halve.core.errors import ConfigError, OutputError
from halve.core.workload import ServiceLevel
from halve.economics.catalogue import load_catalogue
from halve.economics.currency import read_currency
from halve.economics.days import DAYS
from halve.economics.presets import find_preset
from halve.economics.roofline import DoesNotFitError, Throughput

D = Decimal


@pytest.fixture(autouse=True)
def _catalogue_that_ships(monkeypatch, tmp_path):
    monkeypatch.setenv("HALVE_PRICES", str(tmp_path / "none.toml"))


def recomputed(row):
    """A row's price of a million tokens, as a spreadsheet makes it of the cells before."""
    get = {key: D(str(row[key])) for key in row if re.fullmatch(r".*_usd_per_mtok|utilization|.*_tokens", key)}
    request = (
        (get["prompt_tokens"] - get["cached_tokens"]) * get["input_usd_per_mtok"]
        + get["cached_tokens"] * get["cached_input_usd_per_mtok"]
        + get["output_tokens"] * get["output_usd_per_mtok"]
    ) / (1_000_000 * get["utilization"])
    return request, request * 1_000_000 / (get["prompt_tokens"] + get["output_tokens"])


@pytest.mark.parametrize("workload", ["chat", "retrieval"])
def test_rows_recompute_from_their_own_cells(workload):
    found = price(device="H100", weights="int8", workload=workload)
    for row in found.rows():
        request, million = recomputed(row)
        assert float(request) == pytest.approx(float(row["usd_per_request"]), rel=1e-6)
        assert float(million) == pytest.approx(float(row["usd_per_mtok"]), rel=1e-6)


def test_a_shape_is_an_estimate_that_says_its_error_its_price_and_its_age():
    found = price(weights="int8", device="L40S")
    assert found.throughput.basis == "roofline"
    assert found.throughput.error is not None
    notes = "\n".join(found.notes)
    for words in ("an estimate; memory is read at 70%", "off by a factor of 1.19", "skypilot-catalog", "stale"):
        assert words in notes
    assert found.to_plain()["verdict"].endswith("(loss of quality not measured)")
    assert price(weights="int8", device="L40S", price_per_hour=D("0.01")).sentence.startswith("your own machine is")


def test_a_bundle_costs_what_its_certificate_measured(passed):
    found = price(model=str(passed.path), price_per_hour=D("3.60"), vs=[])
    certificate = passed.certificate
    best = max(r.decode_tok_s for r in certificate.rooflines if r.model == "smaller")
    assert found.throughput.basis == "measured"
    assert float(found.cost.output_usd_per_mtok) == pytest.approx(1000 / best, rel=1e-9)
    prefill = certificate.speed.prefill_tok_s
    assert prefill is not None
    assert float(found.cost.input_usd_per_mtok) == pytest.approx(1000 / prefill.value, rel=1e-9)
    assert "certified at most 1 %" in found.sentence
    elsewhere = price(model=str(passed.path), device="c7a.16xlarge", vs=[])
    assert elsewhere.throughput.basis == "scaled"
    with pytest.raises(ConfigError, match=r"what does that cost\? give --price-per-hour, or --device"):
        price(model=str(passed.path))
    even = breakeven(model=str(passed.path), price_per_hour=D("0.0001"), vs=["gpt-5-mini"], operators_per_month=D(1))
    assert [row.case for row in even.rows] == ["now", "with operators", "before compression"]


def test_a_model_that_was_never_measured_wants_a_device(tiny):
    with pytest.raises(ConfigError, match="nothing was measured of it"):
        price(model=str(tiny), price_per_hour=D(1))
    assert price(model=str(tiny), device="c7a.large", vs=[]).throughput.basis == "roofline"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"device": "H300"}, "device 'H300': not in the catalogue"),
        ({"device": "MI300X"}, "known is reserved (--kind reserved)"),
        ({"vs": ["llama@groq"]}, "; groq has llama"),
        ({"device": "TPU v6e"}, "on_demand price is not known here; give --price-per-hour"),
        ({"device": "L4", "price_per_hour": D(-1)}, "--price-per-hour -1: must be from 0"),
        ({"device": "L4", "utilization": D(2)}, "--utilization 2: must be above 0 and at most 1"),
        ({"device": "L4", "slo": "ttft=2"}, "'ttft=2' is not ttft=TIME or tpot=TIME"),
        ({"device": "L4", "slo": "tpot=1ms"}, "the nearest that it can keep is"),
        ({"model": "llama-3.1-8c"}, "neither a directory nor a known shape; did you mean 'llama-3.1-8b'?"),
        ({"weights": "int2"}, "--weights int2: must be one of"),
        ({"workload": "chatt"}, "did you mean 'chat'?"),
        ({"workload": "missing.csv"}, "there is no such file"),
        ({"vs": ["gpt-9-tiny"]}, "API 'gpt-9-tiny': no such price"),
        ({"kind": "daily"}, "--kind daily"),
    ],
)
def test_what_is_unknown_or_absurd_is_named_with_the_way_out(words, said):
    with pytest.raises(ConfigError) as error:
        price(**words)
    assert said in str(error.value)


def test_the_cheapest_machine_of_a_device_is_one_that_holds_the_model():
    found = price(device="EPYC-9R14", vs=[])
    assert found.machine.memory_gb > 17  # c7a.large is cheaper, and has 4 GB
    with pytest.raises(DoesNotFitError, match="do not fit"):
        price(device="c7a.large", vs=[])


def test_prices_of_apis_are_those_of_a_day():
    then = price(device="H100", vs=["gpt-5-mini"], as_of=date(2026, 6, 1))
    assert then.to_plain()["api_prices_of"] == "2026-06-01"
    assert then.rivals[0].price.as_of <= date(2026, 6, 1)


def test_a_trace_with_missing_columns_is_named(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("when,how\n1,2\n")
    with pytest.raises(Exception, match=r"trace\.csv:2: columns .* are of no trace"):
        price(workload=str(path))


def test_a_service_level_lowers_the_utilization_and_a_looser_one_lowers_it_less():
    preset = find_preset("chat")
    rates = Throughput(prefill_tok_s=8000, decode_tok_s=600, sequences=16, basis="measured", origin="x", error=None)
    tight, _ = allowed_utilization(rates, preset, ServiceLevel(ttft_s=3.0, time_per_token_s=0.1), DAYS["flat"])
    loose, words = allowed_utilization(rates, preset, ServiceLevel(ttft_s=60.0, time_per_token_s=1.0), DAYS["flat"])
    assert 0 < tight < loose <= 0.95 / preset.peak
    assert "keeps the level" in words
    with pytest.raises(DoesNotFitError, match="no load keeps it"):
        allowed_utilization(rates, preset, ServiceLevel(ttft_s=0.01), DAYS["flat"])


def test_a_day_lowers_the_utilization_by_its_fullest_hour():
    words = {"device": "H100", "slo": "ttft=30s,tpot=500ms", "vs": []}
    flat, office = price(day="flat", **words), price(day="office", **words)
    assert float(flat.cost.utilization / office.cost.utilization) == pytest.approx(3, rel=1e-3)
    assert "office: eight hours" in office.utilization_origin
    with pytest.raises(ConfigError, match=r"--day flat: .* takes --slo"):
        price(day="flat")


def test_a_trace_on_the_machine_that_was_measured_is_simulated_as_it_is(passed, tmp_path):
    requests = [(i * 2.0, 40, 20) for i in range(50)]
    path = tmp_path / "trace.csv"
    rows = "\n".join(f"{at},{prompt},{output}" for at, prompt, output in requests)
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    found = price(model=str(passed.path), price_per_hour=D("3.60"), workload=str(path), vs=[])
    # $0.001 a second over the time to the last answer, 98 s and a little, for 50 * 60 tokens.
    assert float(found.allocation_usd_per_mtok) == pytest.approx(98 * 0.001 / 3000 * 1e6, rel=0.02)
    assert "the trace as it is" in found.utilization_origin
    assert found.cost.utilization < 1
    slow = tmp_path / "slow.csv"
    slow.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(f"{i / 1e3},20,300" for i in range(200)))
    late = price(model=str(passed.path), price_per_hour=D("3.60"), workload=str(slow), vs=[])
    assert late.cost.utilization > D("0.99")
    assert "answers fall behind" in late.utilization_origin


def test_steps_are_measured_here_and_now(tiny):
    found = price(model=str(tiny), price_per_hour=D(1), measure=True, vs=[])
    assert found.throughput.basis == "measured"
    assert "measured on this machine now" in found.throughput.origin
    for words, said in (
        ({"model": None}, "is a shape; name a bundle"),
        ({"device": "L4"}, "--device L4 is another"),
        ({"price_per_hour": None}, "what does that cost"),
    ):
        with pytest.raises(ConfigError, match=said):
            price(**{"model": str(tiny), "price_per_hour": D(1), "measure": True, **words})


def test_machines_are_ranked_and_those_left_out_say_why():
    found = plan_hardware(model="llama-3.3-70b", weights="int4")
    prices = [row.usd_per_mtok for row in found.rows]
    assert prices == sorted(prices)
    assert found.sentence.startswith("cheapest: ")
    reasons = dict(found.left_out)
    assert any("do not fit" in reason for reason in reasons.values())
    assert reasons["gcp a3-highgpu-8g (us-central1)"].startswith("its price is unknown")
    assert any("no on_demand price of it is known" in reason for reason in reasons.values())
    reserved = plan_hardware(model="llama-3.1-8b", kind="reserved")
    assert {row.machine.device.name for row in reserved.rows} == {"H100", "H200", "B200", "MI300X"}
    only = plan_hardware(device="L40S")
    assert {row.machine.device.name for row in only.rows} == {"L40S"}


def test_a_ranking_recomputes_from_its_own_cells():
    for row in plan_hardware(model="llama-3.1-8b", workload="retrieval", weights="fp8").table():
        get = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        seconds = (get["prompt_tokens"] - get["cached_tokens"]) / get["prefill_tok_s"]
        seconds += get["output_tokens"] / get["decode_tok_s"]
        tokens = get["prompt_tokens"] + get["output_tokens"]
        usd = get["usd_per_hour"] / 3600 * seconds / tokens * 1e6 / get["utilization"]
        assert usd == pytest.approx(get["usd_per_mtok"], rel=1e-6)


def test_a_level_takes_part_in_the_ranking():
    found = plan_hardware(weights="int8", device="L40S", slo="ttft=5s,tpot=200ms")
    free = plan_hardware(weights="int8", device="L40S", utilization=D("0.95"))
    assert found.rows[0].usd_per_mtok > free.rows[0].usd_per_mtok


def test_a_machine_is_the_cheapest_of_its_device_or_the_instance_that_was_named():
    catalogue = load_catalogue(shipped_alone=True)
    assert read_machines(catalogue, "H200", None)[0].usd_per_hour == D("3.39")
    [named] = read_machines(catalogue, "p5en.48xlarge", None, region="ap-northeast-1")
    assert named.usd_per_hour == D("79.12")
    assert read_machines(catalogue, "Standard_ND96isr_H100_v5", D(9))[0].count == 8
    [given] = read_machines(catalogue, "H200", D(2))
    assert (given.usd_per_hour, given.age.is_stale, given.count) == (D(2), False, 1)
    throughput = throughput_on(read_subject(None), given, find_preset("chat"), read_service_level(None))
    assert throughput.basis == "roofline"


def test_the_page_says_what_the_rows_say_in_two_languages(tmp_path):
    yen = read_currency("JPY=155.2@2026-11-20")
    found = breakeven(weights="int8", device="L40S", operators_per_month=D(1000), currency=yen)
    path = tmp_path / "page.html"
    write_report(path, found, "ja")
    html = path.read_text(encoding="utf-8")
    assert '<html lang="ja">' in html
    for row in found.priced.rows():
        assert yen.say_price(D(str(row["usd_per_mtok"]))) in html
    for words in (
        "1 USD = 155.2 JPY, 2026-11-20",
        "損益分岐",
        "with operators",
        "roofline estimate",
        "skypilot-catalog",
    ):
        assert words in html
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!#)', html)  # nothing is fetched
    with pytest.raises(OutputError, match="can't be written"):
        write_report(tmp_path / "no" / "page.html", found)
    with pytest.raises(ConfigError, match="language: 'de' must be en or ja"):
        write_report(path, found, "de")
