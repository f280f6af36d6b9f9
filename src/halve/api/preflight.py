"""What a run will need, before it begins: memory, disk, time, kernels, and the floor that no plan can pass.

Memory and disk are upper bounds by what the stages hold. Time is a rough guess: multiply-adds of every stage over what
a float32 product of the model's own width gives here just now. The floor is bytes over bandwidth: a token at batch 1
reads every weight once, and no format that is allowed has fewer bytes.
"""

import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from halve.api.roofline import Sampler
from halve.api.study import FISHER_TOKENS, LARGE_CALIBRATION_TOKENS, SWAP_TOKENS, is_large
from halve.api.texts import Texts
from halve.api.versus.figures import TOLERANCE
from halve.compress import Hessians
from halve.core.certificate import Preflight
from halve.core.errors import ConfigError, OutputError, QualityError
from halve.core.units import format_bytes, format_duration
from halve.core.workload import ServiceLevel
from halve.evaluate.scorer import WAVE_LOGITS
from halve.evaluate.verdict import NOISE
from halve.formats import FORMATS, Format
from halve.hardware import detect_cpu, free_memory_bytes
from halve.kernels import native_library
from halve.kernels.native import NativeOps
from halve.models import ModelConfig
from halve.models.names import EMBEDDING, modules, num_active_parameters, num_parameters
from halve.models.sizes import bytes_per_token

log = logging.getLogger("halve")

PROCESS_BYTES = 900 << 20  # Python and torch with nothing loaded, and its allocator's slack
STATES_BYTES = 1 << 30  # most of the original's final states that are kept (halve.api.scorers.KEEP_BYTES)
LOGITS_BYTES = 4 * WAVE_LOGITS  # of windows that are scored side by side (halve.evaluate.scorer)
WIDENED_BYTES = 1 << 30  # a model no larger than this in float32 is scored from float32 weights
SPARE_DISK_BYTES = 64 << 20  # certificate, report, sealed text
PLANS_JUDGED = 5
LARGE_S_PER_WEIGHT = 6e-7  # to screen every option of a large model and to time its products, on two cores
SHARE_READ = 0.5  # of the selection text, until the answer on a plan is clear
CLIP_S_PER_WEIGHT = 4e-8  # on two cores; gptq takes about three times that
SEALED_S = 600.0  # that a large model's original may take on a CPU for the sealed text
CALLS_S = 60.0  # timing products, speeds and the replay of the workload
LEAST_LOSS = NOISE["fp32"] ** 2 / 2  # nats; what rounding in float32 alone may make of two right sets of kernels


def preflight(
    config: ModelConfig,
    source: Mapping[str, Format],
    texts: Texts,
    out: Path,
    *,
    weight_bytes: int,
    formats: Mapping[str, Format] | None,
    searched: bool,
    gptq: bool,
    portable: bool,
    device: str,
    activations: str,
) -> Preflight:
    """Look at the machine and the model; nothing of either is changed. Takes about a second.

    source: formats of the original's modules; formats: of a plan that was named, None where plans are searched.
    """
    smallest = dict(formats) if formats is not None else smallest_formats(config, source, portable=portable)
    floor_bytes, original_bytes = bytes_per_token(config, smallest), bytes_per_token(config, source)
    read_gb_s, cached = _read_speed(device)
    hessians = Hessians.size_bytes(config) if gptq else 0
    free_memory, free_disk = free_memory_bytes(), _free_disk(out)
    memory = _memory_bytes(config, texts, weight_bytes, searched=searched)
    disk = weight_bytes + hessians + SPARE_DISK_BYTES
    seconds = _seconds(config, texts, searched=searched, gptq=gptq)
    reason = native_library.available() if device == "cpu" else None
    if device != "cpu":
        kernels = f"torch on {device}"
    elif reason is not None:
        kernels = "PyTorch on the CPU"
    else:
        kernels = f"C++ ({NativeOps(activations='int8' if activations == 'int8' else 'bf16').isa.name})"
    floor_s = None if read_gb_s is None else max(0, floor_bytes - cached) / (read_gb_s * 1e9)
    warnings = []
    if free_memory is not None and memory > free_memory:
        warnings.append(
            f"may need {format_bytes(memory)} of memory, {format_bytes(free_memory)} are free: it may swap or be killed"
        )
    if searched and reason is not None:
        warnings.append(f"plans are ranked by the bytes that a token reads, not by time: {reason}")
    return Preflight(
        kernels=kernels,
        memory_bytes=memory,
        free_memory_bytes=free_memory,
        disk_bytes=disk,
        free_disk_bytes=free_disk,
        seconds=seconds,
        floor_bytes=floor_bytes,
        original_bytes=original_bytes,
        read_gb_s=read_gb_s,
        floor_s=floor_s,
        floor_loss=LEAST_LOSS,
        warnings=tuple(warnings),
    )


