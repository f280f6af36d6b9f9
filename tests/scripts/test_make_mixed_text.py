import json

import make_mixed_text as script
import pytest


def candidate(key, text, group="one"):
    return script.Candidate(key=key, group=group, document={"text": text})


def words(start, count=80):
    return " ".join(f"word{i}" for i in range(start, start + count))


def choose(candidates, budget=10**6, per_group=10):
    return {c.key for c in script.choose(candidates, budget, per_group, set())}


def test_ranks_are_the_same_everywhere():
    assert script.rank("a") == 7950270206553322399
    assert script.rank("a") != script.rank("b")


def test_paragraphs_are_taken_whole():
    assert script.cut(["aaa", "bbb", "ccc"], 1, 9, "\n") == "bbb\nccc"
    assert script.cut(["aaa", "bbb", "ccc"], 1, 7, "\n") == "bbb"
    assert script.cut(["aaa"], 0, 2, "\n") == ""


def test_a_document_that_repeats_another_is_left_out():
    copy = "Something else comes first. " + words(0)
    assert len(choose([candidate("a", words(0)), candidate("b", copy)])) == 1
    assert choose([candidate("a", words(0)), candidate("b", words(500))]) == {"a", "b"}


def test_a_work_gives_one_excerpt_and_a_group_no_more_than_its_share():
    assert len(choose([candidate("w:0", words(0)), candidate("w:1", words(500))])) == 1
    many = [candidate(f"w{i}", words(500 * i)) for i in range(5)]
    assert len(choose(many, per_group=2)) == 2


def test_groups_take_turns_until_the_budget_is_used():
    many = [
        candidate(f"{group}{i}", words(500 * i + 5000 * n), group) for n, group in enumerate("ab") for i in range(5)
    ]
    taken = choose(many, budget=1500)
    assert {key[0] for key in taken} == {"a", "b"}
    assert len(taken) < 5


@pytest.mark.parametrize(
    "text",
    [
        "too short",
        words(0, 3000),
        words(0) + " write to someone@example.com",
        words(0) + " call 555-123-4567",
        words(0) + " all heathens",
        words(0) + " \ufffd",
        words(0) + " Copyright 2001",
    ],
    ids=["short", "long", "address", "telephone", "dated", "broken", "notice"],
)
def test_text_that_does_not_fit_is_left_out(text):
    assert not script.fits(candidate("a", text))
    assert script.fits(candidate("a", words(0)))


def test_tool_calls_become_turns_that_alternate(tmp_path):
    turns = [("human", "Weather?"), ("function_call", "{}"), ("observation", "sun"), ("gpt", "It is sunny.")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns], "tools": '[{"name": "weather"}]'}
    (tmp_path / "instruct").mkdir()
    with script.gzip.open(tmp_path / "instruct/glaive_toolcall_en_300.jsonl.gz", "wt") as stream:
        stream.write(json.dumps(row) + "\n")
    (found,) = script.glaive(tmp_path)
    messages = found.document["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[0]["content"].startswith("Weather?\n\nTools that may be called")
    assert messages[2]["content"] == "Tool result: sun"


def arguments(folder, data):
    names = ("python", "npm", "pyenv", "postgresql", "torch")
    return [str(data), "--out", str(folder / "out"), *(x for n in names for x in (f"--{n}", str(folder)))]


def test_a_folder_that_does_not_exist_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments(tmp_path, tmp_path / "none"))
    assert stop.value.code == 2
    assert "none is not a folder" in capsys.readouterr().err


def test_a_missing_input_is_named(tmp_path, capsys):
    assert script.main(arguments(tmp_path, tmp_path)) == 1
    assert "titles.tsv" in capsys.readouterr().err
