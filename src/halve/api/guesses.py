"""Whether guesses of next tokens pay for a workload: how many are right is measured, what steps then take simulated.

The plan that passed answers prompts of the selection text one after the other, and guesses are counted: n-grams', and
those of a draft, the same model in fewer bits. A draft is only made where the simulation says that it would pay if all
of its guesses were right; one that then pays lies in the bundle.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from halve.api.bundle import DRAFT_FOLDER, PLAN_FILE
from halve.api.model import load
from halve.api.plans import Plans, replayed, times_of
from halve.api.progress import Progress
from halve.api.serving import WORTHWHILE, engine_for, is_worthwhile
from halve.api.workspace import write_atomic
from halve.compress import Choice, apply_plan, grouped_plan
from halve.core.plan import Speculation
from halve.engine import SamplingParams, Simulation
from halve.engine.scheduler import Step
from halve.formats import FORMATS
from halve.kernels.ops import Array
from halve.models.names import Module, experts_of, groups
from halve.search import Candidate, Move
from halve.search.device_table import PlannedTimes, StepShape
from halve.search.sensitivity import parts_of

log = logging.getLogger("halve")

NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 256, 48
DRAFT_FORMAT, DRAFT_LENGTHS = "int3-g64", (1, 2, 4)
NGRAM = Speculation(method="ngram")

Answers = list[tuple[list[int], Sequence[int]]]  # token ids of prompts, and of what the plan says then


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Guesses that were made and found right while so many steps decoded one answer at a time."""

    steps: int
    made: int
    right: int

    @property
    def said(self) -> str:
        """In words."""
        return f"{self.right} of {self.made} guesses were right in {self.steps} steps"

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


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A way to guess: what comes of the workload, at which pace, and in words how often it was right."""

    name: str
    speculation: Speculation
    found: tuple[float, Simulation]
    said: str


@dataclass(frozen=True, kw_only=True)
class _Foretold:
    """What comes of the workload with a plan, by simulation: plain, and with guesses."""

    plans: Plans
    candidate: Candidate
    times: PlannedTimes

    @property
    def plain(self) -> Simulation:
        """Without guesses."""
        return self.plans.simulation(self.candidate)

    def with_ngrams(self, counted: Counted) -> tuple[float, Simulation]:
        """With as many right n-gram guesses a step as were counted."""
        return self._replayed(self.times.of_step, counted.length, counted.rate)

    def with_draft(self, rate: float) -> tuple[float, Simulation]:
        """With a draft whose guesses are right at this rate, at the best number of guesses a step."""
        seconds = _with_draft(self.plans, self.times)
        found = (self._replayed(seconds, length, rate) for length in DRAFT_LENGTHS)
        return max(found, key=lambda one: one[1].output_tok_s)

    def _replayed(self, seconds: Callable[[Step], float], length: int, rate: float) -> tuple[float, Simulation]:
        return replayed(
            self.plans.purpose.workload,
            self.times,
            self.plans.question.config,
            engine_for(self.plans.serving),
            seconds=seconds,
            num_drafts=length,
            draft_rate=rate,
        )


def judge_guesses(
    plans: Plans, candidate: Candidate, directory: Path, texts: list[Array], progress: Progress
) -> tuple[Move, ...]:
    """Choose what the plan in `directory` guesses, which is written into it; returns what was not chosen, and why.

    texts: selection text, whose beginnings are prompts. A draft model that is chosen lies in the directory. Nothing is
    guessed where steps are not timed.
    """
    if plans.table is None:
        return ()
    foretold = _Foretold(plans=plans, candidate=candidate, times=times_of(plans.table, candidate))
    counted, answers = _count(directory, texts, progress)
    ways = [_Way(name="ngram", speculation=NGRAM, found=foretold.with_ngrams(counted), said=counted.said)]
    drafted = _try_draft(foretold, directory, answers, progress)
    ways += [drafted] if isinstance(drafted, _Way) else []
    moves = [drafted] if isinstance(drafted, Move) else []
    plain = foretold.plain
    best = max(ways, key=lambda way: way.found[1].output_tok_s)
    chosen = best if is_worthwhile(best.found[1], plain) else None
    if chosen is not None:
        log.info("guesses are made by %s: %s", chosen.name, chosen.said)
        plan = replace(candidate.plan, speculation=chosen.speculation)
        write_atomic(directory / PLAN_FILE, plan.to_json())
        plans.foresee(candidate, chosen.found)
    if chosen is None or chosen.speculation.method != "draft":
        shutil.rmtree(directory / DRAFT_FOLDER, ignore_errors=True)
    for way in ways:
        if way is not chosen:
            pays = is_worthwhile(way.found[1], plain)
            why = "saves less than what was taken" if pays else f"saves less than {WORTHWHILE:.0%}"
            moves.append(_move(way.name, plain, way.found[1], f"{why}: {way.said}"))
    return tuple(moves)


def _try_draft(foretold: _Foretold, directory: Path, answers: Answers, progress: Progress) -> _Way | Move:
    """A draft, made and counted; or why none was made."""
    draft, name = directory / DRAFT_FOLDER, f"draft in {DRAFT_FORMAT}"
    shutil.rmtree(draft, ignore_errors=True)
    plain, bound = foretold.plain, foretold.with_draft(1.0)[1]
    if not is_worthwhile(bound, plain):
        return _move(name, plain, bound, f"saves less than {WORTHWHILE:.0%} even if every guess is right")
    if foretold.candidate.plan.experts.changes:
        return _move(name, plain, bound, "was not made of other experts; told is what perfect guesses save")
    _make_draft(foretold.plans, foretold.candidate, draft, progress)
    counted = _agreeing(draft, answers, progress)
    speculation = Speculation(method="draft", path=DRAFT_FOLDER)
    return _Way(name=name, speculation=speculation, found=foretold.with_draft(counted.rate), said=counted.said)


def _move(what: str, plain: Simulation, found: Simulation, why: str) -> Move:
    cost = found.output_tokens * (1 / found.output_tok_s - 1 / plain.output_tok_s)
    return Move(part="speculation", chosen="none", rejected=what, cost=cost, loss=0.0, why=why)


def _make_draft(plans: Plans, candidate: Candidate, directory: Path, progress: Progress) -> None:
    """Write the original in few bits, rounded and cached as the plan is; formats that fit no group become int8."""
    question = plans.question
    choices = {
        part.name: Choice(format=DRAFT_FORMAT if _fits(part.modules) else "int8", method="clip")
        for part in parts_of(question.config)
    }
    activations, kv_cache = candidate.plan.activations.format, candidate.plan.kv_cache
    plan = grouped_plan(question.config, choices, portable=False, activations=activations, kv_cache=kv_cache)
    with progress.task(f"Writing a draft in {DRAFT_FORMAT}", "matrices") as advance:
        energies = plans.studied.statistics.energies
        apply_plan(question.checkpoint, question.config, plan, directory, energies=energies, progress=advance)


def _fits(modules: Sequence[Module]) -> bool:
    return all(FORMATS[DRAFT_FORMAT].refusal(module.shape[1]) is None for module in modules)


def _count(directory: Path, texts: list[Array], progress: Progress) -> tuple[Counted, Answers]:
    """Answer beginnings of texts alone, where n-gram guesses are made most freely."""
    model = load(directory, device="cpu", keep=False, speculation="ngram")
    try:
        sampling = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        most = min(PROMPT_TOKENS, model.config.context - ANSWER_TOKENS)
        prompts = [text[: min(most, len(text))].tolist() for text in texts[:NUM_PROMPTS] if len(text) and most > 0]
        answers: Answers = []
        with progress.task("Counting guesses", "answers") as advance:
            for done, prompt in enumerate(prompts):
                answers += [(prompt, one.token_ids) for one in model.generate_all([prompt], sampling)]
                advance(done + 1, len(prompts))
        found = model.engine.metrics()
    finally:
        model.close()
    right = found.num_accepted_tokens
    return Counted(steps=max(1, found.num_sampled_tokens - right), made=found.num_draft_tokens, right=right), answers


def _agreeing(draft: Path, answers: Answers, progress: Progress) -> Counted:
    """Tokens of answers that a draft would have guessed, behind the right ones before them; one guess a token."""
    model = load(draft, device="cpu", keep=False)
    made = right = 0
    try:
        with progress.task("Counting a draft's guesses", "answers") as advance:
            for done, (prompt, answer) in enumerate(answers):
                logits = model.logits([*prompt, *answer])[len(prompt) - 1 : -1]
                made, right = made + len(answer), right + int((logits.argmax(axis=1) == np.array(answer)).sum())
                advance(done + 1, len(answers))
    finally:
        model.close()
    return Counted(steps=max(1, made), made=made, right=right)


def _with_draft(plans: Plans, times: PlannedTimes) -> Callable[[Step], float]:
    """Step times of a plan whose guesses come from the same model in fewer bits: one step of it for each guess, and
    its own reading of prompts.
    """
    fits = {group.name: _fits(group.members) for group in groups(plans.question.config)}
    formats = {name: DRAFT_FORMAT if fits[experts_of(name)[0]] else own for name, own in times.formats.items()}
    smaller = replace(times, formats=formats)

    def of_step(step: Step) -> float:
        drafting = [chunk for chunk in step.chunks if chunk.draft]
        total = times.of_step(step)
        shape = StepShape.of(step)
        if shape.prompts:
            total += smaller.model_s(StepShape(0, 0.0, shape.prompts, shape.prompt_pairs, 0))
        for i in range(max((len(chunk.draft) for chunk in drafting), default=0)):
            pairs = [chunk.start + i + 1.0 for chunk in drafting if len(chunk.draft) > i]
            total += smaller.model_s(StepShape(len(pairs), sum(pairs), 0, 0.0, len(pairs)))
        return total

    return of_step
