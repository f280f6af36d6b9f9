"""What one run of `optimize` works on, and how its plans and their losses are said."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import expm1

from halve.api.plans import Purpose
from halve.api.progress import Progress
from halve.api.study import Question
from halve.api.texts import Texts
from halve.api.workspace import Workspace
from halve.checkpoint import Checkpoint
from halve.compress import Energies
from halve.core.certificate import Attempt, JudgedBy, Measured, Quality
from halve.core.plan import ExpertPlan
from halve.evaluate import documents_needed
from halve.formats import Format
from halve.models import ModelConfig
from halve.search import Candidate, Judged

MAX_ATTEMPTS = 3  # openings of the sealed text when formats are searched, each at a third of the error rate
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one run works on; made once, read everywhere below."""

    checkpoint: Checkpoint
    config: ModelConfig  # of the original, with its cache in fp32: the reference that quality is measured against
    source: Mapping[str, Format]
    named: Candidate | None  # when the format was named
    question: Question
    purpose: Purpose
    pick: int | None  # of the plans that a search finds, from 1; None for the cheapest within the limit
    time_s: float | None
    limit: float | None
    judged_by: JudgedBy
    device: str
    texts: Texts
    workspace: Workspace
    progress: Progress
    foretold_s: float  # a rough guess of the whole run
    shrunk: dict[ExpertPlan, Energies] = field(default_factory=dict)  # of the model that lies with other experts

    @property
    def searched(self) -> bool:
        """Whether plans are searched, so that the sealed text may be opened more than once."""
        return self.named is None and self.pick is None

    @property
    def confidence(self) -> float:
        """Of every interval: the error rate is shared out among the attempts (Bonferroni)."""
        return 1 - (1 - CONFIDENCE) / (MAX_ATTEMPTS if self.searched else 1)


def label(candidate: Candidate | Judged) -> str:
    """A candidate as people say it: `int4-g32 (clip)`."""
    return f"{candidate.format} ({candidate.method})"


def rounding_of(candidate: Candidate) -> str:
    """What a plan rounds beside the weights, for the log: `int8 activations and a bf16 cache`."""
    plan = candidate.plan
    return f"{plan.activations.format} activations and a {plan.kv_cache} cache"


def in_words(measured: Quality | Attempt | Judged) -> str:
    """Quality loss with its interval, and what KL makes of it: `0.41 % [0.28 %, 0.55 %], by KL 0.44 % [...]`."""

    def percent(value: Measured, loss: Callable[[float], float]) -> str:
        return f"{loss(value.value):.3%} [{loss(value.low):.3%}, {loss(value.high):.3%}]"

    return f"{percent(measured.ppl_ratio, lambda r: r - 1)}, by KL {percent(measured.kl_mean, expm1)}"


def nothing_passed(job: Job, dearest: Candidate, what: str, best: Attempt | Judged) -> str:
    """The error of a run in which no plan meets the limit: the best that was reached, and the ways out."""
    assert job.limit is not None, "only under a limit is there something to pass"
    more, needed = "give more text (--calibration)", documents_needed(best, job.limit, job.judged_by)
    if needed is not None and needed > best.ppl_ratio.n:
        more = f"give more text (--calibration): about {needed} documents, not {best.ppl_ratio.n}, to judge this one on"
    advice = f"allow more, {more}, or leave out --max-quality-loss to have it made and measured"
    if flags := _exact_flags(dearest):
        advice = f"round less ({flags}), {advice}"
    subject = "no plan meets" if job.searched else "this format does not meet"
    return (
        f"{subject} a quality loss of {job.limit:.3%}; best reached: {what} with {in_words(best)}. "
        f"Nothing written; {advice}"
    )


def _exact_flags(candidate: Candidate) -> str:
    """The flags that leave unrounded what the candidate rounds beside its weights; empty when it rounds nothing."""
    plan = candidate.plan
    rounded = {"--activations": plan.activations.format, "--kv-cache": str(plan.kv_cache)}
    return " ".join(f"{flag} fp32" for flag, chosen in rounded.items() if chosen != "fp32")
