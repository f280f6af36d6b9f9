"""What prompts share, what recurs in them, and what putting that first does."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.data.answers import first_marker, loop_start
from halve.data.prompt_parts import (
    BLOCK_TOKENS,
    ApproximateEncoder,
    PrefixHits,
    Recurring,
    approximate_ids,
    block_names,
    example_blocks,
    keys_of,
    lines_of,
    message_key,
    reordered,
    reordered_text,
    trimmed,
)
from halve.data.request_logs import LoggedMessage, LoggedRequest

RULES = "".join(f"Rule {i}: always answer in the language of the customer.\n" for i in range(6))


def request(*messages, line=1, tools=()):
    return LoggedRequest(
        line=line, model="m", messages=tuple(LoggedMessage(role=r, text=t) for r, t in messages), tools=tools
    )


def recurring(requests):
    counted = Recurring()
    for one in requests:
        counted.add(keys_of(one))
    return counted


def dated(i):
    return request(("system", f"Now: day {i}\n{RULES}Be kind to everyone."), ("user", f"Question number {i}"))


def test_blocks_are_named_by_all_before_them():
    a, b = list(range(64)), [*range(16), 99, *range(17, 64)]
    assert len(block_names(a)) == 4
    assert block_names(a)[0] == block_names(b)[0]
    assert not set(block_names(a)[1:]) & set(block_names(b)[1:])
    assert block_names(a[:15]) == ()
    assert block_names(a[:40]) == block_names(a)[:2]


def test_hits_by_hand():
    hits = PrefixHits()
    ids = list(range(40))
    assert hits.add(block_names(ids), 40) == 0
    assert hits.add(block_names(ids), 40) == 32
    assert hits.add(block_names(ids[:32]), 32) == 16  # its last token must be computed
    assert hits.add(block_names([*range(20), 7]), 21) == 16


def test_a_cache_forgets_what_was_not_used_the_longest():
    hits = PrefixHits(num_blocks=2)
    first, second = ([base + i for i in range(32)] for base in (0, 100))
    hits.add(block_names(first), 32)
    hits.add(block_names(second), 32)
    assert hits.overflowed
    assert hits.add(block_names(first), 33) == 0


def test_what_recurs_is_told_from_what_differs():
    counted = recurring(dated(i) for i in range(10))
    system = dated(3).messages[0].text
    levels = [counted.level(key) for key, *_ in keys_of(dated(3))]
    assert levels[0] == 3  # the whole message differs
    assert levels[1] == 3  # its first line
    assert set(levels[2:-2]) == {0}
    text, tail = reordered_text("system", system, counted)
    assert text == f"{RULES}Be kind to everyone.\nNow: day 3"
    assert tail == "Now: day 3"


def test_reordering_makes_a_prefix():
    requests = [dated(i) for i in range(10)]
    counted, encode = recurring(requests), ApproximateEncoder()
    found = []
    for change in (lambda one: one, lambda one: reordered(one, counted)):
        hits = PrefixHits()
        prompts = [encode(changed.messages, changed.tools) for changed in map(change, requests)]
        found.append(sum(hits.add(block_names(ids), len(ids)) for ids in prompts))
    rules = len(approximate_ids(RULES))
    assert found[0] == 0
    assert found[1] >= 9 * (rules - BLOCK_TOKENS)


def test_what_differs_goes_behind_examples_that_recur():
    shots = [("user", "What is two and two, in words?"), ("assistant", "Two and two are four, my friend.")]
    requests = [request(("system", f"Now: day {i}\n{RULES}"), *shots, ("user", f"Question {i}")) for i in range(10)]
    one = reordered(requests[4], recurring(requests))
    assert [m.role for m in one.messages] == ["system", "user", "assistant", "user"]
    assert one.messages[0].text == RULES.rstrip("\n")
    assert one.messages[-1].text == "Now: day 4\n\nQuestion 4"


def test_tools_are_sent_in_one_order():
    a, b = (json.dumps({"type": "function", "function": {"name": name, "x": 1}}) for name in "ab")
    one, other = (reordered(request(("user", "x"), tools=t), Recurring()) for t in ((a, b), (b, a)))
    assert one.tools == other.tools


@given(st.lists(st.text(alphabet="ab \n", max_size=60), min_size=1, max_size=8))
def test_reordering_loses_no_line(texts):
    requests = [request(("system", f"{text}\n{RULES}"), ("user", "x")) for text in texts]
    counted = recurring(requests * 3)
    for one in requests:
        before, after = (sorted(m.text.split()) for m in (one.messages[0], reordered(one, counted).messages[0]))
        assert before == after


def test_what_recurs_everywhere_stays_as_it_is():
    one = request(("system", RULES), ("user", "x"))
    assert reordered(one, recurring([one] * 5)) == one
    assert reordered(one, Recurring()) == one


def test_counting_is_bounded():
    counted = Recurring(capacity=50)
    for i in range(500):
        counted.add(keys_of(request(("user", f"unlike {i}"), ("system", "the same in all of them"))))
    assert len(counted.parts) <= 50
    key = message_key(LoggedMessage(role="system", text="the same in all of them"))
    assert 500 - counted.lost <= counted.parts[key].count <= 500
    assert counted.share(key) > 0.9


def test_short_lines_go_with_the_line_before():
    assert lines_of("{\n  a long line\n}\nanother long line") == ["{\n", "  a long line\n}\n", "another long line"]


def test_numbers_for_pieces():
    ids = approximate_ids("Hello world, 12345")
    assert len(ids) == len(["Hello", " world", ",", " 123", "45"])
    assert approximate_ids("Hello")[0] == ids[0]
    assert len(approximate_ids("日本語")) == 3
    encoder = ApproximateEncoder(num_texts=1)
    long = LoggedMessage(role="user", text=RULES * 3)
    assert encoder([long], []) == encoder([long], []) == encoder([replace(long)], [])


def test_trimming():
    line = "The same long line of a prompt."
    assert trimmed(f"\n{line}  \n\n\n\n{line}\nshort\nshort\n") == f"{line}\n\nshort\nshort"


def test_examples_that_stand_in_a_text():
    text = "Say the mood.\n\nExample 1: a\nglad\n\nExample 2: b\nsad\n\nExample 3: c\nsad\n"
    assert example_blocks(text) == ["Example 1: a\nglad\n\n", "Example 2: b\nsad\n\n"]
    assert example_blocks("Q: a\nA: b\nQ: c\nA:") == []  # two are no pattern
    assert len(example_blocks("例1:あ\n例2:い\n例3:う")) == 2
    assert example_blocks("") == []


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Yes.\nUser: and then?", (4, "\nUser:")),
        ("Yes.<|im_end|>\nmore", (4, "<|im_end|>")),
        ("\nUser: what", None),
        ("The User: field", None),
        ("A list\n### Heading", None),
        ("", None),
    ],
)
def test_where_somebody_elses_turn_begins(answer, found):
    assert first_marker(answer) == found


@pytest.mark.parametrize(
    ("answer", "start"),
    [
        ("Well. " + "I am sorry. " * 5, len("Well. ") + len("I am sorry. ")),
        ("Well. " + "I am sorry. " * 5 + "I am", len("Well. ") + len("I am sorry. ")),
        ("Well. " + "I am sorry. " * 2, None),
        ("ha" * 10, None),  # short: a laugh
        ("no loop in this text at all, as far as anyone can see it", None),
        ("", None),
    ],
)
def test_where_a_loop_begins(answer, start):
    found = loop_start(answer)
    assert found is None if start is None else start - 2 <= found <= start
