"""Both models run as users will run them: how fast, what they say, and whether the fast kernels agree.

Speeds are taken in turns, so that a drifting machine slows each model alike.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from statistics import median

import numpy as np

from halve.api.certify import served
from halve.api.clock import witnessed
from halve.api.model import Model, load
from halve.api.progress import Progress
from halve.api.replayed import Paced, replay_in_turns
from halve.api.roofline import reader
from halve.api.scorers import KEEP_BYTES
from halve.api.texts import WINDOW_TOKENS
from halve.api.versus.processes import Others
from halve.core.certificate import Measured, Served, Speed, SpeedRatio, WorkloadReplay
from halve.core.errors import KernelError
from halve.core.plan import ActivationFormat, Activations, KVCache, Plan
from halve.engine import SamplingParams
from halve.evaluate import compare
from halve.evaluate.canary import first_difference
from halve.evaluate.scorer import DecoderScorer
from halve.evaluate.verdict import noise_of
from halve.kernels.ops import Array
from halve.models import Decoder

PROMPT_TOKENS = 128
DECODE_TOKENS = 32
RUNS = 5
DISTURBED_CORES = 0.15  # of other programs, as `halve bench` takes it
SLOW_S = 10.0  # a warm-up longer than this is itself the measurement: a slow model is measured once, not RUNS times

# Speeds and costs are told over the original as other engines run it. In float32, as `load` runs a plain checkpoint,
# it is slower, which would flatter the smaller model.
BF16 = Plan(activations=Activations(format="bf16"), kv_cache=KVCache(format="bf16"))
AGAINST = "original in bf16, same engine"

SAMPLE_PROMPT_TOKENS = 24
SAMPLE_TOKENS = 40
NUM_SAMPLES = 2  # answers of both models that the report shows
NUM_PROMPTS = 24  # answers of both models that are held against each other
CANARY_TOKENS = 48  # of an answer that is held against the original's

# Two right sets of kernels differ by the order of their sums: measured, 1e-7 nats per token. Where activations are
# rounded, that order decides what falls to which side, and noise e in the logits costs a KL of up to e^2 / 2:
# measured with int8 activations on tiny-en at 4 bits, 5e-4. Other models answer to rounding more: random weights of
# Llama-3.2-1B's shape by 3e-3. There kernels that are right lie as far from what is not rounded as the reference does,
# but for the luck of a few hundred tokens; what else is wrong with them comes on top.
# On CUDA the stream between operations is bf16; measured on tiny-en, 1e-4.
AGREEMENT = 1e-4
AGREEMENT_BF16 = 1e-3
AS_FAR = 1.5  # times the reference's own distance from what is not rounded


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt and how both models continue it, greedily."""

    prompt: str
    original: str
    smaller: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """speeds: of the original and the smaller model. agreement: KL to the reference kernels. served: how it runs.

    ratios: of seconds per decoded token, smaller over original, both measured in turns. parted: tokens after which the
    greedy answers of both part, for each prompt; answer_tokens: of such an answer. disturbed, read_gb_s: as in `Turns`.
    replayed: the workload, run by both; None where none was asked for.
    """

    speeds: tuple[Speed, Speed]
    answers: tuple[Answer, ...]
    agreement: float
    kernels: dict[str, str]
    served: Served
    ratios: tuple[SpeedRatio, ...]
    parted: tuple[int, ...]
    answer_tokens: int
    disturbed: bool
    replayed: WorkloadReplay | None = None
    read_gb_s: float | None = None


