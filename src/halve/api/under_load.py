"""A machine under load: the engine's own scheduler over the times of its steps, simulated.

It says how much of its time a machine may work when answers must be soon, and what a trace of one's own would cost as
it is: the seconds of steps are shared between prompts and answers as the ledger of `halve serve` shares them.
"""

from dataclasses import dataclass
from decimal import Decimal
from functools import cache

from halve.api.model import BLOCK_SIZE, load
from halve.api.progress import SILENT, Progress
from halve.core.certificate import Certificate
from halve.core.errors import ConfigError, RequestError
from halve.core.workload import ServiceLevel, Workload
from halve.economics.days import Day
from halve.economics.presets import Preset
from halve.economics.roofline import DoesNotFitError, Throughput
from halve.engine.config import EngineConfig
from halve.engine.runner import ModelRunner
from halve.engine.scheduler import Step
from halve.engine.simulate import Simulation, simulate
from halve.engine.step_times import StepTimes, measure_steps

LEAST_STEP_TOKENS, MOST_STEP_TOKENS = 128, 8192  # of prompts in a step that is simulated
SIMULATED = 256  # requests, and one more a sequence up to twice as many, to find what a service level allows
MOST_LOAD = 0.95  # a machine beyond it is taken for full
FULL_STEP = 512  # tokens of a step of prompts
BATCHES = (1, 2, 4, 8, 16, 32)  # sequences that decode side by side, of which the fastest is what a machine can do
REPEATS = 7
MEASURED_TOKENS = 2048  # of the cache of the runner that is measured: some of its longest steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What one machine's steps take, measured. num_blocks: of its cache, None for as many as it wants."""

    times: StepTimes
    origin: str
    num_blocks: int | None = None
    context: int | None = None
    config: EngineConfig | None = None

    def throughput(self, context: float) -> Throughput:
        """The fastest that it decodes sequences of so many tokens, and prompts."""
        times, most = self.times, (self.config or EngineConfig()).max_num_seqs
        batches = [batch for batch in BATCHES if batch <= most]
        best = max(batches, key=lambda batch: batch / times.of(batch, batch, batch * context))
        return Throughput(
            prefill_tok_s=FULL_STEP / times.of(FULL_STEP, 1, FULL_STEP * (FULL_STEP + 1) / 2),
            decode_tok_s=best / times.of(best, best, best * context),
            sequences=best,
            basis="measured",
            origin=f"{self.origin}, {best} sequences",
        )


