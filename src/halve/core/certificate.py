"""The certificate: quality and cost of a plan against the original, and how to measure both again.

Outsiders rely on these names: they may be added to, never renamed. A quantity that was not measured is null.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["pass", "fail", "measured"]
JudgedBy = Literal["both", "ppl", "kl"]
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
class Draft:
    """The smaller model inside a bundle that guesses tokens: bytes of its weight files, in addition, and their hash."""

    bytes: int
    weights_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """basis "bytes": ranked by the bytes read for one token, no price known; dollars are then null, never 0."""

    basis: Literal["bytes"]
    usd_per_mtok: Measured | None
    original_usd_per_mtok: Measured | None
    ratio: float  # of the basis: bytes read per token, smaller over original


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadReplay:
    """A workload run for real by the bundle and by the original, in the same engine, in turns.

    num_requests: of the workload, its first ones. output_tok_s: tokens of answers a second, prompts included, from the
    first request to the last answer, at the pace that `WorkloadCost` found for each model; median, lowest and highest
    round. ratio: of seconds, smaller over original, within a round. Times are in seconds, percentiles over requests,
    medians over rounds; within_level: the share of requests that kept the service level. usd_per_mtok: of a million
    tokens of answers; null without a price.
    """

    num_requests: int
    num_rounds: int
    output_tok_s: Measured
    original_output_tok_s: Measured
    ratio: Measured
    ttft_p50_s: float
    ttft_p99_s: float
    time_per_token_p50_s: float
    time_per_token_p99_s: float
    within_level: float
    level_met: bool
    usd_per_mtok: Measured | None
    original_usd_per_mtok: Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadCost:
    """What a workload takes by the engine's own scheduler, over step times that were measured in parts on this device.

    basis "simulated": no request was run; "replayed": `replayed` says what came of running it; "estimated": by a
    roofline of `device`, which was not there, so that nothing of it is certified. output_tok_s: tokens of
    answers a second, at the highest pace that keeps the workload's service level (all requests at once where it has
    none). Times are in seconds, percentiles over requests. level_met: whether the level is kept at all. usd_per_mtok:
    of a million tokens of answers; null without a price.
    """

    workload: str
    num_requests: int
    output_tok_s: float
    original_output_tok_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    time_per_token_p50_s: float
    time_per_token_p99_s: float
    level_met: bool
    usd_per_hour: str | None
    usd_per_mtok: float | None
    original_usd_per_mtok: float | None
    basis: Literal["simulated", "replayed", "estimated"] = "simulated"
    replayed: WorkloadReplay | None = None
    device: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """What a run was expected to need before it began, and what no plan can be faster than.

    kernels: that will run the plans here. memory_bytes, disk_bytes: at most, beside what else runs; free_*: at the
    start, null where the system does not say. seconds: a rough guess from the model's size, the text and how fast this
    machine multiplies; a factor of two either way is common. floor_bytes: fewest bytes of weights that a token can read
    in any format that was allowed; original_bytes: those of the original. floor_s: floor_bytes, less what the
    processor's cache may hold, at the read speed read_gb_s that was measured just then; null where it was not.
    floor_loss: below it no limit can be told from the rounding of float32. warnings: what may go wrong, in words.
    """

    kernels: str
    memory_bytes: int
    free_memory_bytes: int | None
    disk_bytes: int
    free_disk_bytes: int | None
    seconds: float
    floor_bytes: int
    original_bytes: int
    read_gb_s: float | None
    floor_s: float | None
    floor_loss: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Tokens per second on `inputs.device`, median with the lowest and highest run; null where not measured."""

    prefill_tok_s: Measured | None
    decode_tok_s: Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRatio:
    """Seconds of a decoded token, smaller model over `against`, with `batch` sequences side by side.

    basis "turns": both were run here in turns; value is the ratio of medians, its interval a bootstrap over the n
    rounds. basis "given": the other figure was given by the user, and only ours was measured beside it.
    """

    against: str
    batch: int
    ratio: Measured
    basis: Literal["turns", "given"] = "turns"


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """A speed beside what the machine gave at the same time: a figure above it is a mistake, and fails.

    model: "original" or "smaller". batch: sequences that decode side by side. bytes_per_step: of weights, read once a
    step. cached_bytes: of the last-level cache, which need not be read again. memory_fraction: of read_gb_s, null
    where a cache could hold all weights. arithmetic_fraction: of the loop that `arithmetic` names. tolerance: how far
    above 1 a fraction may lie, since both are samples.
    """

    model: str
    batch: int
    decode_tok_s: float
    bytes_per_step: int
    cached_bytes: int
    read_gb_s: float
    memory_fraction: float | None
    arithmetic: str
    arithmetic_fraction: float
    tolerance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """How quality was measured: the bundle reloaded from disk, run by the engine's own steps over its paged cache.

    ops: whose kernels (`native`, `torch`, `cuda`). batch: sequences of a step. step_tokens: tokens of a step at most.
    decoded_share: of the tokens that ran as decoding steps, one for each sequence; the others in chunks of prompts.
    reference_kl: nats per token from the definition of the kernels (`kernels/reference.py`) on a part of the text.
    speculation: the plan's method; answers_compared: answers with and without it, all of them the same (0: none made).
    """

    ops: str
    batch: int
    step_tokens: int
    activations: str
    kv_cache: str
    decoded_share: float
    reference_kl: float
    speculation: str = "none"
    answers_compared: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """The same questions to both models.

    original_accuracy, accuracy: with Wilson's interval. difference: smaller minus original, paired, with Tango's score
    interval. harmed, fixed: questions that only the original, only the smaller model answers. mcnemar_p: of the exact
    two-sided test that both are equally many. margin: the most that accuracy may fall; non_inferior: whether the lower
    end of the one-sided interval is above -margin (null without a margin). num_needed: questions that a loss of nothing
    needs to pass with probability 0.8, at the share of changed answers seen here. chance: accuracy of a guess, null
    where there is none to name; above_chance_p: of the one-sided binomial test that the original does no better.
    """

    name: str
    kind: Literal["choice", "last_word", "generate"]
    sha256: str
    num_items: int
    original_accuracy: Measured
    accuracy: Measured
    difference: Measured
    harmed: int
    fixed: int
    mcnemar_p: float
    lower_bound: float
    margin: float | None
    non_inferior: bool | None
    num_needed: int | None
    chance: float | None
    above_chance_p: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """What greedy answers tell that the likelihood of a text does not.

    kind "task": `task` names the result above where the original beats chance, and so does the smaller model; kind
    "divergence": there is none. Both models continue the beginnings of sealed documents; divergence is the tokens after
    which they first part (max_tokens where they never do), its median with a bootstrap interval over prompts; p10 and
    p90 its quantiles; same: share of answers that never do.
    """

    kind: Literal["task", "divergence"]
    task: str | None = None
    num_prompts: int = 0
    max_tokens: int = 0
    divergence: Measured | None = None
    p10: float | None = None
    p90: float | None = None
    same: float | None = None


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
    """Where the sealed documents are: in the bundle (`halve/sealed.jsonl`), or only named by hash and path.

    document_tokens: of each document, so many first tokens were judged; null where all were.
    """

    kept: bool
    source: str
    window_tokens: int
    document_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One opening of the sealed text: what was judged, and how it went."""

    plan: str
    ppl_ratio: Measured
    kl_mean: Measured
    passed: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How scales and norms were tuned under codes that stay. first_kl, last_kl: nats per token of calibration text,
    original against smaller with activations as they are, over the first and the last steps. kept_step: the steps after
    which the held-out text, of which no gradient was taken, was closest; on it held_out_first_kl before and held_out_kl
    then. Null where an older Halve kept the last step.
    """

    steps: int
    tokens: int
    seconds: float
    first_kl: float
    last_kl: float
    kept_step: int | None = None
    held_out_first_kl: float | None = None
    held_out_kl: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """verdict: `pass` or `fail` against max_quality_loss, `measured` when no limit was set.

    judged_by: the figures that must keep the limit: the perplexity ratio, KL, or both.

    What an older Halve did not measure is null or empty.
    """

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
    plan_sha256: str | None = None  # of halve/plan.json as it lies in the bundle
    seen_sha256: str | None = None  # of halve/seen.json, the fingerprint of all text that the search saw
    served: Served | None = None
    tasks: tuple[TaskResult, ...] = ()
    canary: Canary | None = None
    speed_ratios: tuple[SpeedRatio, ...] = ()
    rooflines: tuple[Roofline, ...] = ()
    workload_cost: WorkloadCost | None = None
    judged_by: JudgedBy = "both"
    preflight: Preflight | None = None
    tuning: Tuning | None = None  # of the scales, where the plan's were tuned
    draft: Draft | None = None
    version: int = 1
