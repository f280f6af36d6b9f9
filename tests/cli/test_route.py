"""`halve route` as a shell sees it."""

from tests.api.test_route import rows, write

ARGS = ("--cheap", "small=0.6/0.6", "--dear", "large=10/30")


def test_a_reader_sees_the_frames_and_the_verdict(shell, tmp_path):
    path = write(tmp_path / "q.jsonl", rows(200))
    ran = shell("route", path, *ARGS, "--max-quality-loss", "10%", "--requests-per-month", "1000000")
    assert ran.code == 0, ran.err
    for words in (
        "coin, as often right",
        "oracle, as often right",
        "$ a month",
        "100 questions that it was not",
    ):
        assert words in ran.out


def test_json(shell, tmp_path):
    ran = shell("route", write(tmp_path / "q.jsonl", rows(100)), *ARGS, "--json")
    assert ran.json["num_questions"] == 100
    assert ran.json["answer"] in ("holds", "not_shown", "broken")


def test_bad_input_is_said_in_one_line(shell, tmp_path):
    ran = shell("route", tmp_path / "none.jsonl", *ARGS)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1
