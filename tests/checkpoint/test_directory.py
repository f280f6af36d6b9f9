import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halve.checkpoint import open_checkpoint, quantization_config, weight_specs, weight_tensors
from halve.checkpoint.safetensors import SINGLE, TensorWriter
from halve.core.errors import CheckpointError
from halve.formats import FORMATS, Weight
from halve.formats.base import BF16

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}


@pytest.fixture
def model(tmp_path):
    """A directory with a config, a compressed matrix, a plain one and two vectors."""
    int8 = Weight(
        format=FORMATS["int8"],
        shape=(2, 4),
        codes=np.arange(-4, 4, dtype=np.int8).reshape(2, 4),
        scale=np.array([[0.5], [2.0]], BF16),
    )
    tensors = weight_tensors("q", int8, portable=False)
    specs = weight_specs("q", int8.format, int8.shape, portable=False)
    extra = {"k.weight": np.ones((2, 4), BF16), "norm.weight": np.full(4, 1.5, BF16), "q.bias": np.zeros(2, np.float16)}
    specs |= {"k.weight": ("BF16", (2, 4)), "norm.weight": ("BF16", (4,)), "q.bias": ("F16", (2,))}
    with TensorWriter(tmp_path, specs) as writer:
        for name, array in (tensors | extra).items():
            writer.write(name, array)
    config = {**CONFIG, "quantization_config": quantization_config({"q": "int8", "k": "bf16"}, portable=False)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_directory_opens_with_config_weights_and_layout(model):
    with open_checkpoint(str(model)) as checkpoint:
        assert checkpoint.path == model
        assert checkpoint.config["hidden_size"] == 4
        assert checkpoint.layout.format_of("q").name == "int8"
        assert checkpoint.reader.size_bytes == (model / SINGLE).stat().st_size
        assert checkpoint.read_weight("q", (2, 4)).dequantize().tolist() == [[-2, -1.5, -1, -0.5], [0, 2, 4, 6]]
        assert checkpoint.read_weight("k", (2, 4)).format.name == "bf16"
        assert not checkpoint.is_bundle


def test_vectors_come_as_float32(model):
    with open_checkpoint(model) as checkpoint:
        for name, size, value in (("norm.weight", 4, 1.5), ("q.bias", 2, 0)):
            vector = checkpoint.read_vector(name, (size,))
            assert vector.dtype == np.float32
            assert vector.tolist() == [value] * size


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("norm.weight", (5,), r"norm.weight: shape \[4\]; the model needs \[5\]: config.json and weights"),
        ("q.weight", (2, 4), "q.weight: I8; vectors are F32, F16 or BF16"),
        ("final.weight", (4,), "tensor 'final.weight': no such tensor"),
    ],
)
def test_a_vector_that_does_not_fit_is_named(model, name, shape, words):
    with open_checkpoint(model) as checkpoint, pytest.raises(CheckpointError, match=words):
        checkpoint.read_vector(name, shape)


def test_a_vector_with_nan_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with TensorWriter(tmp_path, {"norm.weight": ("F32", (2,))}) as writer:
        writer.write("norm.weight", np.array([1, np.nan], np.float32))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"norm.weight: nan at \[1\]"):
        checkpoint.read_vector("norm.weight", (2,))


def test_the_hash_covers_config_and_weights(model):
    with open_checkpoint(model) as checkpoint:
        before = checkpoint.sha256()
        config = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
        assert before == hashlib.sha256(f"{config} {checkpoint.reader.sha256()}".encode()).hexdigest()
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.sha256() != before


def test_a_bundle_is_known_by_its_plan(model):
    (model / "halve").mkdir()
    (model / "halve" / "plan.json").write_text("{}")
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.is_bundle


