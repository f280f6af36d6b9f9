"""The certificate: quality and cost of a plan against the original, and how to measure both again.

Outsiders rely on these names: they may be added to, never renamed. A quantity that was not measured is null.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["pass", "fail", "measured"]
Answer = Literal["holds", "inconclusive", "contradicted", "measured"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A measured value with its interval and the number of units behind it (documents, runs)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How far the smaller model's predictions are from the original's, on text that the search never saw.

    kl_mean, kl_p99: nats per token, original against smaller. flip_rate: share of tokens whose top-1 differs.
    ppl_ratio: perplexity of the smaller over the original; the quality loss is this minus 1.
    confidence: of every interval here (0.95, or less error when the sealed text may be opened several times).
    """

    kl_mean: Measured
    kl_p99: Measured
    flip_rate: Measured
    ppl_ratio: Measured
    tasks: Mapping[str, Measured] = field(default_factory=dict)
    confidence: float = 0.95
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Bytes of the weight files. ratio: bytes over float32_bytes (four bytes for every parameter)."""

    bytes: int
    original_bytes: int
    float32_bytes: int
    ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """basis "bytes": ranked by the bytes read for one token, no price known; dollars are then null, never 0."""

    basis: Literal["bytes"]
    usd_per_mtok: Measured | None
    original_usd_per_mtok: Measured | None
    ratio: float  # of the basis: bytes read per token, smaller over original


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Tokens per second on `inputs.device`, median with the lowest and highest run; null where not measured."""

    prefill_tok_s: Measured | None
    decode_tok_s: Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Everything the figures depend on. Hashes are SHA-256 in hex."""

    model_sha256: str
    calibration_sha256: str
    sealed_sha256: str
    device: str
    workload: str | None
    price: str | None
    versions: Mapping[str, str]
    command: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SealedText:
    """Where the sealed documents are: in the bundle (`halve/sealed.jsonl`), or only named by hash and path."""

    kept: bool
    source: str
    window_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One opening of the sealed text: what was judged, and how it went."""

    plan: str
    ppl_ratio: Measured
    kl_mean: Measured
    passed: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """verdict: `pass` or `fail` against max_quality_loss, `measured` when no limit was set."""

    verdict: Verdict
    max_quality_loss: float | None
    quality: Quality
    size: Size
    cost: Cost
    speed: Speed
    original_speed: Speed
    inputs: Inputs
    sealed: SealedText
    attempts: tuple[Attempt, ...]
    max_attempts: int
    weights_sha256: str  # of the bundle's weight files, so that a changed bundle is noticed
    version: int = 1
