"""Calls of functions in a model's text: how each family writes them, and how a grammar makes it write them.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number (Hermes, Qwen)
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    llama     {"name": ..., "parameters": {...}}, several with `; ` between them, <|python_tag|> may stand before (3.x)
    pythonic  [name(key=value, ...), ...] (Llama 3.2 and 4)

What a text holds is parsed whichever of these it is; the chat template says which one a forced call takes.
"""

import ast
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["hermes", "mistral", "llama", "pythonic"]

_STARTS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{", "[")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call. arguments: JSON text of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "call_" + secrets.token_hex(12))

    def wire(self) -> dict[str, Any]:
        """As chat completions tell it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def family_of(template: str | None) -> Family:
    """How a model with this chat template writes calls."""
    source = template or ""
    if "[TOOL_CALLS]" in source:
        return "mistral"
    if "<tool_call>" in source or not source or "tools" not in source:
        return "hermes"
    return "llama" if '"parameters"' in source or "python_tag" in source else "pythonic"


def may_be_call(text: str) -> bool:
    """Whether a text that begins so can still turn out to be a call."""
    begun = text.lstrip()
    return not begun or any(begun.startswith(start) or start.startswith(begun) for start in _STARTS)


def parse(text: str, names: Sequence[str]) -> tuple[str, list[Call]]:
    """Content and calls of a text. A text that names none of the known functions is content."""
    for read in (_hermes, _mistral, _json, _pythonic):
        found = read(text)
        if found is not None and found[1] and all(call.name in names for call in found[1]):
            return found
    return text, []


def _call(raw: Any) -> Call | None:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        return None
    arguments = raw.get("arguments", raw.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, Mapping):
        return None
    return Call(name=raw["name"], arguments=json.dumps(arguments, ensure_ascii=False))


def _all(raw: Sequence[Any]) -> list[Call] | None:
    calls = [_call(one) for one in raw]
    return [call for call in calls if call] if calls and all(calls) else None


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _hermes(text: str) -> tuple[str, list[Call]] | None:
    bodies = re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", text, re.DOTALL)
    calls = _all([_loads(body) for body in bodies])
    return None if calls is None else (text[: text.index("<tool_call>")].strip(), calls)


def _mistral(text: str) -> tuple[str, list[Call]] | None:
    before, mark, rest = text.partition("[TOOL_CALLS]")
    raw = _loads(rest.strip()) if mark else None
    calls = _all(raw) if isinstance(raw, list) else None
    return None if calls is None else (before.strip(), calls)


def _json(text: str) -> tuple[str, list[Call]] | None:
    rest, found, decoder = text.strip().removeprefix("<|python_tag|>").strip(), [], json.JSONDecoder()
    while rest:
        try:
            raw, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        found += raw if isinstance(raw, list) else [raw]
        rest = rest[end:].lstrip("; \n")
    calls = _all(found)
    return None if calls is None else ("", calls)


def _pythonic(text: str) -> tuple[str, list[Call]] | None:
    body = text.strip().removeprefix("<|python_tag|>").strip()
    if not (body.startswith("[") and body.endswith("]")) or len(body) > 100_000:
        return None
    try:
        tree = ast.parse(body, mode="eval").body
        if not isinstance(tree, ast.List):
            return None
        calls = []
        for node in tree.elts:
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)) or node.args:
                return None
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            calls.append(Call(name=ast.unparse(node.func), arguments=json.dumps(arguments, ensure_ascii=False)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return ("", calls) if calls else None


def forced_grammar(functions: Sequence[Mapping[str, Any]], family: Family, *, several: bool) -> str:
    """A grammar, in Lark, of at least one call of these functions, as the family writes them."""
    key = "parameters" if family in ("llama", "pythonic") else "arguments"
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": f["name"]}, key: f.get("parameters") or {"type": "object"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for f in functions
    ]
    compact = {"x-guidance": {"whitespace_flexible": False}}
    schema = json.dumps({**compact, **({"anyOf": options} if len(options) > 1 else options[0])})
    more = {"hermes": '("\\n" call)*', "mistral": '("," one)*', "llama": '("; " one)*', "pythonic": '("; " one)*'}
    rest = f" {more[family]}" if several else ""
    if family == "hermes":
        rules = f'start: call{rest}\ncall: "<tool_call>\\n" one "\\n</tool_call>"'
    elif family == "mistral":
        rules = f'start: "[TOOL_CALLS][" one{rest} "]"'
    else:
        rules = f"start: one{rest}"
    return f"%llguidance {{}}\n{rules}\none: %json {schema}\n"
