"""Files of questions: benchmarks as they are published, and a schema for your own.

A file is `.jsonl`, one JSON object a line, also with `.gz` or `.xz` (`.json` where its lines are objects, as JGLUE's
are). All lines of a file are of one kind, known by their keys:

| keys                                        | what is asked |
|---------------------------------------------|---|
| `prompt`, `choices`, `answer` (a number)    | which choice is likeliest behind the prompt; answer counts from 0 |
| `prompt`, `answer` (text)                   | the model writes; right if it says just that (below) |
| `text`                                      | the last word, from all that stands before it (LAMBADA) |
| `query`, `choices`, `gold`                  | ARC |
| `ctx`, `endings`, `label`                   | HellaSwag |
| `question`, `choice0` ..., `label`          | JCommonsenseQA |
| `question`, `choices`, `answer` (a letter)  | MMLU, JMMLU |
| `question`, `answer` with a line `#### 18`  | GSM8K: the model writes; right if it comes to the same number |

Of the first two, `joiner` may say what stands between prompt and answer: a space unless said or there already. Other
keys are refused by name, but for identifiers (`id`, `q_id`, `key`, `subject`, `category`, `source`).

**Which choice.** The one with the highest log-likelihood per UTF-8 byte, given the prompt: long choices are not
disfavoured, and the figure does not depend on a tokenizer. **Written answers** are compared without case, outer white
space and a last full stop; numbers by value, the one behind `####` or else the last.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from halve.core.errors import ConfigError, DataError
from halve.core.record import parse_json, shown
from halve.data.sources import read_text

log = logging.getLogger("halve.evaluate")

Kind = Literal["choice", "last_word", "generate"]

IDENTIFIERS = frozenset({"id", "q_id", "key", "subject", "category", "source"})
MAX_ANSWER_TOKENS = 256
STOPS = ("\n\n", "\nQuestion:")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One item. prompt: what the model reads. choices: what may follow, joiner included; empty where it writes.

    answer: the index of the right choice, or the text that is right.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The questions of one file, in order of the file. sha256: of the lines as they were read.

    chance: the share that guessing gets right on average; None where nothing can be guessed.
    """

    name: str
    kind: Kind
    questions: tuple[Question, ...]
    sha256: str
    number: bool = False  # written answers are numbers
    lines: tuple[str, ...] = ()  # of the file, as they were read

    @property
    def chance(self) -> float | None:
        """Of a choice: the mean of one over the number of choices."""
        if self.kind != "choice":
            return None
        return sum(1 / len(q.choices) for q in self.questions) / len(self.questions)

    def is_right(self, question: Question, written: str) -> bool:
        """Whether what a model wrote is the answer."""
        wanted = str(question.answer)
        if self.number:
            return (found := number_in(written)) is not None and found == number_in(wanted)
        return _plain(written) == _plain(wanted)

    def first(self, count: int) -> "Task":
        """A sample of so many: in order of their hashes, so that it is the same on every machine."""
        ranked = sorted(self.questions, key=lambda q: hashlib.sha256(repr(q).encode()).digest())
        return replace(self, questions=tuple(ranked[:count]), sha256=_sha256([repr(q) for q in ranked[:count]]))


def read_task(path: Path | str) -> Task:
    """Read a file of questions. Raises DataError naming file and line for anything that is not by the rules above."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: does not exist; give a file of questions (`halve.evaluate.tasks` lists the formats)")
    lines = [(n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: holds no questions")
    reader, found = None, []
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            raw = parse_json(line, where)
        except ConfigError as error:
            raise DataError(str(error)[:400]) from error
        if not isinstance(raw, dict):
            raise DataError(f"{where}: a question is a JSON object, this is {shown(raw)}")
        form = _form_of(raw, where)
        if reader is not None and form is not reader:
            raise DataError(f"{where}: a question of another kind than those before; give each kind a file of its own")
        reader = form
        found.append(form.read(raw, where))
    assert reader is not None
    # Published files repeat a choice now and then; where all are the same, every model would be right.
    asking = [question for question in found if len(set(question.choices)) != 1 or reader.kind != "choice"]
    if len(asking) < len(found):
        log.warning("%s: left out %d questions whose choices are all the same", path, len(found) - len(asking))
    if not asking:
        raise DataError(f"{path}: the choices of every question are all the same; nothing is asked")
    name = re.sub(r"\.(jsonl|json|gz|xz)$", "", re.sub(r"\.(gz|xz)$", "", path.name))
    return Task(
        name=name,
        kind=reader.kind,
        questions=tuple(asking),
        sha256=_sha256([line for _, line in lines]),
        number=reader.number,
        lines=tuple(line for _, line in lines),
    )


def number_in(text: str) -> float | None:
    """The number behind the last `####`, or else the last number; None where there is none."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = _NUMBER.findall(marked)
    if not found:
        return None
    number = found[0] if marked is not text else found[-1]
    return float(number.replace(",", ""))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """One row of the table above."""

    keys: frozenset[str]
    kind: Kind
    read: Callable[[Mapping[str, Any], str], Question]
    optional: frozenset[str] = frozenset()
    number: bool = False
    fits: Callable[[Mapping[str, Any]], bool] = lambda raw: True


