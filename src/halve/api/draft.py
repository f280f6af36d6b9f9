"""Which guesses a loaded model makes: what was asked for, or what its plan says; and the draft model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from halve import __version__
from halve.api.bundle import read_plan
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.core.errors import ConfigError
from halve.core.plan import Plan, Speculation
from halve.kernels import native
from halve.kernels.ops import Ops
from halve.models import Decoder, ReadySource, load_config, load_decoder
from halve.text import Tokenizer


def choose_speculation(given: str | Speculation | None, plan: Plan, checkpoint: Checkpoint) -> Speculation:
    """From `off`, `ngram` or the place of a draft model; None is the plan's, where a path may be inside the bundle.

    Raises ConfigError for a draft that the plan names and that is nowhere.
    """
    if isinstance(given, Speculation):
        return given
    if given is None:
        chosen = plan.speculation
        if not chosen.path:
            return chosen
        beside = checkpoint.path / chosen.path
        if beside.is_dir():
            return replace(chosen, path=str(beside))
        if "/" not in chosen.path and not Path(chosen.path).is_dir():  # so that it is no ORG/NAME either
            raise ConfigError(
                f"{checkpoint.path}: its plan guesses by the draft {chosen.path!r}, which is not there; copy the whole "
                "bundle, or guess nothing (--speculate off): answers are the same"
            )
        return chosen
    if given in ("off", "none"):
        return Speculation()
    return Speculation(method="ngram") if given == "ngram" else Speculation(method="draft", path=given)


def load_draft(
    path: str,
    tokenizer: Tokenizer,
    vocab_size: int,
    make_ops: Callable[[str], Ops],
    *,
    keep: bool,
) -> Decoder:
    """The draft model of a model with this tokenizer and this many rows of its embedding.

    make_ops: the Ops for a format of activations. Raises ConfigError naming the draft when it belongs to other tokens.
    """
    checkpoint = open_checkpoint(resolve(path))
    plan = read_plan(checkpoint)
    config = load_config(checkpoint, plan)
    way_out = "take a draft made from the same model, such as `halve optimize MODEL --format int4-g32 -o DRAFT`"
    if config.vocab_size != vocab_size:
        raise ConfigError(
            f"draft {path}: its vocabulary has {config.vocab_size} tokens, the model's {vocab_size}; {way_out}"
        )
    if difference := tokenizer.difference(Tokenizer.from_directory(Path(checkpoint.path), vocab_size=vocab_size)):
        raise ConfigError(f"draft {path}: it has another tokenizer, {difference}; {way_out}")
    ops = make_ops(plan.activations.format)
    if isinstance(ops, native.NativeOps):
        with ReadySource(checkpoint, ops, version=__version__, keep=keep) as source:
            return Decoder(config, ops, source, None)
    return load_decoder(checkpoint, config, ops, None)
