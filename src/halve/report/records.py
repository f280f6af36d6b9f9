"""What a report is made of. Strings may hold anything (model output, file names); the page escapes them."""

from dataclasses import dataclass

from halve.core.certificate import Certificate, Measured
from halve.core.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSize:
    """Bytes of one group of modules, such as "attention q/k/v", in the original and in the smaller model."""

    pattern: str
    parameters: int
    format_before: str
    bytes_before: int
    format_after: str
    bytes_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """Relative output error of one module: ||X (W - W')^T|| / ||X W^T||, estimated from its input energies.

    layer: None for modules outside the layers, such as `lm_head`. group: as in `GroupSize.pattern`.
    """

    name: str
    layer: int | None
    group: str
    format: str
    method: str
    relative_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One plan that the search looked at, judged on the selection split.

    bytes_per_token: bytes of weights read for one token. ppl_ratio: None when it was skipped; `outcome` says why.
    """

    format: str
    method: str
    bytes_per_token: int
    ppl_ratio: Measured | None
    outcome: str
    chosen: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt and how both models continue it."""

    prompt: str
    original: str
    smaller: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPage:
    """Everything on the page, in the order in which it is read. created: a date as it should be shown."""

    title: str
    model_name: str
    certificate: Certificate
    plan: Plan
    architecture: str
    licence: str | None
    groups: tuple[GroupSize, ...]
    layers: tuple[LayerError, ...]
    candidates: tuple[Candidate, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    created: str