def run_trial(
    original: Path,
    smaller: Path,
    reference: Callable[[ActivationFormat], Decoder],
    sealed: Sequence[Array],
    device: str,
    progress: Progress,
    asked: Paced | None = None,
    usd_per_hour: Decimal | None = None,
) -> Trial:
    """Load both models as `halve.load` does, measure and sample them, and run a workload where one is asked for.

    reference: makes the smaller model by the reference kernels, with activations so rounded. sealed: token ids of the
    sealed documents, whose beginnings are the prompts.
    Raises KernelError when the kernels that will serve the smaller model disagree with the reference.
    """
    ours = load(smaller, device=device, keep=False)
    models = [load(original, device=device, keep=False, plan=replace(BF16, serving=ours.plan.serving)), ours]
    with witnessed():
        turns = in_turns(models, progress)
    replayed = None
    if asked is not None:
        with progress.task("Replaying the workload", "rounds") as advance:
            replayed = replay_in_turns(models, asked, usd_per_hour, advance)
    models.pop(0).close()
    models.insert(0, load(original, device=device, keep=False))  # what it says is not rounded
    documents = sealed[:NUM_SAMPLES]
    with progress.task("Sampling", "answers") as advance:
        answers = []
        for done, prompt in enumerate(documents):
            answers.append(_answer(models, prompt[:SAMPLE_PROMPT_TOKENS].tolist()))
            advance(done + 1, len(documents))
    answer_tokens = min(CANARY_TOKENS, models[0].config.context - SAMPLE_PROMPT_TOKENS)
    parted = _parted(models, sealed[:NUM_PROMPTS], answer_tokens, progress)
    models.pop(0).close()
    agreement = _agreement(ours, reference, documents)
    return Trial(
        speeds=turns.speeds,
        answers=tuple(answers),
        agreement=agreement,
        kernels=ours.kernels,
        served=served(ours, agreement, documents),
        ratios=(SpeedRatio(against=AGAINST, batch=1, ratio=turns.decode),),
        parted=parted,
        answer_tokens=answer_tokens,
        disturbed=turns.disturbed,
        replayed=replayed,
        read_gb_s=turns.read_gb_s,
    )


def _answer(models: Sequence[Model], prompt: list[int]) -> Answer:
    room = models[0].config.context - len(prompt)
    original, smaller = (model.generate(prompt, max_tokens=min(SAMPLE_TOKENS, room)).text for model in models)
    return Answer(prompt=models[0].tokenizer.decode(prompt), original=original, smaller=smaller)


def _parted(
    models: Sequence[Model], documents: Sequence[Array], max_tokens: int, progress: Progress
) -> tuple[int, ...]:
    """How many tokens the greedy answers of both models share, for each document's beginning."""
    prompts = [document[:SAMPLE_PROMPT_TOKENS].tolist() for document in documents if len(document)]
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    answers = []
    with progress.task("Answering", "models") as advance:
        for done, model in enumerate(models):
            answers.append([answer.token_ids for answer in model.generate_all(prompts, sampling)])
            advance(done + 1, len(models))
    return tuple(first_difference(one, other) for one, other in zip(*answers, strict=True))