def test_text_travels_and_weights_code_and_pickles_stay(model):
    carried = [
        *("LICENSE", "LICENSE-MODEL.txt", "NOTICE", "README.md", "USE_POLICY.md", "added_tokens.json"),
        *("chat_template.jinja", "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json"),
        *("tokenizer.model", "tokenizer_config.json", "vocab.json"),
    ]
    stay = [
        *("modeling_custom.py", "tokenizer.py", "tokenizer.pkl", "tokenizer_custom.so", "vocab.bin", "x.gguf"),
        *("pytorch_model.bin", "training_args.bin", "LICENSE.exe"),
    ]
    for name in [*carried, *stay]:
        (model / name).write_text("x")
    (model / "tokenizer").mkdir()
    with open_checkpoint(model) as checkpoint:
        assert [path.name for path in checkpoint.carried_files()] == carried
        assert all(path.parent == model for path in checkpoint.carried_files())


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, None),
        ({"README.md": "# A model\nlicense: mit\n"}, None),
        ({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model"}, "apache-2.0"),
        ({"README.md": "\ufeff---\r\nlicense: 'mit'\r\n---\r\n"}, "mit"),
        ({"README.md": "---\nlicense:\n- cc0-1.0\n---\n"}, "cc0-1.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: llama3.2\n---\n"}, "llama3.2"),
        ({"README.md": "---\nlicense: other\n---\n"}, "other"),
        ({"README.md": "---\nlanguage: en\n---\n", "LICENSE": "\n  Apache License \nVersion 2.0"}, "Apache License"),
        ({"license.txt": "MIT License\n"}, "MIT License"),
        ({"LICENSE": "\n"}, None),
        ({"README.md": "---\nlicense: mit\n", "LICENSE": "x"}, "x"),  # front matter that never ends is none
    ],
)
def test_the_licence_is_what_card_or_licence_file_say(model, files, licence):
    for name, text in files.items():
        (model / name).write_bytes(text.encode())
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.licence() == licence


def refused(path, words):
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_a_path_that_is_no_model_is_refused_with_the_way_out(tmp_path):
    refused("", "the model's path is empty")
    refused(tmp_path / "no", "no: does not exist; give a model's directory, or org/name")
    refused(tmp_path, r"no config.json; give the directory of a Hugging Face model")
    refused("x" * 5000, "cannot be read: .*File name too long")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    refused(tmp_path / "model.safetensors", "a file; give the directory that holds config.json")


@pytest.mark.parametrize(("name", "start"), [("model.gguf", b""), ("model", b"GGUF\x03\0\0\0")])
def test_a_gguf_file_is_recognised(tmp_path, name, start):
    (tmp_path / name).write_bytes(start)
    refused(tmp_path / name, "a GGUF file, already quantized for llama.cpp; give the directory of the original")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_are_named(model):
    (model / "config.json").chmod(0)
    refused(model, "config.json: cannot be read: Permission denied; check the path and permissions")


def test_a_file_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_text("x")

    def fail(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    refused(path, "model: cannot be read: Permission denied; check the permissions")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[]", "config.json: expected a JSON object"),
        ("{", "config.json: not JSON"),
        ('{"a": 1, "a": 2}', r"config.json: duplicate keys \['a'\]"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "quant_method: 'gptq'"),
        ('{"quantization_config": 4}', "expected an object"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(model, config, words):
    (model / "config.json").write_text(config)
    refused(model, words)


def test_code_in_the_directory_never_runs(model, tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "ran"
    code = f"open({str(trace)!r}, 'w').close()\n"
    for name in ("modeling_evil.py", "tokenizer.py", "__init__.py", "configuration_evil.py"):
        (model / name).write_text(code)
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    with open_checkpoint(model) as checkpoint:
        checkpoint.carried_files()
        checkpoint.read_weight("q", (2, 4))
    assert not trace.exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_config_is_read_or_refused_and_nothing_else(model, data):
    good = (model / "config.json").read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    (model / "config.json").write_bytes(raw)
    try:
        with open_checkpoint(model) as checkpoint:
            checkpoint.read_weight("q", (2, 4))
    except CheckpointError:
        pass
    finally:
        (model / "config.json").write_bytes(good)


def test_a_draft_model_in_a_bundle_counts_in_its_bytes(model):
    with open_checkpoint(model) as checkpoint:
        alone = checkpoint.weight_bytes
        assert alone == checkpoint.reader.size_bytes
        draft = model / "halve" / "draft"
        draft.mkdir(parents=True)
        (draft / "model.safetensors").write_bytes(bytes(100))
        (draft / "config.json").write_bytes(bytes(7))
        assert checkpoint.weight_bytes == alone + 100
