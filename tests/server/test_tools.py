"""Calls as each family writes them."""

import json

import pytest

from halve.server.tools import family_of, may_be_call, parse

NAMES = ["get", "put"]
TEXTS = {
    "hermes": 'Let me see. <tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "get", "arguments": {"a": 1}}]',
    "llama": '<|python_tag|>{"name": "get", "parameters": {"a": 1}}',
    "llama, text arguments": '{"name": "get", "arguments": "{\\"a\\": 1}"}',
    "pythonic": "[get(a=1)]",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_call_is_read(text):
    content, [call] = parse(text, NAMES)
    assert (call.name, json.loads(call.arguments)) == ("get", {"a": 1})
    assert content == ("Let me see." if "Let" in text else "")


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "get", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "put", "arguments": {}}</tool_call>',
        '[TOOL_CALLS] [{"name": "get", "arguments": {}}, {"name": "put", "arguments": {}}]',
        '{"name": "get", "parameters": {}}; {"name": "put", "parameters": {}}',
        "[get(), put()]",
    ],
)
def test_several_calls_are_read(text):
    assert [call.name for call in parse(text, NAMES)[1]] == NAMES


@pytest.mark.parametrize(
    "text",
    ["", "hello", "{", '{"name": "unknown", "parameters": {}}', "[1, 2]", "[get(1)]", "[get(a=open('x'))]",
     '{"name": 5}', "[" * 5000, "[get(a=" + "(" * 3000 + ")]", '{"name": "get", "parameters": [1]}'],
)  # fmt: skip
def test_what_is_no_call_stays_text(text):
    assert parse(text, NAMES) == (text, [])


def test_a_template_tells_its_family():
    assert family_of(None) == "hermes"
    assert family_of("{% if tools %}<tool_call>") == "hermes"
    assert family_of("[TOOL_CALLS] tools") == "mistral"
    assert family_of('tools {"name": , "parameters": }') == "llama"
    assert family_of("{% for t in tools %}") == "pythonic"


def test_a_beginning_may_become_a_call():
    assert all(may_be_call(text) for text in ("", " ", "<tool", "<tool_call>x", "{", "[TOOL"))
    assert not any(may_be_call(text) for text in ("Hello", "<p>"))
