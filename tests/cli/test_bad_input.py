"""What a user can get wrong: exit 1, one clear line on stderr, no traceback, nothing on stdout."""

import json
import shutil

import pytest

from tests.api.tiny import CONTEXT, make_model, write_text


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the model that a test may spoil."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def refused(shell):
    """Run a command that fails; its one line without the program's name."""

    def run(*args):
        ran = shell(*args)
        assert ran.code == 1, ran.out + ran.err
        assert ran.out == ""
        (line,) = ran.err.splitlines()
        assert line.startswith("halve: ")
        return line.removeprefix("halve: ")

    return run


def config(model, **changes):
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, **changes}))
    return model


def test_a_path_that_does_not_exist(refused, tmp_path):
    assert "no such directory, and not a name on the Hub" in refused("inspect", tmp_path / "nowhere")
    assert "no such directory" in refused("generate", tmp_path / "nowhere", "hi")
    assert "no such directory" in refused("optimize", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert "no such directory" in refused("verify", tmp_path / "nowhere", "--against", tmp_path)


def test_a_draft_model_that_is_not_there_or_of_other_tokens(refused, tiny, tmp_path):
    assert "no such directory" in refused("generate", tiny, "hi", "--speculate", tmp_path / "nowhere")
    other = make_model(tmp_path / "other", vocab_size=320)
    assert "its vocabulary has 320 tokens" in refused("generate", tiny, "hi", "--speculate", other)


def test_a_file_instead_of_a_directory(refused, model):
    assert "a file; give the directory that holds config.json" in refused("inspect", model / "model.safetensors")


def test_a_directory_without_a_configuration(refused, tmp_path):
    assert "no config.json; give the directory of a Hugging Face model" in refused("inspect", tmp_path)


def test_a_configuration_that_is_no_json(refused, model):
    (model / "config.json").write_text("{broken")
    assert "config.json" in refused("inspect", model)


def test_an_architecture_that_is_not_known_is_named(refused, model):
    assert "MambaForCausalLM" in refused("inspect", config(model, architectures=["MambaForCausalLM"]))


def test_truncated_weights(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused("generate", model, "hi")
    assert "model.safetensors" in message
    assert "download" in message


def test_weights_that_are_pickles_are_never_opened(refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "only pickle weights (pytorch_model.bin); loading them can run any code" in refused("generate", model, "hi")


def test_weights_of_another_shape(refused, model):
    assert "model.layers" in refused("generate", config(model, intermediate_size=96), "hi")


def test_a_tokenizer_with_more_tokens_than_the_vocabulary(refused, tmp_path):
    small = make_model(tmp_path / "small", vocab_size=290)
    for command in (["generate", small, "hi"], ["optimize", small, "-o", tmp_path / "out", "--format", "int8"]):
        message = refused(*command)
        assert "290" in message
        assert "tokenizer" in message


def test_no_tokenizer(refused, model):
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("generate", model, "hi")


def test_quality_limits_that_are_none(refused, model, tmp_path):
    for limit, rule in (("1", "ambiguous"), ("much", "is not a percentage"), ("-1%", "must be zero or more")):
        assert rule in refused("optimize", model, "-o", tmp_path / "out", "--max-quality-loss", limit)


def test_formats_that_do_not_exist_or_do_not_fit(refused, model, text, tmp_path):
    optimize = ["optimize", model, "-o", tmp_path / "out", "--calibration", text]
    assert "unknown format 'int9'; known formats are fp32" in refused(*optimize, "--format", "int9")
    message = refused(*optimize, "--format", "int4-g128")
    assert "group_size 128 does not divide in_features 64; formats that fit it: fp8, int8, int8-g32" in message


def test_text_that_is_missing_little_or_broken(refused, model, tmp_path):
    optimize = ["optimize", model, "-o", tmp_path / "out", "--format", "int8", "--calibration"]
    assert "nowhere.txt: does not exist" in refused(*optimize, tmp_path / "nowhere.txt")
    little = write_text(tmp_path / "little.jsonl", count=6)
    assert "needed are 20 documents and 2000 tokens" in refused(*optimize, little)
    little.write_text('{"text": "fine"}\n{"txet": "no"}\n')
    assert "little.jsonl:2: " in refused(*optimize, little)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["little.jsonl", "model"]


def test_an_output_that_exists_or_is_the_model(refused, model, tmp_path):
    (tmp_path / "out").mkdir()
    optimize = ["optimize", model, "--format", "int8", "-o"]
    assert "exists already; choose another output" in refused(*optimize, tmp_path / "out")
    assert "is the model itself" in refused(*optimize, model, "--force")


def test_sampling_out_of_range_is_told_before_the_model_is_opened(refused, tmp_path):
    generate = ["generate", tmp_path / "nowhere", "hi"]
    assert refused(*generate, "--temperature", -1) == "temperature: -1.0 must be a finite number, 0 or more"
    assert refused(*generate, "--top-p", 1.5) == "top_p: 1.5 must be above 0 and at most 1"
    assert refused(*generate, "--max-tokens", 0) == "max_tokens: 0 must be a whole number, 1 or more"
    assert "seed: -1 must be" in refused(*generate, "--seed", -1)
    assert "top_k: -1 must be" in refused(*generate, "--top-k", -1)
    assert "n: 0 must be" in refused(*generate, "-n", 0)
    assert "'seven' is not ID=VALUE, such as 17=-100" in refused(*generate, "--logit-bias", "seven")
    assert "they are told in JSON only; add --json" in refused(*generate, "--logprobs", 2)


def test_a_prompt_longer_than_the_context(refused, tiny):
    message = refused("generate", tiny, "dabo " * 200)
    assert f"the context holds {CONTEXT}" in message
    assert "the prompt has " in message


def test_a_device_that_is_not_there(refused, tiny, tmp_path):
    assert "device 'nonsense' can't be used" in refused("generate", tiny, "hi", "--device", "nonsense")
    assert "take cpu" in refused("optimize", tiny, "-o", tmp_path / "out", "--device", "nonsense", "--format", "int8")


def test_a_plain_model_given_as_a_bundle(refused, tiny):
    assert "holds no halve/certificate.json" in refused("verify", tiny, "--against", tiny)


def test_a_plan_of_a_newer_halve_is_refused(refused, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "bundle")
    (model / "halve").mkdir()
    (model / "halve/plan.json").write_text('{"version": 99}')
    assert "version 99 was written by a newer Halve" in refused("generate", model, "hi")