def sealed_tokens(config: ModelConfig) -> int:
    """Tokens that the original of a large model reads in float32 on this machine in SEALED_S."""
    return int(SEALED_S * _flops(config, rough=False) / (2.0 * num_active_parameters(config)))


def check(
    found: Preflight, out: Path, *, limit: float | None, level: ServiceLevel, time_s: float | None, activations: str
) -> tuple[str, ...]:
    """Refuse what can't end well, and return what may not.

    Raises OutputError for too little disk, ConfigError for more memory than the machine has, QualityError for a limit
    or a service level below the floor.
    """
    warnings = list(found.warnings)
    if found.free_disk_bytes is not None and found.free_disk_bytes < found.disk_bytes:
        raise OutputError(
            f"{out}: this run needs up to {format_bytes(found.disk_bytes)} of disk there, "
            f"{format_bytes(found.free_disk_bytes)} are free; make room or choose another output"
        )
    total = detect_cpu().memory_bytes
    if total and found.memory_bytes > total:
        raise ConfigError(
            f"this run needs up to {format_bytes(found.memory_bytes)} of memory, this machine has "
            f"{format_bytes(total)}; take a larger machine or a smaller model"
        )
    if limit is not None and limit < found.floor_loss:
        raise QualityError(
            f"max_quality_loss {limit:.3g} is below the floor: two right sets of float32 kernels may part by "
            f"{found.floor_loss:.1g} already, and any rounding loses more; ask for 0.1% or more"
        )
    noise = NOISE[activations] ** 2 / 2
    if limit is not None and limit < noise:
        warnings.append(
            f"{activations} activations alone may lose up to {noise:.2%}, more than the limit of {limit:.3%}: "
            "--activations fp32 leaves them as they are"
        )
    asked = level.time_per_token_s
    floor_s = found.floor_s
    if asked is not None and floor_s is not None and asked * (1 + TOLERANCE) < floor_s:
        raise QualityError(
            f"slo: no plan can give a token in {1e3 * asked:.3g} ms here: the smallest reads "
            f"{format_bytes(found.floor_bytes)} of weights for each, which takes {1e3 * floor_s:.3g} ms at "
            f"{found.read_gb_s:.3g} GB/s; ask for no less (tpot={_up(1e3 * floor_s)}ms)"
        )
    if level.ttft_s is not None and floor_s is not None and level.ttft_s * (1 + TOLERANCE) < floor_s:
        raise QualityError(
            f"slo: no plan can give a first token after {1e3 * level.ttft_s:.3g} ms here: reading the weights once "
            f"takes {1e3 * floor_s:.3g} ms at {found.read_gb_s:.3g} GB/s; ask for no less (ttft={_up(1e3 * floor_s)}ms)"
        )
    if time_s is not None and time_s < found.seconds:
        warnings.append(
            f"about {format_duration(found.seconds)} are likely, more than the {format_duration(time_s)} given: the "
            "best plan by then is certified"
        )
    return tuple(warnings)


def in_words(found: Preflight) -> list[str]:
    """A few lines for people, warnings last."""

    def beside(need: int, free: int | None) -> str:
        return f"up to {format_bytes(need)}" + ("" if free is None else f" ({format_bytes(free)} free)")

    floor = (
        f"floor: {format_bytes(found.floor_bytes)} of weights a token, {found.floor_bytes / found.original_bytes:.2f} "
        "of the original's"
    )
    if found.floor_s:
        floor += f"; no plan is faster than {1e3 * found.floor_s:.3g} ms a token at {found.read_gb_s:.3g} GB/s"
    elif found.read_gb_s is not None:
        floor += "; it fits the processor's cache"
    return [
        f"needs: memory {beside(found.memory_bytes, found.free_memory_bytes)}, disk "
        f"{beside(found.disk_bytes, found.free_disk_bytes)}, roughly {format_duration(found.seconds)}; "
        f"kernels: {found.kernels}",
        floor,
        *(f"warning: {words}" for words in found.warnings),
    ]


