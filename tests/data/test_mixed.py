import hashlib
import json
import re
from collections import Counter

import pytest

from halve.data.mixed import KINDS, mixed_text_paths

# A change of the text changes every certificate made with it: say so in the commit, and in SOURCES.md.
SHA256 = {
    "english": "4d43db09545b801f286083cf2867a56d1d571e6509db94d29221f83102925606",
    "japanese": "1e766d6afbf2874ee66321c67ce4d07bc843ee63c39c27ad200ed7c517fbf7f5",
    "code": "59fc89965bf06a0a56797d1788eef42becaa8a8fbec635f3d4c3eb7d93bdf6cf",
    "chat": "7920c0b9e2d7dcc89e7b3e3dd7450a3e56ed05de5bf1ece06d48998ddf0c74c7",
}
PATHS = {path.stem: path for path in mixed_text_paths()}
SOURCES = (mixed_text_paths()[0].parent / "SOURCES.md").read_text(encoding="utf-8")


def documents(kind):
    lines = PATHS[kind].read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def words(document):
    return document["text"] if "text" in document else "\n".join(m["content"] for m in document["messages"])


def test_there_is_one_file_for_each_kind():
    assert tuple(PATHS) == KINDS == tuple(SHA256)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_that_were_reviewed(kind):
    assert hashlib.sha256(PATHS[kind].read_bytes()).hexdigest() == SHA256[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_counts_documents_and_bytes_as_they_are(kind):
    stated = re.search(rf"^\| {kind}\.jsonl \| (\d+) \| (\d+) \|", SOURCES, re.MULTILINE)
    assert (int(stated[1]), int(stated[2])) == (len(documents(kind)), PATHS[kind].stat().st_size)


def test_all_kinds_together_are_small_and_many():
    assert sum(path.stat().st_size for path in PATHS.values()) < 700_000
    assert 400 <= sum(len(documents(kind)) for kind in KINDS) <= 700


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_a_text_or_messages_of_moderate_length(kind):
    for document in documents(kind):
        assert document.keys() == ({"messages"} if kind == "chat" else {"text"})
        assert 300 <= len(words(document).encode()) <= 4000
        assert words(document) == words(document).strip("\n")


def test_chat_turns_alternate_and_end_with_the_assistant():
    for document in documents("chat"):
        roles = [message["role"] for message in document["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message.keys() == {"role", "content"} and message["content"] for message in document["messages"])


def test_japanese_is_japanese():
    for document in documents("japanese"):
        kana = re.findall(r"[\u3040-\u30ff]", document["text"])
        assert len(kana) > 0.2 * len(document["text"])


def test_no_two_documents_begin_alike():
    beginnings = Counter(words(document)[:50] for kind in KINDS for document in documents(kind))
    assert [text for text, count in beginnings.items() if count > 1] == []


def test_no_two_documents_share_a_long_line():
    lines = [
        line
        for kind in KINDS
        for document in documents(kind)
        for line in {line for line in words(document).splitlines() if len(line) >= 120}
    ]
    assert [line for line, count in Counter(lines).items() if count > 1] == []


def test_no_document_holds_an_electronic_address():
    found = [words(d) for kind in KINDS for d in documents(kind) if re.search(r"[\w.+-]+@[\w-]+\.\w", words(d))]
    assert found == []


def test_every_licence_text_that_sources_names_is_there_and_every_one_there_is_named():
    folder = PATHS["code"].parent / "licenses"
    named = set(re.findall(r"`licenses/([\w.-]+)`", SOURCES))
    assert named == {path.name for path in folder.iterdir()}
    assert all((folder / name).stat().st_size > 500 for name in named)


def test_every_npm_package_that_sources_names_has_its_licence():
    notices = (PATHS["code"].parent / "licenses/npm.txt").read_text(encoding="utf-8")
    listed = re.search(r"MIT and ISC: (.*?)\(", SOURCES, re.DOTALL)[1]
    packages = re.findall(r"[@\w/-]+", listed)
    assert packages == re.findall(r"^==== (\S+) ", notices, re.MULTILINE)
