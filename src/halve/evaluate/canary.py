"""What greedy answers tell that the likelihood of a text does not: the canary of a certificate.

Likelihoods are measured with the text given. An answer is fed its own tokens, through decoding, the cache and guesses,
and a fault there shows in nothing else. So either a task that the original answers better than by guessing is answered
better than by guessing by the smaller model too; or the answers of both are held against each other: they part where
first choices differ, so that they may not part much more often than first choices do on the sealed text.
"""

from collections.abc import Sequence

import numpy as np

from halve.core.certificate import Canary, Measured, TaskResult
from halve.core.errors import QualityError
from halve.evaluate.answering import ABOVE_CHANCE, beats_chance
from halve.evaluate.bootstrap import intervals, upper_quantile
from halve.evaluate.paired import above_chance_p

# Answers part at the rate of flips where they are as hard to foresee as the text. Measured on bundles of tiny-en and
# stories260k in 2 to 8 bits: at 0.4 to 1.4 times that rate.
FACTOR = 3.0
LEVEL = 0.001


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two answers share at their beginning."""
    both = min(len(one), len(other))
    return next((i for i in range(both) if one[i] != other[i]), both)


def canary(
    parted: Sequence[int],
    max_tokens: int,
    flip_rate: Measured,
    tasks: Sequence[TaskResult] = (),
    *,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Canary:
    """The record of answers of max_tokens that part after so many tokens, and of tasks where there are any.

    Raises QualityError where answers part far more often than first choices differ on the text, or where the smaller
    model answers a task no better than by guessing that the original answers better.
    """
    if not parted:
        raise QualityError("canary: no prompts; the sealed text has no document of two tokens")
    positions = np.array(parted, np.int64)
    events, tried = int((positions < max_tokens).sum()), int(np.minimum(positions + 1, max_tokens).sum())
    most = min(1.0, FACTOR * flip_rate.high)
    if most < 1 and above_chance_p(events, tried, most) < LEVEL:
        raise QualityError(
            f"canary: {events} of {len(positions)} greedy answers part from the original's, in {tried} tokens, where "
            f"first choices on the text differ at a rate of {flip_rate.value:.3g}; text is predicted well and answers "
            "are not, so decoding is broken here: please report it, with `halve doctor --json`"
        )
    telling = next((task for task in tasks if beats_chance(task)), None)
    if telling is not None and _guesses(telling):
        raise QualityError(
            f"canary: {telling.name}: the original answers {telling.original_accuracy.value:.1%}, the smaller model "
            f"{telling.accuracy.value:.1%} of {telling.num_items} questions, no better than a guess; take a stricter "
            "--max-quality-loss or a finer --format"
        )
    median = {"divergence": upper_quantile(positions, np.arange(len(positions)), tail_percent=50)}
    figures: dict[str, Measured] = {}
    if len(positions) > 1:
        figures = intervals(median, len(positions), confidence=0.95, num_resamples=num_resamples, seed=seed)
    return Canary(
        kind="divergence" if telling is None else "task",
        task=None if telling is None else telling.name,
        num_prompts=len(positions),
        max_tokens=max_tokens,
        divergence=figures.get("divergence"),
        p10=float(np.quantile(positions, 0.1)),
        p90=float(np.quantile(positions, 0.9)),
        same=float((positions >= max_tokens).mean()),
    )


def canary_words(found: Canary) -> str:
    """The record in a sentence."""
    parts = "" if found.divergence is None else f"; the median answer parts behind {found.divergence.value:.0f} tokens"
    told = (
        f"{found.same or 0:.0%} of {found.num_prompts} greedy answers of {found.max_tokens} tokens are the original's"
    )
    task = "" if found.task is None else f" (task {found.task} is answered better than by guessing, as by the original)"
    return f"Canary: {told}{parts}{task}."


def _guesses(task: TaskResult) -> bool:
    """Whether the smaller model is not shown to do better than a guess, as the original was."""
    if task.chance is None:
        return task.accuracy.value == 0
    right = round(task.accuracy.value * task.num_items)
    return above_chance_p(right, task.num_items, task.chance) >= ABOVE_CHANCE
