"""Speeds beside what the machine can do: a decoded token reads all weights and multiplies by them.

A figure above that is a mistake of whoever measured it, and no certificate is written over it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from halve.api.bundle import read_plan
from halve.api.versus.figures import TOLERANCE, Ceiling, Measure, MismeasuredError, Work, turn_of
from halve.api.versus.rounds import last_level_cache_bytes
from halve.checkpoint import Checkpoint
from halve.core.certificate import Roofline, Speed
from halve.core.errors import ConfigError, QualityError
from halve.hardware import detect_cpu
from halve.kernels import native_library
from halve.kernels.ceilings import ARITHMETIC, LEAST_ARENA_BYTES, Arena, gmac_s, loop_for
from halve.models import ModelConfig, stored_formats
from halve.models.names import EMBEDDING, modules
from halve.models.sizes import bytes_per_token

log = logging.getLogger("halve")

SAMPLES = 3  # of the ceilings; one more each time that a figure lies above, since other programs lower them
DECODE = Measure(name="decode_b1", batch=1, prompt=0, new_tokens=2)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A speed, and the work behind a token."""

    model: str
    decode_tok_s: float
    bytes_per_step: int
    macs: int


def judged(model: str, checkpoint: Checkpoint, config: ModelConfig, speed: Speed) -> Judged | None:
    """What the files of a model need for a token; None where decoding was not measured."""
    if speed.decode_tok_s is None:
        return None
    macs = sum(m.shape[0] * m.shape[1] for m in modules(config) if m.name != EMBEDDING or config.tied)
    size = bytes_per_token(config, stored_formats(checkpoint, config))
    if (guesses := read_plan(checkpoint).speculation).method != "none":
        size //= 1 + guesses.max_tokens  # one reading of the weights may give as many tokens, if all guesses are right
    return Judged(model=model, decode_tok_s=speed.decode_tok_s.value, bytes_per_step=size, macs=macs)


def rooflines(
    speeds: list[Judged], sample: "Sampler | None" = None, *, read_gb_s: float | None = None
) -> tuple[Roofline, ...]:
    """Each speed at batch 1 as a share of the ceilings. Raises QualityError for one above them.

    read_gb_s: what memory gave while the speeds were measured, where that is known; a shared machine may give less now.
    Nothing where this machine's ceilings can't be measured (a log line says why).
    """
    try:
        sample = sample or Sampler()
    except ConfigError as error:
        log.info("speeds are not held against this machine's limits: %s", error)
        return ()
    ceiling = sample()
    if read_gb_s is not None:
        ceiling = replace(ceiling, read_gb_s=max(ceiling.read_gb_s, read_gb_s))
    return tuple(_roofline(one, ceiling, sample) for one in speeds)


def reader() -> Callable[[], float] | None:
    """Reads memory for some hundredths of a second and says how fast that was, GB/s; None where the C++ is missing."""
    if native_library.available():
        return None
    arena, threads = Arena(LEAST_ARENA_BYTES), detect_cpu().num_cores
    return lambda: max(arena.read_gb_s(threads) for _ in range(2))


class Sampler:
    """Samples of the ceilings on the threads that kernels run on. Raises ConfigError where there is no way to."""

    def __init__(self) -> None:
        if reason := native_library.available():
            raise ConfigError(reason)
        device = detect_cpu()
        self.threads, self.arena = device.num_cores, Arena(LEAST_ARENA_BYTES)
        self.loops = {what: loop for what in ARITHMETIC if (loop := loop_for(what, device))}
        self.cached_bytes = last_level_cache_bytes()

    def __call__(self) -> Ceiling:
        """The fastest of a few."""
        read = max(self.arena.read_gb_s(self.threads) for _ in range(SAMPLES))
        return Ceiling(read, {what: gmac_s(loop, self.threads) for what, loop in self.loops.items()})


def _roofline(one: Judged, ceiling: Ceiling, sample: Sampler) -> Roofline:
    work = Work(weight_bytes=one.bytes_per_step, macs_of_layers=one.macs, macs_of_head=0)
    for again in range(SAMPLES + 1):
        try:
            turn = turn_of(
                DECODE, one.decode_tok_s, one.decode_tok_s, work, ceiling, cached_bytes=sample.cached_bytes, others=None
            )
            break
        except MismeasuredError as error:
            if again == SAMPLES:
                raise QualityError(
                    f"{one.model} model: {error}; a speed that this machine can't reach is not certified. Check its "
                    "clock, or run it again with nothing else running"
                ) from error
            ceiling = Ceiling.faster(ceiling, sample())
    assert turn.arithmetic is not None
    assert turn.arithmetic_fraction is not None
    return Roofline(
        model=one.model,
        batch=1,
        decode_tok_s=one.decode_tok_s,
        bytes_per_step=one.bytes_per_step,
        cached_bytes=sample.cached_bytes,
        read_gb_s=ceiling.read_gb_s,
        memory_fraction=turn.bandwidth_fraction,
        arithmetic=turn.arithmetic,
        arithmetic_fraction=turn.arithmetic_fraction,
        tolerance=TOLERANCE,
    )
