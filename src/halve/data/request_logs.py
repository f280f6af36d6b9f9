"""Logs of requests to language models, one JSON object a line, as proxies, servers and batch files write them.

A line is a request body, or holds one under `request` or `body`; what came of it may stand under `response`:

    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}            chat completions
    {"prompt": "Once upon"}                                                          completions
    {"instructions": "Be brief.", "input": "Hello"}                                  responses
    {"system": "Be brief.", "messages": [...]}                                       Anthropic's messages
    {"request": {...}, "response": {"choices": [...], "usage": {...}}, "timestamp": "2026-11-20T10:00:00Z"}
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}          a batch file

Time: `timestamp`, `time`, `created_at`, `startTime`, `start_time` or `created`, of the line or its response: seconds or
milliseconds since 1970, or ISO 8601. Tokens: `usage` of the line or its response, in OpenAI's or Anthropic's names.
Files may end in .gz or .xz. One line is held at a time.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

from halve.core.errors import ConfigError, DataError
from halve.core.record import parse_json, shown

MAX_LINE_BYTES = 64 << 20
SHAPES = "messages, prompt or input, of its own or under request or body"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedMessage:
    """role: system, user, assistant, tool and so on; of a plain prompt: empty. text: its parts of text, joined."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRequest:
    """A request, and its answer where one was logged.

    tools: each as JSON text, in the order that they were sent. at: seconds since 1970. answer, finish_reason and the
    numbers of tokens: None where the log doesn't say. num_other_parts: images and the like, which are left out.
    """

    line: int
    model: str
    messages: tuple[LoggedMessage, ...]
    tools: tuple[str, ...] = ()
    at: float | None = None
    answer: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    max_tokens: int | None = None
    num_other_parts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BadLine:
    """A line that is no request, and why."""

    line: int
    reason: str


def read_log(path: Path | str) -> Iterator[LoggedRequest | BadLine]:
    """The lines of a log, in order; blank ones are passed over. What is wrong with a line is told, not raised.

    Raises DataError for a file that is missing, unreadable or no text.
    """
    path = Path(path)
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: longer than {MAX_LINE_BYTES >> 20} MiB; a log has a request a line"
                    )
                if line.strip():
                    yield _read_line(line, number)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: can't be read: {error}; give a log of requests, one JSON object a line") from error


def _opened(path: Path) -> IO[bytes]:
    if path.is_dir():
        raise DataError(f"{path}: is a directory; give one file, one JSON object a line")
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path))
    return lzma.open(path) if name.endswith(".xz") else path.open("rb")


def _read_line(line: bytes, number: int) -> LoggedRequest | BadLine:
    try:
        raw = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), f"line {number}")
        return _request(raw, number)
    except UnicodeDecodeError as error:
        return BadLine(line=number, reason=f"not UTF-8 at byte {error.start}")
    except (ConfigError, DataError) as error:
        return BadLine(line=number, reason=str(error).removeprefix(f"line {number}: "))


def _request(raw: Any, number: int) -> LoggedRequest:
    if not isinstance(raw, Mapping):
        raise DataError(f"each line is an object, this is {shown(raw)}")
    body = next((raw[key] for key in ("request", "body") if isinstance(raw.get(key), Mapping)), raw)
    body = body["body"] if isinstance(body.get("body"), Mapping) else body
    messages, other = _messages(body)
    if not any(message.text for message in messages):
        raise DataError("the request holds no text")
    response = raw.get("response")
    response = response if isinstance(response, Mapping) else {}
    response = response["body"] if isinstance(response.get("body"), Mapping) else response
    answer, finish = _answer(response)
    usage = next((u for u in (response.get("usage"), raw.get("usage")) if isinstance(u, Mapping)), raw)
    prompt, cached, completion = _usage(usage)
    limit = body.get("max_completion_tokens", body.get("max_tokens", body.get("max_output_tokens")))
    return LoggedRequest(
        line=number,
        model=_name(body.get("model") or response.get("model")),
        messages=tuple(messages),
        tools=_tools(body.get("tools")),
        at=_time(raw, response),
        answer=answer,
        finish_reason=finish,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        max_tokens=limit if isinstance(limit, int) and not isinstance(limit, bool) else None,
        num_other_parts=other,
    )


