"""Tasks of `halve optimize`: both models answer the same questions, on the kernels and in the formats of serving."""

from collections.abc import Sequence
from pathlib import Path

from halve.api.certify import served_device
from halve.api.model import Model, load
from halve.api.progress import Progress
from halve.core.certificate import TaskResult
from halve.core.errors import ConfigError, QualityError
from halve.engine import SamplingParams
from halve.evaluate.answering import answers_by_likelihood, answers_written, require_questions, result_of
from halve.evaluate.scorer import DecoderScorer
from halve.evaluate.tasks import Task, read_task


def read_tasks(quality: Sequence[str], margin: float | None) -> tuple[Task, ...]:
    """The files of `tasks=FILE`. Raises ConfigError for another word, DataError for a file or too few questions."""
    tasks = []
    for word in quality:
        kind, _, path = word.partition("=")
        if kind != "tasks" or not path:
            raise ConfigError(f"quality: {word!r:.80} is not known; give ppl, kl or tasks=FILE")
        tasks.append(read_task(path))
        require_questions(tasks[-1], margin)
    if margin is not None and not tasks:
        raise ConfigError("task_margin: there are no tasks; name them by --quality tasks=FILE")
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise ConfigError(f"quality: two tasks are called {max(names, key=names.count)!r}; rename a file")
    return tuple(tasks)


def judge_tasks(
    original: Path, smaller: Path, tasks: Sequence[Task], margin: float | None, device: str, progress: Progress
) -> tuple[TaskResult, ...]:
    """Put the questions to both. Raises QualityError where accuracy may fall by more than the margin."""
    if not tasks:
        return ()
    answers: list[list[list[bool]]] = []
    for what, path in (("original", original), ("smaller", smaller)):
        model = load(path, device=served_device(device), keep=False)
        answers.append([_answers(model, task, what, progress) for task in tasks])
        model.close()
    results = tuple(
        result_of(task, before, after, margin=margin) for task, before, after in zip(tasks, *answers, strict=True)
    )
    for result in results:
        if result.non_inferior is False:
            raise QualityError(
                f"{result.name}: accuracy {result.accuracy.value:.1%} against {result.original_accuracy.value:.1%}; at "
                f"95 % it may have fallen by {-result.lower_bound:.1%}, more than the margin of {result.margin:.1%} "
                f"({result.num_items} questions; {result.num_needed} would show that nothing is lost). Take a stricter "
                "--max-quality-loss, a finer --format, or more questions"
            )
    return results


def _answers(model: Model, task: Task, what: str, progress: Progress) -> list[bool]:
    if task.kind == "generate":

        def write(prompts: Sequence[Sequence[int]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
            sampling = SamplingParams(max_tokens=max_tokens, stop=stop)
            return [answer.text for answer in model.generate_all([list(p) for p in prompts], sampling)]

        return answers_written(task, write, model.tokenizer, model.config.context)
    scorer = DecoderScorer(model.decoder)  # whole texts at once: questions are many, and short
    with progress.task(f"Asking the {what} {task.name}", "answers") as advance:
        return answers_by_likelihood(task, scorer, model.tokenizer, model.config.context, advance)
