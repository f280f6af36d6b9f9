"""Questions with two models' answers, read from a .jsonl file: prompts, who was right, how long answers were."""

import gzip
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halve.core.errors import ConfigError, DataError
from halve.core.record import parse_json, shown
from halve.data.prompt_parts import approximate_ids
from halve.economics.fields import nearest

Array = np.ndarray[Any, np.dtype[Any]]

MIN_QUESTIONS = 40
CHARS_PER_TOKEN = 4  # of English answers whose length is known in characters alone


@dataclass(slots=True)
class Questions:
    """right float64 [2, n]; prompt_tokens int64 [n]; answer_tokens int64 [2, n], of the cheap and the dear model.

    scores: of a router of one's own, or None. notes: how tokens were counted.
    """

    prompts: list[str]
    right: Array
    prompt_tokens: Array
    answer_tokens: Array
    scores: Array | None
    notes: list[str]


def read_questions(
    path: Path, columns: tuple[tuple[str, str], tuple[str, str]], score: str | None, answer_tokens: int | None
) -> Questions:
    """The questions of a .jsonl file, also .gz or .xz.

    columns: of the cheap and the dear model, each with the column of its answers' lengths or "". score: a column of
    scores. answer_tokens: where a length is not told. Raises DataError naming file, line and column.
    """
    prompts: list[str] = []
    right: list[list[float]] = [[], []]
    sizes: list[list[int]] = [[], []]
    scores: list[float] = []
    by_chars = assumed = False
    for number, row in _rows(path):
        where = f"{path}:{number}"
        prompts.append(_column(row, "prompt", where, _text))
        for i, (name, length) in enumerate(columns):
            right[i].append(_column(row, name, where, _share))
            usual = (f"{name}_{unit}" for unit in ("tokens", "chars") if f"{name}_{unit}" in row)
            column = length or next(usual, "")
            if column:
                size, is_chars = _column(row, column, where, _whole), column.endswith("_chars")
                by_chars |= is_chars
                sizes[i].append(-(-size // CHARS_PER_TOKEN) if is_chars else size)
            elif answer_tokens is not None:
                assumed = True
                sizes[i].append(answer_tokens)
            else:
                raise DataError(
                    f"{where}: how long the answers of {name} are is not told; give a column {name}_tokens or "
                    f"{name}_chars, name another as {name}:COLUMN, or give --answer-tokens"
                )
        if score is not None:
            scores.append(_column(row, score, where, _number))
    if len(prompts) < MIN_QUESTIONS:
        raise DataError(
            f"{path}: {len(prompts)} questions; half of them choose and half certify, so give {MIN_QUESTIONS}"
        )
    notes = ["tokens of prompts are counted by pieces of words"]
    if by_chars:
        notes.append(f"tokens of answers are their characters over {CHARS_PER_TOKEN}")
    if assumed:
        notes.append(f"answers are taken to have {answer_tokens} tokens")
    return Questions(
        prompts=prompts,
        right=np.array(right),
        prompt_tokens=np.array([max(1, len(approximate_ids(prompt))) for prompt in prompts], np.int64),
        answer_tokens=np.array(sizes, np.int64),
        scores=np.array(scores) if score is not None else None,
        notes=notes,
    )


def _rows(path: Path) -> Any:
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".xz")
    if not plain.endswith(".jsonl"):
        raise DataError(f"{path}: questions are a .jsonl file, also with .gz or .xz behind it")
    opened: Callable[..., Any] = gzip.open if name.endswith(".gz") else lzma.open if name.endswith(".xz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = parse_json(line, f"{path}:{number}")
                    if not isinstance(row, dict):
                        raise DataError(f"{path}:{number}: each line is an object, this is {shown(row)}")
                    yield number, row
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{path}: can't be read: {error}; give a .jsonl file of questions") from error
    except ConfigError as error:
        raise DataError(str(error)) from error


def _column(row: dict[str, Any], name: str, where: str, read: Callable[[Any, str], Any]) -> Any:
    if name not in row:
        raise DataError(f"{where}: has no column {name!r}{nearest(name, row) or ';'} it has {', '.join(sorted(row))}")
    return read(row[name], f"{where}: {name}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {shown(value)} must be a text")
    return value


def _share(value: Any, where: str) -> float:
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise DataError(f"{where}: {shown(value)} must be true or false, or from 0 to 1")
    return float(value)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10**8:
        raise DataError(f"{where}: {shown(value)} must be a whole number from 0 to {10**8}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {shown(value)} must be a number")
    return float(value)
