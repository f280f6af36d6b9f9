import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halve.text
from halve.core.errors import TextError
from halve.text import Tokenizer

from .conftest import SENTENCES, byte_fallback, byte_level

TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  two spaces  ",
    "<|end|>within<|eot_id|> text",
    "<s>again</s> the",
    "<tool call>x",
    "\x00\ufffd\u200d",
]
EMBEDDED = Path(halve.text.__file__).parents[1] / "models" / "embedded" / "tiny-en"


def oracle(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def expected_ids(theirs: Any, text: str, ours: Tokenizer, add_bos: bool) -> list[int]:
    ids = theirs.encode(text)
    bos = ours.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        return ids[1:]
    return [bos, *ids] if add_bos and ids[:1] != [bos] else ids


def assert_same_ids(path: Path, add_bos: bool = False) -> None:
    ours, theirs = Tokenizer.from_directory(path), oracle(path)
    for text in TEXTS:
        assert ours.encode(text) == expected_ids(theirs, text, ours, add_bos), text
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_ids_of_the_embedded_model_are_those_of_transformers():
    assert_same_ids(EMBEDDED)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"pad_token": "<pad>", "additional_special_tokens": ["<|user|>", "the"]},
        {
            "bos_token": {"__type": "AddedToken", "content": "<b>", "lstrip": False, "rstrip": False},
            "add_bos_token": True,
        },
        {"clean_up_tokenization_spaces": True},
    ],
    ids=str,
)
def test_ids_are_those_of_transformers(checkpoint, make, changes):
    assert_same_ids(checkpoint(make, **changes), add_bos=changes.get("add_bos_token", make is byte_fallback))


def test_llama_tokenizer_class_gives_the_same_ids(checkpoint):
    path = checkpoint(byte_fallback, tokenizer_class="LlamaTokenizer", legacy=True)
    ours, theirs = Tokenizer.from_directory(path), oracle(path)
    for text in SENTENCES:
        assert ours.encode(text) == [ours.bos_token_id, *theirs.encode(text)]


def test_special_tokens_map_overrules_an_old_config(checkpoint):
    path = checkpoint(byte_level, eos_token="<|im_end|>")
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    assert_same_ids(path)
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False) == "<|eot_id|>"


def test_listed_added_tokens_are_added(checkpoint):
    size = byte_level()[0].get_vocab_size()
    token = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    path = checkpoint(byte_level, added_tokens_decoder={str(size): token})
    assert_same_ids(path)
    assert size in Tokenizer.from_directory(path).special_token_ids


def test_added_token_with_another_id_is_refused(checkpoint):
    path = checkpoint(byte_level, added_tokens_decoder={"7": {"content": "<|end|>"}})
    with pytest.raises(TextError, match=r"tokenizer_config.json: '<\|end\|>' has id 7, tokenizer.json: 1"):
        Tokenizer.from_directory(path)


@pytest.mark.parametrize("listed", [["<x>"], {"one": {"content": "<x>"}}, {"700": "<x>"}, {"700": {}}])
def test_malformed_added_tokens_are_refused(checkpoint, listed):
    with pytest.raises(TextError, match="added_tokens_decoder is not a map"):
        Tokenizer.from_directory(checkpoint(byte_level, added_tokens_decoder=listed))


def test_truncation_stored_in_tokenizer_json_is_off(checkpoint):
    path = checkpoint()
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (path / "tokenizer.json").write_text(json.dumps(raw))
    assert len(Tokenizer.from_directory(path).encode(SENTENCES[0])) > 3


