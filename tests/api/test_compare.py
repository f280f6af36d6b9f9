"""Two models side by side on the same text."""

import json
import shutil

import pytest

import halve
from halve.api.compare import verdict_of
from halve.cli.compare import show_compared
from halve.core.certificate import Measured
from halve.core.errors import ConfigError, DataError
from halve.data import Document, read_documents, write_documents
from tests.api.tiny import halve as command
from tests.api.tiny import make_model, write_text
from tests.ggufs import write_gguf


def test_two_bundles_are_set_side_by_side_on_the_sealed_text(passed, measured, tiny):
    found = halve.compare(passed.path, measured.path, reference=tiny)
    quality = found.quality
    assert (found.a.kind, found.b.kind) == ("bundle", "bundle")
    assert (quality.num_documents, quality.num_tokens) == (
        passed.certificate.quality.num_documents,
        passed.certificate.quality.num_tokens,
    )
    # On the same text, run by the same engine: the figures of the certificate.
    assert quality.a.kl_mean.value == pytest.approx(passed.certificate.quality.kl_mean.value, rel=0.05)
    assert quality.b.kl_mean.value == pytest.approx(measured.certificate.quality.kl_mean.value, rel=0.05)
    assert quality.better == "a"
    assert quality.kl_difference.low > 0
    assert found.bytes_ratio < 1
    assert found.verdict == "trade"
    assert "A is closer to the reference" in found.sentence
    assert found.speed_a.decode_tok_s.n == 5
    assert found.decode_ratio.low <= found.decode_ratio.value <= found.decode_ratio.high
    assert found.text.startswith("halve/sealed.jsonl of ")


def test_a_model_beside_itself_is_not_told_apart(tiny, text):
    found = halve.compare(tiny, tiny, text=text, speed=False)
    assert found.verdict == "not told apart"
    assert found.quality.ppl_ratio == Measured(value=1.0, low=1.0, high=1.0, n=80)
    assert found.quality.between.flip_rate.value == 0
    assert (found.speed_a, found.speed_left_out) == (None, "not asked for")


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q5_0"])
def test_a_gguf_file_of_the_same_model_is_judged_by_the_same_code(tiny, text, tmp_path, kind):
    path = write_gguf(tiny, tmp_path / f"{kind}.gguf", kind)
    found = halve.compare(tiny, path, text=text, speed=kind == "Q5_0")
    assert (found.b.kind, next(iter(found.b.formats))) == ("gguf", kind)
    assert found.b.file_bytes == path.stat().st_size
    divergence = found.quality.between.kl_mean.value
    if kind == "F32":
        assert divergence < 1e-6
    else:
        assert 1e-6 < divergence < (0.01 if kind == "Q8_0" else 0.3)
    if kind == "Q5_0":  # no format of ours has its bits
        assert "Q5_0 runs in float32 here" in found.speed_left_out
        assert found.speed_b is None
    assert found.bytes_ratio == pytest.approx({"F32": 2.0, "Q8_0": 0.53, "Q5_0": 0.34}[kind], rel=0.05)


def test_what_is_portable_runs_from_its_compressed_tensors_alone(portable, tiny, tmp_path):
    plain = shutil.copytree(portable.path, tmp_path / "plain")
    shutil.rmtree(plain / "halve")
    found = halve.compare(portable.path, plain, speed=False)
    assert (found.b.kind, found.quality.between.flip_rate.value) == ("checkpoint", 0.0)
    assert found.verdict == "not told apart"


def test_models_of_other_tokens_are_refused(tiny, text, tmp_path):
    other = make_model(tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    one, two = (next(t for t, i in vocab.items() if i == n) for n in (50, 51))
    vocab[one], vocab[two] = 51, 50
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"other: another tokenizer than .*where token 50 is"):
        halve.compare(tiny, other, text=text)
    with pytest.raises(ConfigError, match=r"other: another tokenizer than .*where token 50 is"):
        halve.compare(tiny, tiny, text=text, reference=other)
    smaller = make_model(tmp_path / "smaller", vocab_size=301)
    with pytest.raises(ConfigError, match=r"301 tokens, and 300 in"):
        halve.compare(tiny, smaller, text=text)
    path = write_gguf(tiny, tmp_path / "x.gguf", tokens=[f"t{i}" for i in range(300)])
    with pytest.raises(ConfigError, match=r"x\.gguf: its tokens are not those of .*where token 0 is 't0', not '<s>'"):
        halve.compare(tiny, path, text=text)


def test_two_gguf_files_need_a_tokenizer(tiny, text, tmp_path):
    path = write_gguf(tiny, tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="name a directory that has it by --tokenizer"):
        halve.compare(path, path, text=text)
    assert halve.compare(path, path, text=text, tokenizer=tiny, speed=False).verdict == "not told apart"
    with pytest.raises(ConfigError, match="a GGUF file; give the directory of the original"):
        halve.compare(tiny, tiny, text=text, reference=path)


def test_text_that_a_search_saw_is_no_text_to_compare_on(passed, tiny, text):
    with pytest.raises(DataError, match="holds text that calibration or search saw"):
        halve.compare(tiny, passed.path, text=text)


def test_documents_that_the_other_search_saw_are_left_out(passed, tiny, text, tmp_path, caplog):
    """The other's calibration text is made of another text, into which some of these sealed documents slipped."""
    sealed = read_documents(passed.path / "halve/sealed.jsonl")
    longer = [Document(text=f"{d.text} And one word more.") for d in sealed[:16]]
    mixed = tmp_path / "mixed.jsonl"
    write_documents(mixed, [*read_documents(write_text(tmp_path / "new.jsonl", count=70, seed=7)), *longer])
    other = halve.optimize(tiny, tmp_path / "other", format="int8", method="clip", calibration=mixed)
    with caplog.at_level("WARNING"):
        found = halve.compare(passed.path, other.path, speed=False)
    assert 20 <= found.quality.num_documents < passed.certificate.quality.num_documents
    assert "documents that the search of other saw" in caplog.text


def test_too_little_text_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="needed are 20 documents"):
        halve.compare(tiny, tiny, text=write_text(tmp_path / "few.jsonl", count=5))


@pytest.mark.parametrize(
    ("better", "ratio", "decode", "verdict"),
    [
        ("not told apart", 0.5, None, "b"),
        ("a", 0.5, None, "trade"),
        ("a", 1.0, None, "a"),
        ("b", 1.0, (0.5, 0.6, 0.7), "b"),
        ("not told apart", 0.5, (1.1, 1.2, 1.3), "trade"),
        ("not told apart", 1.0, (0.9, 1.0, 1.1), "not told apart"),
    ],
)
def test_the_verdict_is_for_what_is_no_worse_in_anything(better, ratio, decode, verdict):
    low, value, high = decode or (0, 0, 0)
    measured = Measured(value=value, low=low, high=high, n=5) if decode else None
    assert verdict_of(better, ratio, measured) == verdict


def test_the_shell_prints_a_table_and_json(tiny, measured, capsys):
    told = command("compare", tiny, measured.path, "--no-speed", "--json").json
    assert told["command"].startswith("halve compare ")
    assert told["quality"]["between"]["flip_rate"]["value"] > 0
    show_compared(halve.compare(tiny, measured.path, reference=tiny))
    shown = capsys.readouterr().out
    assert "nats a token" in shown.splitlines()[-1]
    for words in ("weight files", "bytes read per token", "mean KL", "flips", "decode tokens/s", "36 documents"):
        assert words in shown
