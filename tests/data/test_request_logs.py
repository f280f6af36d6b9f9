"""Logs of requests: every shape that is read, and what is told of lines that are none."""

import gzip
import json
import lzma

import pytest

from halve.core.errors import DataError
from halve.data.request_logs import BadLine, read_log

CHAT = {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}


def read(tmp_path, *lines, name="log.jsonl"):
    path = tmp_path / name
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(text.encode())
    return list(read_log(path))


def texts(request):
    return [(message.role, message.text) for message in request.messages]


@pytest.mark.parametrize(
    "line",
    [
        CHAT,
        {"request": CHAT},
        {"body": CHAT, "custom_id": "a", "method": "POST", "url": "/v1/chat/completions"},
        {"request": {"method": "POST", "body": CHAT}},
        {"model": "m", "instructions": "Be brief.", "input": "Hello"},
        {"model": "m", "instructions": "Be brief.", "input": [{"role": "user", "content": "Hello"}]},
        {"model": "m", "system": "Be brief.", "messages": CHAT["messages"][1:]},
        {"model": "m", "system": [{"type": "text", "text": "Be brief."}], "messages": CHAT["messages"][1:]},
        {"model": "m", "messages": [{"role": "developer", "content": "Be brief."}, CHAT["messages"][1]]},
        {"model": "m", "messages": [CHAT["messages"][0], {"role": "user", "content": [{"text": "Hello"}]}]},
    ],
)  # fmt: skip
def test_every_shape_is_the_same_request(tmp_path, line):
    (request,) = read(tmp_path, line)
    assert texts(request) == [("system", "Be brief."), ("user", "Hello")]
    assert request.model == "m"


def test_a_plain_prompt(tmp_path):
    one, listed = read(tmp_path, {"prompt": "Once"}, {"prompt": ["Once"]})
    assert texts(one) == texts(listed) == [("", "Once")]


@pytest.mark.parametrize(
    ("response", "answer", "finish", "tokens"),
    [
        ({"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
          "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}},
         "Hi", "stop", (9, 4, 2)),
        ({"choices": [{"text": "Hi", "finish_reason": "length"}]}, "Hi", "length", (None, None, None)),
        ({"status_code": 200, "body": {"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 3}}},
         "Hi", None, (3, None, None)),
        ({"content": [{"type": "text", "text": "Hi"}], "stop_reason": "max_tokens",
          "usage": {"input_tokens": 5, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 1,
                    "output_tokens": 2}},
         "Hi", "length", (9, 3, 2)),
        ({"output": [{"type": "message", "content": [{"type": "output_text", "text": "Hi"}]}], "status": "incomplete",
          "usage": {"input_tokens": 5, "output_tokens": 2}}, "Hi", "length", (5, None, 2)),
        ({"error": "overloaded"}, None, None, (None, None, None)),
        (None, None, None, (None, None, None)),
    ],
)  # fmt: skip
def test_answers_and_usage(tmp_path, response, answer, finish, tokens):
    (request,) = read(tmp_path, {"request": CHAT, "response": response})
    assert (request.answer, request.finish_reason) == (answer, finish)
    assert (request.prompt_tokens, request.cached_tokens, request.completion_tokens) == tokens


def test_tokens_beside_the_request(tmp_path):
    (request,) = read(tmp_path, {**CHAT, "prompt_tokens": 7, "completion_tokens": 3, "max_tokens": 20})
    assert (request.prompt_tokens, request.completion_tokens, request.max_tokens) == (7, 3, 20)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timestamp", 1.5e9),
        ("time", 1.5e12),
        ("created_at", "2017-07-14T02:40:00Z"),
        ("startTime", "2017-07-14 02:40:00"),
    ],
)
def test_times(tmp_path, field, value):
    (request,) = read(tmp_path, {"request": CHAT, field: value})
    assert request.at == 1.5e9


def test_tools_calls_and_images(tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "What?"}]}
    (request,) = read(tmp_path, {"messages": [call, image], "tools": [tool]})
    assert request.tools == ('{"type":"function","function":{"name":"f"}}',)
    assert texts(request) == [("assistant", '[{"id":"1"}]'), ("user", "What?")]
    assert request.num_other_parts == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON: "),
        ("[1]", "each line is an object, this is [1]"),
        ({"question": "x"}, "no request of a known shape: it has ['question'], and needs messages, prompt or input"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["x"]}, "messages[0]: 'x' must be an object with role and content"),
        ({"messages": [{"content": "x"}]}, "messages[0]: has no role; it needs role and content"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages[0]: content 4 must be a text or a list of parts"),
        ({"messages": [{"role": "user", "content": ""}]}, "the request holds no text"),
        ({**CHAT, "tools": True}, "tools: True must be a list of objects"),
        ({"prompt": [1, 2]}, "prompt: [1, 2] must be a text"),
        ({**CHAT, "timestamp": "soon"}, "timestamp: 'soon' is no time; give seconds since 1970 or ISO 8601"),
    ],
)
def test_a_line_that_is_none_is_told_with_its_number(tmp_path, line, said):
    first, bad, last = read(tmp_path, CHAT, line, CHAT)
    assert isinstance(bad, BadLine)
    assert bad.line == 2
    assert bad.reason.startswith(said)
    assert (first.line, last.line) == (1, 3)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n\n' + json.dumps(CHAT).encode())
    bad, request = read_log(path)
    assert bad.reason == "not UTF-8 at byte 12"
    assert request.line == 3


def test_compressed_logs(tmp_path):
    line = json.dumps(CHAT).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(line))
    assert [len(list(read_log(tmp_path / f"a.jsonl.{end}"))) for end in ("gz", "xz")] == [1, 1]
    (tmp_path / "b.jsonl.gz").write_bytes(line)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: can't be read"):
        list(read_log(tmp_path / "b.jsonl.gz"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: can't be read"):
        list(read_log(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a directory; give one file"):
        list(read_log(tmp_path))


def test_a_line_beyond_all_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("halve.data.request_logs.MAX_LINE_BYTES", 100)
    with pytest.raises(DataError, match=r"log\.jsonl:2: longer than"):
        read(tmp_path, {"prompt": "x"}, {"prompt": "x" * 200})
