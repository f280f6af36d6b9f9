"""A certificate computed again."""

import hashlib
import json
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

import halve
from halve.api import texts
from halve.checkpoint import open_checkpoint
from halve.core.errors import CheckpointError, DataError, QualityError
from halve.data import Document, documents_sha256, read_documents, write_documents
from tests.api.tiny import make_model, run_as_recorded, write_text
from tests.tools import not_of_time


@pytest.fixture(autouse=True)
def _what_was_recorded(request, monkeypatch):
    """Both models as the certificate says that they ran: one test in the file has them run again."""
    if "runs_again" not in request.fixturenames:
        run_as_recorded(monkeypatch)


@pytest.fixture
def runs_again():
    """Asks for both models to run, as users do."""


@pytest.fixture
def bundle(passed, tmp_path):
    """A copy of the bundle that a test may spoil."""
    return shutil.copytree(passed.path, tmp_path / "bundle")


def edit(bundle, change):
    path = bundle / "halve/certificate.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_an_untouched_bundle_holds_and_every_figure_reproduces(passed, tiny, runs_again):
    result = halve.verify(passed.path, against=tiny)
    assert result.answer == "holds"
    again = result.certificate
    assert again.speed.decode_tok_s.n == passed.certificate.speed.decode_tok_s.n
    assert again.speed != passed.certificate.speed  # they were measured, not copied
    assert again.canary == passed.certificate.canary  # greedy answers are the same each time
    assert again.served == passed.certificate.served
    assert not_of_time(result.differences) == []
    assert result.certificate.quality.num_tokens == passed.certificate.quality.num_tokens
    assert result.text == "halve/sealed.jsonl"


def test_a_bundle_without_a_limit_is_measured(measured, tiny):
    result = halve.verify(measured.path, against=tiny)
    assert (result.answer, not_of_time(result.differences)) == ("measured", [])


def test_other_text_judges_the_limit_and_reproduces_nothing(passed, tiny, tmp_path):
    other = write_text(tmp_path / "other.jsonl", seed=5)
    result = halve.verify(passed.path, against=tiny, text=other)
    assert result.answer == "holds"
    assert not_of_time(result.differences) == []
    assert result.text == str(other)
    assert result.certificate.quality.num_documents == 80


def test_other_text_that_is_too_little_is_refused(passed, tiny, tmp_path):
    with pytest.raises(DataError, match="needed are 20 documents"):
        halve.verify(passed.path, against=tiny, text=write_text(tmp_path / "other.jsonl", count=5, seed=5))


def test_a_limit_below_the_whole_interval_is_contradicted(bundle, passed, tiny):
    low = passed.certificate.quality.ppl_ratio.low - 1  # of random weights, where less than no loss is luck
    edit(bundle, lambda raw: raw.update(max_quality_loss=low - 1e-4, verdict="fail"))
    assert halve.verify(bundle, against=tiny).answer == "contradicted"


def test_a_limit_inside_the_interval_is_inconclusive(bundle, passed, tiny):
    middle = passed.certificate.quality.ppl_ratio.value - 1
    edit(bundle, lambda raw: raw.update(max_quality_loss=middle, verdict="fail"))
    assert halve.verify(bundle, against=tiny).answer == "inconclusive"


@pytest.fixture(scope="module")
def unrounded(tiny, text, tmp_path_factory):
    """A bundle that rounds weights and nothing else."""
    out = tmp_path_factory.mktemp("unrounded") / "out"
    exact = {"activations": "fp32", "kv_cache": "fp32"}
    return halve.optimize(tiny, out, format="int8", max_quality_loss="1%", calibration=text, **exact)


@pytest.mark.parametrize("figure", ["kl_mean", "flip_rate", "ppl_ratio"])
def test_a_figure_edited_to_a_tenth_does_not_reproduce_through_rounded_activations(bundle, tiny, figure):
    edit(bundle, lambda raw: raw["quality"][figure].update(value=raw["quality"][figure]["value"] * 0.1))
    found = halve.verify(bundle, against=tiny).differences
    assert [line for line in found if line.startswith(f"{figure}.value: recorded ")]
    assert all(line.startswith((figure, "attempts: the last has")) for line in found)


@pytest.mark.parametrize("figure", ["kl_mean", "kl_p99", "flip_rate", "ppl_ratio"])
def test_an_edited_figure_does_not_reproduce(unrounded, tmp_path, tiny, figure):
    bundle = shutil.copytree(unrounded.path, tmp_path / "bundle")
    edit(bundle, lambda raw: raw["quality"][figure].update(value=raw["quality"][figure]["value"] * 0.5))
    found = halve.verify(bundle, against=tiny).differences
    assert [line for line in found if line.startswith(f"{figure}.value: recorded")]


