"""What prompts have in common: how often lines and messages recur, and how they are ordered so that more is shared.

A prefix cache finds what requests begin with alike. A line that differs (a date, a name, a document) hides all that
follows it. `Recurring` counts lines and messages in bounded memory, `reordered` puts those that recur before those that
differ, and the chain of `block_names` says what two prompts share, in blocks as the engine's cache has them.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby, pairwise

import numpy as np

from halve.data.request_logs import LoggedMessage, LoggedRequest

BLOCK_TOKENS = 16
SHORT = 8  # characters: a line below that (a brace, a rule) goes with the line before it
WORTH_MOVING = 200  # characters of lines that recur together
_PIECES = re.compile(r" ?[A-Za-z]{1,6}| ?\d{1,3}| ?[!-/:-@\[-`{-~]{1,2}|\s{1,8}|[^\sA-Za-z\d]")

Encode = Callable[[Sequence[LoggedMessage], Sequence[str]], Sequence[int]]


def key_of(*parts: str) -> int:
    """63 bits that stand for some texts."""
    digest = blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def approximate_ids(text: str) -> list[int]:
    """Numbers that stand for a text's pieces: about as many as a tokenizer of 32,000 or more entries gives.

    Of words up to six letters, of three digits, of two signs, and single letters of other scripts. Equal pieces have
    equal numbers, so what two texts share is about right too. How far off it is: docs/LOG.md.
    """
    return [hash_of(piece) for piece in _PIECES.findall(text)]


_seen: dict[str, int] = {}


def hash_of(piece: str) -> int:
    """31 bits of a piece; common ones are remembered."""
    found = _seen.get(piece)
    if found is None:
        found = int.from_bytes(blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little") >> 1
        if len(_seen) < 1 << 16:
            _seen[piece] = found
    return found


def rendered(messages: Sequence[LoggedMessage], tools: Sequence[str]) -> list[str]:
    """A conversation as texts, one for the tools and one for each message, with roles as marks between."""
    texts = ["".join(f"<|tools|>\n{tool}\n" for tool in tools)] if tools else []
    texts += [f"<|{message.role}|>\n{message.text}\n" if message.role else message.text for message in messages]
    return texts


class ApproximateEncoder:
    """Messages to numbers without a tokenizer; long texts that recur are remembered, in bounded memory."""

    def __init__(self, num_texts: int = 512) -> None:
        self._texts: OrderedDict[str, list[int]] = OrderedDict()
        self._num_texts = num_texts

    def __call__(self, messages: Sequence[LoggedMessage], tools: Sequence[str]) -> list[int]:
        """Numbers of a prompt."""
        ids: list[int] = []
        for text in rendered(messages, tools):
            ids += self._of(text)
        return ids

    def _of(self, text: str) -> list[int]:
        if not 500 < len(text) < 200_000:
            return approximate_ids(text)
        found = self._texts.pop(text, None)
        if found is None:
            found = approximate_ids(text)
        self._texts[text] = found
        if len(self._texts) > self._num_texts:
            self._texts.popitem(last=False)
        return found


def block_names(ids: Sequence[int], block_tokens: int = BLOCK_TOKENS) -> tuple[int, ...]:
    """A name for each whole block of a prompt, of it and all before it: prompts share as far as names are the same."""
    data = np.asarray(ids, np.int64).tobytes()
    size, previous, names = block_tokens * 8, b"", []
    for start in range(0, len(data) - size + 1, size):
        previous = blake2b(previous + data[start : start + size], digest_size=8).digest()
        names.append(int.from_bytes(previous, "little") >> 1)
    return tuple(names)


class PrefixHits:
    """What a prefix cache would find, with room for so many blocks; those not used the longest go first."""

    def __init__(self, num_blocks: int = 1 << 20) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._num_blocks = num_blocks
        self.overflowed = False

    def add(self, names: Sequence[int], num_tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
        """Tokens of a prompt that are there already; the prompt is there from now on. At least its last one isn't."""
        found = 0
        for name in names:
            if name not in self._blocks:
                break
            found += 1
        for name in names:
            self._blocks.pop(name, None)
            self._blocks[name] = None
        while len(self._blocks) > self._num_blocks:
            self.overflowed = True
            self._blocks.popitem(last=False)
        most = max(0, num_tokens - 1) // block_tokens  # one token must be computed for the answer to begin
        return min(found, most) * block_tokens


@dataclass(slots=True)
class Part:
    """Something that recurs. count: prompts that have it. text: its beginning. line: of the log, where it was first."""

    count: int
    size: int
    text: str
    line: int
    role: str


