"""`halve prompts`: a log of known waste, what is found in it, and what the engine says of it."""

import json
from decimal import Decimal

import pytest

from halve.api.prompts import prompts, read_prices
from halve.core.errors import ConfigError, DataError
from halve.kernels import native_library
from halve.models.embedded import embedded_model_path

RULES = "".join(f"Rule {i}: always answer in the language of the customer.\n" for i in range(12))
SHOTS = [
    {"role": "user", "content": "What are two and two, said in words?"},
    {"role": "assistant", "content": "Two and two are four, and that is all."},
]
PRICES = read_prices("0.5", "0.05", "1.5", None)


def line(i, *, answer="It is done.", dated=True, finish="stop", **more):
    head = f"Now: day {i}, customer {i * 7}.\n" if dated else ""
    messages = [{"role": "system", "content": head + RULES}, *SHOTS, {"role": "user", "content": f"Question {i}?"}]
    response = {"choices": [{"message": {"content": answer}, "finish_reason": finish}]}
    return {"timestamp": 1_790_000_000 + 100 * i, "request": {"model": "m", "messages": messages}, "response": response,
            **more}  # fmt: skip


def write(path, lines):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def by_kind(found):
    return {one.kind: one for one in found.findings}


def test_a_date_in_front_hides_the_rules(tmp_path):
    found = prompts(write(tmp_path / "log.jsonl", [line(i) for i in range(30)]), prices=PRICES)
    reorder = by_kind(found)["reorder"]
    sent, better, held = found.replays
    assert sent.hit_tokens == 0
    assert better.hit_tokens == reorder.tokens > 0.7 * found.prompt_tokens
    assert held.change == "reordered, sent together each 60 s"
    assert reorder.usd == reorder.tokens * Decimal("0.45") / 1_000_000
    assert reorder.evidence == ("'Now: day #, customer #.' (30 requests)",)
    assert not reorder.keeps_answers
    # 30 requests in 2,900 s: one each 100 s
    assert found.requests_per_month == 26_280
    assert found.usd_per_month(reorder.usd) == reorder.usd * 26_280 / 30
    assert "cache" not in by_kind(found)


def test_the_same_prompt_is_found_as_it_is(tmp_path):
    found = prompts(write(tmp_path / "log.jsonl", [line(i, dated=False) for i in range(30)]), prices=PRICES)
    kinds = by_kind(found)
    assert "reorder" not in kinds
    assert kinds["cache"].keeps_answers
    assert kinds["cache"].tokens == found.replays[0].hit_tokens == found.replays[1].hit_tokens
    assert kinds["examples"].tokens == sum(r.tokens for r in found.roles if r.name == "examples")
    assert "2 examples recur" in kinds["examples"].change
    assert kinds["examples"].evidence[0].startswith("line 1: ")


def test_roles_add_up(tmp_path):
    found = prompts(write(tmp_path / "log.jsonl", [line(i) for i in range(5)]))
    assert sum(role.tokens for role in found.roles) == pytest.approx(found.prompt_tokens, rel=0.02)
    assert sum(role.share for role in found.roles) == pytest.approx(1)


def test_answers_that_run_on(tmp_path):
    lines = [line(i) for i in range(30)]
    lines[3] = line(3, answer="It is done.\nUser: and what else is there to say?")
    lines[4] = line(4, answer="I see. " + "I am sorry. " * 9, finish="length")
    found = by_kind(prompts(write(tmp_path / "log.jsonl", lines), prices=PRICES))
    assert "1 answers go on with the next turn; end them by stop sequences: '\\nUser:'" in found["run_on"].change
    assert found["run_on"].evidence == ("line 4",)
    assert found["run_on"].usd == found["run_on"].tokens * Decimal("1.5") / 1_000_000
    assert "1 answers end in a loop" in found["loop"].change
    assert "1 answers were cut off" in found["cut"].change
    assert found["cut"].usd is None


def test_long_answers_and_long_system_prompts(tmp_path):
    lines = [line(i, dated=False, usage={"completion_tokens": 500 if i < 2 else 10}) for i in range(40)]
    found = prompts(write(tmp_path / "log.jsonl", lines), prices=PRICES, long_system=100)
    kinds = by_kind(found)
    # 38 of 40 have 10: that is 19 in 20
    assert kinds["long"].tokens == 2 * 490
    assert "max_tokens: 10 cuts the others" in kinds["long"].change
    assert "1 system prompt is longer than 100 tokens" in kinds["system"].change
    assert found.answer_tokens == 2 * 500 + 38 * 10


def test_a_prompt_that_says_things_twice(tmp_path):
    one = line(0, dated=False)
    messages = one["request"]["messages"]
    messages[0]["content"] = f"{RULES}\n\n\n{RULES}"
    messages[3:3] = SHOTS
    found = by_kind(prompts(write(tmp_path / "log.jsonl", [one] * 10), prices=PRICES))
    assert "say lines twice" in found["system"].change
    assert found["repeats"].tokens == 10 * 10  # the question of the second example


def test_examples_inside_a_prompt(tmp_path):
    foods = [("very good", "glad"), ("quite cold", "sad"), ("rather late", "sad"), ("very good", "glad")]
    shots = "".join(f"Review: the food was {word}.\nMood: {mood}\n\n" for word, mood in foods)
    lines = [{"prompt": f"{shots}Review: it was number {i}.\nMood:"} for i in range(20)]
    found = prompts(write(tmp_path / "log.jsonl", lines), prices=PRICES)
    kinds = by_kind(found)
    assert "3 examples recur" in kinds["examples"].change
    assert kinds["repeats"].tokens == kinds["examples"].tokens * 1 // 4
    assert {role.name for role in found.roles} == {"examples", "question"}


