"""From a checkpoint to a certified bundle."""

import errno
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import halve
from halve.checkpoint import TensorWriter
from halve.core.errors import CheckpointError, DataError, FormatError, OutputError, QualityError, RequestError
from tests.api.tiny import CARRIED, CONTEXT, VOCABULARY, make_model, words, write_text
from tests.tools import not_of_time

QUALITY = {"kl_mean", "kl_p99", "flip_rate", "ppl_ratio", "tasks"}


def files(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


def recorded(result):
    return json.loads((result.path / "halve/certificate.json").read_text())


def test_without_a_limit_the_bundle_is_made_and_measured(measured):
    assert measured.certificate.verdict == "measured"
    assert measured.certificate.max_quality_loss is None
    assert measured.certificate.attempts[0].passed is None
    assert files(measured.path) == {
        *CARRIED,
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "halve/plan.json",
        "halve/certificate.json",
        "halve/report.html",
        "halve/sealed.jsonl",
        "halve/seen.json",
    }
    assert measured.report == measured.path / "halve/report.html"
    assert [p.name for p in measured.path.parent.iterdir()] == ["out"]


def test_the_certificate_holds_every_name_that_outsiders_rely_on(measured):
    raw = recorded(measured)
    assert raw.keys() >= {"version", "verdict", "quality", "size", "cost", "speed", "inputs"}
    assert raw["quality"].keys() >= QUALITY
    assert raw["size"].keys() >= {"bytes", "original_bytes", "float32_bytes", "ratio"}
    assert raw["cost"].keys() >= {"basis", "usd_per_mtok", "original_usd_per_mtok", "ratio"}
    assert raw["speed"].keys() >= {"prefill_tok_s", "decode_tok_s"}
    inputs = "model_sha256 calibration_sha256 sealed_sha256 device workload price versions command"
    assert raw["inputs"].keys() >= set(inputs.split())
    leaves = [raw["quality"][k] for k in QUALITY - {"tasks"}] + list(raw["speed"].values())
    assert all(leaf.keys() == {"value", "low", "high", "n"} for leaf in leaves)
    assert raw["cost"]["usd_per_mtok"] is None  # not known is not zero


def test_a_format_within_the_limit_passes(passed):
    assert passed.certificate.verdict == "pass"
    assert passed.certificate.max_quality_loss == 0.01
    assert passed.certificate.quality.ppl_ratio.high <= 1.01
    assert passed.certificate.quality.confidence == 0.95
    assert passed.certificate.max_attempts == 1


def test_the_certificate_names_bytes_that_are_on_disk(passed, tiny):
    size = passed.certificate.size
    assert size.bytes == (passed.path / "model.safetensors").stat().st_size
    assert size.original_bytes == (tiny / "model.safetensors").stat().st_size
    assert size.ratio == size.bytes / size.float32_bytes


def test_auto_takes_the_cheapest_format_that_passes_and_records_the_openings(tiny, text, tmp_path):
    result = halve.optimize(tiny, tmp_path / "out", max_quality_loss=0.05, calibration=text)
    certificate = result.certificate
    assert certificate.verdict == "pass"
    assert certificate.max_attempts == 3
    assert 1 <= len(certificate.attempts) <= 3
    assert [a.passed for a in certificate.attempts] == [False] * (len(certificate.attempts) - 1) + [True]
    assert certificate.quality.confidence == pytest.approx(1 - 0.05 / 3)
    front = json.loads((result.path / "halve/front.json").read_text())
    (chosen,) = [p for p in front["points"] if p["chosen"]]
    assert certificate.attempts[-1].plan == chosen["name"]
    assert len({g["format"] for g in _groups(result.path)}) > 1
    assert certificate.size.bytes < 0.8 * certificate.size.original_bytes
    assert [p["cost_ratio"] for p in front["points"]] == sorted(p["cost_ratio"] for p in front["points"])


def _groups(path):
    from halve.core.record import to_dict

    return to_dict(halve.inspect(path))["groups"]


@pytest.mark.parametrize(
    "arguments", [{"max_quality_loss": "0.0001%"}, {"max_quality_loss": "1%", "format": "int2-g32"}]
)
def test_a_limit_that_nothing_meets_says_the_best_reached_and_leaves_nothing(tiny, text, tmp_path, arguments):
    with pytest.raises(QualityError, match=r"best reached: \S+ \((clip|gptq)\).* with .*%.*Nothing written"):
        halve.optimize(tiny, tmp_path / "deep/out", calibration=text, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_rounding_to_nearest_needs_no_calibration_and_is_recorded(tiny, text, tmp_path):
    result = halve.optimize(tiny, tmp_path / "out", format="int8-g32", method="rtn", calibration=text)
    rules = json.loads((result.path / "halve/plan.json").read_text())["weights"]["rules"]
    assert {rule["method"] for rule in rules} == {"rtn"}
    assert "--method rtn" in result.certificate.inputs.command


def test_without_kept_text_only_its_hash_and_path_stay(tiny, text, tmp_path):
    result = halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text, keep_text=False)
    assert "halve/sealed.jsonl" not in files(result.path)
    assert recorded(result)["sealed"]["source"] == str(text)
    assert not result.certificate.sealed.kept
    assert not_of_time(halve.verify(result.path, against=tiny).differences) == []


def test_every_carried_file_is_the_same_byte_for_byte(passed, tiny):
    for name in (*CARRIED, "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (passed.path / name).read_bytes() == (tiny / name).read_bytes()


# Both compute in float32 from the same weights: codes times a bf16 scale, whose product float32 holds without loss.
# What is left is the order of sums, about sqrt(64) * 2^-24 of each product: logits below 10 move by 1e-6 or so
# (measured here: 3.5e-6). Another machine's kernels get thirty times that.
LOGITS_BOUND = 1e-4


@pytest.fixture(scope="module")
def opened_by_transformers(portable):
    return AutoModelForCausalLM.from_pretrained(portable.path, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore")  # of the peer's, about its own internals
def test_transformers_computes_the_logits_of_a_portable_bundle(portable, opened_by_transformers):
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, 100).tolist()
    with torch.no_grad():
        theirs = opened_by_transformers(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(halve.load(portable.path).logits(tokens), theirs, atol=LOGITS_BOUND)


@pytest.mark.filterwarnings("ignore")
def test_transformers_continues_a_portable_bundle_with_the_same_tokens(portable, opened_by_transformers):
    ours = halve.load(portable.path)
    prompt = ours.tokenizer.encode(words(7, 10))
    made = ours.generate(prompt, max_tokens=30).token_ids
    with torch.no_grad():
        logits = opened_by_transformers(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    for token, values, indices in zip(made, best.values, best.indices, strict=True):
        assert token == indices[0] or values[0] - values[1] <= 2 * LOGITS_BOUND


def test_a_portable_bundle_keeps_its_table_in_16_bits(portable):
    assert {"bf16"} == {g["format"] for g in _groups(portable.path) if g["pattern"] == "model.embed_tokens"}


def test_an_existing_output_is_refused_before_any_work(tiny, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("halve.api.optimize.prepare_texts", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(OutputError, match="exists already"):
        halve.optimize(tiny, tmp_path / "out", format="int8")


def test_force_replaces_a_bundle_and_nothing_else(tiny, text, tmp_path):
    first = halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text)
    again = halve.optimize(tiny, tmp_path / "out", format="int4-g32", calibration=text, force=True)
    assert again.certificate.size.bytes < first.certificate.size.bytes
    assert recorded(again)["size"]["bytes"] == again.certificate.size.bytes
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is not a bundle of Halve"):
        halve.optimize(tiny, tmp_path / "thesis", format="int8", calibration=text, force=True)
    assert files(tmp_path / "thesis") == {"thesis.tex"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


def test_the_output_may_lie_in_directories_that_do_not_exist_yet(tiny, text, tmp_path):
    result = halve.optimize(tiny, tmp_path / "a/b/out", format="int8", method="rtn", calibration=text)
    assert (result.path / "config.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_the_model_itself_is_never_the_output(tiny, tmp_path, force):
    before = files(tiny)
    (tmp_path / "link").symlink_to(tiny)
    for out in (tiny, tmp_path / "link"):
        with pytest.raises(OutputError, match="is the model itself; choose another output"):
            halve.optimize(tiny, out, format="int8", force=force)
    assert files(tiny) == before


def test_a_bundle_is_compressed_again_only_against_its_own_certificate(passed, tiny, text, tmp_path):
    result = halve.optimize(passed.path, tmp_path / "out", format="int4-g32", calibration=text)
    assert result.certificate.inputs.model_sha256 != passed.certificate.inputs.model_sha256
    assert result.certificate.size.original_bytes == passed.certificate.size.bytes


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tiny, text, tmp_path, monkeypatch):
    def write(self, name, array):
        raise OutputError(f"{self.directory}: cannot be written: No space left on device")

    monkeypatch.setattr(TensorWriter, "write", write)
    with pytest.raises(OutputError, match="No space left on device"):
        halve.optimize(tiny, tmp_path / "a/out", format="int8", calibration=text)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_energies_are_saved_leaves_nothing(tiny, text, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match="No space left on device; nothing was written"):
        halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused_at_once(tiny, text, tmp_path):
    for device in ("nonsense", "auto"):
        with pytest.raises(RequestError, match=f"device '{device}' can't be used: .*; take cpu"):
            halve.optimize(tiny, tmp_path / "out", format="int8", calibration=text, device=device)
        with pytest.raises(RequestError, match=f"device '{device}' can't be used"):
            halve.verify(tiny, against=tiny, device=device)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_says_how_much_is_there_and_how_much_is_needed(tiny, tmp_path):
    little = write_text(tmp_path / "little.jsonl", count=8)
    with pytest.raises(DataError, match=r"documents with \d+ tokens to predict; needed are 20 documents and 2000"):
        halve.optimize(tiny, tmp_path / "out", format="int8", calibration=little)


def test_broken_jsonl_is_named_by_file_and_line(tiny, text, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(text.read_text() + '{"text": "no end\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:81: "):
        halve.optimize(tiny, tmp_path / "out", format="int8", calibration=broken)


def test_a_format_that_does_not_divide_lists_those_that_do(tiny, text, tmp_path):
    with pytest.raises(FormatError, match=r"group_size 128 does not divide in_features 64; formats that fit it: .*g64"):
        halve.optimize(tiny, tmp_path / "out", format="int4-g128", calibration=text)


def test_formats_that_make_nothing_smaller_or_do_not_exist_are_refused(tiny, text, tmp_path):
    with pytest.raises(FormatError, match="format bf16 stores floats as they are and makes nothing smaller"):
        halve.optimize(tiny, tmp_path / "out", format="bf16", calibration=text)
    with pytest.raises(FormatError, match="unknown format 'int9'; known formats are"):
        halve.optimize(tiny, tmp_path / "out", format="int9", calibration=text)


def test_a_nan_weight_is_named(tmp_path, text):
    model = make_model(tmp_path / "nan")
    path = model / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + length])["model.layers.1.mlp.down_proj.weight"]["data_offsets"]
    raw[8 + length + start : 8 + length + start + 2] = b"\xc0\x7f"  # NaN in bf16
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj"):
        halve.optimize(model, tmp_path / "out", format="int8", calibration=text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan"]


def test_the_speed_trial_fits_a_very_short_context(tmp_path, text):
    model = make_model(tmp_path / "short", max_position_embeddings=32)
    result = halve.optimize(model, tmp_path / "out", format="int8", calibration=text)
    assert result.certificate.sealed.window_tokens == 32 < CONTEXT
    assert result.certificate.speed.decode_tok_s.n == 5
