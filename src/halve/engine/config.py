"""How an engine divides its steps, and what it tells about itself."""

from dataclasses import dataclass, field

from halve.core.errors import ConfigError
from halve.core.plan import Speculation
from halve.models.expert_cache import ExpertCacheUse


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much runs at once.

    max_num_seqs: sequences that share a step. max_tokens_per_step: tokens of a step, prompts and decodes together; at
    least max_num_seqs, so that every running sequence can get its token. max_prefill_beside_decode: tokens of prompts
    in a step that also decodes, which is what a running answer waits for; None for no limit of its own.
    overtakes_per_priority: how many later requests of one priority level lower go first (`engine/scheduler.py`).
    deterministic: refuse a runner that does not give a token the same result in every batch. With one that does, a
    seed gives the same text whatever the neighbours; without the flag other runners may differ by rounding.
    speculation: where guesses of the next tokens come from (`engine/speculative.py`). Raises ConfigError.
    """

    max_num_seqs: int = 32
    max_tokens_per_step: int = 512
    max_prefill_beside_decode: int | None = 256
    overtakes_per_priority: int = 100
    deterministic: bool = False
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"engine.max_num_seqs: {self.max_num_seqs} must be 1 or more")
        if self.max_tokens_per_step < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_tokens_per_step: {self.max_tokens_per_step} must be at least max_num_seqs "
                f"({self.max_num_seqs}), one token for each running sequence"
            )
        beside = self.max_prefill_beside_decode
        if beside is not None and beside < 1:
            raise ConfigError(f"engine.max_prefill_beside_decode: {beside} must be 1 or more, or None for no limit")
        if self.overtakes_per_priority < 1:
            raise ConfigError(f"engine.overtakes_per_priority: {self.overtakes_per_priority} must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMetrics:
    """An engine between two steps. Counts are since it was made.

    num_waiting, num_running: sequences. blocks_free, blocks_cached, blocks_used: of its cache, all of it together.
    num_computed_tokens: tokens that ran through the model, prompts and decodes. num_sampled_tokens: tokens chosen.
    num_hit_tokens: tokens found in the prefix cache instead. num_preemptions: sequences that gave up their blocks.
    num_finished, num_aborted, num_failed: answers that ended well, were aborted, or were in a step that failed.
    num_draft_tokens: guesses that ran beside decodes (num_computed_tokens counts them too). num_accepted_tokens: of
    them, those that the model chose too. num_switched_off: answers for which guesses were tried and did not pay.
    busy_s: seconds of steps; what answers are charged adds up to it.
    expert_tokens: of a sparse model, tokens that each expert got, by sparse layer. experts_per_step: experts of a layer
    that a step reads, on average. expert_imbalance: tokens of the busiest expert over the mean expert's, averaged over
    the layers. None for a dense model, and before the first step. expert_cache: of a model whose experts are read from
    disk as they are asked for.
    """

    num_waiting: int = 0
    num_running: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_used: int = 0
    num_steps: int = 0
    num_computed_tokens: int = 0
    num_sampled_tokens: int = 0
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_switched_off: int = 0
    busy_s: float = 0.0
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    experts_per_step: float | None = None
    expert_imbalance: float | None = None
    expert_cache: ExpertCacheUse | None = None