def test_counts_follow_the_logs_own_usage(tmp_path):
    lines = [line(i, dated=False, usage={"prompt_tokens": 1000}) for i in range(10)]
    found = prompts(write(tmp_path / "log.jsonl", lines))
    assert found.prompt_tokens == 10_000
    assert any("prompt tokens are scaled by" in note for note in found.notes)


def test_what_the_server_found_already_is_not_saved_again(tmp_path):
    usage = {"prompt_tokens": 300, "prompt_tokens_details": {"cached_tokens": 300}}
    found = prompts(
        write(tmp_path / "log.jsonl", [line(i, dated=False, usage=usage) for i in range(10)]), prices=PRICES
    )
    assert found.cached_tokens == 3000
    assert "cache" not in by_kind(found)
    assert found.usd > 0


def test_bad_lines_are_named_and_left_out(tmp_path):
    found = prompts(write(tmp_path / "log.jsonl", [line(0), "{", line(1), {"x": 1}]))
    assert (found.num_requests, found.num_bad) == (2, 2)
    assert [bad.split(":")[0] for bad in found.bad_lines] == ["line 2", "line 4"]
    assert found.notes[0].startswith("2 lines are no requests and were left out; line 2: not JSON")


def test_unknown_prices_are_unknown(tmp_path):
    path = write(tmp_path / "log.jsonl", [line(i) for i in range(5)])
    found = prompts(path)
    assert found.usd is None
    assert {one.usd for one in found.findings} == {None}
    assert "nothing is priced: give --input-price" in found.notes[0] + found.notes[1]
    half = prompts(path, prices=read_prices("1", None, "2", None))
    assert half.usd is not None
    assert by_kind(half)["reorder"].usd is None
    assert any("what caching saves is not known" in note for note in half.notes)


def test_a_log_without_times_has_no_month(tmp_path):
    lines = [{"prompt": f"{RULES}{i}"} for i in range(5)]
    found = prompts(write(tmp_path / "log.jsonl", lines), prices=PRICES)
    assert found.requests_per_month is None
    assert len(found.replays) == 2
    assert any("a month's dollars are not known" in note for note in found.notes)
    assert prompts(tmp_path / "log.jsonl", requests_a_month=100).requests_per_month == 100
    assert prompts(tmp_path / "log.jsonl", first=2).num_requests == 2


def test_windows_help_a_cache_that_is_too_small(tmp_path):
    """Two products take turns, and the cache has room for one of them."""
    lines = [
        {
            "timestamp": 1000 * (i + 1),
            "prompt": "".join(f"{name} rule {k}: be kind to all.\n" for k in range(30)) + f"{i}",
        }
        for i, name in enumerate(["Alpha", "Beta"] * 10)
    ]
    found = prompts(write(tmp_path / "log.jsonl", lines), prices=PRICES, cache_tokens=400, window_s=10_000)
    sent, better, held = found.replays
    assert sent.hit_tokens == better.hit_tokens < held.hit_tokens
    assert by_kind(found)["window"].tokens == held.hit_tokens - better.hit_tokens


@pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")
def test_the_model_finds_what_was_foretold(tmp_path):
    lines = [{"prompt": f"A story for Tom{i}.\n{RULES[:400]}"} for i in range(8)]
    path = write(tmp_path / "log.jsonl", lines)
    found = prompts(path, model=str(embedded_model_path()), on_engine=True)
    sent, better = found.replays
    assert better.through == embedded_model_path().name
    assert sent.num_requests == better.num_requests == 8
    assert sent.hit_tokens == 0
    assert better.hit_tokens == by_kind(found)["reorder"].tokens > 0
    assert found.tokenizer == str(embedded_model_path())


def test_the_tokenizer_of_a_model_counts(tmp_path):
    path = write(tmp_path / "log.jsonl", [line(0)])
    counted = prompts(path, model=str(embedded_model_path()))
    assert counted.prompt_tokens != prompts(path).prompt_tokens
    assert counted.replays[0].through == "simulator"


@pytest.mark.parametrize("text", ["", "\n\n", "{}\n", "not a log\n"])
def test_logs_without_a_request(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"log\.jsonl: no request in \d lines; "):
        prompts(path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"first": 0}, "first: 0 must be from 1"),
        ({"replay": -1}, "replay: -1 must be from 0 to 100000"),
        ({"cache_tokens": 1}, "cache_tokens: 1 must be from 64"),
        ({"window_s": -1}, "window_s: -1 must be from 0"),
        ({"on_engine": True}, "replaying on the engine needs a model: give --model"),
    ],
)
def test_values_that_cannot_be(tmp_path, given, said):
    with pytest.raises(ConfigError, match=said):
        prompts(write(tmp_path / "log.jsonl", [line(0)]), **given)


def test_prices_from_words():
    assert PRICES.origin == "stated on the command line"
    with pytest.raises(ConfigError, match=r"--input-price: '-1' must be from 0 to 100000"):
        read_prices("-1", None, None, None)
    with pytest.raises(ConfigError, match=r"--api x/y: has no known price"):
        read_prices(None, None, None, "x/y")
    with pytest.raises(ConfigError, match=r"--api x: it has prices of its own"):
        read_prices("1", None, None, "x")
    pytest.importorskip("genai_prices")
    known = read_prices(None, "0.01", None, "openai/gpt-4o-mini")
    assert known.input_usd_per_mtok == Decimal("0.15")
    assert known.cached_input_usd_per_mtok == Decimal("0.01")
