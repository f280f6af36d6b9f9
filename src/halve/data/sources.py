"""Files of text to documents, and documents to tokens.

A document is the unit of everything that follows: it is never cut here, it falls into one split whole, and the
bootstrap resamples documents. So one record of a file is one document, and what a record is can be told by a rule:

- `.jsonl`, `.jsonl.gz`, `.jsonl.xz`: each line is an object with `text`, or `messages` of `role` and `content`.
- a directory: every `.txt` and `.jsonl` file below it, in order of name; each `.txt` is one document.
- any other file, also `.gz` and `.xz`: plain text, cut at the first of `SEPARATORS` that cuts it (see there).
"""

import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from halve.core.errors import ConfigError, DataError, OutputError
from halve.core.record import parse_json

log = logging.getLogger("halve.data")

Array = np.ndarray[Any, np.dtype[Any]]

# Documents are held in memory. Beyond this a machine may start to swap, and a few MB are enough to calibrate on.
MAX_FILE_BYTES = 2 * 1024**3

# The first that gives at least so many pieces cuts a plain text file. A mark set on purpose counts from the first one;
# two blank lines also stand before a heading, so they count only where there are many. Each pattern starts at a line's
# edge, so a search stays linear.
SEPARATORS = (
    ("form feed", re.compile("\f"), 2),
    ("line <|endoftext|>", re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$", re.MULTILINE), 2),
    ("two or more blank lines", re.compile(r"\n(?:[ \t]*\n){2,}"), 50),
    ("blank line", re.compile(r"\n[ \t]*\n"), 2),
)


class Tokenizer(Protocol):
    """What this room asks of a tokenizer."""

    @property
    def chat_template(self) -> str | None:
        """The template that renders messages, or None for a base model."""

    def encode(self, text: str) -> list[int]:
        """Token ids, with the tokens that the model's own tokenizer puts in front."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the messages as the chat template renders them."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text or one conversation; exactly one of the two.

    messages: each has strings `role` and `content`; further keys are for the chat template.
    sha256: of the canonical JSON (sorted keys, UTF-8), in hex.
    Raises DataError when both or neither are given, when there is no text in it, or when it has no JSON form.
    """

    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sha256: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise DataError("a document has either text or messages, one of the two")
        for number, message in enumerate(self.messages or (), 1):
            _check_message(message, f"message {number}")
        if not any(part.strip() for part in self.contents()):
            raise DataError("a document has text in it; this one is blank")
        try:
            canonical = self.to_json_line().encode()
        except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"a document is Unicode text that JSON can hold: {_clip(str(error))}") from error
        object.__setattr__(self, "sha256", hashlib.sha256(canonical).hexdigest())

    def contents(self) -> list[str]:
        """The text, or the content of each message."""
        return [self.text] if self.text is not None else [m["content"] for m in self.messages or ()]

    def to_json_line(self) -> str:
        """One line of JSONL without its newline: sorted keys, no spaces, characters as they are."""
        value = {"messages": self.messages} if self.text is None else {"text": self.text}
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_documents(path: Path | str) -> list[Document]:
    """Read every document of a file or directory (rules at the top of this file), in order.

    Documents without text in them are left out and counted in one log line. CRLF is read as a newline, and a byte
    order mark is dropped.
    Raises DataError, naming file and line or byte, for what is missing, unreadable, not UTF-8, not by the rules,
    over MAX_FILE_BYTES, or empty.
    """
    path = Path(path)
    num_blank = 0
    documents: list[Document] = []
    for file in _files(path):
        found, blank = _read_file(file, whole=path.is_dir())
        documents += found
        num_blank += blank
    if num_blank:
        log.warning("%s: left out %d documents without text in them", path, num_blank)
    if not documents:
        raise DataError(f"{path}: no text in it; give a file with at least one document")
    return documents


def write_documents(path: Path | str, documents: Iterable[Document]) -> None:
    """Write documents as JSONL; `read_documents` reads the same documents back, in the same order.

    Raises OutputError when the name does not end in `.jsonl` or the file can't be written.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise OutputError(f"{path}: documents are written as JSONL; give a name that ends in .jsonl")
    try:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(document.to_json_line() + "\n" for document in documents)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error


def documents_sha256(documents: Iterable[Document]) -> str:
    """SHA-256 in hex of the file that `write_documents` makes of them, so that `sha256sum` shows the same."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.to_json_line().encode() + b"\n")
    return digest.hexdigest()


def encode(documents: Sequence[Document], tokenizer: Tokenizer, *, vocab_size: int) -> list[Array]:
    """Token ids of each document, int32 [tokens].

    Messages go through the chat template; without one they become lines `role: content`, and keys that only a
    template could use are left out with a log line.
    vocab_size: rows of the model's embedding. Raises DataError naming a document with a token outside it.
    """
    left_out: set[str] = set()
    encoded = []
    for number, document in enumerate(documents, 1):
        if document.messages is None:
            ids = tokenizer.encode(document.text or "")
        elif tokenizer.chat_template is not None:
            ids = tokenizer.encode_chat(document.messages)
        else:
            left_out.update(key for message in document.messages for key in message.keys() - {"role", "content"})
            ids = tokenizer.encode("\n".join(f"{m['role']}: {m['content']}" for m in document.messages))
        outside = next((i for i in ids if not 0 <= i < vocab_size), None)
        if outside is not None:
            raise DataError(
                f"document {number} ({_clip(document.contents()[0], 40)!r}): token {outside} is outside the model's "
                f"vocabulary of {vocab_size}; use the tokenizer that belongs to this model"
            )
        encoded.append(np.array(ids, np.int32))
    if left_out:
        log.warning("no chat template: left out %s of messages, kept role and content", sorted(left_out))
    return encoded


