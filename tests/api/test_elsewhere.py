"""A device that is not here: what is estimated of it, and that it is said to be an estimate."""

import json
import logging
from dataclasses import replace
from decimal import Decimal

import pytest

import halve
from halve.api.elsewhere import estimated_cost, estimates_warning, where
from halve.api.shape_cost import LLAMA_1B
from halve.core.errors import ConfigError, RequestError
from halve.core.plan import Activations, KVCache, Plan
from halve.core.workload import ServiceLevel, Workload
from halve.formats import FORMATS
from halve.models.names import modules
from tests.tools import not_of_time

WORKLOAD = Workload.poisson(requests_per_s=1.0, num_requests=8, prompt_tokens=512, output_tokens=256)


def stored(name):
    return {m.name: FORMATS[name] for m in modules(LLAMA_1B)}


def cost(plan=Plan(), smaller="int4-g32", device="L4", config=LLAMA_1B, workload=WORKLOAD, usd="0.80"):  # noqa: B008
    return estimated_cost(where(device)[2], config, (stored("bf16"), stored(smaller)), plan, workload, Decimal(usd))


def test_fewer_bytes_are_answered_sooner_and_a_plan_that_changes_nothing_is_not():
    same, smaller = cost(smaller="bf16"), cost()
    assert same.output_tok_s == pytest.approx(same.original_output_tok_s)
    assert smaller.output_tok_s > smaller.original_output_tok_s
    rounded = cost(Plan(activations=Activations(format="int8"), kv_cache=KVCache(format="int8")))
    assert rounded.output_tok_s > smaller.output_tok_s
    assert (rounded.basis, rounded.device, rounded.replayed) == ("estimated", "L4", None)
    assert rounded.usd_per_mtok == pytest.approx(0.8 / (rounded.output_tok_s * 3600 / 1e6))


def test_names_are_those_of_the_catalogue_in_any_case():
    assert where("l4")[2].name == "L4"
    assert where("l4")[:2] == ("l4", "cpu")
    assert where("cpu") == ("cpu", "cpu", None)
    assert estimates_warning(None, LLAMA_1B) == ()
    assert "never certified" in estimates_warning(where("H100")[2], LLAMA_1B)[0]


def test_a_level_is_kept_by_fewer_sequences_and_one_that_none_keep_is_refused_with_the_nearest():
    def with_level(**level):
        return replace(WORKLOAD, service_level=ServiceLevel(**level))

    assert cost(workload=with_level(time_per_token_s=0.02)).level_met
    assert not cost(workload=with_level(ttft_s=1e-6)).level_met
    with pytest.raises(ConfigError, match="the nearest that it can keep is"):
        cost(workload=with_level(time_per_token_s=1e-5))


def test_a_model_beyond_its_memory_is_refused():
    large = replace(LLAMA_1B, layers=LLAMA_1B.layers * 30)
    formats = {m.name: FORMATS["bf16"] for m in modules(large)}
    with pytest.raises(ConfigError, match=r"do not fit 24 GB \(L4\)"):
        estimated_cost(where("L4")[2], large, (formats, formats), Plan(), WORKLOAD, None)


def test_a_bundle_says_what_it_was_estimated_for_and_verify_leaves_that_out(tiny, text, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, "halve"):
        found = halve.optimize(
            tiny, out, max_quality_loss="5%", calibration=text, device="L4", price_per_hour="0.8", workload="batch"
        )
    assert "warning: L4 is not here" in caplog.text
    told = found.certificate.workload_cost
    assert (told.basis, told.device, told.workload) == ("estimated", "L4", "batch")
    assert "--device L4" in found.certificate.inputs.command
    assert json.loads((out / "halve/front.json").read_text())["basis"] == "bytes"
    assert "is an estimate and not certified" in found.report.read_text()
    verified = halve.verify(out, against=tiny)
    assert not_of_time(verified.differences) == []
    assert "workload_cost: it was estimated for L4, not measured" in verified.not_compared


def test_what_is_neither_here_nor_in_the_catalogue_is_refused(tiny, text, tmp_path):
    with pytest.raises(RequestError, match=r"device 'H1000' can't be used: .*not in the catalogue.*H100"):
        halve.optimize(tiny, tmp_path / "out", max_quality_loss="5%", calibration=text, device="H1000")


def test_a_level_that_no_plan_keeps_there_is_refused_before_anything_is_searched(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr("halve.api.optimize.run", None)  # calling it fails
    arguments = {"max_quality_loss": "5%", "calibration": text, "device": "L4"}
    with pytest.raises(ConfigError, match="the nearest that it can keep is"):
        halve.optimize(tiny, tmp_path / "out", slo="tpot=0.001ms", **arguments)
    assert not list(tmp_path.iterdir())
