"""What a certificate says against what was measured again, and against its own figures. Records in, lines out.

A figure of quality comes out again nearly to the bit (`evaluate.verdict`). A speed is another each time. Alone it
claims what the machine gives at least: it disagrees when it lies above the interval measured now, widened, on the
machine that the certificate names and with nothing else running. A machine that was slow meanwhile is no lie. A ratio
of two speeds, taken in turns, disagrees both ways. On another machine speeds say nothing.
"""

from collections.abc import Iterator, Sequence
from math import log1p

from halve.core.certificate import (
    Canary,
    Certificate,
    Measured,
    Roofline,
    Served,
    Speed,
    SpeedRatio,
    TaskResult,
    WorkloadCost,
)
from halve.evaluate import passes
from halve.evaluate.answering import counted
from halve.evaluate.paired import Pairs

ERROR = 0.05  # of all openings of the sealed text together
RATIO_APART = 1.5  # by which the ends of a ratio of two speeds, taken in turns, may lie off
SPEED_APART = 2.0  # by which a speed alone, which follows the machine's clock and heat, may lie above one of now
COST_RATIO_APART = 1.5  # by which the gain on a workload may lie off, whose steps are timed anew
ITEMS_APART = 0.01  # of the questions of a task: what rounding on another machine may answer otherwise; at least one


def inconsistencies(recorded: Certificate) -> list[str]:
    """What the figures of a certificate do not bear out among themselves: no model is needed to see it."""
    return [*_verdict(recorded), *_attempts(recorded), *_costs(recorded), *_speeds(recorded), *_tasks(recorded)]


def _verdict(c: Certificate) -> Iterator[str]:
    limit = c.max_quality_loss
    verdict = "measured" if limit is None else "pass" if passes(c.quality, limit, c.judged_by) else "fail"
    if c.verdict != verdict:
        yield f"verdict: recorded {c.verdict}; by the recorded figures and limit it is {verdict}"


def _attempts(c: Certificate) -> Iterator[str]:
    if not 0 < len(c.attempts) <= c.max_attempts:
        yield f"attempts: recorded {len(c.attempts)} openings of the sealed text, of at most {c.max_attempts}"
        return
    confidence = 1 - ERROR / c.max_attempts
    if abs(c.quality.confidence - confidence) > 1e-9:
        told = f"recorded {c.quality.confidence:.6g}; {c.max_attempts} openings share an error of {ERROR:.0%}"
        yield f"quality.confidence: {told}, which is {confidence:.6g}"
    for name in ("ppl_ratio", "kl_mean"):
        one, other = getattr(c.attempts[-1], name), getattr(c.quality, name)
        if one != other:
            yield f"attempts: the last has {name} {one.value:.6g}, quality {other.value:.6g}; they are one measurement"
    if c.max_quality_loss is not None:
        for number, attempt in enumerate(c.attempts, 1):
            ppl = attempt.ppl_ratio.high <= 1 + c.max_quality_loss
            kl = attempt.kl_mean.high <= log1p(c.max_quality_loss)
            held = (ppl or c.judged_by == "kl") and (kl or c.judged_by == "ppl")
            if attempt.passed is not held:
                yield f"attempts: number {number} is recorded as {attempt.passed}; by its figures it is {held}"


def _costs(c: Certificate) -> Iterator[str]:
    cost = c.workload_cost
    if cost is None:
        return
    if cost.usd_per_hour != c.inputs.price:
        yield f"workload_cost.usd_per_hour: recorded {cost.usd_per_hour}, and inputs.price is {c.inputs.price}"
    for prefix in ("", "original_"):
        rate, usd = getattr(cost, f"{prefix}output_tok_s"), getattr(cost, f"{prefix}usd_per_mtok")
        if (usd is None) != (cost.usd_per_hour is None):
            yield f"workload_cost.{prefix}usd_per_mtok: recorded {usd} at {cost.usd_per_hour} dollars an hour"
        elif usd is not None and cost.usd_per_hour is not None:
            due = float(cost.usd_per_hour) / (3600 * rate) * 1e6 if rate else float("inf")
            if abs(usd - due) > 1e-6 * max(usd, due):
                yield f"workload_cost.{prefix}usd_per_mtok: recorded {usd:.6g}; its own tokens a second make {due:.6g}"
    if (run := cost.replayed) is None:
        return
    for prefix in ("", "original_"):
        speed, priced = getattr(run, f"{prefix}output_tok_s"), getattr(run, f"{prefix}usd_per_mtok")
        if priced is not None and cost.usd_per_hour is not None:
            due = float(cost.usd_per_hour) / (3600 * speed.value) * 1e6 if speed.value else float("inf")
            if abs(priced.value - due) > 1e-6 * max(priced.value, due):
                told = f"recorded {priced.value:.6g}; its own tokens a second make {due:.6g}"
                yield f"workload_cost.replayed.{prefix}usd_per_mtok: {told}"


