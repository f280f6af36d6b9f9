# ruff: noqa: E501  (templates are kept as they are found)
import json
from collections import OrderedDict
from typing import Any

import pytest

from halve.core.errors import TextError
from halve.text import Tokenizer

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA31 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b") | length | string ~ " Jul 2024" %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{%- macro render(content) -%}
  {%- if content is string -%}{{ content }}{%- else -%}
    {%- for part in content -%}{{ part.text if part.type == 'text' else '[' ~ part['type'] ~ ']' }}{%- endfor -%}
  {%- endif -%}
{%- endmacro %}
{%- set ns = namespace(users=0, names=[], seen=dict(a=1)) %}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% elif message.role == 'end' %}{% break %}{% endif %}
    {% if message.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}
    {% if message.role == 'assistant' %}
{{ '<|im_start|>assistant' }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{% generation %}{{ render(message.content) }}{{ '<|im_end|>' }}{% endgeneration %}

    {% else %}
{{ '<|im_start|>' ~ message['role'] }}{{ ' name=' + message.name if message.name }}
{{ render(message['content']) }}{{ '<|im_end|>' }}
    {% endif %}
{% endfor %}
{{ ns.users }} {{ '%03d' % ns.users }} {{ ns.seen.items() | list }} {{ messages[-1].content is none }} \
{{ messages[-1].missing }}{{ {'ü': [1, true, none], '<': "&'"} | tojson }} {{ messages | map(attribute='role') | join(',') }}
{% if documents %}{% for d in documents | sort(attribute='title') %}{{ loop.index }}/{{ loop.length }} {{ d.title }}: \
{{ d.text | indent(2) }}{{ ', ' if not loop.last }}{% endfor %}{% endif %}
{% set text %}{% filter upper %}captured{% endfilter %}{% endset %}{{ text * 2 }}{{ eos_token }}{{ unk_token }}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}\
<think></think>{% endif %}{% endif %}
"""

TOOL = {
    "type": "function",
    "function": {"name": "grüße", "description": "Say <hi> & 'bye'", "parameters": {"type": "object", "n": [1, 2.5]}},
}
CALL = {"type": "function", "function": {"name": "grüße", "arguments": {"to": "Jürgen", "n": 3}}}
PLAIN = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Hello <|eot_id|> you  "},
    {"role": "assistant", "content": "Hi! 🙂"},
    {"role": "user", "content": "Why?"},
]
WITH_TOOLS = [
    {"role": "user", "content": "Greet him"},
    {"role": "assistant", "tool_calls": [CALL], "content": None},
    {"role": "tool", "content": {"ok": True, "said": "grüß dich"}},
]
MIXED = [
    {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
    {"role": "skip", "content": "never"},
    {"role": "assistant", "content": "seen", "reasoning": "thinking it over"},
    {"role": "user", "content": "more"},
    {"role": "end", "content": "never"},
]
DOCUMENTS = [{"title": "b", "text": "two\nlines"}, {"title": "a", "text": "one"}]
CASES = [
    (LLAMA2, PLAIN, {}),
    (LLAMA2, PLAIN[1:], {}),
    (LLAMA31, PLAIN, {}),
    (LLAMA31, PLAIN, {"tools": [TOOL]}),
    (LLAMA31, PLAIN, {"date_string": "1 Jan 2025"}),
    (CHATML, PLAIN, {}),
    (CHATML, MIXED, {"documents": DOCUMENTS, "enable_thinking": False}),
    (CHATML, MIXED, {"unk_token": "given"}),
]


def oracle(path: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(("template", "messages", "arguments"), CASES)
@pytest.mark.parametrize("in_file", [False, True], ids=["in config", "in a file"])
def test_a_chat_reads_as_transformers_writes_it(
    checkpoint, template, messages, arguments, add_generation_prompt, in_file
):
    path = checkpoint(chat_template=None if in_file else template)
    if in_file:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    ours, theirs = Tokenizer.from_directory(path), oracle(path)
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
    )
    named = {key: value for key, value in arguments.items() if key in ("tools", "documents")}
    variables = {key: value for key, value in arguments.items() if key not in named}
    options = {"add_generation_prompt": add_generation_prompt, "variables": variables, **named}
    assert ours.render_chat(messages, **options) == expected
    ids = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **arguments)["input_ids"]
    assert ours.encode_chat(messages, **options) == ids


@pytest.mark.parametrize("messages", [WITH_TOOLS, PLAIN[1:2]])
def test_tools_choose_the_template_that_is_named_for_them(checkpoint, messages):
    named = [{"name": "default", "template": LLAMA2}, {"name": "tool_use", "template": LLAMA31}]
    path = checkpoint(chat_template=named)
    ours, theirs = Tokenizer.from_directory(path), oracle(path)
    assert ours.chat_template == theirs.chat_template["default"] == LLAMA2
    expected = theirs.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    assert ours.render_chat(messages, tools=[TOOL]) == expected
    assert ours.render_chat(PLAIN) == theirs.apply_chat_template(PLAIN, tokenize=False)


def test_additional_template_files_are_found(checkpoint):
    path = checkpoint()
    (path / "chat_template.jinja").write_text("plain")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.from_directory(path)
    assert (tokenizer.render_chat(PLAIN), tokenizer.render_chat(PLAIN, tools=[])) == ("plain", "tools")


def test_a_rendered_chat_encodes_with_one_bos(checkpoint):
    tokenizer = Tokenizer.from_directory(checkpoint(chat_template=LLAMA31))
    ids = tokenizer.encode_chat(PLAIN)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode(tokenizer.render_chat(PLAIN)) == ids


def render(checkpoint: Any, template: str, messages: Any = PLAIN, **options: Any) -> str:
    return Tokenizer.from_directory(checkpoint(chat_template=template)).render_chat(messages, **options)


def test_a_chat_without_a_template_is_refused(checkpoint):
    tokenizer = Tokenizer.from_directory(checkpoint())
    assert tokenizer.chat_template is None
    with pytest.raises(TextError, match=r"no chat template; add chat_template.jinja"):
        tokenizer.encode_chat(PLAIN)


def test_named_templates_without_a_default_are_said(checkpoint):
    with pytest.raises(TextError, match=r"no chat template named 'default' \(there are \['rag'\]\)"):
        render(checkpoint, [{"name": "rag", "template": "x"}])


@pytest.mark.parametrize("raw", [3, [{"name": "default"}], [1], [{"name": "default", "template": 2}]])
def test_a_template_of_the_wrong_type_is_refused(checkpoint, raw):
    with pytest.raises(TextError, match=r"tokenizer_config.json: chat_template must be a string or a list"):
        Tokenizer.from_directory(checkpoint(chat_template=raw))


def test_a_template_file_that_is_not_utf8_is_refused(checkpoint):
    path = checkpoint()
    (path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TextError, match="chat template can't be read"):
        Tokenizer.from_directory(path)


def test_what_the_template_refuses_is_passed_on(checkpoint):
    with pytest.raises(
        TextError, match=r"config.json: the chat template refuses these messages: Conversation roles must"
    ):
        render(checkpoint, LLAMA2, [PLAIN[1], PLAIN[1]])


def test_a_syntax_error_is_given_with_its_line(checkpoint):
    with pytest.raises(TextError, match=r"chat template, line 2: "):
        render(checkpoint, "one\n{% if %}")


@pytest.mark.parametrize("template", ["{{ 'a' + 1 }}", "{{ nothing.more }}", "{{ 1 / 0 }}", "{{ messages[0](1) }}"])
def test_a_failing_template_is_named_with_its_reason(checkpoint, template):
    with pytest.raises(TextError, match=r"config.json: the chat template fails on these messages: \w+: "):
        render(checkpoint, template)


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "20000 loop turns and calls"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(40) }}", "20000 loop turns and calls"),
        ("{% for a in [[[]] * 9] recursive %}{{ loop([a] * 9) }}{% endfor %}", "recursion|loop turns"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10 ** 9 }}", "1000000 characters"),
        ("{{ 9 ** 99999 }}", "10000 bits"),
        ("{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "10000 bits"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "characters"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", "characters"),
        ("{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}", "char"),
        ("{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}", ""),
        ("{% set x = 'a' * 99999 %}{% for i in range(9999) %}{{ x }}{% endfor %}", "1000000 characters"),
        ("{% set y %}{% set x = 'a' * 99999 %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}", "characters"),
        ("{{ 'a'.center(10 ** 12) }}", "1000000 characters"),
        ("{{ 'a' | center(10 ** 12) }}", "1000000 characters"),
        ("{{ '%999999999d' % 1 }}", "wider than 99999"),
        ("{{ [1] | tojson(indent=10 ** 9) }}", "64 spaces"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)  # fmt: skip
def test_a_template_that_would_run_or_grow_for_ever_is_stopped(checkpoint, monkeypatch, template, limit):
    monkeypatch.setattr("halve.text.sandbox.MAX_STEPS", 20_000)
    monkeypatch.setattr("halve.text.sandbox.MAX_CHARS", 1_000_000)
    with pytest.raises(TextError, match=rf"config.json: the chat template (was stopped|fails).*({limit})"):
        render(checkpoint, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_that_tries_to_leave_the_sandbox_is_stopped(checkpoint, template):
    with pytest.raises(TextError, match=r"config.json: the chat template does what the sandbox forbids"):
        render(checkpoint, template)


def test_internals_of_functions_read_as_nothing(checkpoint):
    assert render(checkpoint, "{{ raise_exception.__globals__ }}{{ dict.__class__ }}{{ messages.__len__ }}") == ""


@pytest.mark.parametrize("messages", [None, "hello", [], {"role": "user"}, 3])
def test_messages_that_are_no_list_are_refused(checkpoint, messages):
    with pytest.raises(TextError, match=r"messages: expected a list of at least one {role, content}"):
        render(checkpoint, CHATML, messages)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hello", r"messages\[0\]: expected an object with a `role`"),
        ({"content": "x"}, r"messages\[0\]: expected an object with a `role`"),
        ({"role": "user", "content": 3}, r"messages\[0\].content: expected text or a list of parts, got 3"),
        ({"role": "user", "content": [{"image": object()}]}, r"messages\[0\].content\[0\].image: object is not a JSON"),
    ],
)
def test_a_message_of_the_wrong_type_is_named(checkpoint, message, error):
    with pytest.raises(TextError, match=error):
        render(checkpoint, CHATML, [message])


def test_tools_and_variables_are_checked(checkpoint):
    with pytest.raises(TextError, match="tools: expected a list of objects"):
        render(checkpoint, LLAMA31, tools=[print])
    with pytest.raises(TextError, match=r"variables.x: set is not a JSON value"):
        render(checkpoint, LLAMA31, variables={"x": {1}})
    with pytest.raises(TextError, match=r"variables: \['tools'\] are arguments of their own"):
        render(checkpoint, LLAMA31, variables={"tools": []})


def test_the_callers_messages_are_neither_changed_nor_lent(checkpoint):
    messages = [OrderedDict(role="user", content="a"), {"role": "tool", "content": ("x",)}]
    before = json.dumps(messages)
    assert render(checkpoint, "{{ messages[0].content }}{{ messages[1].content[0] }}", messages) == "ax"
    assert json.dumps(messages) == before
