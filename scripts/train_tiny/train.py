"""The verb `train`: a run that ends on time with its learning rate at zero, and that can be resumed.

The schedule's clock is tokens or minutes (whichever is further), so that a run on a shared machine still ends well.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halve.core.errors import ConfigError, DataError, OutputError, TextError
from train_tiny.checkpoint import STATE, load_model, load_state, save_model, save_state
from train_tiny.files import make_folder
from train_tiny.loss import Compute, Forward, batch_loss, stream_loss
from train_tiny.model import Llama, ModelConfig
from train_tiny.optimizer import lr_factor, make_optimizers, set_schedule
from train_tiny.pack import open_stream
from train_tiny.tokenizer import open_tokenizer

# What may change of a checkpoint to start from, since no weight has a shape by it.
ROUTING = ("top_k", "aux_coef")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """One run. shape: the ModelConfig fields that were given; the others keep their defaults."""

    compute: Compute
    data: Path
    valid: Path | None
    tokenizer: Path | None
    out: Path
    resume: bool
    init_from: Path | None
    shape: Mapping[str, Any]
    batch: int  # sequences per forward pass
    accumulate: int  # forward passes per step
    optimizer: str
    muon_lr: float
    adam_lr: float
    router_lr: float
    z_coef: float  # weight of the routers' z-loss
    weight_decay: float
    clip: float
    warmup: float  # share of the run
    decay: float  # share of the run
    tokens: float
    minutes: float
    max_steps: int
    save_minutes: float
    valid_tokens: int
    log_every: int
    compile: bool
    seed: int
    record: Mapping[str, Any]  # the command line, for training.json

    def __post_init__(self) -> None:
        if not (self.minutes or self.tokens or self.max_steps):
            raise ConfigError("give --minutes, --tokens or --max-steps, else the run never stops")
        for name in (
            "minutes",
            "tokens",
            "max_steps",
            "valid_tokens",
            "z_coef",
            "weight_decay",
            "router_lr",
            "save_minutes",
        ):
            self._require(name, getattr(self, name) >= 0, "must be 0 or more")
        for name in ("batch", "accumulate", "log_every"):
            self._require(name, getattr(self, name) >= 1, "must be 1 or more")
        for name in ("muon_lr", "adam_lr", "clip"):
            self._require(name, getattr(self, name) > 0, "must be more than 0")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > 1:
            raise ConfigError(f"--warmup {self.warmup} and --decay {self.decay}: shares of the run, together at most 1")
        if self.init_from and (fixed := sorted(self.shape.keys() - set(ROUTING))):
            raise ConfigError(
                f"{fixed}: the checkpoint of --init-from has its own; leave them out (`halve upcycle` gives a dense "
                "one experts)"
            )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: {rule}")

    def must_match(self, config: ModelConfig, num_tokens: int) -> dict[str, Any]:
        """What a resumed run shares with the one it continues; the rest (out, clock, logging) may change."""
        names = ["batch", "accumulate", "optimizer", "muon_lr", "adam_lr", "weight_decay", "clip", "warmup", "decay"]
        names += ["router_lr", "z_coef"] if config.num_experts else []
        own = {name: getattr(self, name) for name in names}
        run = {"seed": self.seed, "dtype": self.compute.dtype, "num_data_tokens": num_tokens}
        return own | run | asdict(config)


class Batches:
    """Windows of a token stream in a fresh random order each epoch, from a random offset."""

    def __init__(self, data: NDArray[np.uint16], context: int, batch: int, seed: int) -> None:
        # The offset shifts a window by less than a context, so one context more is needed than the batch takes.
        if len(data) < (batch + 1) * context + 1:
            raise DataError(
                f"the stream has {len(data)} tokens; a batch of {batch} windows of {context} needs "
                f"{(batch + 1) * context + 1}: give more text, a smaller --batch or --context"
            )
        self.data, self.context, self.batch = data, context, batch
        self.rng = np.random.default_rng(seed)
        self.order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.epoch = -1

    def next(self, device: str) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [batch, context]; targets are one token ahead."""
        if len(self.order) < self.batch:
            offset = int(self.rng.integers(self.context))
            count = (len(self.data) - offset - 1) // self.context
            self.order = self.rng.permutation(count) * self.context + offset
            self.epoch += 1
        take, self.order = self.order[: self.batch], self.order[self.batch :]
        rows = np.stack([self.data[i : i + self.context + 1] for i in take]).astype(np.int64)
        ids = torch.from_numpy(rows)
        if device == "cuda":
            ids = ids.pin_memory().to(device, non_blocking=True)
        return ids[:, :-1], ids[:, 1:]

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"rng": self.rng.bit_generator.state, "order": torch.from_numpy(self.order.copy()), "epoch": self.epoch}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.rng.bit_generator.state = state["rng"]
        self.order, self.epoch = state["order"].cpu().numpy(), state["epoch"]


