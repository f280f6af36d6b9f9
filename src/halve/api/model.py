"""`halve.load(path).generate(...)`: a model on a device, answering prompts through the engine."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from halve import __version__
from halve.api.bundle import read_plan
from halve.api.draft import choose_speculation, load_draft
from halve.api.serving import engine_for
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.checkpoint.files import read_object
from halve.core.errors import ConfigError, KernelError, PlanError, RequestError
from halve.core.plan import Plan, Speculation
from halve.core.units import parse_bytes
from halve.engine import (
    AheadModelRunner,
    Completion,
    Engine,
    EngineConfig,
    ModelRunner,
    OfflineRun,
    Prompt,
    SamplingParams,
    Stream,
    blocks_for,
    blocks_within,
    run_file,
)
from halve.engine.constrain import GuidanceConstrainer
from halve.hardware import detect_cpu
from halve.kernels import native, native_cache, native_library, native_rows
from halve.kernels.backends import backend
from halve.kernels.cuda import rows as cuda_rows
from halve.kernels.ops import Array, Ops, OwnMemoryOps, TokenBatch
from halve.kernels.team import home, pin
from halve.models import Decoder, ModelConfig, OffloadSource, ReadySource, load_config, load_decoder
from halve.text import Tokenizer

if TYPE_CHECKING:  # torch loads only where it computes
    from halve.kernels.reference import TorchOps

log = logging.getLogger("halve")

BLOCK_SIZE = 16  # tokens
CACHE_SHARE = 0.1  # of the machine's memory
# On CUDA a step takes milliseconds whatever it holds, and memory is for the cache.
CUDA_ENGINE = EngineConfig(max_num_seqs=256, max_tokens_per_step=8192, max_prefill_beside_decode=2048)


class Model:
    """A loaded model. Make one by `halve.load`.

    Its engine runs whatever is asked from any thread in one batch over one cache, and starts with the first request.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        ops: Ops,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        engine_config: EngineConfig | None = None,
        cache_bytes: int | None = None,
        draft: Decoder | None = None,
    ) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.config, self.plan, self.ops, self.decoder = decoder.config, plan, ops, decoder
        self.tokenizer = tokenizer
        self.eos_token_ids = end_tokens(checkpoint, self.tokenizer)
        self._engine_config = engine_config or default_engine(decoder, plan)
        self._draft = draft
        if cache_bytes is None and isinstance(ops, OwnMemoryOps):
            cache_bytes = ops.spare_bytes()
        self._num_blocks = cache_blocks(self.config, self._engine_config, cache_bytes, draft.config if draft else None)
        self.constrainer = GuidanceConstrainer(
            checkpoint.path / "tokenizer.json", vocab_size=self.config.vocab_size, eos_token_ids=self.eos_token_ids
        )
        self._engine: Engine | None = None
        self._making_engine = Lock()

    @property
    def kernels(self) -> dict[str, str]:
        """Which kernel runs each operation and format."""
        return dict(self.ops.kernels)

    @property
    def engine_config(self) -> EngineConfig:
        """How its engine divides its steps."""
        return self._engine_config

    @property
    def num_blocks(self) -> int:
        """Blocks of its engine's cache."""
        return self._num_blocks

    @property
    def engine(self) -> Engine:
        """The engine behind `generate` and `stream`; its cache is allocated on first use."""
        with self._making_engine:
            if self._engine is None:
                kind = AheadModelRunner if self.decoder.runs_ahead else ModelRunner
                sizes = {"num_blocks": self._num_blocks, "block_size": BLOCK_SIZE}
                self._engine = Engine(
                    kind(self.decoder, **sizes),
                    self.tokenizer,
                    self._engine_config,
                    eos_token_ids=self.eos_token_ids,
                    draft=ModelRunner(self._draft, **sizes) if self._draft else None,
                    constrainer=self.constrainer,
                )
            return self._engine

    def generate(self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Any) -> Completion:
        """Continue a prompt (text, or token ids).

        options: fields of `SamplingParams` instead of `sampling`: max_tokens, temperature, top_p, seed, stop (strings
        that end the text and are not part of it) and so on. Raises RequestError for a prompt that is empty or longer
        than the context, bad parameters, or n above 1 (take `generate_all`).
        """
        sampling = _sampling(sampling, options)
        if sampling.n != 1:
            raise RequestError(f"n: {sampling.n} answers can't be one completion; use generate_all([prompt], n=...)")
        return self.engine.generate([prompt], sampling)[0]

    def generate_all(
        self,
        prompts: Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Continue many prompts together, as `Engine.generate` does; options as for `generate`."""
        if isinstance(sampling, Sequence) and not options:
            return self.engine.generate(prompts, sampling)
        return self.engine.generate(prompts, _sampling(sampling, options))

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Any) -> Stream:
        """The same, step by step as tokens come: by `for`, or by `async for` in an event loop."""
        return self.engine.stream(prompt, _sampling(sampling, options))

    def run_file(
        self,
        source: str | Path,
        out: str | Path,
        sampling: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> OfflineRun:
        """Answer a file of prompts into a file of answers, in bounded memory, taking up what an earlier run left.

        The lines of both: `halve.engine.offline`. options as for `generate`. Raises as `halve.engine.run_file` does.
        """
        return run_file(self.engine, source, out, _sampling(sampling, options), progress=progress)

    def logits(self, prompt: Prompt) -> Array:
        """Next-token logits after every token of a prompt (text, or token ids), float32 [tokens, vocab_size].

        Raises RequestError for a prompt that is empty or longer than the context.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not 0 < len(ids) <= self.config.context:
            raise RequestError(f"prompt: {len(ids)} tokens; this model takes 1 to {self.config.context}")
        if not all(0 <= i < self.config.vocab_size for i in ids):
            raise RequestError(f"prompt: token ids must lie in 0 to {self.config.vocab_size - 1}")
        return self.ops.to_host(self.decoder.logits(self.decoder.hidden(TokenBatch.whole([ids]))))

    def close(self) -> None:
        """End the engine's thread; what is unfinished ends with reason "abort". Without it, it ends with the model."""
        with self._making_engine:
            if self._engine is not None:
                self._engine.close()
            self.decoder.close()


def _sampling(sampling: Any, options: Mapping[str, Any]) -> SamplingParams:
    if sampling is None:
        return SamplingParams.of(**options)
    if not isinstance(sampling, SamplingParams) or options:
        raise RequestError("sampling: give SamplingParams, or its fields as keywords, not both")
    return sampling


def load(
    model: str | Path,
    *,
    device: str = "auto",
    engine: EngineConfig | None = None,
    cache_bytes: int | None = None,
    num_threads: int | None = None,
    cores: Sequence[int] = (),
    keep: bool = True,
    speculation: str | Speculation | None = None,
    plan: Plan | None = None,
    expert_cache: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a checkpoint or a bundle: a directory, or an `org/name` of the model hub.

    device: `auto` (our C++ on CPU), `cuda` (our Triton kernels, where triton is installed), another torch device, or
    one that an installed package brings (`halve.kernels.backends`). engine: how its engine divides its steps; None is
    what the plan says.
    cache_bytes: memory for keys and values; None is a tenth of the machine's, or what a GPU has left, and less where
    the engine can't fill it.
    num_threads: of the C++ kernels, None for one for each physical core (`halve doctor` says how many and why); cores:
    where to keep them, empty for wherever the system likes, on a machine of several memory nodes for one of them (one
    team for the process; `halve.kernels.team`).
    keep: whether compressed weights, once packed for the C++ kernels, are kept on disk for the next start
    (`halve.models.ready` says where) and read from there. speculation: where guesses of the next tokens come from,
    which change how fast answers come and nothing else: `ngram`, the place of a draft model with the same tokenizer,
    `off`; None is what `engine` or else the bundle's plan says. plan: whose formats of activations and of the cache are
    taken instead of the bundle's; a plain checkpoint runs in float32 without one. expert_cache: of a sparse model, on
    the C++ kernels: memory for experts (bytes, or "2GB"); the rest is read from disk when it is asked for. The weights
    are packed to disk at the first start, one matrix at a time. progress: layers done, layers in all.
    Raises CheckpointError, ConfigError, TextError naming what is wrong with the files, RequestError for cache_bytes
    that hold nothing, ConfigError for an expert_cache that can't be.
    """
    checkpoint = open_checkpoint(resolve(str(model)))
    plan = read_plan(checkpoint) if plan is None else plan
    config = load_config(checkpoint, plan)
    check_served(device, plan.activations.format, *plan.kv_cache.names)
    cached = None if expert_cache is None else parse_bytes(expert_cache, "expert_cache")
    if cached is not None and device not in ("auto", "cpu"):
        raise ConfigError(
            f"expert_cache: experts are read from disk by the C++ kernels on the CPU, and device {device} has all of "
            "them in its memory; take device cpu, or leave the expert cache out"
        )
    ops = make_ops(device, plan.activations.format, num_threads, cores)
    if cached is not None:
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        decoder = _offloaded(checkpoint, config, ops, cached, keep=keep, progress=progress)
    elif isinstance(ops, native.NativeOps):
        # Threads read the weights while this one reads the tokenizer, which takes as long.
        with ReadySource(checkpoint, ops, version=__version__, keep=keep) as source:
            tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
            decoder = Decoder(config, ops, source, progress)
    else:
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        decoder = load_decoder(checkpoint, config, ops, progress)
    for what, kernel in sorted(ops.kernels.items()):
        log.debug("%s: %s", what, kernel)
    engine = engine or default_engine(decoder, plan)
    if speculation is not None or engine.speculation.method == "none":
        engine = replace(engine, speculation=choose_speculation(speculation, plan, checkpoint))
    draft = None
    if path := engine.speculation.path:
        draft = load_draft(
            path,
            tokenizer,
            config.vocab_size,
            lambda activations: make_ops(device, activations, num_threads),
            keep=keep,
        )
    return Model(checkpoint, plan, ops, decoder, tokenizer, engine_config=engine, cache_bytes=cache_bytes, draft=draft)


def _offloaded(
    checkpoint: Checkpoint,
    config: ModelConfig,
    ops: Ops,
    cache_bytes: int,
    *,
    keep: bool,
    progress: Callable[[int, int], None] | None,
) -> Decoder:
    """A decoder whose experts are read as they are asked for. Raises ConfigError where they can't be."""
    if not isinstance(ops, native.NativeOps):
        raise ConfigError(
            "expert_cache: experts are read from disk by the C++ kernels, and this model would run on torch instead; "
            "reinstall halve with a compiler, or leave the expert cache out"
        )
    if not keep:
        raise ConfigError("expert_cache: experts are read from weights kept on disk; leave it out, or keep=False")
    source = OffloadSource(checkpoint, config, ops, cache_bytes=cache_bytes, version=__version__, progress=progress)
    return Decoder(config, ops, source, progress)


def default_engine(decoder: Decoder, plan: Plan) -> EngineConfig:
    """How an engine over a decoder divides its steps unless told: as the plan says; a GPU takes more at once."""
    return CUDA_ENGINE if decoder.runs_ahead else engine_for(plan.serving)


def cache_blocks(
    config: ModelConfig, engine: EngineConfig, cache_bytes: int | None, draft: ModelConfig | None = None
) -> int:
    """Blocks of a model's cache within that memory, and no more than all sequences of the engine can fill.

    draft: of the draft model, whose cache has as many blocks and shares the memory. Memory is taken as blocks are first
    written, not before. Raises RequestError when it holds no block.
    """
    per_token = config.kv_cache_bytes_per_token + (draft.kv_cache_bytes_per_token if draft else 0)
    size = per_token * BLOCK_SIZE
    most = blocks_for(max_num_seqs=engine.max_num_seqs, context=config.context, block_size=BLOCK_SIZE)
    return min(
        most, blocks_within(int(CACHE_SHARE * detect_cpu().memory_bytes) if cache_bytes is None else cache_bytes, size)
    )


def check_served(device: str, activations: str, *kv_caches: str) -> None:
    """Refuse, with PlanError, what a plan rounds to where the kernels of a device have no row for it."""
    if device in ("auto", "cpu") and native_library.available() is None:
        computes, way_out = "our C++ on the CPU computes", "use device cuda (--device cuda), another torch device"
        known = {"activations": native_rows.ACTIVATIONS, "kv_cache": tuple(native_cache.FORMATS)}
    elif device.partition(":")[0] == "cuda" and cuda_rows.refusal(device) is None:
        computes, way_out = "our CUDA kernels compute", "run on the CPU (--device cpu)"
        known = {"activations": cuda_rows.ACTIVATIONS, "kv_cache": cuda_rows.CACHES}
    else:
        return
    for what, chosen in (("activations", activations), *(("kv_cache", kept) for kept in kv_caches)):
        if chosen not in known[what]:
            raise PlanError(
                f"{what} {chosen}: {computes} {', '.join(known[what])}; {way_out}, or a plan with {what} in one of "
                "these"
            )


def make_ops(device: str, activations: str, num_threads: int | None = None, cores: Sequence[int] = ()) -> Ops:
    """The Ops of a device: our C++ on CPU where it is built, our Triton on CUDA where it runs, a package's own; else
    torch (said in the log).
    """
    if device in ("auto", "cpu"):
        reason = native_library.available()
        if reason is None:
            ops = native.NativeOps(activations=activations, num_threads=num_threads)
            pin(cores or home(num_threads))
            return ops
        log.warning("running on torch instead of the C++ kernels: %s", reason)
        device = "cpu"
    if num_threads is not None or cores:
        raise RequestError("num_threads and cores are of the C++ kernels on the CPU; leave them out on a torch device")
    if device.partition(":")[0] == "cuda":
        reason = cuda_rows.refusal(device)
        if reason is None:
            from halve.kernels.cuda.ops import CudaOps

            return CudaOps(device, activations=activations)
        log.warning("running on torch instead of the Triton kernels: %s", reason)
    try:
        if factory := backend(device):
            return factory(device, activations=activations)
    except KernelError as error:
        raise RequestError(f"device {device!r} can't be used: {error}") from error
    return torch_ops(device, activations)


def torch_ops(device: str, activations: str = "fp32", *, widened: bool = False) -> "TorchOps":
    """The reference Ops of a torch device. Raises RequestError when there is no such device here."""
    from halve.kernels.reference import TorchOps

    try:
        return TorchOps(device, activations=activations, widened=widened)
    except (RuntimeError, KernelError) as error:
        reason = str(error).splitlines()[0].removeprefix(f"device {device!r}: ").removesuffix("; use cpu")
        raise RequestError(f"device {device!r} can't be used: {reason}; take cpu") from error


def end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text: generation_config.json's, else config.json's, else the tokenizer's."""
    path = checkpoint.path / "generation_config.json"
    generation = read_object(path) if path.exists() else {}
    for source in (generation, checkpoint.config):
        value: Any = source.get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
