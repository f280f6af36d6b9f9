import gzip
import hashlib
import json
import logging
import lzma
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.core.errors import DataError, OutputError
from halve.data import Document, documents_sha256, encode, read_documents, sources, write_documents

TALK = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path):
    return [document.text for document in read_documents(path)]


# --- JSONL ---


def test_each_line_is_a_document_and_other_keys_are_ignored(tmp_path):
    lines = ['{"text": "one", "id": 7}', "", json.dumps({"messages": list(TALK), "score": None})]
    path = written(tmp_path, "a.jsonl", "\n".join(lines))
    assert read_documents(path) == [Document(text="one"), Document(messages=TALK)]


def test_only_a_newline_ends_a_line(tmp_path):
    text = "form feed \\f, next line \x85, line separator \u2028, escaped \\r\\n"
    path = written(tmp_path, "a.jsonl", f'{{"text": "{text}"}}\r\n{{"text": "two"}}\r\n')
    assert texts(path) == ["form feed \f, next line \x85, line separator \u2028, escaped \r\n", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1}', r"a\.jsonl:2: each line is an object with `text` or with `messages`, this has keys \['id'\]"),
        ('{"text": "a", "messages": []}', r"a\.jsonl:2: .* this has both"),
        ('["text"]', r"a\.jsonl:2: .* this is a list"),
        ("{text: 1}", r"a\.jsonl:2: not JSON"),
        ('{"text": "a", "text": "b"}', r"a\.jsonl:2: duplicate keys \['text'\]"),
        ('{"text": 3}', r"a\.jsonl:2: `text` is a string, this is a number"),
        ('{"text": null}', r"a\.jsonl:2: `text` is a string, this is missing or null"),
        ('{"messages": "hi"}', r"a\.jsonl:2: `messages` is a list of objects with role and content, this is a string"),
        ('{"messages": ["hi"]}', r"a\.jsonl:2: message 1 is a string; a message is an object with role and content"),
        ('{"messages": [{"role": "user"}]}', r"a\.jsonl:2: message 1: `content` is a string, this is missing or null"),
        ('{"messages": [{"role": 1, "content": ""}]}', r"a\.jsonl:2: message 1: `role` is a string, this is a number"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: a document is Unicode text"),
        ('{"messages": [{"role": "user", "content": "a", "n": 1e999}]}', r"a\.jsonl:2: .* JSON can hold"),
        ('{"n": ' + "9" * 5000 + ', "text": "a"}', r"a\.jsonl:2: not JSON: .* digits"),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + ', "text": "a"}', r"a\.jsonl:2: not JSON: .* recursion"),
    ],
)
def test_a_line_that_breaks_a_rule_is_named_with_the_rule(tmp_path, line, message):
    path = written(tmp_path, "a.jsonl", '{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        read_documents(path)


def test_an_error_does_not_repeat_a_line_of_megabytes(tmp_path):
    path = written(tmp_path, "a.jsonl", json.dumps({"x" * 5_000_000: 1}))
    with pytest.raises(DataError) as caught:
        read_documents(path)
    assert len(str(caught.value)) < 1000


def test_one_line_of_many_megabytes_is_one_document(tmp_path):
    path = written(tmp_path, "a.jsonl", json.dumps({"text": "word " * 2_000_000}))
    assert len(texts(path)[0]) == 10_000_000


def test_documents_without_text_are_left_out_and_counted(tmp_path, caplog):
    lines = ['{"text": " \\n"}', '{"text": "a"}', '{"messages": []}', '{"messages": [{"role": "u", "content": ""}]}']
    path = written(tmp_path, "a.jsonl", "\n".join(lines))
    with caplog.at_level(logging.WARNING, "halve.data"):
        assert texts(path) == ["a"]
    assert "left out 3 documents without text" in caplog.text


# --- plain text ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n\n\ntwo\fthree\n<|endoftext|>\nfour", ["one\n\n\ntwo", "three\n<|endoftext|>\nfour"]),
        ("one\n\n\nstill one\n<|endoftext|>\n\ntwo\n<|endoftext|>\n", ["one\n\n\nstill one", "two"]),
        ("a line with <|endoftext|> in it\n\n\ntwo", ["a line with <|endoftext|> in it", "two"]),
        ("one\n\nstill one\n \n\t\n\n" * 50, ["one\n\nstill one"] * 50),
        ("one\n\ntwo\n\n\nthree", ["one", "two", "three"]),  # a few pairs of blank lines stand before headings
        ("one\nstill one\n\ntwo\n  \n  three", ["one\nstill one", "two", "  three"]),
        ("one\nstill one\n", ["one\nstill one"]),
        ("\n\n\n one\n\ntwo\n\n\n\n", [" one", "two"]),
        ("one\n\nstill one\n\f\n", ["one\n\nstill one"]),
    ],
    ids=[
        "form feed",
        "endoftext",
        "endoftext within a line",
        "two blank",
        "few",
        "blank",
        "none",
        "at the ends",
        "ff last",
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_plain_text_is_cut_at_the_first_separator_that_occurs(tmp_path, content, expected, newline):
    path = written(tmp_path, "a.txt", content.replace("\n", newline))
    assert texts(path) == expected


def test_a_long_run_of_white_space_is_read_in_linear_time(tmp_path):
    path = written(tmp_path, "a.txt", "one\n" + " " * 500_000 + "x\n" + "\n" * 500_000 + "two")
    assert len(texts(path)) == 2


@pytest.mark.parametrize(("name", "pack"), [("a.txt.gz", gzip.compress), ("b.md.xz", lzma.compress)])
def test_compressed_text_is_read(tmp_path, name, pack):
    assert texts(written(tmp_path, name, pack(b"one\n\ntwo"))) == ["one", "two"]


@pytest.mark.parametrize(("name", "pack"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)])
def test_compressed_jsonl_is_read(tmp_path, name, pack):
    assert texts(written(tmp_path, name, pack(b'{"text": "one"}\n'))) == ["one"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz"])
@pytest.mark.parametrize("damage", ["no archive", "cut short"])
def test_a_broken_archive_is_named(tmp_path, name, damage):
    whole = (gzip if name.endswith("gz") else lzma).compress(bytes(range(256)) * 20)
    path = written(tmp_path, name, b"plain" if damage == "no archive" else whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}: can't be read"):
        read_documents(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_dropped(tmp_path, name, mark):
    assert texts(written(tmp_path, name, mark + ('{"text": "é"}' if name == "a.jsonl" else "é"))) == ["é"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("é".encode() + b"ab\xff", r"not UTF-8 at byte 4; save it"),
        ("\ufeffab".encode() + b"\xff", r"not UTF-8 at byte 5"),
        ("ab".encode("utf-16"), r"not UTF-8 at byte 0 \(it looks like UTF-16\)"),
        ("é".encode() + b"\0b", r"null byte at byte 2"),
        (b"", r"no text in it"),
        (b" \n\n \f\n ", r"no text in it"),
    ],
)
def test_bytes_that_are_no_text_are_named(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"a\.txt: {message}"):
        read_documents(written(tmp_path, "a.txt", content))


def test_a_file_beyond_the_limit_is_refused_also_when_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    assert texts(written(tmp_path, "a.txt", b"a" * 1000))
    with pytest.raises(DataError, match="holds more than 1000 bytes of text; give a part of it"):
        read_documents(written(tmp_path, "b.txt.gz", gzip.compress(b"a" * 1001)))


# --- paths ---


def test_a_directory_is_read_in_order_of_name_with_each_text_file_whole(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    written(tmp_path, "b.txt", "b one\n\nb two\n")
    written(tmp_path, "a.jsonl", '{"text": "a"}')
    written(tmp_path, "sub/c.txt", "c")
    written(tmp_path, "code.py", "pass")
    with caplog.at_level(logging.INFO, "halve.data"):
        assert texts(tmp_path) == ["a", "b one\n\nb two", "c"]
    assert "read 3 .txt and .jsonl files, left out 1 others" in caplog.text


def test_a_directory_without_text_files_is_refused(tmp_path):
    written(tmp_path, "code.py", "pass")
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl file in this directory \(1 other files\)"):
        read_documents(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: does not exist; give a \.jsonl file"):
        read_documents(tmp_path / "nowhere.txt")


def test_a_pipe_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="not a file or directory"):
        read_documents(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="not a file, or a link to nothing"):
        read_documents(tmp_path)


def test_a_path_that_the_system_refuses_is_named():
    with pytest.raises(DataError, match="can't be read: File name too long"):
        read_documents("x" * 5000)


# --- documents ---


def test_a_document_is_text_or_messages():
    for wrong in ({}, {"text": "a", "messages": TALK}):
        with pytest.raises(DataError, match="either text or messages"):
            Document(**wrong)
    with pytest.raises(DataError, match="this one is blank"):
        Document(text=" \n")
    with pytest.raises(DataError, match="message 1: `content` is a string"):
        Document(messages=({"role": "user", "content": None},))


def test_the_hash_is_of_the_canonical_json():
    document = Document(messages=({"role": "user", "content": "é"},))
    assert document.sha256 == hashlib.sha256('{"messages":[{"content":"é","role":"user"}]}'.encode()).hexdigest()
    assert document.sha256 == Document(messages=({"content": "é", "role": "user"},)).sha256


some_text = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)
message = st.fixed_dictionaries({"role": st.text(st.characters(exclude_categories=["Cs"])), "content": some_text})
documents = st.one_of(
    st.builds(Document, text=some_text),
    st.builds(Document, messages=st.lists(message, min_size=1, max_size=3).map(tuple)),
)


@settings(deadline=None)
@given(st.lists(documents, min_size=1, max_size=5))
def test_what_is_written_is_read_back_the_same(tmp_path_factory, written_documents):
    path = tmp_path_factory.mktemp("round") / "a.jsonl"
    write_documents(path, written_documents)
    again = read_documents(path)
    assert again == written_documents
    assert [d.sha256 for d in again] == [d.sha256 for d in written_documents]
    assert documents_sha256(again) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_documents_are_only_written_where_they_can_be_read_back(tmp_path):
    with pytest.raises(OutputError, match=r"give a name that ends in \.jsonl"):
        write_documents(tmp_path / "a.txt", [Document(text="a")])
    with pytest.raises(OutputError, match="can't be written: No such file or directory"):
        write_documents(tmp_path / "no" / "a.jsonl", [Document(text="a")])


# --- tokens ---


class Letters:
    """One token a letter after a BOS of 0; a template that joins contents with `|`."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text):
        return [0, *map(ord, text)]

    def encode_chat(self, messages):
        return self.encode("|".join(m["content"] for m in messages))


def test_text_and_messages_become_tokens(caplog):
    talk = Document(messages=({**TALK[0], "name": "Ann"}, TALK[1]))
    one, plain = encode([Document(text="ab"), talk], Letters(), vocab_size=256)
    assert one.dtype == np.int32
    assert one.tolist() == [0, 97, 98]
    assert bytes(plain[1:].tolist()) == b"user: Hi\nassistant: Hello"
    assert "no chat template: left out ['name'] of messages" in caplog.text
    (rendered,) = encode([talk], Letters("template"), vocab_size=256)
    assert bytes(rendered[1:].tolist()) == b"Hi|Hello"


def test_a_token_outside_the_vocabulary_names_the_document():
    with pytest.raises(DataError, match=r"document 2 \('é'\): token 233 is outside the model's vocabulary of 128"):
        encode([Document(text="a"), Document(text="é")], Letters(), vocab_size=128)
