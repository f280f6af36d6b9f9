"""Chat templates: a conversation as one text, rendered as transformers renders it.

This is where templates are found and what they are given; `halve.text.sandbox` runs them.
Source of the rules: transformers 5, `utils/chat_template_utils.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.core.errors import TextError

if TYPE_CHECKING:
    from halve.text.sandbox import Template


class ChatTemplates:
    """The named chat templates of a checkpoint, compiled when first used."""

    def __init__(self, sources: Mapping[str, tuple[str, Path]], path: Path):
        self._sources, self._path = dict(sources), path
        self._compiled: dict[str, Template] = {}

    @classmethod
    def read(cls, path: Path, config: Mapping[str, Any]) -> "ChatTemplates":
        """Template files where there are any, else `chat_template` of tokenizer_config.json."""
        files = {f.stem: f for f in sorted((path / "additional_chat_templates").glob("*.jinja"))}
        if (main := path / "chat_template.jinja").is_file():
            files["default"] = main
        try:
            sources = {name: (file.read_text(encoding="utf-8"), file) for name, file in files.items()}
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: a chat template can't be read: {error}") from error
        raw, file = config.get("chat_template"), path / "tokenizer_config.json"
        if sources or raw is None:
            return cls(sources, path)
        if isinstance(raw, str):
            return cls({"default": (raw, file)}, path)
        try:
            named = {entry["name"]: entry["template"] for entry in raw}
        except (KeyError, TypeError):
            named = {"": None}
        if not all(isinstance(text, str) for text in [*named, *named.values()]):
            raise TextError(f"{file}: chat_template must be a string or a list of {{name, template}}, got {raw!r:.80}")
        return cls({name: (text, file) for name, text in named.items()}, path)

    @property
    def default(self) -> str | None:
        """Source of the template that is used when no tools are given."""
        return self._sources["default"][0] if "default" in self._sources else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text; with tools by the template named `tool_use` where there is one.

        Raises TextError as `Tokenizer.render_chat` tells.
        """
        arguments = {
            "messages": _read_messages(messages),
            "tools": _read_objects(tools, "tools"),
            "documents": _read_objects(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        if taken := sorted(arguments.keys() & variables.keys()):
            raise TextError(f"variables: {taken} are arguments of their own; pass them by name")
        context = {**special_tokens, **_plain(variables, "variables"), **arguments}
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            known = f" named {name!r} (there are {sorted(self._sources)})" if self._sources else ""
            raise TextError(
                f"{self._path}: no chat template{known}; add chat_template.jinja, or send plain text to a model "
                "that was not trained to chat"
            )
        # jinja2 takes longer to load than many a model's weights to read, so it waits for the first conversation.
        from halve.text.sandbox import Template

        source, file = self._sources[name]
        if name not in self._compiled:
            self._compiled[name] = Template(source, file)
        return self._compiled[name].render(context)


# What a template sees


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as plain JSON values, without keys that are None, reasoning under every name that templates read."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise TextError(f"messages: expected a list of at least one {{role, content}}, got {messages!r:.80}")
    result = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TextError(f"messages[{i}]: expected an object with a `role` string, got {message!r:.80}")
        if not isinstance(message.get("content"), str | list | tuple | Mapping | None):
            raise TextError(f"messages[{i}].content: expected text or a list of parts, got {message['content']!r:.80}")
        plain = {k: _plain(v, f"messages[{i}].{k}") for k, v in message.items() if v is not None}
        names = [name for name in ("reasoning_content", "thinking", "reasoning") if name in plain]
        if names:
            plain = {"thinking": plain[names[0]], **plain, "reasoning_content": plain[names[0]]}
        result.append(plain)
    return result


def _read_objects(objects: Sequence[Mapping[str, Any]] | None, where: str) -> list[dict[str, Any]] | None:
    if objects is None:
        return None
    if not isinstance(objects, list | tuple) or not all(isinstance(value, Mapping) for value in objects):
        raise TextError(f"{where}: expected a list of objects, got {objects!r:.80}")
    return [_plain(value, f"{where}[{i}]") for i, value in enumerate(objects)]


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON values only, so that a template meets no object whose methods act."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TextError(f"{where}: {type(value).__name__} is not a JSON value; pass text, numbers, lists and objects")
