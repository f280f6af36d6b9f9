"""What a run will need and the least that any plan can cost, said before it begins; refused where it can't end well.

Bytes are counted; time is the tokens that will run through the model, by the seconds that a few of them take here, and
no more than an order: rounding, and how many plans must be judged, depend on what is found.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halve.api.replayed import REPLAY_S
from halve.api.study import FISHER_TOKENS, SWAP_TOKENS, Question
from halve.core.errors import ConfigError, OutputError
from halve.core.units import format_bytes
from halve.evaluate.scorer import DecoderScorer
from halve.formats import FORMATS, Format
from halve.hardware import free_memory_bytes
from halve.kernels import native_library
from halve.kernels.ceilings import LEAST_ARENA_BYTES, Arena
from halve.kernels.native import NativeOps
from halve.kernels.ops import Array
from halve.models import ModelConfig, sizes
from halve.models.names import groups, modules, num_parameters

log = logging.getLogger("halve")

PROBE_TOKENS = 128
JUDGED = 3  # times the selection text, in shares, that plans are judged on
SWAPS = 4  # of each group, a half of the model each
WIDE = 8  # bytes for each weight of the widest layer: itself and what is learned of it, in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """Bytes and seconds of a run, and the floor. floor_tok_s: of one sequence, by the rate of a read loop.

    Null where there is nothing to say: seconds of a model that was not probed, a floor without a read loop.
    """

    disk_bytes: int
    disk_free_bytes: int
    memory_bytes: int
    memory_free_bytes: int | None
    seconds: float | None
    tokens: int
    kernels: str
    original_bytes_per_token: int
    floor_bytes_per_token: int
    read_gb_s: float | None

    @property
    def floor_tok_s(self) -> float | None:
        """Tokens a second that no plan passes at batch 1."""
        return None if self.read_gb_s is None else self.read_gb_s * 1e9 / self.floor_bytes_per_token

    def lines(self) -> list[str]:
        """In words."""
        share = self.floor_bytes_per_token / self.original_bytes_per_token
        floor = f"no plan reads less than {format_bytes(self.floor_bytes_per_token)} for a token ({share:.2f} of now)"
        if self.floor_tok_s is not None:
            floor += f": at most {self.floor_tok_s:,.0f} tokens/s for one sequence at {self.read_gb_s:.3g} GB/s"
        free = "unknown" if self.memory_free_bytes is None else format_bytes(self.memory_free_bytes)
        lines = [
            f"needs about {format_bytes(self.memory_bytes)} of memory ({free} free) and up to "
            f"{format_bytes(self.disk_bytes)} of disk ({format_bytes(self.disk_free_bytes)} free)",
            f"kernels: {self.kernels}; {floor}",
        ]
        if self.seconds is not None:
            lines.append(f"takes about {_minutes(self.seconds)}, for {self.tokens:,} tokens through the model")
        return lines


def preflight(
    question: Question,
    original: DecoderScorer,
    out: Path,
    *,
    searched: bool,
    scorer_bytes: int,
    kept_bytes: int,
    time_s: float | None,
) -> Preflight:
    """Count, probe, and say it to the log.

    scorer_bytes, kept_bytes: of the original as it is scored, and of its states that are kept. time_s: that was given
    for the search. Raises OutputError where the disk can't hold what may be written; too little memory is a warning,
    since the system may have more to give than it says.
    """
    config = question.config
    tokens = _tokens(question, searched=searched)
    found = Preflight(
        disk_bytes=question.checkpoint.weight_bytes,
        disk_free_bytes=shutil.disk_usage(_existing(out)).free,
        memory_bytes=_memory(question, scorer_bytes, kept_bytes),
        memory_free_bytes=free_memory_bytes(),
        seconds=_seconds(original, question.texts.calibration, tokens, time_s, searched=searched),
        tokens=tokens,
        kernels=_kernels(question),
        original_bytes_per_token=sizes.bytes_per_token(config, question.source),
        floor_bytes_per_token=sizes.bytes_per_token(config, _smallest(config)),
        read_gb_s=_read_gb_s(),
    )
    for line in found.lines():
        log.info("%s", line)
    if found.disk_bytes > found.disk_free_bytes:
        raise OutputError(
            f"{out}: the smaller model may take {format_bytes(found.disk_bytes)}, and its disk has "
            f"{format_bytes(found.disk_free_bytes)} free; make room, or name an output on another disk"
        )
    if found.memory_free_bytes is not None and found.memory_bytes > found.memory_free_bytes:
        log.warning(
            "this run needs about %s of memory, and %s are free: it may be slow or be ended by the system; end other "
            "programs, or run it on a larger machine",
            format_bytes(found.memory_bytes),
            format_bytes(found.memory_free_bytes),
        )
    return found


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _tokens(question: Question, *, searched: bool) -> int:
    """That run through the model, forwards and backwards, as near as can be known."""
    texts = question.texts
    calibration, selection, sealed = (
        sum(map(len, split)) for split in (texts.calibration, texts.selection, texts.sealed)
    )
    total = calibration + 2 * sealed
    if searched:
        total += JUDGED * selection + 3 * FISHER_TOKENS // (2 if question.large else 1)
        if not question.large:
            total += len(list(groups(question.config))) * SWAPS * SWAP_TOKENS // 2
    return total


def _memory(question: Question, scorer_bytes: int, kept_bytes: int) -> int:
    """Of the original as it is scored, what is kept of it, both models as they are tried at last, the widest matrix."""
    config = question.config
    widest = max(m.shape[0] * m.shape[1] for m in modules(config))
    both = question.checkpoint.weight_bytes + num_parameters(config)
    return scorer_bytes + kept_bytes + both + WIDE * widest


def _seconds(
    original: DecoderScorer, documents: Sequence[Array], tokens: int, time_s: float | None, *, searched: bool
) -> float | None:
    probe = next((d for d in documents if len(d) > PROBE_TOKENS), None)
    if probe is None:
        return None
    taken = []
    for shift in range(2):  # the first one warms up; what was seen before is not computed again
        began = time.perf_counter()
        original.states(probe[shift : shift + PROBE_TOKENS])
        taken.append(time.perf_counter() - began)
    work = tokens * min(taken) / PROBE_TOKENS + (REPLAY_S if searched else 0.0)
    return work if time_s is None else min(work, time_s + REPLAY_S)


def _kernels(question: Question) -> str:
    if question.device != "cpu":
        return f"those of {question.device}"
    if reason := native_library.available():
        return f"the reference in PyTorch, slow and without times, since {reason}"
    return f"our C++ ({NativeOps(activations=question.activations).isa.name})"


def _smallest(config: ModelConfig) -> dict[str, Format]:
    """Of each module the format that is smallest."""
    scaled = [fmt for fmt in FORMATS.values() if fmt.scaled]
    found = {}
    for module in modules(config):
        fits = [fmt for fmt in scaled if not fmt.refusal(module.shape[1])]
        found[module.name] = min(fits, key=lambda fmt: fmt.size_bytes(module.shape))
    return found


def _read_gb_s() -> float | None:
    if native_library.available():
        return None
    try:
        return Arena(LEAST_ARENA_BYTES).read_gb_s(NativeOps().num_threads)
    except (ConfigError, MemoryError):
        return None


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