def _form_of(raw: Mapping[str, Any], where: str) -> _Form:
    keys = frozenset(key for key in raw if key not in IDENTIFIERS and not re.fullmatch(r"choice\d+", key))
    for form in _FORMS:
        if form.keys <= keys and keys <= form.keys | form.optional and form.fits(raw):
            return form
    raise DataError(
        f"{where}: keys {sorted(raw)} are of no kind of question that is known; your own questions are objects with "
        "`prompt`, `choices` and `answer` (counted from 0), with `prompt` and `answer` (text), or with `text`"
    )


def _string(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = raw[key]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: `{key}` is {shown(value)}; it is text, not empty")
    return value


def _choices(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) and v.strip() for v in values):
        raise DataError(f"{where}: the choices are {shown(values)}; they are a list of two or more texts, none empty")
    return values


def _index(value: Any, choices: list[str], where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise DataError(f"{where}: the answer is {shown(value)}; it is the number of a choice, 0 to {len(choices) - 1}")
    return value


def _joined(prompt: str, choices: list[str], joiner: str | None = None) -> tuple[str, ...]:
    if joiner is None:
        joiner = "" if prompt[-1:].isspace() else " "
        return tuple(choice if choice[:1].isspace() else joiner + choice for choice in choices)
    return tuple(joiner + choice for choice in choices)


def _joiner(raw: Mapping[str, Any], where: str) -> str | None:
    value = raw.get("joiner")
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: `joiner` is {shown(value)}; it is the text between prompt and answer")
    return value


def _read_choice(raw: Mapping[str, Any], where: str) -> Question:
    prompt, choices = _string(raw, "prompt", where), _choices(raw["choices"], where)
    joined = _joined(prompt, choices, _joiner(raw, where))
    return Question(prompt=prompt, choices=joined, answer=_index(raw["answer"], choices, where))


def _read_written(raw: Mapping[str, Any], where: str) -> Question:
    prompt = _string(raw, "prompt", where) + (_joiner(raw, where) or "")
    return Question(prompt=prompt, choices=(), answer=_string(raw, "answer", where))


def _read_last_word(raw: Mapping[str, Any], where: str) -> Question:
    before, space, word = _string(raw, "text", where).rstrip().rpartition(" ")
    if not before.strip():
        raise DataError(f"{where}: `text` is one word; the last of several is asked for")
    return Question(prompt=before, choices=(space + word,), answer=0)


def _read_arc(raw: Mapping[str, Any], where: str) -> Question:
    prompt, choices = f"{_string(raw, 'query', where)}\nAnswer:", _choices(raw["choices"], where)
    return Question(prompt=prompt, choices=_joined(prompt, choices), answer=_index(raw["gold"], choices, where))


def _read_hellaswag(raw: Mapping[str, Any], where: str) -> Question:
    prompt, choices = _string(raw, "ctx", where), _choices(raw["endings"], where)
    return Question(prompt=prompt, choices=_joined(prompt, choices), answer=_index(raw["label"], choices, where))


def _read_jcommonsenseqa(raw: Mapping[str, Any], where: str) -> Question:
    numbers = sorted(int(key[6:]) for key in raw if re.fullmatch(r"choice\d+", key))
    if numbers != list(range(len(numbers))):
        raise DataError(f"{where}: choices are numbered {numbers}; they are choice0, choice1, ...")
    choices = _choices([raw[f"choice{n}"] for n in numbers], where)
    prompt = f"質問：{_string(raw, 'question', where)}\n回答："
    return Question(prompt=prompt, choices=tuple(choices), answer=_index(raw["label"], choices, where))


def _read_mmlu(raw: Mapping[str, Any], where: str) -> Question:
    choices = _choices(raw["choices"], where)
    letters = "ABCDEFGHIJ"[: len(choices)]
    if not isinstance(raw["answer"], str) or len(raw["answer"]) != 1 or raw["answer"] not in letters:
        raise DataError(f"{where}: `answer` is {shown(raw['answer'])}; it is one letter, {letters[0]} to {letters[-1]}")
    prompt = f"Question: {_string(raw, 'question', where)}\nAnswer:"
    stripped = [choice.strip() for choice in choices]
    return Question(prompt=prompt, choices=_joined(prompt, stripped), answer=letters.index(raw["answer"]))


def _read_gsm8k(raw: Mapping[str, Any], where: str) -> Question:
    answer = _string(raw, "answer", where)
    if number_in(answer) is None:
        raise DataError(f"{where}: `answer` has no number behind `####`")
    prompt = f"Question: {_string(raw, 'question', where)}\nAnswer:"
    return Question(prompt=prompt, choices=(), answer=answer.rpartition("####")[2].strip())


def _sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


_JOINER = frozenset({"joiner"})
_FORMS = (
    _Form(frozenset({"prompt", "choices", "answer"}), "choice", _read_choice, _JOINER),
    _Form(frozenset({"prompt", "answer"}), "generate", _read_written, _JOINER),
    _Form(frozenset({"text"}), "last_word", _read_last_word),
    _Form(frozenset({"query", "choices", "gold"}), "choice", _read_arc),
    _Form(frozenset({"ctx", "endings", "label"}), "choice", _read_hellaswag),
    _Form(frozenset({"question", "label"}), "choice", _read_jcommonsenseqa, fits=lambda raw: "choice0" in raw),
    _Form(frozenset({"question", "choices", "answer"}), "choice", _read_mmlu),
    _Form(
        frozenset({"question", "answer"}),
        "generate",
        _read_gsm8k,
        number=True,
        fits=lambda raw: isinstance(raw["answer"], str) and "####" in raw["answer"],
    ),
)
