"""Who takes part, and what their models ask of the machine."""

import pytest

from halve.api.versus.entrants import entrants, main_format, model_name, weight_bytes, work_of
from halve.api.versus.processes import WorkerError
from halve.checkpoint import open_checkpoint
from halve.core.errors import ConfigError
from halve.models import load_config
from halve.models.embedded import SPARSE, embedded_model_path
from halve.models.names import num_active_parameters, num_parameters


@pytest.fixture
def opened(tiny):
    with open_checkpoint(tiny) as checkpoint:
        yield checkpoint, load_config(checkpoint)


def named(opened, *vs):
    return entrants(*opened, vs, [], [False])


def test_the_model_goes_first_and_knows_its_format(opened, tiny):
    (ours,) = named(opened)
    assert (ours.name, ours.kind, ours.path, ours.format) == ("halve:tiny", "halve", str(tiny), "bf16")
    assert ours.shape == {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}


def test_two_of_a_name_are_told_apart(opened, passed):
    names = [c.name for c in named(opened, f"halve:{opened[0].path}", "openai:http://localhost:80/v1")]
    assert names == ["halve:tiny#1", "halve:tiny#2", "openai:localhost:80/v1"]
    other = named(opened, f"halve:{passed.path}")[1]
    assert other.format == "int8"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gpt:x", "'gpt:x' is not KIND:PATH with a kind of halve, llama.cpp, onnx, openvino, vllm, openai"),
        ("onnx:", "is not KIND:PATH"),
        ("onnx:/no/such", "there is no /no/such"),
    ],
)
def test_words_that_name_no_engine_are_refused(opened, words, said):
    with pytest.raises(ConfigError, match=said):
        named(opened, words)


def test_an_engine_that_no_environment_has_is_refused_before_anything_is_measured(opened, tmp_path):
    (tmp_path / "model.xml").touch()
    with pytest.raises(ConfigError, match="openvino: no environment with the module openvino_genai"):
        named(opened, f"openvino:{tmp_path}")


def test_bytes_of_a_model_are_those_of_the_files_that_its_engine_reads(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"1")
    (tmp_path / "model.onnx.data").write_bytes(b"1234")
    (tmp_path / "tokenizer.json").write_bytes(b"12345678")
    (tmp_path / ".halve").mkdir()
    assert weight_bytes("onnx", tmp_path) == 5
    assert weight_bytes("onnx", tmp_path / "model.onnx") == 1
    with pytest.raises(WorkerError, match=r"llama.cpp:.* no weight files \(.gguf\) there"):
        weight_bytes("llama.cpp", tmp_path)


def test_a_table_that_is_only_looked_up_is_not_read(opened, tiny):
    config = opened[1]
    work = work_of("halve", str(tiny), config)
    size = (tiny / "model.safetensors").stat().st_size
    table = config.vocab_size * config.hidden_size
    assert not config.tied
    assert work.weight_bytes == pytest.approx(size - 2 * table, rel=0.05)
    assert work.macs_of_head == table
    assert work_of("openai", "http://x/v1", config).weight_bytes is None


def test_of_a_sparse_model_a_token_reads_the_experts_that_it_goes_to():
    path = embedded_model_path(SPARSE)
    with open_checkpoint(path) as checkpoint:
        config = load_config(checkpoint)
    work = work_of("halve", str(path), config)
    assert work.sparse
    assert work.macs_of_layers + work.macs_of_head == num_active_parameters(config)
    size = sum(p.stat().st_size for p in path.glob("*.safetensors"))
    assert work.weight_bytes == pytest.approx(size * num_active_parameters(config) / num_parameters(config), rel=1e-6)


def test_the_format_of_a_checkpoint_is_that_of_most_weights(opened):
    assert main_format(*opened) == "bf16"


def test_a_model_is_named_without_where_it_lies():
    assert model_name("onnx", "/a/b/int4") == "int4"
    assert model_name("openai", "http://host:80/v1#m") == "host:80/v1#m"
