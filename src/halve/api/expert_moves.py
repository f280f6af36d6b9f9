"""Changes of a sparse model's experts, each measured against the original before any plan may make it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import log1p

from halve.api.progress import Progress
from halve.api.study import Question, first_tokens
from halve.compress.shrink import ShrunkSource, shrunk_config
from halve.core.certificate import Measured
from halve.evaluate import compare, quality
from halve.evaluate.scorer import DecoderScorer
from halve.models import CheckpointSource, Decoder, ModelConfig
from halve.search.expert_moves import ExpertMove, expert_moves, expert_statistics, without

log = logging.getLogger("halve")

RANKING_TOKENS = 8192  # of calibration text that experts are ranked on
JUDGED_TOKENS = 4096  # of selection text that a move is judged on


@dataclass(frozen=True, kw_only=True)
class JudgedMove:
    """A move, the configuration that it makes, and what it costs before anything is rounded: KL in nats per token."""

    move: ExpertMove
    config: ModelConfig
    kl: Measured
    accepted: bool
    why: str


def judge_experts(
    question: Question, original: DecoderScorer, limit: float, progress: Progress
) -> tuple[JudgedMove, ...]:
    """Measure the moves of a sparse model; a kind of move goes on as long as it is accepted.

    A move is accepted when its whole interval of KL is within the limit of a quality loss; what the limit leaves is for
    formats. Nothing for a dense model, nor for a compressed one;
    in large ones experts are not merged, since both models would have to be in memory.
    """
    config = question.config
    if not config.sparse or question.checkpoint.config.get("quantization_config") is not None:
        return ()
    statistics = expert_statistics(original.decoder, first_tokens(question.texts.calibration, RANKING_TOKENS))
    text = first_tokens(question.texts.selection[::-1], JUDGED_TOKENS)
    found: list[JudgedMove] = []
    refused: set[str] = set()
    moves = [m for m in expert_moves(config, statistics) if not (question.large and m.kind == "merge")]
    with progress.task("Measuring changes of experts", "moves") as advance:
        for done, move in enumerate(moves):
            if move.kind not in refused:
                judged = _judge(question, original, move, text, limit)
                found.append(judged)
                if not judged.accepted:
                    refused.add(move.kind)
                log.info("%s: %s", move.name, judged.why)
            advance(done + 1, len(moves))
    return tuple(found)


def _judge(
    question: Question, original: DecoderScorer, move: ExpertMove, text: Sequence[object], limit: float
) -> JudgedMove:
    config = shrunk_config(question.config, move.plan)
    if move.kind == "merge":
        source = ShrunkSource(CheckpointSource(question.checkpoint), question.config, move.plan)
        smaller = Decoder(config, original.decoder.ops, source)
    else:
        smaller = without(original.decoder, move.plan)
    scores = compare(original, DecoderScorer(smaller), list(text), window_tokens=question.texts.window_tokens)  # type: ignore[arg-type]
    kl = quality(scores).kl_mean
    accepted = kl.high <= log1p(limit)
    word = "within" if accepted else "refused: beyond"
    why = f"KL {kl.value:.3g} [{kl.low:.3g}, {kl.high:.3g}] nats a token, {word} the limit of {log1p(limit):.3g}"
    return JudgedMove(move=move, config=config, kl=kl, accepted=accepted, why=why)
