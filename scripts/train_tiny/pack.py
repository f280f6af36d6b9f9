"""The verb `pack`: text to one stream of uint16 token ids."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halve.core.errors import ConfigError, DataError
from train_tiny.files import make_folder, write_json
from train_tiny.text import BOS, EOS, chats, documents, is_rows, render, sections, story_request
from train_tiny.tokenizer import open_tokenizer

BATCH = 2000  # pieces encoded at once


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSettings:
    """text: files, `file*3` takes one three times. chat: share of the possible conversations that is added."""

    text: tuple[str, ...]
    tokenizer: Path
    out: Path
    chat: float
    keep_order: bool
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.chat <= 1:
            raise ConfigError(f"--chat {self.chat}: is a share, 0 to 1")
        if self.chat and self.keep_order:
            raise ConfigError("--chat and --keep-order exclude each other: conversations have no place in the order")


def run_pack(settings: PackSettings) -> None:
    """Write <name>.bin, every section as bos, text, eos, shuffled by section unless keep_order; and <name>.json."""
    tokenizer = open_tokenizer(settings.tokenizer)
    rng = random.Random(settings.seed)
    items, num_bytes = collect(settings, rng)
    if not settings.keep_order:
        rng.shuffle(items)
    ids = encode(tokenizer, items)
    make_folder(settings.out.parent)
    ids.tofile(settings.out)
    counts = {"num_tokens": len(ids), "num_bytes": num_bytes, "vocab_size": tokenizer.get_vocab_size()}
    write_json(settings.out.with_suffix(".json"), counts)
    millions = f"{len(ids) / 1e6:.2f} M tokens from {num_bytes / 1e6:.1f} MB"
    print(f"{len(items)} pieces, {millions} -> {settings.out}")


def collect(settings: PackSettings, rng: random.Random) -> tuple[list[str], int]:
    """Pieces of all files in order, conversations after the document they come from; and the bytes read."""
    items: list[str] = []
    num_bytes = 0
    for spec in settings.text:
        path, times = parse_spec(spec)
        for document in documents(path):
            num_bytes += len(document.encode())
            parts = [document] if settings.keep_order or is_rows(path) else sections(document, 3000)
            items += parts * times
            if settings.chat > 0:
                found = [story_request(document, rng)] if is_rows(path) else chats(document, rng)
                items += [render(turns) for turns in found if turns and rng.random() < settings.chat]
    return items, num_bytes


def parse_spec(spec: str) -> tuple[Path, int]:
    """Read `file` or `file*3`. Raises DataError when the count is not a whole number of 1 or more."""
    name, star, times = spec.partition("*")
    if star and not (times.isdecimal() and int(times) > 0):
        raise DataError(f"--text {spec}: {times!r} is not a count; write {name}*3 to take a file three times")
    return Path(name), int(times or 1)


def encode(tokenizer: Any, items: list[str]) -> NDArray[np.uint16]:
    """Bos, text, eos of every piece, one after the other."""
    out: list[NDArray[np.uint16]] = []
    for i in range(0, len(items), BATCH):
        encodings = tokenizer.encode_batch_fast(items[i : i + BATCH], add_special_tokens=False)
        out.extend(np.array([BOS, *encoding.ids, EOS], dtype=np.uint16) for encoding in encodings)
    return np.concatenate(out)


def open_stream(path: Path, vocab_size: int) -> NDArray[np.uint16]:
    """Memory-map a stream that `pack` wrote.

    Raises DataError when it is missing, empty, cut in the middle of an id, or holds ids outside the vocabulary.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; make it by the verb pack")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise DataError(f"{path}: {size} bytes is not a stream of 16-bit ids; make it by the verb pack")
    data: NDArray[np.uint16] = np.memmap(path, dtype=np.uint16, mode="r")
    if (top := int(data.max())) >= vocab_size:
        raise DataError(f"{path}: holds id {top}, the vocabulary has {vocab_size}; pack with the tokenizer of this run")
    return data
