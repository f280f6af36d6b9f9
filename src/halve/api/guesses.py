"""Whether guesses of next tokens pay for a workload: how many are right is measured, what steps then take simulated.

The plan that passed answers prompts of the selection text one after the other, and n-gram guesses are counted. A draft,
the same model in fewer bits, is not made: the simulation says what it would save if all of its guesses were right.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halve.api.bundle import PLAN_FILE
from halve.api.model import load
from halve.api.plans import Plans, replayed, times_of
from halve.api.progress import Progress
from halve.api.serving import WORTHWHILE, engine_for, is_worthwhile
from halve.api.workspace import write_atomic
from halve.core.plan import Speculation
from halve.engine import SamplingParams, Simulation
from halve.engine.scheduler import Step
from halve.formats import FORMATS
from halve.kernels.ops import Array
from halve.models.names import experts_of, groups
from halve.search import Candidate, Move
from halve.search.device_table import PlannedTimes, StepShape

log = logging.getLogger("halve")

NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 256, 48
DRAFT_FORMAT, DRAFT_LENGTHS = "int3-g64", (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Guesses that were made and found right while so many steps decoded one answer at a time."""

    steps: int
    made: int
    right: int

    @property
    def length(self) -> int:
        """Guesses of a step, as a simulation takes them."""
        return max(1, round(self.made / max(1, self.steps)))

    @property
    def rate(self) -> float:
        """Of each guess whose forerunners are right, so that a step of `length` keeps as many as were kept."""
        kept, low, high = self.right / max(1, self.steps), 0.0, 1.0
        for _ in range(40):
            rate = (low + high) / 2
            if sum(rate**i for i in range(1, self.length + 1)) < kept:
                low = rate
            else:
                high = rate
        return high


def judge_guesses(
    plans: Plans, candidate: Candidate, directory: Path, texts: list[Array], progress: Progress
) -> tuple[Move, ...]:
    """Choose what the plan in `directory` guesses, which is written into it; returns what was not chosen, and why.

    texts: selection text, whose beginnings are prompts. Nothing is guessed where steps are not timed.
    """
    table = plans.table
    if table is None:
        return ()
    times = times_of(table, candidate)
    config, engine = plans.question.config, engine_for(plans.serving)
    plain = plans.simulation(candidate)

    def simulated(seconds: Callable[[Step], float], length: int, rate: float) -> tuple[float, Simulation]:
        guessed: dict[str, Any] = {"num_drafts": length, "draft_rate": rate}
        return replayed(plans.purpose.workload, times, config, engine, seconds=seconds, **guessed)

    counted = _count(directory, texts, progress)
    ngram = simulated(times.of_step, counted.length, counted.rate)
    with_draft = _with_draft(plans, times)
    draft = max((simulated(with_draft, length, 1.0)[1] for length in DRAFT_LENGTHS), key=lambda one: one.output_tok_s)
    of_ngram = f"{counted.right} of {counted.made} guesses were right in {counted.steps} steps"
    moves = []
    if is_worthwhile(ngram[1], plain):
        log.info("n-gram guesses are made: %s", of_ngram)
        plan = replace(candidate.plan, speculation=Speculation(method="ngram"))
        write_atomic(directory / PLAN_FILE, plan.to_json())
        plans.foresee(candidate, ngram)
    else:
        moves.append(_move("ngram", plain, ngram[1], f"saves less than {WORTHWHILE:.0%}: {of_ngram}"))
    why = f"saves less than {WORTHWHILE:.0%} even if every guess is right"
    if is_worthwhile(draft, plain):
        why = "was not made: what is told is what it saves if every guess is right; try one by --speculate"
    moves.append(_move(f"draft in {DRAFT_FORMAT}", plain, draft, why))
    return tuple(moves)


def _move(what: str, plain: Simulation, found: Simulation, why: str) -> Move:
    cost = found.output_tokens * (1 / found.output_tok_s - 1 / plain.output_tok_s)
    return Move(part="speculation", chosen="none", rejected=what, cost=cost, loss=0.0, why=why)


def _count(directory: Path, texts: list[Array], progress: Progress) -> Counted:
    """Answer beginnings of texts alone, where guesses are made most freely."""
    model = load(directory, device="cpu", keep=False, speculation="ngram")
    try:
        sampling = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        most = min(PROMPT_TOKENS, model.config.context - ANSWER_TOKENS)
        prompts = [text[: min(most, len(text))].tolist() for text in texts[:NUM_PROMPTS] if len(text) and most > 0]
        with progress.task("Counting guesses", "answers") as advance:
            for done, prompt in enumerate(prompts):
                model.generate_all([prompt], sampling)
                advance(done + 1, len(prompts))
        found = model.engine.metrics()
    finally:
        model.close()
    right = found.num_accepted_tokens
    return Counted(steps=max(1, found.num_sampled_tokens - right), made=found.num_draft_tokens, right=right)


def _with_draft(plans: Plans, times: PlannedTimes) -> Callable[[Step], float]:
    """Step times of a plan whose guesses come from the same model in fewer bits, one step of it for each guess."""
    fmt = FORMATS[DRAFT_FORMAT]
    fits = {g.name: all(fmt.refusal(m.shape[1]) is None for m in g.members) for g in groups(plans.question.config)}
    formats = {name: DRAFT_FORMAT if fits[experts_of(name)[0]] else own for name, own in times.formats.items()}
    smaller = replace(times, formats=formats)

    def of_step(step: Step) -> float:
        drafting = [chunk for chunk in step.chunks if chunk.draft]
        total = times.of_step(step)
        for i in range(max((len(chunk.draft) for chunk in drafting), default=0)):
            pairs = [chunk.start + i + 1.0 for chunk in drafting if len(chunk.draft) > i]
            total += smaller.model_s(StepShape(len(pairs), sum(pairs), 0, 0.0, len(pairs)))
        return total

    return of_step