def make_model(settings: TrainSettings) -> Llama:
    """A new model, or the one to start from. Raises TextError when the tokenizer has another vocabulary."""
    size = open_tokenizer(settings.tokenizer).get_vocab_size() if settings.tokenizer else None
    if settings.init_from:
        model = load_model(settings.init_from)
        routing = settings.shape
        model.set_routing(routing.get("top_k", model.config.top_k), routing.get("aux_coef", model.config.aux_coef))
    else:
        model = Llama(ModelConfig(**{**({"vocab_size": size} if size else {}), **settings.shape}))
    if size not in (None, model.config.vocab_size):
        raise TextError(
            f"the model has {model.config.vocab_size} vocabulary entries, {settings.tokenizer} has {size}; "
            "leave out --vocab, or give the tokenizer that the model was trained with"
        )
    return model


class Run:
    """A training run; `execute` is the whole of it."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        if settings.compute.device == "cuda":
            torch.set_float32_matmul_precision("high")
        self._check_out()
        self.model = make_model(settings).to(settings.compute.device)
        config = self.model.config
        data = open_stream(settings.data, config.vocab_size)
        self.batches = Batches(data, config.context, settings.batch, settings.seed)
        self.valid = open_stream(settings.valid, config.vocab_size) if settings.valid else None
        self.body: Forward = torch.compile(self.model.model, dynamic=False) if settings.compile else self.model.model
        self.optimizers = make_optimizers(
            self.model,
            name=settings.optimizer,
            muon_lr=settings.muon_lr,
            adam_lr=settings.adam_lr,
            router_lr=settings.router_lr,
            weight_decay=settings.weight_decay,
        )
        self.fixed = settings.must_match(config, len(data))
        self.tokens_per_step = settings.batch * settings.accumulate * config.context
        self.step, self.seen = 0, 0
        self.before_s = 0.0  # what earlier pieces of a resumed run took
        self.loss = torch.zeros(())
        make_folder(settings.out)
        if settings.resume:
            self._restore()
        self.start = time.monotonic()

    def _check_out(self) -> None:
        out = self.settings.out
        if self.settings.resume:
            return
        if (out / STATE).exists():
            raise OutputError(f"{out} holds an unfinished run; --resume continues it, another --out leaves it alone")
        if (out / "model.safetensors").exists():
            raise OutputError(f"{out} holds a finished checkpoint; choose another --out, or remove it")

    def _restore(self) -> None:
        state = load_state(self.settings.out, self.settings.compute.device)
        differ = {k: (v, self.fixed.get(k)) for k, v in state["settings"].items() if self.fixed.get(k) != v}
        if differ:
            said = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in differ.items())
            raise ConfigError(f"--resume: {said}; repeat the first command, or start anew with --init-from")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.batches.restore(state["batches"])
        self.step, self.seen, self.before_s = state["step"], state["seen"], state["elapsed_s"]
        self._drop_log_after(self.step)

    def _drop_log_after(self, step: int) -> None:
        # A killed run logged steps that its state does not have; the resumed one takes them again.
        path = self.settings.out / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(x for x in lines if json.loads(x).get("step", 0) <= step), encoding="utf-8")

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run, earlier pieces included."""
        return self.before_s + time.monotonic() - self.start

    def progress(self) -> float:
        """Share of the run that is done, by the clock that is further; steps count where no other clock is given."""
        settings = self.settings
        by_minutes = self.elapsed_s / (settings.minutes * 60) if settings.minutes else 0.0
        by_tokens = self.seen / settings.tokens if settings.tokens else 0.0
        by_steps = self.step / settings.max_steps if not (settings.minutes or settings.tokens) else 0.0
        return max(by_minutes, by_tokens, by_steps)

    def execute(self) -> None:
        """Train until the clock says so, save, and say how it went."""
        settings = self.settings
        self._emit(params=self.model.num_parameters, tokens_per_step=self.tokens_per_step)
        last_save = last_log = time.monotonic()
        seen_log = self.seen
        while (progress := self.progress()) < 1.0 and not (settings.max_steps and self.step >= settings.max_steps):
            factor = lr_factor(progress, settings.warmup, settings.decay)
            routers, norm = self._update(factor)
            if self.step % settings.log_every == 0 or self.step == 1:
                now = time.monotonic()
                rate = round((self.seen - seen_log) / max(now - last_log, 1e-9))
                last_log, seen_log = now, self.seen
                row = {"loss": self._finite_loss(), "aux": float(routers[0]), "z": float(routers[1])}
                row |= {"norm": float(norm), "lr": factor}
                row |= {"tok_s": rate, "epoch": self.batches.epoch, "done": round(progress, 4)}
                self._emit(step=self.step, tokens=self.seen, **row)
            if time.monotonic() - last_save > settings.save_minutes * 60:
                self._save(whole_valid=False)
                self._save_state()
                last_save = last_log = time.monotonic()
                seen_log = self.seen
        self._finish()

    def _update(self, factor: float) -> tuple[Tensor, Tensor]:
        """One step of the optimizers. Returns the routers' losses and the gradient's norm before clipping."""
        set_schedule(self.optimizers, factor, self.step)
        accumulate = self.settings.accumulate
        device = self.settings.compute.device
        coefficients = torch.tensor([self.model.config.aux_coef, self.settings.z_coef], device=device)
        self.loss, router_sum = torch.zeros((), device=device), torch.zeros(2, device=device)
        for _ in range(accumulate):
            x, y = self.batches.next(device)
            loss, routers = batch_loss(self.model, self.body, x, y, self.settings.compute)
            ((loss + coefficients @ routers) / accumulate).backward()  # type: ignore[no-untyped-call]
            self.loss = self.loss + loss.detach() / accumulate
            router_sum = router_sum + routers.detach() / accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.seen = self.step + 1, self.seen + self.tokens_per_step
        return router_sum, norm

    def _finite_loss(self) -> float:
        loss = float(self.loss)
        if not math.isfinite(loss):
            raise ConfigError(f"loss is {loss} at step {self.step}; lower --muon-lr or --adam-lr")
        return loss

    def _save(self, whole_valid: bool) -> None:
        self._finite_loss()
        record = {"num_params": self.model.num_parameters, "tokens_seen": self.seen, "args": dict(self.settings.record)}
        if self.valid is not None:
            total, count = stream_loss(
                self.model, self.valid, self.settings.compute, 0 if whole_valid else self.settings.valid_tokens
            )
            if count == 0:
                raise DataError(f"{self.settings.valid}: holds no two tokens to predict from each other")
            record["valid_loss"] = total / count
            self._emit(step=self.step, tokens=self.seen, valid_loss=total / count, whole=whole_valid)
        save_model(self.model, self.settings.out, self.settings.tokenizer, record)

    def _save_state(self) -> None:
        state = {
            "settings": self.fixed,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "batches": self.batches.state(),
            "step": self.step,
            "seen": self.seen,
            "elapsed_s": self.elapsed_s,
        }
        save_state(self.settings.out, state)

    def _finish(self) -> None:
        self._save(whole_valid=True)
        finished = self.progress() >= 1.0
        if finished:
            (self.settings.out / STATE).unlink(missing_ok=True)
        else:
            self._save_state()
        self._emit(finished=finished, minutes=self.elapsed_s / 60, tokens=self.seen)
        print(f"-> {self.settings.out}" + ("" if finished else "; --resume continues"))

    def _emit(self, **row: Any) -> None:
        with (self.settings.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def run_train(settings: TrainSettings) -> None:
    """Train a model and write its folder, log and (while unfinished) state."""
    Run(settings).execute()
