"""The clients that people have: the packages `openai` and `anthropic`, strict, against a live server."""

import asyncio
import io
import json
import time
from typing import Annotated

import anthropic
import httpx
import openai
import pydantic
import pytest

from halve.server.store import Store

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HI = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=live.url + "/v1", api_key="any", _strict_response_validation=True, max_retries=0)


def test_a_conversation_is_answered(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12 == len(choice.logprobs.content)
    assert "".join(one.token for one in choice.logprobs.content).strip() == choice.message.content.strip()
    assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)
    assert answer.usage.halve["prefill_seconds"] > 0
    assert answer.usage.halve["cost_micro_usd"] >= 0


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0.8, "seed": 5, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens == 40
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_a_repeated_prompt_is_found_in_the_cache(client):
    asked = {"model": "tiny", "prompt": "The old man and the sea and the king. " * 8, "max_tokens": 1}
    client.completions.create(**asked)
    again = client.completions.create(**asked)
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


def test_prompts_of_all_kinds_are_continued(client):
    ids = httpx.post(str(client.base_url).replace("/v1/", "/tokenize"), json={"prompt": "The king"}).json()["tokens"]
    texts = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in ("The king", ["The king"], ids, [ids])
    ]
    assert len(set(texts)) == 1
    two = client.completions.create(model="tiny", prompt=["The king", "A dog"], max_tokens=3, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]


def test_echo_tells_what_the_model_thinks_of_the_prompt(client):
    echoed = client.completions.create(
        model="tiny", prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert echoed.text == "Once upon a time"
    scores = echoed.logprobs.token_logprobs
    assert len(scores) == len(echoed.logprobs.tokens)
    assert sum(scores) < -1
    # The same token as an answer has the same log-probability.
    made = client.completions.create(model="tiny", prompt="Once upon a", max_tokens=1, logprobs=0, temperature=0)
    assert made.choices[0].text == " time"
    assert made.choices[0].logprobs.token_logprobs[0] == pytest.approx(scores[-1], abs=2e-3)


def test_stop_strings_end_an_answer_across_tokens(client):
    asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[10:14]
    cut = client.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_schema_is_followed(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for temperature in (0, 1.5):
        asked = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
        answer = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=60, response_format=asked, temperature=temperature
        ).choices[0]
        found = json.loads(answer.message.content)
        assert found.keys() == {"name", "age"}
        assert isinstance(found["age"], int)
    free = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=200, response_format={"type": "json_object"}, temperature=0
    ).choices[0]
    if free.finish_reason == "stop":
        assert isinstance(json.loads(free.message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_is_called(client, stream):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    asked = {"model": "tiny", "messages": HI, "max_tokens": 80, "tools": [WEATHER], "tool_choice": choice}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or ()]
        assert [d.function.name for d in deltas] == ["get_weather"]
        arguments, reason = deltas[0].function.arguments, chunks[-1].choices[0].finish_reason
    else:
        [made] = client.chat.completions.create(**asked).choices
        [call] = made.message.tool_calls
        assert call.function.name == "get_weather"
        arguments, reason = call.function.arguments, made.finish_reason
    assert json.loads(arguments).keys() == {"city"}
    assert reason == "tool_calls"


def test_a_conversation_with_tools_goes_on(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, tools=[WEATHER])
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_responses_are_kept_and_gone_on_from(client):
    first = client.responses.create(model="tiny", input="Once upon a time", max_output_tokens=8)
    assert first.status == "incomplete"
    second = client.responses.create(
        model="tiny", input="And then?", max_output_tokens=8, previous_response_id=first.id
    )
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    kinds = [event.type for event in client.responses.create(model="tiny", input="Hi", stream=True,
                                                             max_output_tokens=4)]  # fmt: skip
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    assert "response.output_text.delta" in kinds


def test_a_response_calls_a_tool(client):
    tool = {"type": "function", **WEATHER["function"], "strict": True}
    made = client.responses.create(
        model="tiny", input="Hi", tools=[tool], tool_choice="required", max_output_tokens=80, parallel_tool_calls=False
    )
    [call] = [item for item in made.output if item.type == "function_call"][:1]
    assert call.name == "get_weather"
    events = client.responses.create(
        model="tiny", input="Hi", tools=[tool], tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=80, stream=True,
    )  # fmt: skip
    assert "response.function_call_arguments.done" in [event.type for event in events]


def test_embeddings_have_length_1(client):
    made = client.embeddings.create(model="tiny", input=["a dog", "a cat"], encoding_format="float")
    for one in made.data:
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4)


