"""The search as a verb: what it keeps, finds, tells and refuses."""

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

import halve
from halve.api import guesses, judging, making, pipeline, study
from halve.checkpoint import open_checkpoint
from halve.core.errors import CheckpointError, ConfigError, DataError, KernelError, PlanError, QualityError
from halve.core.plan import Plan
from halve.kernels import native_library
from halve.models import load_config, stored_formats
from tests.api.tiny import halve as command
from tests.tools import not_of_time


@pytest.fixture(scope="module", name="cache")
def _cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALVE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", name="found")
def _found(tiny, text, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("found") / "out"
    return halve.optimize(
        tiny, out, max_quality_loss="5%", calibration=text, workload="batch", price_per_hour="0.5", time="10m"
    )


def front_of(result):
    return json.loads((result.path / "halve/front.json").read_text())


def test_the_front_lies_in_the_bundle_with_every_plan_in_words(found):
    front = front_of(found)
    points = front["points"]
    assert [p["number"] for p in points] == list(range(1, len(points) + 1))
    assert [p["predicted_kl"] for p in points] == sorted((p["predicted_kl"] for p in points), reverse=True)
    assert len(points) > 10
    (chosen,) = [p for p in points if p["chosen"]]
    assert chosen["kl"]["value"] == found.certificate.quality.kl_mean.value
    assert any("layer" in line for line in chosen["layers"])
    assert front["workload"] == "batch"
    moves = front["rejected_moves"]
    of_weights = [m for m in moves if m["part"].startswith(("layers.", "lm_head", "embedding"))]
    assert of_weights
    assert all(m["cost"] < 0 < m["loss"] for m in of_weights)
    assert all(m["why"] for m in moves)
    if native_library.available() is None:
        others = {(m["part"], m["rejected"]): m for m in moves if m not in of_weights}
        assert {"kv_cache", "activations", "speculation"} <= {part for part, _ in others}
        plan = Plan.from_json((found.path / "halve/plan.json").read_text())
        assert len([of for of in others if of[0] == "kv_cache"]) >= 2
        assert (str(plan.kv_cache) in {"bf16", "int8", "int4"}) or plan.kv_cache.layers
        draft = others["speculation", "draft in int3-g64"]
        assert "every guess is right" in draft["why"]


def test_the_certificate_says_what_the_workload_costs_and_how_to_repeat_it(found):
    certificate = found.certificate
    assert (certificate.inputs.workload, certificate.inputs.price) == ("batch", "0.5")
    for words in ("--workload batch", "--price-per-hour 0.5", "--time 10m", "--format auto"):
        assert words in certificate.inputs.command
    if native_library.available() is None:
        cost = certificate.workload_cost
        assert cost.workload == "batch"
        assert cost.usd_per_mtok == pytest.approx(0.5 / (cost.output_tok_s * 3600 / 1e6))
        run = cost.replayed
        assert cost.basis == "replayed"
        assert 8 <= run.num_requests <= 64
        assert 1 <= run.num_rounds <= 3
        assert run.usd_per_mtok.value == pytest.approx(0.5 / (run.output_tok_s.value * 3600 / 1e6))
        assert run.usd_per_mtok.low <= run.usd_per_mtok.value <= run.usd_per_mtok.high
        assert run.ratio.n == run.num_rounds
        assert run.level_met
        assert front_of(found)["basis"] == "seconds"
    before = certificate.preflight
    assert before.memory_bytes > 0
    assert before.disk_bytes > certificate.size.bytes
    assert before.floor_bytes < before.original_bytes
    assert before.seconds > 0


def test_the_report_tells_the_plan_in_words(found):
    html = found.report.read_text()
    assert "Not done:" in html
    assert "Stored as" in html


def test_another_limit_asks_nothing_of_the_model_again(found, tiny, text, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("studied again")

    for name in ("fisher", "calibrate", "Swaps", "Screen"):
        monkeypatch.setattr(study, name, refuse)
    result = halve.optimize(tiny, tmp_path / "out", max_quality_loss="20%", calibration=text, workload="batch")
    assert result.certificate.verdict == "pass"
    assert result.certificate.quality.kl_mean.value > found.certificate.quality.kl_mean.value


def test_a_plan_of_the_front_can_be_picked_without_a_limit(found, tiny, text, tmp_path):
    result = halve.optimize(tiny, tmp_path / "out", pick=2, calibration=text, workload="batch")
    wanted = front_of(found)["points"][1]
    assert result.certificate.verdict == "measured"
    assert result.certificate.attempts[0].plan == wanted["name"]
    assert [p["number"] for p in front_of(result)["points"] if p["chosen"]] == [2]
    assert Plan.from_json((result.path / "halve/plan.json").read_text()).weights.rules


@pytest.mark.parametrize("passes", [True, False])
def test_a_cheaper_plan_with_tuned_scales_goes_first_where_it_passes(found, tiny, text, tmp_path, monkeypatch, passes):
    real, tuned = judging._judged, []

    def judged(job, original, candidate, directory):
        result = real(job, original, candidate, directory)
        if "-tuned" not in candidate.format:
            return result
        tuned.append(candidate)
        return replace(result, passed=passes)

    monkeypatch.setattr(judging, "_judged", judged)
    monkeypatch.setattr(judging, "TUNED_SHARE", 0.3)
    monkeypatch.setattr(making, "TUNE_STEPS", 4)
    result = halve.optimize(tiny, tmp_path / "out", max_quality_loss="5%", calibration=text, workload="batch")
    attempts = result.certificate.attempts
    assert len(tuned) == 1
    assert ("-tuned" in attempts[0].plan) is passes
    if passes and attempts[0].passed:
        assert result.certificate.tuning.steps == 4
        assert [p["name"] for p in front_of(result)["points"] if p["chosen"]] == [attempts[0].plan]
    else:
        assert result.certificate.tuning is None
        assert attempts[-1].passed
        assert "-tuned" not in attempts[-1].plan


@pytest.mark.skipif(native_library.available() is not None, reason="only measured times can be simulated")
def test_guesses_that_pay_are_in_the_plan_and_answers_stay_the_same(found, tiny, text, tmp_path, monkeypatch):
    def most_right(directory, texts, progress):
        return guesses.Counted(steps=100, made=200, right=195), []

    monkeypatch.setattr(guesses, "_count", most_right)
    # Whether they pay depends on this machine; what follows where they do, does not.
    monkeypatch.setattr(guesses, "is_worthwhile", lambda found, plain: True)
    out = tmp_path / "out"
    certificate = halve.optimize(tiny, out, max_quality_loss="5%", calibration=text, workload="batch").certificate
    assert Plan.from_json((out / "halve/plan.json").read_text()).speculation.method == "ngram"
    assert certificate.served.speculation == "ngram"
    assert certificate.served.answers_compared > 0
    moves = [m["rejected"] for m in front_of(SimpleNamespace(path=out))["rejected_moves"] if m["part"] == "speculation"]
    assert moves == ["draft in int3-g64"]
    assert "are guessed from what followed before" in (out / "halve/report.html").read_text()
    verified = halve.verify(out, against=tiny)
    assert not_of_time(verified.differences) == []
    assert "workload_cost: it was foretold with guesses, which are not counted again" in verified.not_compared
    assert not (out / "draft").exists()


@pytest.mark.skipif(native_library.available() is not None, reason="only measured times can be simulated")
def test_a_draft_that_pays_lies_in_the_bundle_and_answers_stay_the_same(found, tiny, text, tmp_path, monkeypatch):
    count, agreeing, counted = guesses._count, guesses._agreeing, []

    def hardly_right(directory, texts, progress):
        return guesses.Counted(steps=100, made=200, right=1), count(directory, texts, progress)[1]

    def noted(draft, answers, progress):
        counted.append(agreeing(draft, answers, progress))
        return counted[0]

    monkeypatch.setattr(guesses, "_count", hardly_right)
    monkeypatch.setattr(guesses, "_agreeing", noted)
    # As if the draft took no time: whether it pays depends on this machine; what follows where it does, does not.
    monkeypatch.setattr(guesses, "_with_draft", lambda plans, times: times.of_step)
    monkeypatch.setattr(guesses, "is_worthwhile", lambda found, plain: True)
    out = tmp_path / "out"
    certificate = halve.optimize(tiny, out, max_quality_loss="5%", calibration=text, workload="batch").certificate
    plan = Plan.from_json((out / "halve/plan.json").read_text())
    assert (plan.speculation.method, plan.speculation.path) == ("draft", "draft")
    assert 0.03 < counted[0].rate <= 1  # of random weights; chance is 1 in 300
    assert counted[0].rate == pytest.approx(counted[0].right / counted[0].made)
    with open_checkpoint(out / "draft") as draft:
        assert {f.name for f in stored_formats(draft, load_config(draft)).values()} <= {"int3-g64", "int8"}
    assert certificate.served.speculation == "draft"
    assert certificate.draft.bytes == sum(file.stat().st_size for file in (out / "draft").glob("*.safetensors"))
    assert certificate.served.answers_compared > 0
    assert all(limit.memory_fraction is None or limit.memory_fraction < 1.1 for limit in certificate.rooflines)
    moves = [m for m in front_of(SimpleNamespace(path=out))["rejected_moves"] if m["part"] == "speculation"]
    assert [m["rejected"] for m in moves] == ["ngram"]
    assert moves[0]["why"] == "saves less than what was taken: 1 of 200 guesses were right in 100 steps"
    ways = [halve.load(out, keep=False, speculation=way) for way in (None, "off")]
    guessed, plain = (model.generate("Once upon a time", max_tokens=20).token_ids for model in ways)
    assert guessed == plain
    assert not_of_time(halve.verify(out, against=tiny).differences) == []
    assert "draft of" in (out / "halve/report.html").read_text()
    weights = out / "draft/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="draft: is not the draft that was certified"):
        halve.verify(out, against=tiny)


@pytest.mark.skipif(native_library.available() is not None, reason="only measured times can be simulated")
def test_a_draft_that_does_not_pay_is_told_with_its_count_and_removed(found, tiny, text, tmp_path, monkeypatch):
    asked = []

    def only_the_bound(found, plain):
        asked.append(found)
        return len(asked) == 1  # if every guess were right; not as many as are

    monkeypatch.setattr(guesses, "is_worthwhile", only_the_bound)
    out = tmp_path / "out"
    halve.optimize(tiny, out, max_quality_loss="5%", calibration=text, workload="batch")
    assert Plan.from_json((out / "halve/plan.json").read_text()).speculation.method == "none"
    assert not (out / "draft").exists()
    moves = [m for m in front_of(SimpleNamespace(path=out))["rejected_moves"] if m["part"] == "speculation"]
    assert {m["rejected"] for m in moves} == {"ngram", "draft in int3-g64"}
    assert all(re.search(r"saves less than .*: \d+ of \d+ guesses were right in \d+ steps", m["why"]) for m in moves)


def test_a_number_that_no_plan_has_is_refused_with_those_there_are(found, tiny, text, tmp_path):
    most = len(front_of(found)["points"])
    for pick in (0, 999):
        with pytest.raises(ConfigError, match=f"pick: there is no plan {pick}; this model has plans 1 to {most}"):
            halve.optimize(tiny, tmp_path / "out", pick=pick, calibration=text, workload="batch")


def test_scores_that_are_broken_are_made_again_and_that_is_said(found, cache, tiny, text, tmp_path, caplog):
    (scores,) = cache.glob("search/*/scores.json")
    scores.write_text("{")
    with caplog.at_level(logging.WARNING):
        halve.optimize(tiny, tmp_path / "out", pick=1, calibration=text, workload="batch")
    assert "scores.json can't be read and is made again" in caplog.text
    assert json.loads(scores.read_text())


@pytest.mark.skipif(native_library.available() is not None, reason="only measured times can be replayed")
def test_a_service_level_that_no_plan_keeps_is_refused_with_one_that_can_be_kept(found, tiny, text, tmp_path):
    with pytest.raises(
        QualityError, match=r"no plan keeps this service level: .*ask for no less \(--slo ttft="
    ) as told:
        halve.optimize(tiny, tmp_path / "out", max_quality_loss="5%", calibration=text, slo="tpot=0.0001ms")
    slo = str(told.value).partition("--slo ")[2].rstrip(")")
    result = halve.optimize(tiny, tmp_path / "out", max_quality_loss="300%", calibration=text, slo=slo)
    assert result.certificate.workload_cost.level_met


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"format": "int8", "workload": "batch"}, "workload"),
        ({"format": "int8", "slo": "ttft=1s", "max_quality_loss": "1%"}, "slo"),
        ({"time": "5m"}, "time"),
        ({"format": "int8", "pick": 3}, "pick"),
    ],
)
def test_what_only_a_search_takes_is_refused_without_one(tiny, text, tmp_path, arguments, named):
    with pytest.raises(ConfigError, match=f"{named}: only a search for plans takes this; leave out --format"):
        halve.optimize(tiny, tmp_path / "out", calibration=text, **arguments)


