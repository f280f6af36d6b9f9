"""The command line: four verbs, each of which makes its settings and runs them."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train_tiny
from halve.core.errors import UserError
from train_tiny.evaluate import EvaluateSettings, run_evaluate
from train_tiny.loss import Compute
from train_tiny.pack import PackSettings, run_pack
from train_tiny.tokenizer import TokenizerSettings, run_tokenizer
from train_tiny.train import TrainSettings, run_train

Parser = argparse.ArgumentParser
# Flag, field of ModelConfig, its type, what it is.
SHAPE: list[tuple[str, str, Callable[[str], int | float], str]] = [
    ("--vocab", "vocab_size", int, "vocabulary entries; default: the tokenizer's, else 8192"),
    ("--hidden", "hidden_size", int, "hidden size (256)"),
    ("--intermediate", "intermediate_size", int, "feed-forward size, of each expert (768)"),
    ("--layers", "num_layers", int, "layers (6)"),
    ("--heads", "num_heads", int, "attention heads (4)"),
    ("--kv-heads", "num_kv_heads", int, "key and value heads (2)"),
    ("--context", "context", int, "tokens per sequence (512)"),
    ("--rope-theta", "rope_theta", float, "base of the rotary embedding (10000)"),
    ("--experts", "num_experts", int, "experts per layer of a new model; 0 is dense (0)"),
    ("--top-k", "top_k", int, "experts per token (2)"),
    ("--aux-coef", "aux_coef", float, "weight of the load balance loss (0.01)"),
]


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns 0, or 1 with a line on stderr when the user can mend it (2: wrong usage, by argparse)."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> Parser:
    """The parser of all verbs."""
    top = Parser(prog="train_tiny", description=(train_tiny.__doc__ or "").splitlines()[0])
    verbs = top.add_subparsers(required=True, metavar="VERB")
    for name, add, text in (
        ("tokenizer", _add_tokenizer, "train a byte-level BPE tokenizer"),
        ("pack", _add_pack, "turn text into a stream of token ids"),
        ("train", _add_train, "train a model, from nothing or a checkpoint, or --resume an unfinished run"),
        ("evaluate", _add_evaluate, "loss, perplexity and bits per byte of a checkpoint, as JSON"),
    ):
        add(verbs.add_parser(name, help=text, description=text))
    return top


def _option(p: Parser, flag: str, default: int | float, text: str) -> None:
    p.add_argument(flag, type=type(default), default=default, metavar="N", help=f"{text} ({default})")


def _choice(p: Parser, flag: str, choices: tuple[str, ...], text: str) -> None:
    p.add_argument(flag, choices=choices, default=choices[0], help=f"{text} ({choices[0]})")


def _path(p: Parser, flag: str, text: str, required: bool = True) -> None:
    p.add_argument(flag, type=Path, required=required, metavar="PATH", help=text)


def _flag(p: Parser, flag: str, text: str) -> None:
    p.add_argument(flag, action="store_true", help=text)


def _add_tokenizer(p: Parser) -> None:
    p.add_argument("--text", nargs="+", required=True, type=Path, help="text, .gz, .xz (form feeds) or .jsonl files")
    _path(p, "--out", "folder to write")
    _option(p, "--vocab", 8192, "entries, 16 special tokens and 256 bytes included")
    _option(p, "--context", 512, "tokens; written down as model_max_length")
    _option(p, "--max-chars", 30_000_000, "characters to count merges on")
    _option(p, "--seed", 1, "of the sample")
    p.set_defaults(run=lambda args: run_tokenizer(TokenizerSettings(**_values(args, text=tuple(args.text)))))


def _add_pack(p: Parser) -> None:
    p.add_argument("--text", nargs="+", required=True, help="files as for tokenizer; 'file*3' takes one three times")
    _path(p, "--tokenizer", "folder that the verb tokenizer wrote")
    _path(p, "--out", "stream to write (.bin; a .json with counts goes beside it)")
    _option(p, "--chat", 0.0, "share of the possible story conversations to add")
    _flag(p, "--keep-order", "whole documents in file order (valid, test)")
    _option(p, "--seed", 1, "of the order and the conversations")
    p.set_defaults(run=lambda args: run_pack(PackSettings(**_values(args, text=tuple(args.text)))))


def _values(args: argparse.Namespace, **changed: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "run"} | changed


def _add_compute(p: Parser) -> None:
    _choice(p, "--device", ("cpu", "cuda"), "where to compute")
    _choice(p, "--dtype", ("bf16", "fp32"), "of matrix products")
    _option(p, "--loss-chunk", 1024, "rows of logits held at once")
    _option(p, "--eval-batch", 16, "windows evaluated at once")


def _compute(args: argparse.Namespace) -> Compute:
    return Compute(device=args.device, dtype=args.dtype, loss_chunk=args.loss_chunk, eval_batch=args.eval_batch)


def _add_train(p: Parser) -> None:
    _path(p, "--data", "stream that pack wrote")
    _path(p, "--valid", "stream to measure the loss on, in order", required=False)
    _path(p, "--tokenizer", "folder to copy the tokenizer from; its vocabulary is checked", required=False)
    _path(p, "--out", "folder to write")
    _flag(p, "--resume", "go on with the unfinished run in --out")
    _path(p, "--init-from", "checkpoint to start from, dense or sparse", required=False)
    for flag, field, kind, text in SHAPE:
        p.add_argument(flag, dest=field, type=kind, default=argparse.SUPPRESS, metavar="N", help=text)
    _add_compute(p)
    _add_schedule(p)
    _option(p, "--save-minutes", 4.0, "between checkpoints")
    _option(p, "--valid-tokens", 32768, "of --valid, for checkpoints on the way; 0 takes all")
    _option(p, "--log-every", 10, "steps between lines of log.jsonl")
    _flag(p, "--compile", "torch.compile the model; the first step is slow")
    _option(p, "--seed", 1, "of weights and order")
    p.set_defaults(run=lambda args: run_train(train_settings(args)))


def _add_schedule(p: Parser) -> None:
    _option(p, "--batch", 16, "sequences per forward pass")
    _option(p, "--accumulate", 1, "forward passes per step")
    _choice(p, "--optimizer", ("muon", "adamw"), "of the matrices inside blocks")
    _option(p, "--muon-lr", 0.02, "peak learning rate of Muon")
    _option(p, "--adam-lr", 3e-3, "peak learning rate of AdamW")
    _option(p, "--router-lr", 3e-3, "peak learning rate of AdamW on routers; 0 leaves them as they are")
    _option(p, "--z-coef", 0.001, "weight of the routers' z-loss")
    _option(p, "--weight-decay", 0.02, "of Muon's matrices")
    _option(p, "--clip", 1.0, "largest norm of the gradient")
    _option(p, "--warmup", 0.02, "share of the run")
    _option(p, "--decay", 0.5, "share of the run")
    _option(p, "--tokens", 0.0, "stop after this many; a clock of the schedule")
    _option(p, "--minutes", 0.0, "stop after this long; a clock of the schedule")
    _option(p, "--max-steps", 0, "stop after this many; the clock where no other is given")


def train_settings(args: argparse.Namespace) -> TrainSettings:
    """Settings of `train` from its parsed command line."""
    given = vars(args)
    fields = {field for _, field, _, _ in SHAPE}
    apart = {"run", "device", "dtype", "loss_chunk", "eval_batch"}
    plain = {name: value for name, value in given.items() if name not in apart | fields}
    record = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if name != "run"}
    shape = {name: given[name] for name in sorted(fields & given.keys())}
    return TrainSettings(**plain, compute=_compute(args), shape=shape, record=record)


def _add_evaluate(p: Parser) -> None:
    _path(p, "--model", "folder that train wrote")
    p.add_argument("--text", nargs="+", required=True, type=Path, help="files as for tokenizer")
    _add_compute(p)
    _flag(p, "--rtn", "also round to nearest at 8, 4 and 3 bits, on the first text")
    _option(p, "--rtn-tokens", 65536, "of the first text, for each rounding")
    p.set_defaults(run=lambda args: run_evaluate(evaluate_settings(args)))


def evaluate_settings(args: argparse.Namespace) -> EvaluateSettings:
    """Settings of `evaluate` from its parsed command line."""
    return EvaluateSettings(
        compute=_compute(args), model=args.model, text=tuple(args.text), rtn=args.rtn, rtn_tokens=args.rtn_tokens
    )
