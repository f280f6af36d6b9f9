"""Messages of all protocols as the chat template takes them, and answers as content and calls."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from halve.engine import StepOutput
from halve.engine.constrain import lark_grammar
from halve.server import tools as calls
from halve.server.errors import ApiError
from halve.server.served import Served
from halve.server.wire import FunctionSpec

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages checked, text parts joined, arguments of calls as objects. Raises ApiError."""
    result = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise _wrong(f"messages.{i}.role", f"{role!r:.80} must be one of {', '.join(ROLES)}")
        plain = {k: v for k, v in message.items() if v is not None and k not in ("refusal", "annotations", "audio")}
        plain["role"] = "system" if role == "developer" else "tool" if role == "function" else role
        content = message.get("content")
        if content is not None or role != "assistant":
            plain["content"] = text_of(content, f"messages.{i}.content")
        if given := message.get("tool_calls"):
            plain["tool_calls"] = [_read_call(call, f"messages.{i}.tool_calls.{j}") for j, call in enumerate(given)]
        elif "content" not in plain:
            raise _wrong(f"messages.{i}.content", "an assistant message needs content or tool_calls")
        plain.setdefault("content", "")
        result.append(plain)
    return result


def text_of(content: Any, where: str) -> str:
    """The text of a message's content. Raises ApiError for parts that are not text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, "must be text or a list of text parts")
    texts = []
    for j, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "input_text", "output_text"):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise _wrong(f"{where}.{j}", f"{kind!r:.80}: this model reads text alone")
        if not isinstance(part.get("text"), str):
            raise _wrong(f"{where}.{j}.text", "must be text")
        texts.append(part["text"])
    return "".join(texts)


def _read_call(call: Any, where: str) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function.get("arguments") or "{}"
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {
            "id": str(call.get("id", "")),
            "type": "function",
            "function": {"name": str(function["name"]), "arguments": dict(arguments)},
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _wrong(where, "must be {id, type, function: {name, arguments}} with arguments as JSON text") from error


def _wrong(param: str, rule: str) -> ApiError:
    return ApiError(400, f"{param}: {rule}", param=param, code="invalid_value")


class Toolbox:
    """The functions of a request, and what must be called.

    wanted: the one that must be. parallel: False for one call at most. Raises ApiError.
    """

    def __init__(
        self,
        served: Served,
        functions: Sequence[FunctionSpec],
        choice: Literal["none", "auto", "required"] | None,
        *,
        wanted: str | None = None,
        parallel: bool | None = None,
    ) -> None:
        self.specs: list[dict[str, Any]] = [
            {"type": "function", "function": one.model_dump(exclude_none=True)} for one in functions
        ]
        self.names = [spec["function"]["name"] for spec in self.specs]
        if len(set(self.names)) != len(self.names):
            raise _wrong("tools", f"two functions have one name ({', '.join(self.names)}); rename one")
        if wanted is not None and wanted not in self.names:
            raise _wrong("tool_choice", f"there is no function {wanted!r:.80} among the tools")
        if choice in ("auto", "required") and not self.specs:
            raise _wrong("tool_choice", "there are no tools to choose from")
        self.is_open = bool(self.specs) and choice != "none"
        self.is_forced = choice == "required" or wanted is not None
        self.one = parallel is False or wanted is not None
        callable_ = [s["function"] for s in self.specs if wanted in (None, s["function"]["name"])]
        self.grammar = None
        if self.is_forced:
            family = calls.family_of(served.tokenizer.chat_template)
            self.grammar = lark_grammar(calls.forced_grammar(callable_, family, several=not self.one))

    def answer(self) -> "Answer":
        """A text that may hold calls."""
        return Answer(self)


class Answer:
    """One answer as it grows: text that is surely content, held back while it may be a call."""

    def __init__(self, toolbox: Toolbox | None = None) -> None:
        self._toolbox = toolbox if toolbox and toolbox.is_open else None
        self._held = ""
        self._decided = self._toolbox is None
        self.content = ""
        self.calls: list[calls.Call] = []
        self.finish_reason: str | None = None
        self.token_ids: list[int] = []

    def push(self, output: StepOutput) -> str:
        """Take an output; the content that became certain."""
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
        piece = output.text
        if not self._decided:
            self._held += piece
            # A call may also follow some content, so what comes after a mark is held as well.
            if not calls.may_be_call(self._held) and "<tool_call>" not in self._held:
                self._decided, piece, self._held = True, self._held, ""
            else:
                piece = ""
        if output.finish_reason is not None:
            self.finish_reason = "length" if output.finish_reason == "length" else "stop"
            if self._held and self._toolbox:
                piece, self.calls = calls.parse(self._held, self._toolbox.names)
                if self._toolbox.one:
                    self.calls = self.calls[:1]
                if self.calls:
                    self.finish_reason = "tool_calls"
        self.content += piece
        return piece
