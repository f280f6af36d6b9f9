"""`halve.load(path).generate(...)`: a model on a device, answering prompts through the engine."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve import __version__
from halve.api.bundle import read_plan
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.checkpoint.files import read_object
from halve.core.errors import KernelError, RequestError
from halve.core.plan import Plan
from halve.engine import Completion, Engine, EngineConfig, ModelRunner, Request, SamplingParams, StepOutput
from halve.kernels import native, native_library
from halve.kernels.ops import Array, Ops, TokenBatch
from halve.models import Decoder, ReadySource, load_config, load_decoder
from halve.text import Tokenizer

if TYPE_CHECKING:  # torch loads only where it computes
    from halve.kernels.reference import TorchOps

log = logging.getLogger("halve")

BLOCK_SIZE = 16  # tokens
CACHE_TOKENS = 4096  # cached at once by `load`, or one whole context where that is shorter


class Model:
    """A loaded model. Make one by `halve.load`."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, ops: Ops, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.path = checkpoint.path
        self.config, self.plan, self.ops, self.decoder = decoder.config, plan, ops, decoder
        self.tokenizer = tokenizer
        self.eos_token_ids = end_tokens(checkpoint, self.tokenizer)

    @property
    def kernels(self) -> dict[str, str]:
        """Which kernel runs each operation and format."""
        return dict(self.ops.kernels)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Iterable[str] = (),
    ) -> Completion:
        """Continue a prompt (text, or token ids).

        temperature 0 is greedy. seed makes a sampled text repeatable. stop: strings that end the text and are not
        part of it. Raises RequestError for a prompt that is empty or longer than the context, or bad parameters.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        engine = self.engine([prompt], max_tokens)
        return engine.complete([self.request("0", prompt, sampling)])[0]

    def logits(self, prompt: str | Sequence[int]) -> Array:
        """Next-token logits after every token of a prompt (text, or token ids), float32 [tokens, vocab_size].

        Raises RequestError for a prompt that is empty or longer than the context.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not 0 < len(ids) <= self.config.context:
            raise RequestError(f"prompt: {len(ids)} tokens; this model takes 1 to {self.config.context}")
        if not all(0 <= i < self.config.vocab_size for i in ids):
            raise RequestError(f"prompt: token ids must lie in 0 to {self.config.vocab_size - 1}")
        return self.ops.to_host(self.decoder.logits(self.decoder.hidden(TokenBatch.whole([ids]))))

    def stream(self, prompt: str | Sequence[int], sampling: SamplingParams) -> Iterator[StepOutput]:
        """The same, step by step as tokens come."""
        engine = self.engine([prompt], sampling.max_tokens)
        yield from engine.generate([self.request("0", prompt, sampling)])

    def request(self, request_id: str, prompt: str | Sequence[int], sampling: SamplingParams) -> Request:
        """A request of this model's tokens."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise RequestError(
                "prompt: it is empty, and this model's tokenizer puts no token in front; give at least one character"
            )
        return Request(request_id=request_id, prompt_token_ids=tuple(ids), sampling=sampling)

    def engine(self, prompts: Sequence[str | Sequence[int]], max_tokens: int) -> Engine:
        """An engine whose cache holds these prompts and their answers, up to the model's context each."""
        longest = max(len(self.tokenizer.encode(p)) if isinstance(p, str) else len(p) for p in prompts)
        tokens = min(longest + max(max_tokens, 1), self.config.context)
        num_blocks = len(prompts) * -(-tokens // BLOCK_SIZE)
        runner = ModelRunner(self.decoder, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        return Engine(runner, self.tokenizer, EngineConfig(), eos_token_ids=self.eos_token_ids)


def load(
    model: str | Path,
    *,
    device: str = "auto",
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a checkpoint or a bundle: a directory, or an `org/name` of the model hub.

    device: `auto` (our C++ on CPU), or a torch device such as `cuda`. keep: whether compressed weights, once packed
    for the C++ kernels, are kept on disk for the next start (`halve.models.ready` says where) and read from there.
    progress: layers done, layers in all.
    Raises CheckpointError, ConfigError, TextError naming what is wrong with the files.
    """
    checkpoint = open_checkpoint(resolve(str(model)))
    plan = read_plan(checkpoint)
    config = load_config(checkpoint, plan)
    ops = make_ops(device, plan.activations.format)
    if isinstance(ops, native.NativeOps):
        # Threads read the weights while this one reads the tokenizer, which takes as long.
        with ReadySource(checkpoint, ops, version=__version__, keep=keep) as source:
            tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
            decoder = Decoder(config, ops, source, progress)
    else:
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        decoder = load_decoder(checkpoint, config, ops, progress)
    for what, kernel in sorted(ops.kernels.items()):
        log.debug("%s: %s", what, kernel)
    return Model(checkpoint, plan, ops, decoder, tokenizer)


def make_ops(device: str, activations: str) -> Ops:
    """The Ops of a device: our C++ on CPU where it is built, else torch (said in the log)."""
    if device in ("auto", "cpu"):
        reason = native_library.available()
        if reason is None:
            return native.NativeOps(activations=activations)
        log.warning("running on torch instead of the C++ kernels: %s", reason)
        device = "cpu"
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
