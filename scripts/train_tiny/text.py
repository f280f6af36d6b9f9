"""Documents out of files, and the chat conversations that are cut from them by rule."""

import gzip
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halve.core.errors import DataError

Turns = list[tuple[str, str]]  # (role, text)

# The first special tokens have fixed ids; the rest of the sixteen are held in reserve.
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SPECIALS += [f"<|reserved_{i}|>" for i in range(9)]
BOS, EOS, PAD, END = 0, 1, 2, 6
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def is_rows(path: Path) -> bool:
    """True for JSON Lines, packed or not: each row is one short document."""
    return ".jsonl" in path.name


def read_text(path: Path) -> str:
    """All text of a plain, gzip or xz file in UTF-8. Raises DataError when it is missing, broken or not UTF-8."""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="") as stream:
            return str(stream.read())
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a text, .gz, .xz or .jsonl file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert the file first") from error


def documents(path: Path) -> list[str]:
    """Documents of one file: rows' "text" of JSON Lines, else text between form feeds.

    Raises DataError when the file cannot be read, holds no document, or a row has no text.
    """
    raw = read_text(path)
    found = _rows(path, raw) if is_rows(path) else [part.strip("\n") for part in raw.split("\f") if part.strip()]
    if not found:
        raise DataError(f"{path}: holds no text; a document is a row with a text, or what stands between form feeds")
    return found


def _rows(path: Path, raw: str) -> list[str]:
    texts = []
    for number, line in enumerate(raw.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); each line is an object with a text") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}:{number}: has no "text"; each line is an object with a text')
        if row["text"].strip():
            texts.append(row["text"])
    return texts


def sections(document: str, limit: int) -> list[str]:
    """Sections of a document (two blank lines apart); short neighbours are joined up to `limit` characters."""
    out: list[str] = []
    for section in re.split(r"\n{3,}", document):
        if out and len(out[-1]) + len(section) < limit:
            out[-1] += "\n\n" + section
        else:
            out.append(section)
    return out


def chats(document: str, rng: random.Random) -> list[Turns]:
    """Story-telling conversations cut from one document, a few hundred words each."""
    paragraphs = [p for p in document.split("\n\n") if len(p) > 60]
    out: list[Turns] = []
    i = 0
    while i + 6 < len(paragraphs):
        i += rng.randrange(2, 30)
        reply = _reply(paragraphs[i + 1 :])
        if not reply or len(paragraphs[i]) > 400:
            i += 1
            continue
        ask = paragraphs[i]
        i += 1 + len(reply)
        lead = rng.choice(["Continue this story: ", "What happens next? ", "Go on: ", "Finish the tale: "])
        turns = [("user", lead + ask), ("assistant", "\n\n".join(reply))]
        if rng.random() < 0.2:
            turns.insert(0, ("system", "You are a storyteller."))
        if rng.random() < 0.3 and i < len(paragraphs) and len(paragraphs[i]) < 600:
            more = rng.choice(["And then?", "Go on.", "What happened next?"])
            turns += [("user", more), ("assistant", paragraphs[i])]
            i += 1
        out.append(turns)
    return out


def _reply(paragraphs: list[str]) -> list[str]:
    taken: list[str] = []
    size = 0
    for paragraph in paragraphs:
        size += len(paragraph)
        if size > 900:
            break
        taken.append(paragraph)
    return taken


def story_request(story: str, rng: random.Random) -> Turns | None:
    """A "tell me a story about X" conversation around one short story; None when no noun offers itself."""
    common = ("little", "big", "old", "new")
    words = [word for word in re.findall(r"\b(?:a|the) ([a-z]{3,10})\b", story) if word not in common]
    if not words:
        return None
    topic = max(dict.fromkeys(words), key=words.count)  # the first of equals, whatever the hash seed
    ask = rng.choice(["Tell me a story about a {}.", "Tell me about the {}.", "Write a short story with a {} in it."])
    return [("user", ask.format(topic)), ("assistant", story)]


def render(turns: Turns) -> str:
    """A conversation as the chat template writes it, without the leading <|bos|>."""
    return "".join(f"<|{role}|>{text}<|end|>" for role, text in turns)