def _agreement(model: Model, reference: Callable[[ActivationFormat], Decoder], documents: Sequence[Array]) -> float:
    """KL(reference || served) in nats per token. Rounded caches make a last-bit difference of two sums a larger one."""
    window_tokens = min(model.config.context, WINDOW_TOKENS)

    def apart(one: DecoderScorer, other: DecoderScorer) -> float:
        return float(compare(one, other, documents, window_tokens=window_tokens).kl.mean())

    rounded, runs = model.plan.activations.format, DecoderScorer(model.decoder, keep_bytes=KEEP_BYTES)
    judge = DecoderScorer(reference(rounded), keep_bytes=KEEP_BYTES)
    divergence = apart(judge, runs)
    allowed = max(
        AGREEMENT_BF16 if model.ops.name == "cuda" else AGREEMENT,
        noise_of(rounded, model.plan.kv_cache.names) ** 2 / 2,
    )
    if divergence <= allowed:
        return divergence
    told = ""
    if rounded != "fp32":
        judge.let_go()
        exact = DecoderScorer(reference("fp32"), keep_bytes=KEEP_BYTES)
        ours, theirs = apart(exact, runs), apart(exact, judge)
        if ours <= AS_FAR * theirs:
            return divergence
        told = f" (from what is not rounded by {ours:.2g}, the reference by {theirs:.2g})"
    raise KernelError(
        f"kernels {model.kernels} differ from the reference by a KL divergence of {divergence:.2g} nats per token"
        f"{told}; this is a defect of Halve on this machine: please report it, with `halve doctor --json`"
    )


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Speeds of two models that ran in turns, and seconds of the second over the first for a token.

    disturbed: whether other programs used the processors meanwhile, or nothing here says that they did not. read_gb_s:
    the fastest that memory was read between the rounds; None where that can't be measured.
    """

    speeds: tuple[Speed, Speed]
    decode: Measured
    prefill: Measured
    disturbed: bool
    read_gb_s: float | None


def in_turns(models: Sequence[Model], progress: Progress) -> Turns:
    """Prefill and decode at batch 1, tokens per second: median, lowest and highest run after one that warms up."""
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    others = Others({}) if Path("/proc/stat").exists() else None
    read, reads = reader(), list[float]()
    with progress.task("Measuring speed", "runs") as advance:
        for done in range(RUNS + 1):
            started = time.perf_counter()
            for model, taken in zip(models, times, strict=True):
                taken.append(run_once(model, seed=done))
            if read is not None:
                reads.append(read())
            if done == 0 and time.perf_counter() - started > SLOW_S * len(models):
                break
            advance(done, RUNS)
    disturbed = others is None or others.cores() > DISTURBED_CORES
    rounds = [taken[1:] or taken for taken in times]
    first, second = ([*zip(*taken, strict=True)] for taken in rounds)
    prefill, decode = (
        ratio_of_medians([1 / rate for rate in after], [1 / rate for rate in before])
        for before, after in zip(first, second, strict=True)
    )
    return Turns(
        speeds=(speed_of(rounds[0]), speed_of(rounds[1])),
        decode=decode,
        prefill=prefill,
        disturbed=disturbed,
        read_gb_s=max(reads, default=None),
    )


def ratio_of_medians(ours: Sequence[float], others: Sequence[float], *, num_resamples: int = 2000) -> Measured:
    """Median seconds over median seconds, with a 95 % bootstrap interval over the rounds that both were taken in."""
    pairs = np.array([ours, others])
    drawn = np.random.RandomState(0).randint(0, pairs.shape[1], (num_resamples, pairs.shape[1]))
    one, other = np.median(pairs[:, drawn], axis=2)
    value = float(median(ours) / median(others))
    low, high = np.quantile(one / other, [0.025, 0.975])
    return Measured(value=value, low=min(float(low), value), high=max(float(high), value), n=pairs.shape[1])


def run_once(model: Model, seed: int) -> tuple[float, float]:
    """Prefill and decode tokens per second of one request of random tokens (speed does not depend on which)."""
    half = max(model.config.context // 2, 1)
    prompt_tokens, decode_tokens = min(PROMPT_TOKENS, half), min(DECODE_TOKENS, max(half - 1, 1))
    prompt = np.random.default_rng(seed).integers(0, model.config.vocab_size, prompt_tokens).tolist()
    sampling = SamplingParams(max_tokens=decode_tokens + 1, ignore_eos=True)
    started = time.perf_counter()
    times = [time.perf_counter() for _ in model.stream(prompt, sampling)]
    return prompt_tokens / (times[0] - started), (len(times) - 1) / (times[-1] - times[0])


def speed_of(times: Sequence[tuple[float, float]]) -> Speed:
    """Median, lowest and highest of several runs' prefill and decode."""
    prefill, decode = zip(*times, strict=True)
    return Speed(prefill_tok_s=_spread(prefill), decode_tok_s=_spread(decode))


def _spread(values: Sequence[float]) -> Measured:
    return Measured(value=median(values), low=min(values), high=max(values), n=len(values))