def test_text_that_begins_with_bos_gets_no_second_one(checkpoint):
    tokenizer = Tokenizer.from_directory(checkpoint())
    assert tokenizer.encode("<|begin|>the") == tokenizer.encode("the")
    assert tokenizer.encode("<|begin|><|begin|>the").count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_of_a_stream_add_up_to_the_whole(checkpoint, tmp_path, make, data):
    if not (tmp_path / "tokenizer.json").exists():
        checkpoint(make)
    tokenizer = cached(tmp_path)
    ids = data.draw(
        st.one_of(
            st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12),
            st.text(max_size=12).map(tokenizer.encode),
            st.lists(st.integers(0, 290), max_size=12),
        )
    )
    skip = data.draw(st.booleans())
    stream = tokenizer.decode_stream(skip_special_tokens=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
    assert stream.flush() == ""


CACHE: dict[Path, Tokenizer] = {}


def cached(path: Path) -> Tokenizer:
    return CACHE.setdefault(path, Tokenizer.from_directory(path)) if path not in CACHE else CACHE[path]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_stream_never_gives_half_a_character(checkpoint, make):
    tokenizer = Tokenizer.from_directory(checkpoint(make))
    text = "x🙂y東京zü."
    stream = tokenizer.decode_stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len([p for p in pieces if p]) > 3


def test_a_stream_gives_plain_text_at_once(checkpoint):
    tokenizer = Tokenizer.from_directory(checkpoint())
    stream = tokenizer.decode_stream()
    assert all(stream.push(i) for i in tokenizer.encode("the old house", add_special_tokens=False))


def test_an_unfinished_character_comes_out_at_the_flush(checkpoint):
    tokenizer = Tokenizer.from_directory(checkpoint())
    ids = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    stream = tokenizer.decode_stream()
    assert [p for p in map(stream.push, ids) if p] == ["a"]
    assert stream.flush() == "\ufffd"


def test_ids_that_only_the_model_has_are_without_text(checkpoint):
    path = checkpoint()
    size = Tokenizer.from_directory(path).vocab_size
    tokenizer = Tokenizer.from_directory(path, vocab_size=size + 2)
    assert tokenizer.decode([size + 1]) == "" == tokenizer.decode_stream().push(size)
    for bad in (-1, size + 2):
        with pytest.raises(TextError, match=rf"token id {bad} is outside the vocabulary \(0 to {size + 1}\)"):
            tokenizer.decode([bad])
        with pytest.raises(TextError, match="outside the vocabulary"):
            tokenizer.decode_stream().push(bad)


def test_a_tokenizer_beyond_the_vocabulary_is_refused_with_its_first_such_token(checkpoint):
    path = checkpoint(byte_level, pad_token="<pad>")
    size = Tokenizer.from_directory(path).vocab_size
    assert Tokenizer.from_directory(path, vocab_size=size).vocab_size == size
    with pytest.raises(TextError, match=rf"does not match the vocabulary.* {size} ids .*model {size - 1};.*'<pad>'"):
        Tokenizer.from_directory(path, vocab_size=size - 1)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(TextError, match=r"tokenizer.json: missing; copy the tokenizer files"):
        Tokenizer.from_directory(tmp_path)


def test_a_sentencepiece_model_comes_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b")
    with pytest.raises(
        TextError, match=r"tokenizer.model alone is not read.*AutoTokenizer.from_pretrained\(.*save_pre"
    ):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}', "\x00"])
def test_a_broken_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TextError, match=r"tokenizer.json: tokenizers [\d.]+ can't read it"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "can't be read as JSON"), (b"\xff", "JSON"), (b"[]", "object")]
)
def test_a_broken_config_is_named(checkpoint, name, content, message):
    path = checkpoint()
    (path / name).write_bytes(content)
    with pytest.raises(TextError, match=rf"{name}: .*{message}"):
        Tokenizer.from_directory(path)


def test_adding_a_token_that_has_no_name_is_refused(checkpoint):
    with pytest.raises(TextError, match="add_bos_token is true, but there is no bos_token"):
        Tokenizer.from_directory(checkpoint(byte_level, bos_token=None, add_bos_token=True))


@pytest.mark.parametrize("text", [None, 3, "\ud800", ["a"]])
def test_what_is_not_text_is_refused(checkpoint, text):
    with pytest.raises(TextError, match="can't be tokenized; pass a string"):
        Tokenizer.from_directory(checkpoint()).encode(text)


def test_neither_torch_nor_transformers_is_loaded():
    code = "import sys, halve.text; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