def _files(path: Path) -> list[Path]:
    """The file itself, or what a directory holds by the rules."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: can't be read: {error.strerror}") from error

    try:
        if path.is_file():
            return [path]
        if not path.is_dir():
            rule = "not a file or directory" if path.exists() else "does not exist"
            raise DataError(f"{path}: {rule}; give a .jsonl file, a text file or a directory of them")
    except OSError as error:  # a directory on the way that may not be entered, a name that is too long
        refuse(error)
    below = [Path(root) / name for root, _, names in os.walk(path, onerror=refuse) for name in names]
    files = sorted(file for file in below if _plain_name(file).endswith((".txt", ".jsonl")))
    if not files:
        raise DataError(f"{path}: no .txt or .jsonl file in this directory ({len(below)} other files)")
    if len(files) < len(below):
        log.info("%s: read %d .txt and .jsonl files, left out %d others", path, len(files), len(below) - len(files))
    return files


def _plain_name(file: Path) -> str:
    """The name in lower case without the ending of its compression."""
    name = file.name.lower()
    return name.removesuffix(".gz").removesuffix(".xz")


def _read_file(file: Path, *, whole: bool) -> tuple[list[Document], int]:
    """Documents of one file, and how many blank ones were left out. whole: plain text is not cut."""
    text = read_text(file)
    if _plain_name(file).endswith(".jsonl"):
        found = [_read_line(line, f"{file}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        documents = [document for document in found if document is not None]
        return documents, len(found) - len(documents)
    # Blank lines before the first and after the last document separate nothing.
    text = re.sub(r"\A(?:[ \t]*\n)+", "", text.replace("\r\n", "\n")).rstrip(" \t\n")
    name, pieces = ("none", [text]) if whole else _cut(text)
    log.info("%s: %d documents, separator: %s", file, len(pieces), name)
    return [Document(text=piece.strip("\n")) for piece in pieces if piece.strip()], sum(not p.strip() for p in pieces)


def _cut(text: str) -> tuple[str, list[str]]:
    """The separator that was taken, and the pieces."""
    for name, separator, fewest in SEPARATORS:
        pieces = separator.split(text)
        if len(pieces) >= fewest:
            return name, pieces
    return "none", [text]


def read_text(file: Path) -> str:
    """The whole file, decompressed and decoded."""
    try:
        if not file.is_file():  # a pipe would block, and a device may never end
            raise DataError(f"{file}: not a file, or a link to nothing; take it out of the directory")
        with _open(file) as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file}: can't be read: {error}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise DataError(f"{file}: holds more than {MAX_FILE_BYTES} bytes of text; give a part of it")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        hint = " (it looks like UTF-16)" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(f"{file}: not UTF-8 at byte {error.start}{hint}; save it as UTF-8") from error
    if (at := raw.find(b"\0")) >= 0:
        raise DataError(f"{file}: null byte at byte {at}; this is no text, give a UTF-8 file")
    return text.removeprefix("\ufeff")


def _open(file: Path) -> IO[bytes] | gzip.GzipFile:
    """The file's bytes, decompressed by the ending of its name."""
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file, "rb")
        case ".xz":
            return lzma.open(file, "rb")
    return file.open("rb")


def _read_line(line: str, where: str) -> Document | None:
    """The document of one JSONL line, or None for one without text in it."""
    try:
        raw = parse_json(line, where)
    except ConfigError as error:
        raise DataError(_clip(str(error), 400)) from error
    except ValueError as error:  # a whole number with too many digits
        raise DataError(f"{where}: not JSON: {_clip(str(error))}") from error
    rule = "each line is an object with `text` or with `messages`"
    if not isinstance(raw, dict):
        raise DataError(f"{where}: {rule}, this is {_kind(raw)}")
    if ("text" in raw) == ("messages" in raw):
        raise DataError(f"{where}: {rule}, this has {'both' if 'text' in raw else f'keys {_clip(str(sorted(raw)))}'}")
    text, messages = raw.get("text"), raw.get("messages")
    if "text" in raw and not isinstance(text, str):
        raise DataError(f"{where}: `text` is a string, this is {_kind(text)}")
    if "messages" in raw and not isinstance(messages, list):
        raise DataError(f"{where}: `messages` is a list of objects with role and content, this is {_kind(messages)}")
    for number, message in enumerate(messages or (), 1):
        _check_message(message, f"{where}: message {number}")
    if not (text or "").strip() and not any(message["content"].strip() for message in messages or ()):
        return None
    try:
        return Document(text=text) if messages is None else Document(messages=tuple(messages))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {_kind(message)}; a message is an object with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DataError(f"{where}: `{key}` is a string, this is {_kind(message.get(key))}")


def _kind(value: Any) -> str:
    """What a JSON value is, without its (perhaps very long) content."""
    names = {type(None): "missing or null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _clip(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