@pytest.mark.parametrize(
    ("section", "name"), [("size", "bytes"), ("size", "original_bytes"), ("size", "float32_bytes"), ("cost", "ratio")]
)
def test_edited_bytes_do_not_reproduce(bundle, tiny, section, name):
    edit(bundle, lambda raw: raw[section].update({name: raw[section][name] // 2}))
    (difference,) = halve.verify(bundle, against=tiny).differences
    assert difference.startswith(f"{section}.{name}: recorded")


@pytest.mark.parametrize("verdict", ["measured", "fail"])
def test_a_verdict_that_its_own_figures_do_not_bear_out_is_told(bundle, tiny, verdict):
    edit(bundle, lambda raw: raw.update(verdict=verdict))
    found = halve.verify(bundle, against=tiny).differences
    assert found == (f"verdict: recorded {verdict}; by the recorded figures and limit it is pass",)


def test_one_changed_byte_of_the_weights_is_noticed(bundle, tiny):
    path = bundle / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="the weight files are not the ones that were certified"):
        halve.verify(bundle, against=tiny)


def test_a_changed_configuration_does_not_reproduce(bundle, tiny):
    raw = json.loads((bundle / "config.json").read_text())
    raw["rms_norm_eps"] = 1.0
    (bundle / "config.json").write_text(json.dumps(raw))
    assert any(d.startswith("kl_mean.value") for d in halve.verify(bundle, against=tiny).differences)


def test_another_original_is_refused(passed, tmp_path):
    other = make_model(tmp_path / "other", initializer_range=0.2)
    with pytest.raises(CheckpointError, match=r"is not the model that .* was made from .*give that model to --against"):
        halve.verify(passed.path, against=other)


def test_changed_sealed_text_is_refused(bundle, tiny):
    lines = (bundle / "halve/sealed.jsonl").read_text().splitlines(keepends=True)
    (bundle / "halve/sealed.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"sealed\.jsonl: is not the text that was certified"):
        halve.verify(bundle, against=tiny)


def test_missing_sealed_text_points_to_other_text(bundle, tiny):
    (bundle / "halve/sealed.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"sealed\.jsonl: is missing from the bundle; .*--text FILE"):
        halve.verify(bundle, against=tiny)


def test_a_missing_certificate_is_named(bundle, tiny):
    (bundle / "halve/certificate.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no halve/certificate\.json"):
        halve.verify(bundle, against=tiny)


def test_a_certificate_that_is_no_text_is_named(bundle, tiny):
    (bundle / "halve/certificate.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"certificate\.json: can't be read"):
        halve.verify(bundle, against=tiny)


def test_text_that_was_not_kept_is_read_again_from_its_source(tiny, tmp_path):
    source = write_text(tmp_path / "mine.jsonl")
    result = halve.optimize(tiny, tmp_path / "out", format="int8", method="rtn", calibration=source, keep_text=False)
    assert not_of_time(halve.verify(result.path, against=tiny).differences) == []
    write_text(source, seed=3)
    with pytest.raises(DataError, match=r"its sealed part is not the text that was certified.*--text FILE"):
        halve.verify(result.path, against=tiny)
    source.unlink()
    with pytest.raises(DataError, match=r"mine\.jsonl: does not exist"):
        halve.verify(result.path, against=tiny)


def test_a_plan_that_was_edited_after_it_was_certified_is_refused(bundle, tiny):
    path = bundle / "halve/plan.json"
    path.write_text(path.read_text().replace('"bf16"', '"fp32"'))
    with pytest.raises(CheckpointError, match=r"plan\.json: is not the plan that was certified"):
        halve.verify(bundle, against=tiny)


def test_a_certificate_of_an_older_halve_is_still_verified(bundle, tiny):
    newer = ("plan_sha256", "seen_sha256", "served", "tasks", "canary", "speed_ratios", "rooflines")
    edit(bundle, lambda raw: [raw.pop(name) for name in newer])
    result = halve.verify(bundle, against=tiny)
    assert (result.answer, not_of_time(result.differences)) == ("holds", [])


def test_the_certificate_says_how_the_model_is_served(passed):
    served = passed.certificate.served
    assert (served.batch, served.kv_cache, served.activations) == (32, "bf16", "int8")
    assert served.decoded_share == 0.5
    assert (served.speculation, served.answers_compared) == ("none", 0)


@pytest.mark.parametrize("fault", ["swapped scales", "a damaged layer"])
def test_faults_of_the_weights_are_caught_even_under_their_new_hash(bundle, tiny, fault):
    """Who edits the weights may edit their hash as well; the figures then give it away."""
    path = bundle / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    scale = f"{name}_scale"
    if fault == "swapped scales":
        tensors[scale] = tensors[scale].flip(0).contiguous()
    else:
        stored = next(n for n in tensors if n.startswith(name) and n != scale and "shape" not in n)
        tensors[stored] = tensors[stored].roll(1, 0).contiguous()
    save_file(tensors, path)
    with open_checkpoint(bundle) as changed:
        sha256 = changed.reader.sha256()
    edit(bundle, lambda raw: raw.update(weights_sha256=sha256))
    result = halve.verify(bundle, against=tiny)
    assert any(line.startswith("kl_mean.value") for line in result.differences)


def test_calibration_text_slipped_into_sealed_text_is_caught_even_under_its_new_hash(bundle, text, tiny):
    path = bundle / "halve/sealed.jsonl"
    sealed = set(path.read_text().splitlines())
    seen = next(d for d in read_documents(text) if d.to_json_line() not in sealed)
    near = Document(text=f"{seen.text.upper()} And one word more.")
    write_documents(path, [*read_documents(path), near])
    edit(bundle, lambda raw: raw["inputs"].update(sealed_sha256=documents_sha256(read_documents(path))))
    with pytest.raises(DataError, match="holds text that calibration or search saw"):
        halve.verify(bundle, against=tiny)


def test_text_that_the_search_saw_is_no_text_to_judge_on(passed, text, tiny):
    with pytest.raises(DataError, match="holds text that calibration or search saw"):
        halve.verify(passed.path, against=tiny, text=text)


def test_a_fingerprint_that_was_edited_or_lost_is_told(bundle, tiny):
    path = bundle / "halve/seen.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"seen\.json: is not the file that was certified"):
        halve.verify(bundle, against=tiny)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"seen\.json: is missing"):
        halve.verify(bundle, against=tiny)


def test_sealed_text_that_a_broken_split_shares_is_never_opened(tiny, text, tmp_path, monkeypatch):
    real = texts._unseen
    monkeypatch.setattr(texts, "_unseen", lambda parts: (real(parts)[0], [*parts.sealed, parts.calibration[0]]))
    with pytest.raises(DataError, match="holds text that calibration or search saw"):
        halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text)
    assert not (tmp_path / "out").exists()


def test_a_clock_that_lies_while_it_is_verified_is_caught(passed, tiny, monkeypatch, runs_again):
    real = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() * 0.1)
    with pytest.raises(QualityError, match="no speed can be certified by it"):
        halve.verify(passed.path, against=tiny)


def test_a_clock_that_lies_while_it_is_certified_leaves_no_bundle(tiny, text, tmp_path, monkeypatch):
    real = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() * 0.1)
    with pytest.raises(QualityError, match="no speed can be certified by it"):
        halve.optimize(tiny, tmp_path / "out", format="int8", method="rtn", calibration=text)
    assert not (tmp_path / "out").exists()


def test_the_certificate_of_another_model_is_caught(bundle, measured, tiny):
    shutil.copy(measured.path / "halve/certificate.json", bundle / "halve/certificate.json")
    with pytest.raises(CheckpointError, match="is not the plan that was certified"):
        halve.verify(bundle, against=tiny)
    own = hashlib.sha256((bundle / "halve/plan.json").read_bytes()).hexdigest()
    edit(bundle, lambda raw: raw.update(plan_sha256=own))
    with pytest.raises(CheckpointError, match="the weight files are not the ones that were certified"):
        halve.verify(bundle, against=tiny)


def test_the_certificate_of_another_model_is_caught_even_under_this_ones_hashes(bundle, measured, tiny):
    own = json.loads((bundle / "halve/certificate.json").read_text())
    hashes = {name: own[name] for name in ("weights_sha256", "plan_sha256", "seen_sha256", "inputs", "sealed")}
    shutil.copy(measured.path / "halve/certificate.json", bundle / "halve/certificate.json")
    edit(bundle, lambda raw: raw.update(hashes))
    found = halve.verify(bundle, against=tiny).differences
    for figure in ("kl_mean.value", "flip_rate.value", "size.bytes", "cost.ratio"):
        assert any(line.startswith(figure) for line in found), figure