def test_activations_that_no_searched_format_meets_are_refused(tiny, text, tmp_path):
    with pytest.raises(PlanError, match="activations fp8"):
        halve.optimize(tiny, tmp_path / "out", max_quality_loss="1%", activations="fp8", calibration=text)


@pytest.mark.parametrize("how", ["interrupt", "time"])
def test_when_it_is_stopped_the_best_so_far_is_certified(found, tiny, text, tmp_path, monkeypatch, how):
    real, calls = judging.judge_early, []

    def judge(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt if how == "interrupt" else AssertionError("judged after the time was over")
        return real(*args)[0], True

    monkeypatch.setattr(judging, "judge_early", judge)
    limit = {"time": "1ms"} if how == "time" else {}
    result = halve.optimize(tiny, tmp_path / "out", max_quality_loss="90%", calibration=text, workload="batch", **limit)
    assert result.certificate.verdict == "pass"
    assert len(calls) <= 2


def test_a_portable_search_keeps_the_table_and_opens_elsewhere(tiny, text, cache, tmp_path):
    result = halve.optimize(tiny, tmp_path / "out", max_quality_loss="20%", calibration=text, portable=True)
    formats = {m["pattern"]: m["format"] for m in halve_groups(result.path)}
    assert result.certificate.verdict == "pass"
    assert len(set(formats.values())) > 1
    assert Plan.from_json((result.path / "halve/plan.json").read_text()).portable


def halve_groups(path):
    from halve.core.record import to_dict

    return to_dict(halve.inspect(path))["groups"]


def test_the_shell_shows_what_the_workload_costs(tiny, text, cache, tmp_path):
    ran = command(
        "optimize", tiny, "-o", tmp_path / "out", "--max-quality-loss", "20%", "--calibration", text,
        "--workload", "batch", "--price-per-hour", "0.5",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    if native_library.available() is None:
        assert re.search(r"workload batch, \d+ requests, \d rounds?", ran.out)
        assert "at $0.5 an hour" in ran.out
    assert "best so far" not in ran.err


def test_one_figure_alone_may_be_judged_and_that_is_recorded(tiny, text, cache, tmp_path):
    result = halve.optimize(tiny, tmp_path / "out", max_quality_loss="5%", calibration=text, quality=["ppl"])
    assert result.certificate.judged_by == "ppl"
    assert result.certificate.quality.ppl_ratio.high <= 1.05
    assert "--quality ppl" in result.certificate.inputs.command
    assert not_of_time(halve.verify(result.path, against=tiny).differences) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("arrival_s,prompt_tokens,output_tokens\n0,-4,1\n", "trace.csv:2: prompt_tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n0,nan,1\n", "trace.csv:2: prompt_tokens"),
        ("when,how_long\n0,1\n", "trace.csv"),
        ("arrival_s,prompt_tokens,output_tokens\n", "trace.csv"),
    ],
)
def test_a_trace_that_is_none_is_refused_before_any_work(tiny, text, tmp_path, rows, said):
    trace = tmp_path / "trace.csv"
    trace.write_text(rows)
    with pytest.raises(DataError, match=said):
        halve.optimize(tiny, tmp_path / "out", max_quality_loss="5%", calibration=text, workload=str(trace))
    assert [path.name for path in tmp_path.iterdir()] == ["trace.csv"]


def test_an_error_behind_the_certificate_leaves_what_was_certified(tiny, text, tmp_path, monkeypatch):
    asked = {"max_quality_loss": "5%", "calibration": text, "workload": "batch"}

    def broken(*_):
        raise KernelError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr("halve.api.optimize.run_trial", broken)
        with pytest.raises(KernelError):
            halve.optimize(tiny, tmp_path / "out", **asked)
    monkeypatch.setattr(judging, "judge_early", None)  # calling them fails
    monkeypatch.setattr(pipeline, "score", None)
    assert halve.optimize(tiny, tmp_path / "out", resume=True, **asked).certificate.verdict == "pass"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
