"""`halve prompts` as a shell sees it."""

from tests.api.test_prompts import line, write


def test_an_engineer_reads_where_tokens_go(shell, tmp_path):
    path = write(tmp_path / "log.jsonl", [*(line(i) for i in range(30)), "{"])
    ran = shell("prompts", path, "--input-price", "0.5", "--cached-price", "0", "--output-price", "1.5")
    assert ran.code == 0, ran.err
    for words in ("30 requests", "examples", "reorder", "Now: day #", "as sent", "simulator", "line 31: not JSON"):
        assert words in ran.out


def test_json(shell, tmp_path):
    ran = shell("prompts", write(tmp_path / "log.jsonl", [line(i) for i in range(5)]), "--json", "--replay", "0")
    assert ran.json["num_requests"] == 5
    assert ran.json["replays"] == []
    assert ran.json["findings"][0]["usd_per_month"] is None
    assert ran.json["requests_per_month"] == 26280


def test_a_log_of_another_shape_is_told_in_one_line(shell, tmp_path):
    ran = shell("prompts", write(tmp_path / "log.jsonl", [{"question": 1}]))
    assert ran.code == 1
    (said,) = ran.err.splitlines()
    assert "line 1: no request of a known shape: it has ['question'], and needs messages, prompt or input" in said
