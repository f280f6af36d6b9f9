"""A model as the server sees it: an engine, its tokenizer, and what is said of it."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halve.core.errors import RequestError, TextError
from halve.engine import Engine, EngineConfig
from halve.engine.constrain import Constrainer
from halve.kernels.ops import Array
from halve.server.errors import ApiError
from halve.text import Tokenizer

log = logging.getLogger("halve.server")

FALLBACK_STOPS = ("\nuser:", "\nsystem:")


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """One model under a name.

    hidden: token ids -> final hidden states [T, H]; logits: token ids -> [T, vocab]; both run on the engine's thread,
    between two steps. promise: what the certificate says of its cost and speed, for the console.
    """

    name: str
    engine: Engine
    config: EngineConfig
    tokenizer: Tokenizer
    context: int
    vocab_size: int
    created: int
    constrainer: Constrainer | None
    hidden: Callable[[Sequence[int]], Array]
    logits: Callable[[Sequence[int]], Array]
    promise: Mapping[str, Any] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens as the tokenizer adds them."""
        try:
            return self.tokenizer.encode(text)
        except TextError as error:
            raise ApiError(400, str(error), param="prompt") from error

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of a conversation, ready for the assistant's answer, and strings that end it.

        A model without a chat template gets `role: text` lines. A template that knows no tools gets them as a message.
        """
        source = self.tokenizer.chat_template
        given = list(messages)
        if tools and (source is None or "tools" not in source):
            given = [{"role": "system", "content": _tools_as_text(tools)}, *given]
            tools = None
        try:
            if source is None:
                if "template" not in self._told:
                    self._told.add("template")
                    log.warning("%s has no chat template: conversations are sent as `role: text` lines", self.name)
                text = "".join(f"{m['role']}: {m.get('content') or ''}\n" for m in given) + "assistant:"
                return self.tokenizer.encode(text), FALLBACK_STOPS
            ids = self.tokenizer.encode_chat(given, add_generation_prompt=True, tools=tools, variables=variables)
        except (TextError, RequestError) as error:
            raise ApiError(400, str(error), param="messages") from error
        return ids, ()


def _tools_as_text(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call functions. To call one, answer with <tool_call>\n"
        '{"name": NAME, "arguments": OBJECT}\n</tool_call> and nothing else. The functions:\n' + lines
    )


class Registry:
    """The models of a server by name; the first is the default."""

    def __init__(self, models: Sequence[Served]) -> None:
        self._models = {served.name: served for served in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def get(self, name: str | None) -> Served:
        """A model by its name. Raises ApiError 404."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ApiError(
                404,
                f"model: there is no {name!r:.200}; this server has {', '.join(self._models)}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]