def measured_steps(model: str, progress: Progress = SILENT) -> Steps:
    """Load a model on this machine and time its steps: seconds for a small one, a minute for a large one.

    Nothing else should run meanwhile. Raises what `halve.load` raises.
    """
    with progress.task("loading", "layers") as advance:
        loaded = load(model, progress=advance)
    with progress.task("steps", "measuring"):
        runner = ModelRunner(
            loaded.decoder,
            num_blocks=min(loaded.num_blocks, -(-MEASURED_TOKENS // BLOCK_SIZE)),
            block_size=BLOCK_SIZE,
        )
        times = measure_steps(runner, repeats=REPEATS)
    return Steps(
        times=times,
        origin="steps measured on this machine now",
        num_blocks=loaded.num_blocks,
        context=loaded.config.context,
        config=loaded.engine_config,
    )


def certified_steps(certificate: Certificate) -> Steps | None:
    """Steps as far as a certificate tells them: of the batches that decoded, and of prompts. None where it has none."""
    prefill = certificate.speed.prefill_tok_s
    rows = sorted((r for r in certificate.rooflines if r.model == "smaller"), key=lambda row: row.batch)
    if prefill is None or not rows:
        return None
    points = {row.batch: row.batch / row.decode_tok_s for row in rows}
    slowest = max(points.values())
    points[FULL_STEP] = max(FULL_STEP / prefill.value, slowest)
    return Steps(
        times=StepTimes(tokens=tuple(points), seconds=tuple(points.values())),
        origin=f"certificate, {certificate.inputs.device}",
    )


class _Shared:
    """Step times that keep count of what `EngineCore` would charge to prompts and to answers: seconds by tokens."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self.prefill_s = self.decode_s = 0.0

    def __call__(self, step: Step) -> float:
        seconds = self._times.of_step(step)
        total = sum(chunk.num_tokens for chunk in step.chunks)
        prompt = sum(
            min(chunk.num_tokens, max(0, chunk.sequence.num_prompt_tokens - chunk.start)) for chunk in step.chunks
        )
        self.prefill_s += seconds * prompt / max(1, total)
        self.decode_s += seconds * (total - prompt) / max(1, total)
        return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """A trace as it is on one machine. throughput: tokens a second that the ledger charges for.

    utilization: of the time to the last answer, steps ran. hit_share: of prompts' tokens, found in the cache. late: the
    machine is too slow for the trace.
    """

    throughput: Throughput
    utilization: Decimal
    hit_share: float
    simulation: Simulation
    late: bool

    @property
    def words(self) -> str:
        """How it went."""
        run = self.simulation
        said = f"the trace as it is: steps run {run.utilization:.1%} of {run.duration_s:,.0f} s"
        if run.num_refused:
            said += f"; {run.num_refused} requests that the engine can't hold are left out"
        if self.late:
            said += "; it asks for more than one machine does, and answers fall behind"
        return said


def replay(steps: Steps, trace: Workload) -> Replayed:
    """What the ledger would say of a trace, by a simulation. Raises ConfigError where the engine can serve none of it.

    An answer's first token comes with its prompt's last step and is charged there, so that an answer's seconds are
    shared by one token more than the steps after it had; cached tokens are charged nothing.
    """
    shared = _Shared(steps.times)
    block = sum(-(-(r.prompt_tokens + r.output_tokens) // BLOCK_SIZE) for r in trace.requests)
    try:
        done = simulate(
            trace,
            shared,
            num_blocks=steps.num_blocks or block + 1,
            block_size=BLOCK_SIZE,
            context=steps.context,
            config=steps.config,
        )
    except RequestError as error:
        raise ConfigError(f"--workload {trace.name}: {error}") from error
    computed = max(1, done.prompt_tokens - done.num_hit_tokens)
    least = 1e-9 * max(done.busy_s, 1e-9)
    batch = max(1.0, done.mean_running)
    throughput = Throughput(
        prefill_tok_s=computed / max(shared.prefill_s, least),
        decode_tok_s=done.output_tokens / max(shared.decode_s, least),
        sequences=batch,
        basis="measured",
        origin=f"{steps.origin}; the trace runs {batch:.1f} sequences side by side",
    )
    return Replayed(
        throughput=throughput,
        utilization=min(Decimal(1), max(Decimal("0.000001"), Decimal(f"{done.utilization:.6g}"))),
        hit_share=done.hit_rate,
        simulation=done,
        late=done.duration_s > 1.05 * trace.duration_s + done.latency_s.p50,
    )


@cache
def allowed_utilization(
    throughput: Throughput, preset: Preset, level: ServiceLevel, day: Day, seed: int = 0
) -> tuple[float, str]:
    """The share of time with work at which a service level still holds, by the engine's own scheduler.

    Requests of the workload's lengths come at random, at loads that are halved in until the highest that keeps the
    level is known to 2 %. The result is divided by the busiest minute over the mean of its hour, and by the fullest
    hour over the mean of the day, since machines are paid for all of it.
    Returns the share and how it came about. Raises DoesNotFitError where even a single request does not keep it.
    """
    batch = max(1, round(throughput.sequences))
    full = batch / throughput.decode_tok_s
    alone = full / 2 if batch > 1 else full  # a step of one sequence still reads the weights
    prefill = 1 / throughput.prefill_tok_s
    points = {1: alone, max(2, batch): full, batch + 8192: full + 8192 * prefill}
    times = StepTimes(tokens=tuple(points), seconds=tuple(points.values()))
    longest = preset.prompt[-1] + preset.output[-1]
    # A step holds no more of prompts than answers beside them can wait for.
    room = MOST_STEP_TOKENS if level.time_per_token_s is None else (0.8 * level.time_per_token_s - full) / prefill
    config = EngineConfig(
        max_num_seqs=batch,
        max_tokens_per_step=batch + int(max(LEAST_STEP_TOKENS, min(MOST_STEP_TOKENS, room))),
        max_prefill_beside_decode=None,
    )
    blocks = batch * -(-round(preset.mean_prompt + preset.mean_output) // 16) + -(-longest // 16) + 1
    work_s = preset.mean_prompt * prefill + preset.mean_output / throughput.decode_tok_s

    def keeps(load: float) -> bool:
        workload = preset.workload(SIMULATED + min(batch, SIMULATED), load / work_s, level, seed)
        return simulate(workload, times.of_step, num_blocks=blocks, context=longest + 1, config=config).level_met

    low, high = 0.0, MOST_LOAD
    if keeps(high):
        low = high
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    if not low:
        raise DoesNotFitError(
            f"--slo: no load keeps it on this machine ({throughput.origin}); a prompt of the mean length alone takes "
            f"{preset.mean_prompt * prefill:.2f} s, a token {full * 1e3:.1f} ms with {batch} sequences; allow more, or "
            "take a faster machine"
        )
    said = f"a load of {low:.0%} keeps the level; an hour's busiest minute has {preset.peak:.3g} times its mean"
    said += f", the day's fullest hour {day.peak:.3g} times ({day.name}: {day.source})"
    return low / preset.peak / float(day.peak), said
