"""A model as the server sees it: an engine, its tokenizer, and what is said of it."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from halve.core.errors import RequestError, TextError
from halve.engine import Engine, EngineConfig
from halve.engine.constrain import Constrainer
from halve.kernels.ops import Array
from halve.server.errors import ApiError
from halve.text import Tokenizer

log = logging.getLogger("halve.server")

T = TypeVar("T")

_ASIDE = ThreadPoolExecutor(2, "halve-aside")
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

    async def encode(self, text: str, name: str = "prompt", *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. name: of the field that holds it. Raises ApiError."""
        return await self.aside(self._encode, text, name, add_special_tokens)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of a conversation, ready for the assistant's answer, and strings that end it. Raises ApiError.

        A model without a chat template gets `role: text` lines. A template that knows no tools gets them as a message.
        """
        return await self.aside(self._chat, messages, tools, variables)

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run what takes a processor's time where it holds up neither streams nor the database."""
        return await asyncio.get_running_loop().run_in_executor(_ASIDE, partial(work, *arguments))

    def _encode(self, text: str, name: str, add_special_tokens: bool) -> list[int]:
        self._require_short(len(text), name)
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TextError as error:
            raise ApiError(400, str(error), param=name) from error

    def _require_short(self, length: int, name: str) -> None:
        """Refuse a text that cannot fit before seconds are spent on its tokens."""
        most = self.context * self.tokenizer.longest_token
        if length > most:
            raise ApiError(
                400,
                f"{name}: {length} characters can't fit: the context holds {self.context} tokens, and none has more "
                f"than {self.tokenizer.longest_token} characters",
                param=name,
                code="context_length_exceeded",
            )

    def _chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[list[int], tuple[str, ...]]:
        self._require_short(sum(len(message.get("content") or "") for message in messages), "messages")
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