def _up(value: float) -> str:
    """Two significant digits, rounded up."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step) * step:.3g}"


def smallest_formats(config: ModelConfig, source: Mapping[str, Format], *, portable: bool) -> dict[str, Format]:
    """The format of fewest bytes that a search may give each module."""
    found = {}
    for module in modules(config):
        kept = source[module.name]
        choices = [
            fmt
            for fmt in FORMATS.values()
            if fmt.kind == "int" and fmt.refusal(module.shape[1]) is None and (not portable or fmt.bits in (4, 8))
        ]
        if portable and module.name == EMBEDDING:
            choices = []
        found[module.name] = min([kept, *choices], key=lambda fmt: fmt.size_bytes(module.shape))
    return found


def _read_speed(device: str) -> tuple[float | None, int]:
    """GB/s of this machine's memory just now, and the bytes that its last cache holds."""
    if device != "cpu":
        return None, 0
    try:
        sampler = Sampler()
    except ConfigError:
        return None, 0
    return sampler().read_gb_s, sampler.cached_bytes


def _free_disk(out: Path) -> int | None:
    """Of the nearest folder that is there: those below it will be made."""
    folder = next((p for p in (out.absolute(), *out.absolute().parents) if p.exists()), None)
    try:
        return None if folder is None else shutil.disk_usage(folder).free
    except OSError:
        return None


def _memory_bytes(config: ModelConfig, texts: Texts, weight_bytes: int, *, searched: bool) -> int:
    """Both models at once as scored or run, a window's logits of both, and what is kept between plans."""
    widened = 4 * num_parameters(config)
    model = widened if widened <= WIDENED_BYTES else weight_bytes
    window = min(texts.window_tokens * config.vocab_size * 4, LOGITS_BYTES)
    selected = sum(map(len, texts.selection)) * config.hidden_size * 4
    states = min(STATES_BYTES, selected) if searched else 0
    widest = 4 * config.hidden_size * max(m.shape[0] for m in modules(config)) if searched else 0
    # Screening runs back through one layer and the head of a large model in float32; small ones are held whole.
    return PROCESS_BYTES + 2 * model + 4 * window + states + widest


def _seconds(config: ModelConfig, texts: Texts, *, searched: bool, gptq: bool) -> float:
    """Of all stages; a sparse model's token runs through its active parameters."""
    active, weights, large = num_active_parameters(config), num_parameters(config), is_large(config)
    exact_s = _flops(config, rough=False)
    rough_s = _flops(config, rough=True) if large else exact_s
    calibration, selection, sealed = (sum(map(len, t)) for t in (texts.calibration, texts.selection, texts.sealed))
    if large and not gptq:
        calibration = min(calibration, LARGE_CALIBRATION_TOKENS)
    forward = 2.0 * active
    exact, rough = forward * (1 if large else 2) * sealed, forward * (calibration + (sealed if large else 0))
    if gptq:
        rough += calibration * Hessians.size_bytes(config) / 2
    rounding = CLIP_S_PER_WEIGHT * weights * (3 if gptq else 1)
    plans, screened = 1, 0.0
    if searched:
        plans = PLANS_JUDGED + 1
        rough += 3 * forward * FISHER_TOKENS / (2 if large else 1)
        exact += 0 if large else forward * SWAP_TOKENS * 3 * len(list(modules(config)))
        judged = forward * selection * SHARE_READ  # a large plan by the kernels that serve it
        exact += judged * (1 if large else 1 + PLANS_JUDGED)
        rough += judged * PLANS_JUDGED if large else 0
        screened = LARGE_S_PER_WEIGHT * weights if large else 0.0
    return exact / exact_s + rough / rough_s + screened + plans * rounding + CALLS_S


def _flops(config: ModelConfig, *, rough: bool) -> float:
    """What a product of the model's own width gives here: floating point operations a second.

    rough: by the arithmetic of statistics of large models (`halve.kernels.rough`).
    """
    import torch

    from halve.kernels.rough import RoughOps, rough_ops

    rows, width, out = 256, config.hidden_size, min(config.intermediate_size, 4096)
    dtype = torch.bfloat16 if rough and isinstance(rough_ops("cpu"), RoughOps) else torch.float32
    x, w = torch.ones((rows, width), dtype=dtype), torch.ones((out, width), dtype=dtype)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * width * out / best / 1.5  # attention, norms and losses beside the products
