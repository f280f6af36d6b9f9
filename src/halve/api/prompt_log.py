"""A log of requests, read twice: what recurs in it, then where its tokens go. Memory is bounded at any length."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halve.core.errors import DataError
from halve.data.answers import first_marker, loop_start
from halve.data.prompt_parts import (
    PrefixHits,
    Recurring,
    block_names,
    example_blocks,
    key_of,
    keys_of,
    lines_of,
    message_key,
    reordered,
    reordered_text,
    trimmed,
)
from halve.data.request_logs import BadLine, LoggedMessage, LoggedRequest, read_log

MAX_BAD = 20  # bad lines that are told one by one
MAX_KINDS = 5_000  # different system prompts that are told apart
Encode = Callable[[Sequence[LoggedMessage], Sequence[str]], Sequence[int]]
Count = Callable[[str], int]


@dataclass(slots=True)
class SystemPrompt:
    """Prompts that share the recurring part of their system message. saved: tokens that trimming one spares."""

    count: int
    tokens: int
    text: str
    line: int
    saved: int


@dataclass(slots=True)
class Example:
    """A message between the system prompt and the last one that recurs. count: how often it was sent."""

    count: int
    tokens: int
    text: str
    line: int


@dataclass(slots=True)
class Sample:
    """A request for the replay: its prompts' blocks and length as sent and reordered, and its answer's length."""

    at: float | None
    sent: tuple[int, ...]
    sent_tokens: int
    better: tuple[int, ...]
    better_tokens: int
    answer_tokens: int
    request: LoggedRequest | None


@dataclass(slots=True)
class Reading:
    """What was counted, in tokens as the encoder counts them. Names of the roles: see `roles`."""

    num_requests: int = 0
    bad: list[BadLine] = field(default_factory=list)
    num_bad: int = 0
    models: Counter[str] = field(default_factory=Counter)
    first_at: float | None = None
    last_at: float | None = None
    num_timed: int = 0
    prompt: int = 0
    usage_prompt: int = 0  # of requests whose usage was logged, as the log says
    counted_prompt: int = 0  # of the same requests, as counted here
    cached: int = 0
    num_with_cached: int = 0
    answer: int = 0
    num_with_answer: int = 0
    hits_sent: int = 0
    hits_better: int = 0
    overflowed: bool = False
    roles: Counter[str] = field(default_factory=Counter)
    run_on: int = 0
    markers: Counter[str] = field(default_factory=Counter)
    run_on_lines: list[int] = field(default_factory=list)
    loop: int = 0
    num_loops: int = 0
    loop_lines: list[int] = field(default_factory=list)
    cut: int = 0
    num_cut: int = 0
    num_unlimited: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    systems: dict[int, SystemPrompt] = field(default_factory=dict)
    examples: dict[int, Example] = field(default_factory=dict)
    repeated: int = 0
    repeated_lines: list[int] = field(default_factory=list)
    moved: Counter[str] = field(default_factory=Counter)
    num_moved: int = 0
    samples: list[Sample] = field(default_factory=list)
    num_other_parts: int = 0


def read_requests(path: Path, first: int | None, bad: Callable[[BadLine], None]) -> Iterator[LoggedRequest]:
    """The requests of a log, at most `first`; bad lines are handed over. Raises DataError for a log without any."""
    number = num_bad = 0
    reason: BadLine | None = None
    for line in read_log(path):
        if isinstance(line, BadLine):
            num_bad += 1
            reason = reason or line
            bad(line)
            continue
        number += 1
        yield line
        if first is not None and number >= first:
            return
    if not number:
        told = "it is empty" if reason is None else f"line {reason.line}: {reason.reason}"
        raise DataError(f"{path}: no request in {num_bad} lines; {told}; the shapes that are read are in docs/GUIDE.md")


class LogReader:
    """Reads one log. encode: messages and tools to numbers of tokens; count: tokens of a text."""

    def __init__(
        self, path: Path, encode: Encode, count: Count, *, first: int | None, samples: int, texts: bool
    ) -> None:
        self._path, self._encode, self._count, self._first = path, encode, count, first
        self._num_samples, self._keep_texts = samples, texts
        self.recurring, self.found = Recurring(), Reading()
        self._sent, self._better = PrefixHits(), PrefixHits()
        self._counts: dict[int, int] = {}

    def read(self) -> Reading:
        """Both passes."""
        for request in read_requests(self._path, self._first, lambda line: None):
            self.recurring.add(keys_of(request))
        for request in read_requests(self._path, self._first, self._note_bad):
            self._request(request)
        self.found.overflowed = self._sent.overflowed or self._better.overflowed
        return self.found

    def _note_bad(self, line: BadLine) -> None:
        self.found.num_bad += 1
        if len(self.found.bad) < MAX_BAD:
            self.found.bad.append(line)

    def _size(self, text: str) -> int:
        """Tokens of a text that recurs, counted once."""
        key = key_of(text)
        if key not in self._counts:
            if len(self._counts) > 50_000:
                self._counts.clear()
            self._counts[key] = self._count(text)
        return self._counts[key]

    def _request(self, request: LoggedRequest) -> None:
        found = self.found
        found.num_requests += 1
        if request.model in found.models or len(found.models) < MAX_KINDS:
            found.models[request.model or "not named"] += 1
        found.num_other_parts += request.num_other_parts
        if request.at is not None:
            found.num_timed += 1
            found.first_at = request.at if found.first_at is None else min(found.first_at, request.at)
            found.last_at = request.at if found.last_at is None else max(found.last_at, request.at)
        ids = self._encode(request.messages, request.tools)
        better = reordered(request, self.recurring)
        better_ids = ids if better == request else self._encode(better.messages, better.tools)
        names, better_names = block_names(ids), block_names(better_ids)
        found.prompt += len(ids)
        if request.prompt_tokens is not None:
            found.usage_prompt += request.prompt_tokens
            found.counted_prompt += len(ids)
        if request.cached_tokens is not None:
            found.cached += request.cached_tokens
            found.num_with_cached += 1
        found.hits_sent += self._sent.add(names, len(ids))
        found.hits_better += self._better.add(better_names, len(better_ids))
        if better != request:
            self._note_moved(request, better)
        self._roles(request, len(ids))
        answer = self._answer(request)
        if len(found.samples) < self._num_samples:
            sample = Sample(request.at, names, len(ids), better_names, len(better_ids), max(1, answer), None)
            sample.request = request if self._keep_texts else None
            found.samples.append(sample)

    def _note_moved(self, request: LoggedRequest, better: LoggedRequest) -> None:
        """The line that stood in front of what recurs, without its numbers."""
        self.found.num_moved += 1
        before, after = request.messages[0].text, better.messages[0].text
        if before == after:
            role = next((a.role for a, b in zip(request.messages, better.messages, strict=True) if a != b), "tools")
            self.found.moved[f"a {role or 'prompt'} message" if role != "tools" else "tools in another order"] += 1
        elif len(self.found.moved) < 1000:
            self.found.moved[re.sub(r"\d+", "#", before.lstrip().splitlines()[0][:80])] += 1

    def _roles(self, request: LoggedRequest, total: int) -> None:
        """Tokens by what they are; what is counted of its own first, the rest by characters."""
        sizes, messages = Counter[str](), request.messages
        if request.tools:
            sizes["tools"] = self._size("\n".join(request.tools))
        chars: Counter[str] = Counter()
        seen: set[int] = set()
        for i, message in enumerate(messages):
            is_last = i == len(messages) - 1
            if not is_last and i > 0 and self._is_example(message):
                sizes["examples"] += self._example(message, request.line, seen)
                continue
            inside = 0
            for block in self._blocks(message):
                inside += len(block.text)
                sizes["examples"] += self._example(block, request.line, seen)
            if message.role == "system":
                size = self._system(request.line, message)
                sizes["system"] += size * (len(message.text) - inside) // max(1, len(message.text))
            else:
                chars["question" if is_last else "history"] += len(message.text) - inside + 8
        rest = max(0, total - sum(sizes.values()))
        if chars.total():
            for role, number in chars.items():
                sizes[role] += rest * number // chars.total()
        self.found.roles.update(sizes)

    def _is_example(self, message: LoggedMessage) -> bool:
        """Whether a message between the first and the last one recurs in a tenth of the requests."""
        return message.role != "system" and len(message.text) >= 20 and self.recurring.level(message_key(message)) < 2

    def _blocks(self, message: LoggedMessage) -> list[LoggedMessage]:
        """Examples inside a message whose first lines recur as often."""
        blocks = []
        for text in example_blocks(message.text):
            line = lines_of(text)[0]
            if self.recurring.level(key_of("line", message.role, line)) < 2:
                blocks.append(LoggedMessage(role="example", text=text))
        return blocks

    def _system(self, line: int, message: LoggedMessage) -> int:
        size = self._size(message.text)
        whole, tail = reordered_text("system", message.text, self.recurring)
        head = whole[: len(whole) - len(tail)] if tail else whole
        key = key_of(head.strip() or "unlike any other")
        known = self.found.systems.get(key)
        if known is not None:
            known.count += 1
            known.tokens += size
        elif len(self.found.systems) < MAX_KINDS:
            saved = max(0, size - self._count(trimmed(message.text)))
            self.found.systems[key] = SystemPrompt(1, size, message.text[:80], line, saved)
        return size

    def _example(self, message: LoggedMessage, line: int, seen: set[int]) -> int:
        """Tokens of an example, which is noted, and again where the prompt has it already."""
        key, size, found = message_key(message), self._size(message.text), self.found
        known = found.examples.get(key)
        if known is not None:
            known.count += 1
        elif len(found.examples) < MAX_KINDS:
            found.examples[key] = Example(1, size, message.text[:80], line)
        if key in seen and message.role != "assistant":  # answers such as "yes" may well be the same
            found.repeated += size
            if len(found.repeated_lines) < 5:
                found.repeated_lines.append(line)
        seen.add(key)
        return size

    def _answer(self, request: LoggedRequest) -> int:
        """Tokens of the answer; 0 where nothing is known of it."""
        found, text = self.found, request.answer
        size = request.completion_tokens
        if size is None:
            size = self._count(text) if text else None
        found.num_unlimited += request.max_tokens is None
        if size is None:
            return 0
        found.num_with_answer += 1
        found.answer += size
        if request.finish_reason == "length":
            found.cut += size
            found.num_cut += 1
        spared = self._runs_on(request.line, text, size) if text else 0
        found.lengths[size - spared] += 1
        return size

    def _runs_on(self, line: int, text: str, size: int) -> int:
        """Tokens behind where an answer should have ended."""
        found = self.found
        marker, loop = first_marker(text), loop_start(text)
        share = size / max(1, len(text))  # tokens of a character, since usage and counting differ
        if marker is not None and (loop is None or marker[0] <= loop):
            spared = round((len(text) - marker[0]) * share)
            found.run_on += spared
            found.markers[marker[1]] += 1
            if len(found.run_on_lines) < 5:
                found.run_on_lines.append(line)
            return spared
        if loop is None:
            return 0
        spared = round((len(text) - loop) * share)
        found.num_loops += 1
        found.loop += spared
        if len(found.loop_lines) < 5:
            found.loop_lines.append(line)
        return spared