def _speeds(c: Certificate) -> Iterator[str]:
    for limit in c.rooflines:
        for name in ("memory_fraction", "arithmetic_fraction"):
            fraction = getattr(limit, name)
            if fraction is not None and fraction > 1 + limit.tolerance:
                yield f"rooflines: the {limit.model} model at {fraction:.2f} of what the machine can do ({name})"
        speed = {"original": c.original_speed, "smaller": c.speed}.get(limit.model)
        decode = None if speed is None else speed.decode_tok_s
        if limit.batch == 1 and decode is not None and decode.value != limit.decode_tok_s:
            told = f"at {limit.decode_tok_s:.6g} tokens/s, its speed is {decode.value:.6g}"
            yield f"rooflines: the {limit.model} model {told}"


def _tasks(c: Certificate) -> Iterator[str]:
    accuracies = {task.name: task.accuracy for task in c.tasks}
    if dict(c.quality.tasks) != accuracies:
        yield "quality.tasks: is not what the results of the tasks say"
    for task in c.tasks:
        due = counted(task, pairs_of(task), margin=task.margin)
        for name in ("difference", "mcnemar_p", "lower_bound", "non_inferior", "accuracy", "original_accuracy"):
            if getattr(task, name) != getattr(due, name):
                yield f"tasks.{task.name}.{name}: does not follow from its {task.num_items} questions"


def pairs_of(task: TaskResult) -> Pairs:
    """The counts behind a result."""
    both = round(task.original_accuracy.value * task.num_items) - task.harmed
    return Pairs(
        both=both, harmed=task.harmed, fixed=task.fixed, neither=task.num_items - both - task.harmed - task.fixed
    )


def task_differences(recorded: Sequence[TaskResult], again: Sequence[TaskResult]) -> list[str]:
    """Results that other answers gave. Allowed are ITEMS_APART of the questions, as long as the margin is held."""
    found: list[str] = []
    for one, other in zip(recorded, again, strict=True):
        allowed = max(1.0, ITEMS_APART * one.num_items)
        for name, first, second in (
            ("original_accuracy", one.original_accuracy, other.original_accuracy),
            ("accuracy", one.accuracy, other.accuracy),
        ):
            if abs(first.value - second.value) * one.num_items > allowed + 1e-6:
                told = f"recorded {first.value:.4g}, now {second.value:.4g}, allowed are {allowed:.3g} questions"
                found.append(f"tasks.{one.name}.{name}: {told}")
        counts = [(name, getattr(one, name), getattr(other, name)) for name in ("harmed", "fixed")]
        found += [
            f"tasks.{one.name}.{name}: recorded {first}, now {second}"
            for name, first, second in counts
            if abs(first - second) > 2 * allowed
        ]
        if one.non_inferior and other.non_inferior is False:
            found.append(f"tasks.{one.name}: the margin of {one.margin:.1%} was held, and is not shown now")
    return found


def speed_differences(
    recorded: Certificate, speeds: tuple[Speed, Speed], ratios: Sequence[SpeedRatio], *, disturbed: bool
) -> list[str]:
    """Speeds of this machine that do not come out again; alone only where nothing else ran, beside each other always.

    speeds: of the original and the smaller model, measured now.
    """
    found: list[str] = []
    pairs = zip(("original_speed", "speed"), (recorded.original_speed, recorded.speed), speeds, strict=True)
    for name, one, other in [] if disturbed else pairs:
        for figure in ("prefill_tok_s", "decode_tok_s"):
            found += _above(f"{name}.{figure}", getattr(one, figure), getattr(other, figure))
    now = {ratio.against: ratio.ratio for ratio in ratios if ratio.basis == "turns"}
    for ratio in recorded.speed_ratios:
        if ratio.basis == "turns" and ratio.batch == 1 and ratio.against in now:
            found += _apart(f"speed_ratios ({ratio.against})", ratio.ratio, now[ratio.against], RATIO_APART)
    if recorded.speed_ratios and recorded.speed.decode_tok_s and recorded.original_speed.decode_tok_s:
        first = recorded.speed_ratios[0].ratio
        due = recorded.original_speed.decode_tok_s.value / recorded.speed.decode_tok_s.value
        if not first.low / RATIO_APART <= due <= first.high * RATIO_APART:
            found.append(f"speed_ratios: recorded {first.value:.3g}; the recorded speeds make {due:.3g}")
    return found