class Recurring:
    """How many requests have a text, for texts that are frequent, in bounded memory.

    Lossy counting (Manku and Motwani, VLDB 2002): whenever there are more than `capacity` texts, each loses one and
    those without any go. A count is too low by `lost` at most.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self.parts: dict[int, Part] = {}
        self.capacity, self.lost, self.requests = capacity, 0, 0

    def add(self, keys: Iterable[tuple[int, str, int, str]]) -> None:
        """Count the texts of a request, each once: key, text, line, role."""
        self.requests += 1
        for key, (_, text, line, role) in {one[0]: one for one in keys}.items():
            part = self.parts.get(key)
            if part is None:
                self.parts[key] = Part(1, len(text), text[:120], line, role)
            else:
                part.count += 1
        while len(self.parts) > self.capacity:
            self.lost += 1
            self.parts = {key: part for key, part in self.parts.items() if part.count > self.lost}

    def share(self, key: int) -> float:
        """Of all requests."""
        part = self.parts.get(key)
        return part.count / self.requests if part and part.count > 1 else 0.0

    def level(self, key: int) -> int:
        """0 in half of the requests or more, 1 in a tenth, 2 in a hundredth and three of them, else 3: it differs."""
        part = self.parts.get(key)
        if part is None or part.count < 3:
            return 3
        share = part.count / self.requests
        return 0 if share >= 0.5 else 1 if share >= 0.1 else 2 if share >= 0.01 else 3


def lines_of(text: str) -> list[str]:
    """Lines with their ends; short ones go with the line before."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if lines and len(line.strip()) < SHORT:
            lines[-1] += line
        else:
            lines.append(line)
    return lines


_EXAMPLE = re.compile(
    r"^(?:#+ ?|\*\*)?(?:Example|Beispiel|Exemple|Ejemplo|Q|Question|Input|Text|Review|例|質問|入力)"
    r"(?: ?\d+)?(?:\*\*)? ?[::]",
    re.MULTILINE,
)


def example_blocks(text: str) -> list[str]:
    """Examples that stand in a text: from a line such as `Example 2:` or `Q:` to the next of its kind.

    The last one is left out, since nothing says where it ends (and in a prompt it is the question). Lines of one kind
    must come three times or more.
    """
    starts: dict[str, list[int]] = {}
    for found in _EXAMPLE.finditer(text):
        starts.setdefault(re.sub(r"[\W\d]+", "", found[0]), []).append(found.start())
    often = max(starts.values(), key=len, default=[])
    if len(often) < 3:
        return []
    return [text[a:b] for a, b in pairwise(often)]


def keys_of(request: LoggedRequest) -> list[tuple[int, str, int, str]]:
    """Keys of the lines and of the whole messages of a request, for `Recurring`."""
    found = []
    for message in request.messages:
        found.append((message_key(message), message.text, request.line, message.role))
        found += [
            (key_of("line", message.role, line), line, request.line, message.role) for line in lines_of(message.text)
        ]
    return found


def message_key(message: LoggedMessage) -> int:
    """Of a whole message."""
    return key_of("message", message.role, message.text)


def reordered_text(role: str, text: str, recurring: Recurring) -> tuple[str, str]:
    """A message with the lines that recur first, and of the result what comes after them.

    Lines in a row of one level stay together; rows that recur and are worth it go first, the commonest before the
    others, and everything else follows in its order.
    """
    levels = [(recurring.level(key_of("line", role, line)), line) for line in lines_of(text)]
    rows = [(level, "".join(line for _, line in group)) for level, group in groupby(levels, key=lambda one: one[0])]
    first = sorted((row for row in rows if row[0] < 3 and len(row[1]) >= WORTH_MOVING), key=lambda row: row[0])
    rest = [row for row in rows if not (row[0] < 3 and len(row[1]) >= WORTH_MOVING)]
    head, tail = (_joined(row[1] for row in part) for part in (first, rest))
    if not first or not tail.strip():
        return text, "" if first else text
    return _joined([head, tail]).rstrip("\n"), tail.rstrip("\n")


def _joined(texts: Iterable[str]) -> str:
    """One after another, each beginning a line of its own."""
    result = ""
    for text in texts:
        result += ("\n" if result and not result.endswith("\n") else "") + text
    return result


def reordered(request: LoggedRequest, recurring: Recurring) -> LoggedRequest:
    """The same request with what recurs in front: tools by name, lines within each message.

    Where messages that recur (examples) follow a system message that differs, what differs in it goes to the beginning
    of the last message, behind them.
    """
    tools = tuple(sorted(_sorted_tool(tool) for tool in request.tools))
    messages = []
    for message in request.messages:
        if message.role in ("system", "user", ""):
            text, _ = reordered_text(message.role, message.text, recurring)
            messages.append(replace(message, text=text))
        else:
            messages.append(message)
    behind = [m for m in request.messages[1:-1] if recurring.level(message_key(m)) < 2]
    if len(messages) > 2 and messages[0].role == "system" and messages[-1].role == "user" and behind:
        whole, tail = reordered_text("system", request.messages[0].text, recurring)
        head = whole[: len(whole) - len(tail)].rstrip("\n") if tail else whole
        if tail.strip() and head.strip():
            messages[0] = replace(messages[0], text=head)
            messages[-1] = replace(messages[-1], text=f"{tail}\n\n{messages[-1].text}")
    return replace(request, messages=tuple(messages), tools=tools)


def _sorted_tool(tool: str) -> str:
    value = json.loads(tool)
    inner = value.get("function") if isinstance(value.get("function"), dict) else value
    return json.dumps({"name": inner.get("name"), **value}, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def trimmed(text: str) -> str:
    """The same text without spaces at ends of lines, runs of blank lines, and lines that it has already said."""
    said: set[str] = set()
    kept: list[str] = []
    for line in (one.rstrip() for one in text.split("\n")):
        if len(line) >= 20 and line in said:
            continue
        said.add(line)
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip("\n")
