"""What no client may do: hang, crash or leak."""

import asyncio
import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from .conftest import metric

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


def body(**more):
    return {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, **more}


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


REFUSED = [
    ("deep", CHAT, b'{"model":"tiny","messages":' + b"[" * 60000 + b"]" * 60000 + b"}", None),
    ("nan", CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}', "temperature"),
    ("infinite", CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"max_tokens":1e400}', "max_tokens"),
    ("not utf-8", CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"\xff\xfe"}]}', None),
    ("surrogate", CHAT, b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', None),
    ("empty", CHAT, b"", None),
    ("list", CHAT, b"[]", None),
    ("negative", CHAT, body(max_tokens=-5), "max_tokens"),
    ("text for a number", CHAT, body(max_tokens="5"), "max_tokens"),
    ("unknown field", CHAT, body(foo=1), "foo"),
    ("no messages", CHAT, body(messages=[]), "messages"),
    ("role", CHAT, body(messages=[{"role": "king", "content": "x"}]), "messages.0.role"),
    ("image", CHAT, body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content.0"),
    ("long", CHAT, body(messages=[{"role": "user", "content": "x " * 5000}]), "messages"),
    ("bias", CHAT, body(logit_bias={"abc": 1}), "logit_bias"),
    ("bias beyond", CHAT, body(logit_bias={"99999999": 1}), "logit_bias"),
    ("n", CHAT, body(n=100000), "n"),
    ("stops", CHAT, body(stop=["a"] * 1000), "stop"),
    ("top_logprobs", CHAT, body(top_logprobs=2), "top_logprobs"),
    ("schema", CHAT, body(**schema({"type": "wrong"})), "response_format"),
    ("tool choice", CHAT, body(tool_choice="required"), "tool_choice"),
    ("tools twice", CHAT, body(tools=[{"type": "function", "function": {"name": "a"}}] * 2), "tools"),
    ("empty prompt", TEXT, {"model": "tiny", "prompt": []}, "prompt"),
    ("empty ids", TEXT, {"model": "tiny", "prompt": [[]]}, "prompt"),
    ("negative ids", TEXT, {"model": "tiny", "prompt": [-1]}, "prompt"),
    ("huge ids", TEXT, {"model": "tiny", "prompt": [2**40]}, "prompt"),
    ("many prompts", TEXT, {"model": "tiny", "prompt": ["a"] * 10000}, "prompt"),
    ("detokenize", "/detokenize", {"tokens": [10**30]}, "tokens"),
    ("embedding", "/v1/embeddings", {"model": "tiny", "input": []}, "input"),
    ("batch", "/v1/batches", {"input_file_id": "x", "endpoint": "/v1/x", "completion_window": "24h"}, "endpoint"),
    ("message", "/v1/messages", {"model": "tiny", "messages": [{"role": "x"}], "max_tokens": 3}, None),
]


@pytest.mark.parametrize(("what", "path", "sent", "param"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_wrong_is_named(live, what, path, sent, param):
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    answer = httpx.post(live.url + path, content=content, headers=JSON, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 5
    if param:
        assert error["param"] == param, error
    assert httpx.get(live.url + "/health").status_code == 200


@pytest.mark.parametrize(
    "hostile",
    [
        {"type": "string", "pattern": "(a|a)*" * 50 + "b{1000}{1000}"},
        {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "(x+x+)+y"} for i in range(2000)}},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"enum": [str(i) * 20 for i in range(20000)]},
    ],
)
def test_hostile_schemas_harm_nobody(live, hostile):
    answer = httpx.post(live.url + CHAT, json=body(**schema(hostile)), timeout=30)
    assert answer.status_code in (200, 400)
    assert httpx.post(live.url + TEXT, json={"model": "tiny", "prompt": "hi", "max_tokens": 2}).status_code == 200


def test_every_form_that_a_field_may_have_is_told(live):
    answer = httpx.post(live.url + CHAT, json=body(stop={"a": 1}))
    assert answer.json()["error"]["message"] == "stop: Input should be a valid string or a valid array"


def test_other_requests_are_refused_in_the_same_shape(live):
    assert httpx.post(live.url + CHAT, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(live.url + CHAT, json=body(model="no")).json()["error"]["code"] == "model_not_found"
    assert httpx.get(live.url + CHAT).json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(live.url + "/v1/none").json()["error"]["code"] == "unknown_url"
    large = httpx.post(live.url + CHAT, content=b"x" * 20_000_000, headers=JSON)
    assert large.status_code == 413


def test_clients_that_leave_give_their_blocks_back(live):
    async def leave():
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(base_url=live.url, timeout=60, limits=limits) as client:

            async def one():
                asked = {"model": "tiny", "prompt": "x " * 200, "max_tokens": 250, "ignore_eos": True}
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    await asyncio.wait_for(client.post(TEXT, json=asked), 0.5)

            await asyncio.gather(*(one() for _ in range(200)))

    asyncio.run(leave())
    answer = httpx.post(live.url + TEXT, json={"model": "tiny", "prompt": "hi", "max_tokens": 2}, timeout=5)
    assert answer.status_code == 200
    deadline = time.monotonic() + 10
    while (used := metric(live, "halve:kv_blocks_used")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert used == 0
    assert metric(live, "halve:num_requests_running") == metric(live, "halve:num_requests_waiting") == 0


def test_a_slow_client_holds_nobody_up(live):
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        assert httpx.post(live.url + TEXT, json={"model": "tiny", "prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_huge_prompt_holds_no_stream_up(live):
    """15 MB of words take 20 s to tokenize, and can't fit."""
    huge = {"model": "tiny", "messages": [{"role": "user", "content": "word " * 3_000_000}]}
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(2) as pool, httpx.stream("POST", live.url + TEXT, json=asked, timeout=30) as stream:
        sent = [
            pool.submit(httpx.post, live.url + CHAT, json=huge, timeout=60),
            pool.submit(httpx.post, live.url + TEXT, json={"model": "tiny", "prompt": "word " * 3_000_000}),
        ]
        *_, last = (line for line in stream.iter_lines() if line)
        assert last == "data: [DONE]"
        errors = [one.result().json()["error"] for one in sent]
    assert [error["code"] for error in errors] == ["context_length_exceeded"] * 2
    assert [error["param"] for error in errors] == ["messages", "prompt"]


def test_openapi_tells_every_route(live):
    document = httpx.get(live.url + "/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/batches/{id}/cancel", "/v1/messages"} <= document["paths"].keys()
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def _references(value):
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "$ref" and isinstance(item, str):
                yield item
            else:
                yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def test_the_log_holds_no_prompt(live):
    word = "zebrafinch"
    httpx.post(live.url + CHAT, json=body(messages=[{"role": "user", "content": word}]))
    httpx.post(live.url + CHAT, json=body(messages=[{"role": "user", "content": word * 3000}]))
    httpx.post(live.url + CHAT, json=body(stop=[word], n=-1))
    assert word not in live.log.read_text()