def slower_before(recorded: Certificate, speeds: tuple[Speed, Speed]) -> str | None:
    """In words, speeds recorded far below what this machine gives now: they claim too little, not too much."""
    pairs = zip((recorded.original_speed, recorded.speed), speeds, strict=True)
    both = [(one.decode_tok_s, now.decode_tok_s) for one, now in pairs]
    times = [now.low / one.high for one, now in both if one is not None and now is not None]
    if not times or max(times) <= SPEED_APART:
        return None
    return f"speeds alone: this machine is {max(times):.1f} times as fast as when they were recorded"


def _above(name: str, one: Measured | None, other: Measured | None) -> Iterator[str]:
    """A speed that was recorded above what the machine gives now."""
    if one is None or other is None:
        yield from _one_of_two(name, one, other)
    elif one.low / SPEED_APART > other.high:
        yield _beside(name, one, other)


def _apart(name: str, one: Measured | None, other: Measured | None, apart: float) -> Iterator[str]:
    """Figures whose intervals do not meet, even widened."""
    if one is None or other is None:
        yield from _one_of_two(name, one, other)
    elif one.low / apart > other.high or one.high * apart < other.low:
        yield _beside(name, one, other)


def _one_of_two(name: str, one: Measured | None, other: Measured | None) -> Iterator[str]:
    if one is not other:
        yield f"{name}: {'not recorded' if one is None else 'recorded, but not measured again'}"


def _beside(name: str, one: Measured, other: Measured) -> str:
    told = f"recorded {one.value:.4g} [{one.low:.4g}, {one.high:.4g}], now {other.value:.4g}"
    return f"{name}: {told} [{other.low:.4g}, {other.high:.4g}]"


def served_differences(recorded: Served | None, again: Served, *, same_machine: bool) -> list[str]:
    """How the model is served, where it is served otherwise; what the machine decides only on the same machine."""
    if recorded is None:
        return []
    names = ["activations", "kv_cache", "speculation", "decoded_share"]
    names += ["ops", "batch", "step_tokens", "answers_compared"] if same_machine else []
    pairs = [(name, getattr(recorded, name), getattr(again, name)) for name in names]
    return [f"served.{name}: recorded {one}, now {other}" for name, one, other in pairs if one != other]


def canary_differences(recorded: Canary | None, again: Canary) -> list[str]:
    """Whether answers part elsewhere, beyond both intervals."""
    if recorded is None:
        return []
    names = ("kind", "task", "num_prompts", "max_tokens")
    pairs = [(name, getattr(recorded, name), getattr(again, name)) for name in names]
    found = [f"canary.{name}: recorded {one}, now {other}" for name, one, other in pairs if one != other]
    if found:
        return found
    return list(_apart("canary.divergence", recorded.divergence, again.divergence, 1.0))


def roofline_differences(recorded: Sequence[Roofline], again: Sequence[Roofline]) -> list[str]:
    """Recorded speeds beyond what the same machine gives now."""
    found = []
    ceilings = {limit.model: limit for limit in again}
    for one in recorded:
        now = ceilings.get(one.model)
        if now is None or one.batch != now.batch or now.decode_tok_s <= 0:
            continue
        for name in ("memory_fraction", "arithmetic_fraction"):
            share = getattr(now, name)
            if share is None or share <= 0:
                continue
            fraction = share * one.decode_tok_s / now.decode_tok_s
            if fraction > (1 + one.tolerance) * SPEED_APART:
                told = f"{one.decode_tok_s:.4g} tokens/s are {fraction:.2f} of what this machine does ({name})"
                found.append(f"rooflines: the {one.model} model: recorded {told}")
    return found


def cost_differences(recorded: WorkloadCost, again: WorkloadCost, *, disturbed: bool) -> list[str]:
    """What a workload takes, where it is not found again: tokens a second beside the original's, and alone."""
    found = []
    if (recorded.workload, recorded.num_requests) != (again.workload, again.num_requests):
        asked = f"{again.workload}, {again.num_requests} requests"
        return [f"workload_cost: recorded {recorded.workload}, {recorded.num_requests} requests, now {asked}"]
    ratio, now = (cost.output_tok_s / cost.original_output_tok_s for cost in (recorded, again))
    if not 1 / COST_RATIO_APART <= ratio / now <= COST_RATIO_APART:
        found.append(f"workload_cost: recorded {ratio:.3g}x the original's tokens a second, now {now:.3g}x")
    for name in () if disturbed else ("output_tok_s", "original_output_tok_s"):
        one, other = getattr(recorded, name), getattr(again, name)
        if one / other > SPEED_APART:
            found.append(f"workload_cost.{name}: recorded {one:.4g}, now {other:.4g}")
    if recorded.replayed is not None and again.replayed is not None:
        ratios = (recorded.replayed.ratio, again.replayed.ratio)
        found += _apart("workload_cost.replayed.ratio", *ratios, COST_RATIO_APART)
    return found