def _name(value: Any) -> str:
    """A model's name, such as can be printed."""
    return value[:200].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _tools(tools: Any) -> tuple[str, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools: {shown(tools)} must be a list of objects")
    return tuple(map(_canonical, tools))


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _messages(body: Mapping[str, Any]) -> tuple[list[LoggedMessage], int]:
    found: list[LoggedMessage] = []
    other = 0

    def add(role: str, content: Any, where: str) -> None:
        nonlocal other
        text, left_out = _text(content, where)
        other += left_out
        found.append(LoggedMessage(role=role, text=text))

    if isinstance(body.get("messages"), list):
        if body.get("system"):
            add("system", body["system"], "system")
        for i, message in enumerate(body["messages"]):
            _add_message(message, f"messages[{i}]", add)
        if not body["messages"]:
            raise DataError("messages is empty")
        return found, other
    if "input" in body:
        if body.get("instructions"):
            add("system", body["instructions"], "instructions")
        items = body["input"]
        if isinstance(items, list):
            for i, message in enumerate(items):
                _add_message(message, f"input[{i}]", add)
        else:
            add("user", items, "input")
        return found, other
    if "prompt" in body:
        prompt = body["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise DataError(f"prompt: {shown(prompt)} must be a text (of several prompts log each in a line)")
        return [LoggedMessage(role="", text=prompt)], 0
    raise DataError(f"no request of a known shape: it has {shown(sorted(map(str, body)))}, and needs {SHAPES}")


def _add_message(message: Any, where: str, add: Any) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: {shown(message)} must be an object with role and content")
    role = message.get("role") or message.get("type")
    if not isinstance(role, str):
        raise DataError(f"{where}: has no role; it needs role and content")
    content = message.get("content", message.get("output"))
    calls = message.get("tool_calls") or (message.get("arguments") if content is None else None)
    if content is None and calls is None:
        content = ""
    if calls is not None:
        text, _ = _text(content or "", where)
        content = f"{text}{_canonical(calls)}"
    add("system" if role == "developer" else role, content, where)


def _text(content: Any, where: str) -> tuple[str, int]:
    """Text of a content, and how many parts are something else."""
    if content is None:
        return "", 0
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, list):
        raise DataError(f"{where}: content {shown(content)} must be a text or a list of parts")
    texts, other = [], 0
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str):
            texts.append(text)
        elif isinstance(part, Mapping) and isinstance(part.get("content"), str | list):
            inner, more = _text(part["content"], where)
            texts.append(inner)
            other += more
        else:
            other += 1
    return "\n".join(texts), other


def _answer(response: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Text of the first answer and why it ended; None where it isn't there."""
    choices = response.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        first = choices[0]
        message = first.get("message")
        text = message.get("content") if isinstance(message, Mapping) else first.get("text")
        finish = first.get("finish_reason")
        return _or_none(text), finish if isinstance(finish, str) else None
    if "content" in response:  # Anthropic's
        finish = response.get("stop_reason")
        words = {"max_tokens": "length", "end_turn": "stop", "stop_sequence": "stop"}
        return _or_none(response["content"]), words.get(finish, finish) if isinstance(finish, str) else None
    if isinstance(response.get("output"), list):
        parts = [part.get("content") for part in response["output"] if isinstance(part, Mapping)]
        text = "".join(_or_none(part) or "" for part in parts)
        cut = response.get("status") == "incomplete"
        return text, "length" if cut else "stop"
    return None, None


def _or_none(content: Any) -> str | None:
    try:
        return _text(content, "answer")[0] if content is not None else None
    except DataError:
        return None


def _usage(usage: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Tokens of the prompt (cached ones too), cached ones, and those of the answer."""

    def whole(*names: str) -> int | None:
        for name in names:
            value = usage.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        return None

    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else whole("cached_tokens")
    cached = cached if isinstance(cached, int) else None
    prompt = whole("prompt_tokens", "input_tokens")
    read = whole("cache_read_input_tokens")
    if prompt is not None and read is not None:  # Anthropic counts them beside the input
        prompt += read + (whole("cache_creation_input_tokens") or 0)
        cached = read
    return prompt, cached, whole("completion_tokens", "output_tokens")


_TIMES = ("timestamp", "time", "created_at", "startTime", "start_time", "created")


def _time(raw: Mapping[str, Any], response: Mapping[str, Any]) -> float | None:
    for source in (raw, response):
        for name in _TIMES:
            value = source.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                return float(value) / 1000 if value > 1e11 else float(value)
            if isinstance(value, str):
                try:
                    date = datetime.fromisoformat(value.strip())
                except ValueError:
                    raise DataError(f"{name}: {shown(value)} is no time; give seconds since 1970 or ISO 8601") from None
                return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return None