def test_a_batch_is_answered_line_by_line(client):
    lines = [
        {"custom_id": f"n{i}", "method": "POST", "url": "/v1/completions",
         "body": {"model": "tiny", "prompt": f"{i}:", "max_tokens": 3 if i else -1}}
        for i in range(6)
    ]  # fmt: skip
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    deadline = time.monotonic() + 60
    while batch.status != "completed" and time.monotonic() < deadline:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (5, 1)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {one["custom_id"] for one in answers} == {f"n{i}" for i in range(1, 6)}
    [failed] = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert failed["response"]["body"]["error"]["param"] == "max_tokens"
    assert batch.id in [one.id for one in client.batches.list().data]
    client.files.delete(file.id)


def test_async_clients_share_the_server(live):
    async def ask():
        client = openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="any", _strict_response_validation=True)
        asked = {"model": "tiny", "prompt": "The king", "max_tokens": 12, "temperature": 0}
        alone = (await client.completions.create(**asked)).choices[0].text
        many = await asyncio.gather(*(client.completions.create(**asked) for _ in range(32)))
        await client.close()
        return alone, {one.choices[0].text for one in many}

    alone, together = asyncio.run(ask())
    assert together == {alone}  # greedy answers are the same alone and among others


def test_anthropics_client_is_served(live):
    client = anthropic.Anthropic(base_url=live.url, api_key="any", _strict_response_validation=True, max_retries=0)
    made = client.messages.create(model="tiny", max_tokens=9, system="Be kind.", messages=HI)
    assert made.stop_reason == "max_tokens"
    assert made.usage.output_tokens == 9
    counted = client.messages.count_tokens(model="tiny", system="Be kind.", messages=HI)
    assert counted.input_tokens == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
    with client.messages.stream(model="tiny", max_tokens=9, messages=HI) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == text
    tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    called = client.messages.create(
        model="tiny",
        max_tokens=80,
        messages=HI,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    assert called.stop_reason == "tool_use"
    [use] = [block for block in called.content if block.type == "tool_use"]
    assert use.input.keys() == {"city"}
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "x " * 4000}])


class Person(pydantic.BaseModel):
    """A record that a client asks for."""

    name: Annotated[str, pydantic.Field(max_length=6)]
    age: Annotated[int, pydantic.Field(ge=0, le=99)]


def test_records_are_parsed_by_the_client(client):
    made = client.chat.completions.parse(model="tiny", messages=HI, max_tokens=80, response_format=Person, seed=1)
    if made.choices[0].finish_reason == "stop":
        assert isinstance(made.choices[0].message.parsed, Person)
    response = client.responses.parse(model="tiny", input="Hi", text_format=Person, max_output_tokens=80)
    assert response.status in ("completed", "incomplete")


def test_scoring_is_billed(live):
    asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 1}
    store = Store(live.db)  # the console's sums may be some seconds old when the machine is busy; the ledger's are not
    [before] = store.usage()
    assert httpx.post(live.url + "/v1/completions", json=asked).status_code == 200
    asked = {"model": "tiny", "input": "Once upon a time"}
    assert httpx.post(live.url + "/v1/embeddings", json=asked).status_code == 200
    [after] = store.usage()
    store.close()
    assert after["requests"] == before["requests"] + 2
    assert after["prompt_tokens"] > before["prompt_tokens"]
    assert after["prefill_us"] > before["prefill_us"]
