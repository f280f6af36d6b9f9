"""Both models answer the questions of a task; the counts become one record of a certificate.

A continuation's log-likelihood is the sum over its tokens of log p(token | everything before), as any evaluator of
language models computes it: prompt and continuation are encoded as one text, and what differs from the prompt's own
encoding counts to the continuation. A prompt that is too long for the context loses its beginning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from halve.core.certificate import TaskResult
from halve.core.errors import DataError, QualityError
from halve.evaluate.fidelity import Array, LogitSource
from halve.evaluate.paired import (
    Pairs,
    above_chance_p,
    interval,
    items_needed,
    least_items,
    lower_bound,
    mcnemar_p,
    wilson,
)
from halve.evaluate.tasks import MAX_ANSWER_TOKENS, STOPS, Kind, Question, Task

ABOVE_CHANCE = 0.001  # p-value below which a model is said to beat a guess


class Encoder(Protocol):
    """What this room asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids, with the tokens that the model's own tokenizer puts in front."""


class Writer(Protocol):
    """A model that continues prompts greedily, as it is served."""

    def __call__(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """The text of each answer, without the stop string that ended it."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A continuation as tokens: ids int32 [T], of which those from `start` on are the continuation's."""

    ids: Array
    start: int


def encoded(question: Question, choice: str, encoder: Encoder, context: int) -> Asked:
    """Prompt and choice as one text, cut at the front to the context. Raises DataError for a choice beyond it."""
    alone, whole = encoder.encode(question.prompt), encoder.encode(question.prompt + choice)
    both = min(len(alone), len(whole))
    shared = next((i for i in range(both) if alone[i] != whole[i]), both)
    start = max(shared, 1)
    if start >= len(whole):
        raise DataError(f"question {question.prompt[-60:]!r}: {choice!r} adds no token behind the prompt")
    cut = max(len(whole) - context, 0)
    if start - cut < 1:
        raise DataError(
            f"question {question.prompt[-60:]!r}: a choice of {len(whole) - start} tokens leaves no room for a prompt "
            f"in the context of {context}"
        )
    return Asked(np.array(whole[cut:], np.int32), start - cut)


def log_likelihoods(
    source: LogitSource, asked: Sequence[Asked], progress: Callable[[int, int], None] | None = None
) -> list[tuple[float, bool]]:
    """For each continuation its log-likelihood in nats, and whether greedy decoding would write it."""
    if expect := getattr(source, "expect", None):
        expect([one.ids for one in asked])
    found = []
    for done, one in enumerate(asked):
        total, greedy, row = 0.0, True, 0
        for chunk in source.logits(one.ids):
            first = max(one.start - 1, row)  # the row before a token predicts it
            last = min(len(one.ids) - 1, row + len(chunk))
            if first < last:
                part = chunk[first - row : last - row].astype(np.float64)
                if not np.isfinite(part).all():
                    raise QualityError("logits hold NaN or infinity; the model's weights or its format are broken")
                targets = one.ids[first + 1 : last + 1]
                greedy &= bool((part.argmax(axis=1) == targets).all())
                part -= part.max(axis=1, keepdims=True)
                rows = np.arange(len(targets))
                total += float((part[rows, targets] - np.log(np.exp(part).sum(axis=1))).sum())
            row += len(chunk)
        found.append((total, greedy))
        if progress:
            progress(done + 1, len(asked))
    return found


def answers_by_likelihood(
    task: Task,
    source: LogitSource,
    encoder: Encoder,
    context: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[bool]:
    """Whether each question is answered: the likeliest choice a byte is the right one, or the last word is greedy."""
    asked = [encoded(q, choice, encoder, context) for q in task.questions for choice in q.choices]
    scores = iter(log_likelihoods(source, asked, progress))
    right = []
    for question in task.questions:
        of_choices = [next(scores) for _ in question.choices]
        if task.kind == "last_word":
            right.append(of_choices[0][1])
            continue
        per_byte = [
            total / len(choice.encode()) for (total, _), choice in zip(of_choices, question.choices, strict=True)
        ]
        chosen = question.choices[per_byte.index(max(per_byte))]
        right.append(chosen == question.choices[int(question.answer)])
    return right


def answers_written(task: Task, write: Writer, encoder: Encoder, context: int) -> list[bool]:
    """Whether each question's written answer is right. Raises DataError for a prompt that leaves no room."""
    prompts = [encoder.encode(question.prompt) for question in task.questions]
    for question, ids in zip(task.questions, prompts, strict=True):
        if len(ids) >= context:
            raise DataError(
                f"question {question.prompt[:60]!r}: {len(ids)} tokens leave no room for an answer in the context of "
                f"{context}; leave it out"
            )
    written = write(prompts, MAX_ANSWER_TOKENS, STOPS)
    return [task.is_right(question, text) for question, text in zip(task.questions, written, strict=True)]


def require_questions(task: Task, margin: float | None) -> None:
    """Raise DataError when no outcome of so few questions could show the margin, naming how many are needed."""
    if margin is None:
        return
    least = least_items(margin)
    if len(task.questions) < least:
        raise DataError(
            f"{task.name}: {len(task.questions)} questions can't show a loss of at most {margin:.3g} in accuracy; even "
            f"with no answer changed {least} are needed, and {items_needed(margin, 0.04)} where 4 % change. Give more "
            "questions, or allow a wider margin"
        )


def result_of(
    task: Task, original: Sequence[bool], smaller: Sequence[bool], *, margin: float | None, confidence: float = 0.95
) -> TaskResult:
    """The record of both models' answers to a task."""
    return counted(task, Pairs.of(original, smaller), margin=margin, confidence=confidence)


class Asking(Protocol):
    """What a result takes over from its task."""

    @property
    def name(self) -> str:
        """Of the file."""

    @property
    def kind(self) -> Kind:
        """What is asked."""

    @property
    def sha256(self) -> str:
        """Of the questions."""

    @property
    def chance(self) -> float | None:
        """Accuracy of a guess."""


def counted(task: Asking, pairs: Pairs, *, margin: float | None, confidence: float = 0.95) -> TaskResult:
    """The record of a task whose answers were counted."""
    right, n = pairs.both + pairs.harmed, pairs.n
    bound = lower_bound(pairs)
    changed = (pairs.harmed + pairs.fixed) / n
    return TaskResult(
        name=task.name,
        kind=task.kind,
        sha256=task.sha256,
        num_items=n,
        original_accuracy=wilson(right, n, confidence),
        accuracy=wilson(pairs.both + pairs.fixed, n, confidence),
        difference=interval(pairs, confidence),
        harmed=pairs.harmed,
        fixed=pairs.fixed,
        mcnemar_p=mcnemar_p(pairs),
        lower_bound=bound,
        margin=margin,
        non_inferior=None if margin is None else bound > -margin,
        num_needed=None if margin is None else items_needed(margin, changed),
        chance=task.chance,
        above_chance_p=None if task.chance is None else above_chance_p(right, n, task.chance),
    )


def beats_chance(result: TaskResult) -> bool:
    """Whether the original does better than guessing, so that a broken smaller model would be seen.

    What can't be guessed is beaten by any right answer.
    """
    if result.above_chance_p is None:
        return result.original_accuracy.value > 0
    return result.above_chance_p < ABOVE_CHANCE
