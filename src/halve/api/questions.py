"""Tasks of `halve optimize`: both models answer the same questions, on the kernels and in the formats of serving."""

from collections.abc import Sequence
from pathlib import Path

from halve.api.bundle import TASKS_FOLDER
from halve.api.certify import served_device
from halve.api.model import Model, load
from halve.api.progress import Progress
from halve.api.workspace import write_atomic
from halve.core.certificate import TaskResult
from halve.core.errors import CheckpointError, ConfigError, QualityError
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
    results = ask(original, smaller, [(task, margin) for task in tasks], device, progress)
    for result in results:
        if result.non_inferior is False:
            raise QualityError(
                f"{result.name}: accuracy {result.accuracy.value:.1%} against {result.original_accuracy.value:.1%}; at "
                f"95 % it may have fallen by {-result.lower_bound:.1%}, more than the margin of {result.margin:.1%} "
                f"({result.num_items} questions; {result.num_needed} would show that nothing is lost). Take a stricter "
                "--max-quality-loss, a finer --format, or more questions"
            )
    return results


def ask(
    original: Path, smaller: Path, tasks: Sequence[tuple[Task, float | None]], device: str, progress: Progress
) -> tuple[TaskResult, ...]:
    """Put the questions to both models, whatever comes out. tasks: each with its margin."""
    if not tasks:
        return ()
    answers: list[list[list[bool]]] = []
    for what, path in (("original", original), ("smaller", smaller)):
        model = load(path, device=served_device(device), keep=False)
        answers.append([_answers(model, task, what, progress) for task, _ in tasks])
        model.close()
    return tuple(
        result_of(task, before, after, margin=margin)
        for (task, margin), before, after in zip(tasks, *answers, strict=True)
    )


def keep_tasks(directory: Path, tasks: Sequence[Task]) -> None:
    """Write the questions into a bundle, line by line as they were read, so that anyone can ask them again."""
    folder = directory / TASKS_FOLDER
    if tasks:
        folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        write_atomic(folder / f"{task.name}.jsonl", "\n".join(task.lines) + "\n")


def tasks_again(bundle: Path, recorded: Sequence[TaskResult], given: Sequence[str | Path]) -> list[Task]:
    """The questions behind recorded results: of the bundle, or of files given instead.

    Raises CheckpointError where there are none, or others than those that were asked.
    """
    files = {task.name: task for task in map(read_task, given)}
    if unknown := sorted(files.keys() - {result.name for result in recorded}):
        raise ConfigError(f"tasks: {unknown[0]!r} was not asked; recorded are {[r.name for r in recorded]}")
    found = []
    for result in recorded:
        path = bundle / TASKS_FOLDER / f"{result.name}.jsonl"
        if result.name not in files and not path.exists():
            raise CheckpointError(
                f"{bundle}: the questions of task {result.name!r} are not in the bundle; give their file by "
                f"--tasks {result.name}.jsonl"
            )
        task = files.get(result.name) or read_task(path)
        if task.sha256 != result.sha256:
            raise CheckpointError(
                f"task {result.name!r}: these are not the questions that were asked (their hash differs); give the "
                f"original file by --tasks {result.name}.jsonl"
            )
        found.append(task)
    return found


def _answers(model: Model, task: Task, what: str, progress: Progress) -> list[bool]:
    if task.kind == "generate":

        def write(prompts: Sequence[Sequence[int]], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
            sampling = SamplingParams(max_tokens=max_tokens, stop=stop)
            return [answer.text for answer in model.generate_all([list(p) for p in prompts], sampling)]

        return answers_written(task, write, model.tokenizer, model.config.context)
    scorer = DecoderScorer(model.decoder)  # whole texts at once: questions are many, and short
    with progress.task(f"Asking the {what} {task.name}", "answers") as advance:
        return answers_by_likelihood(task, scorer, model.tokenizer, model.config.context, advance)
