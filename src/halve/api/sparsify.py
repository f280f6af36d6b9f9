"""`halve sparsify`: a dense model as a sparse one, and whether that was worth it.

The verdict is measured beside what else the same bytes a token could buy: the dense model in one format, by the same
rounding, on the same sealed text.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halve.api.certify import served_device
from halve.api.clock import witnessed
from halve.api.model import load, torch_ops
from halve.api.progress import SILENT, Progress
from halve.api.scorers import original_scorer, reload
from halve.api.texts import Texts, prepare_texts
from halve.api.trial import RUNS, run_once, speed_of
from halve.api.workloads import seconds_of
from halve.api.workspace import refuse_existing
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.compress import (
    Energies,
    LayerFacts,
    Recovery,
    apply_plan,
    calibrate,
    recover,
    sparsify_refusal,
    split_layers,
    split_of,
    target_of,
    trained_gains,
    write_sparse,
)
from halve.compress.distil import FULL_PARAMETERS
from halve.compress.experts import SplitFeedForward
from halve.compress.sparsify import CALIBRATION_TOKENS, NATIVE
from halve.core.certificate import Measured
from halve.core.errors import ConfigError, OutputError
from halve.core.units import format_bytes
from halve.data import encode, read_documents
from halve.data.overlap import Fingerprint, require_unseen
from halve.evaluate import compare, quality
from halve.evaluate.scorer import DecoderScorer
from halve.formats import Format
from halve.hardware import free_memory_bytes
from halve.kernels.ops import Array
from halve.models import CheckpointSource, ModelConfig, load_config, stored_formats
from halve.models.names import num_active_parameters, num_parameters
from halve.models.sizes import bytes_per_token
from halve.search import Candidate, uniform_candidates
from halve.text import Tokenizer

log = logging.getLogger("halve")

CONFIDENCE = 0.95
FOUR_BITS = "int4-g32"
SEALED_TOKENS = 40_000  # that verdicts are read from
RECOVER_WINDOW = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model that was measured. bytes_per_token: of weights, that a decoded token reads; of_dense: as a share of
    the dense model's. ppl_ratio, kl: against the dense model, as it is; both null for itself.
    """

    name: str
    kind: Literal["dense", "sparse"]
    format: str
    bytes_per_token: int
    of_dense: float
    perplexity: float
    ppl_ratio: Measured | None
    kl: Measured | None
    decode_tok_s: Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsified:
    """What was written, and what it is worth. better: dense, where a dense model of one format loses less at no more
    bytes a token, in each of the comparisons that verdict tells.
    """

    path: str
    architecture: str
    native: bool  # only Halve loads it
    experts: int
    active: int
    shared: int
    active_share: float  # of the neurons of feed-forwards
    parameters: int
    active_parameters: int
    dense_parameters: int
    layers: tuple[LayerFacts, ...]
    recovery: Recovery | None
    rows: tuple[Row, ...]
    better: Literal["dense", "sparse", "mixed"]
    verdict: str
    version: int = 1


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    experts: int = 8,
    active: int = 2,
    shared: int = 0,
    recover_on: str | Path | None = None,
    recover_steps: int = 400,
    recover_time: str | None = None,
    calibration: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Sparsified:
    """Cut a dense model's feed-forwards into experts, write the result to `out`, and measure it.

    experts: equal slices of each feed-forward; shared of them run for every token, and `active` of the others. The
    result is a Mixtral, a Qwen2-MoE (with shared experts) or a Qwen3-MoE where one of these has the model's attention,
    else of a family of Halve's own. recover_on: text to distil on from the dense model, until recover_steps are done or
    recover_time is over; calibration: text as for `optimize`, without it the package's; what is judged on is sealed
    from both. The directory appears whole or not at all. Raises ConfigError, CheckpointError, DataError, OutputError.
    """
    out = Path(out)
    time_s = None if recover_time is None else seconds_of(recover_time, "recover_time")
    if recover_on is None and recover_time is not None:
        raise ConfigError("recover_time: there is nothing to recover on; give text by --recover")
    if recover_steps < 1:
        raise ConfigError(f"recover_steps: {recover_steps} must be at least 1; leave out --recover to train nothing")
    with open_checkpoint(resolve(str(model))) as checkpoint:
        config = load_config(checkpoint).with_kv_format("fp32")
        if reason := sparsify_refusal(checkpoint, config):
            raise ConfigError(reason)
        split = split_of(config, experts=experts, active=active, shared=shared)
        name = target_of(config, split)
        refuse_existing(out, force=False)
        torch_ops(device)
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        texts = prepare_texts(None if calibration is None else Path(calibration), tokenizer, config, selected=False)
        lessons = None if recover_on is None else _lessons(Path(recover_on), tokenizer, config, texts)
        partial = out.with_name(f".{out.name}.partial")
        if partial.exists():
            raise OutputError(f"{partial}: another run's work; remove it if none is running")
        partial.mkdir(parents=True)
        try:
            bench = _Bench(checkpoint, config, texts, device, progress)
            with progress.task("Cutting feed-forwards", "layers") as advance:
                cut = split_layers(
                    config,
                    CheckpointSource(checkpoint),
                    texts.calibration,
                    split,
                    window_tokens=texts.window_tokens,
                    device=device,
                    progress=advance,
                )
                facts: list[LayerFacts] = []
                kept: list[SplitFeedForward] = []
                layers = _noted(cut, facts, None if lessons is None else kept)
                made = write_sparse(checkpoint, config, split, layers, partial / "model")
            share = f"{split.share:.3g}".rstrip("0") if split.share < 1 else "1"
            bench.add(f"sparse, {share} active", "sparse", partial / "model")
            recovery = None
            if lessons is not None:
                shutil.move(partial / "model", partial / "before")
                bench.moved(partial / "model", partial / "before")
                with progress.task("Recovering", "steps") as advance:
                    layers_after, gains, final, recovery = recover(
                        bench.original.decoder,
                        kept,
                        lessons,
                        window_tokens=min(RECOVER_WINDOW, texts.window_tokens),
                        steps=recover_steps,
                        seconds=time_s,
                        seed=seed,
                        progress=advance,
                    )
                write_sparse(
                    checkpoint, config, split, iter(layers_after), partial / "model", trained_gains(gains, final)
                )
                bench.add(f"sparse, {share} active, recovered", "sparse", partial / "model")
            rows = bench.finished(partial, made)
            better, verdict = verdict_of(rows)
            (partial / "model").replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Sparsified(
        path=str(out),
        architecture=name,
        native=name == NATIVE,
        experts=split.experts,
        active=split.active,
        shared=split.shared,
        active_share=split.share,
        parameters=num_parameters(made),
        active_parameters=num_active_parameters(made),
        dense_parameters=num_parameters(config),
        layers=tuple(facts),
        recovery=recovery,
        rows=rows,
        better=better,
        verdict=verdict,
    )


def _noted(
    cut: Iterator[tuple[SplitFeedForward, LayerFacts]], facts: list[LayerFacts], kept: list[SplitFeedForward] | None
) -> Iterator[SplitFeedForward]:
    for made, fact in cut:
        facts.append(fact)
        if kept is not None:
            kept.append(made)
        yield made


def _lessons(path: Path, tokenizer: Tokenizer, config: ModelConfig, texts: Texts) -> list[Array]:
    """The text to recover on, in tokens. Raises DataError where it holds what the verdict is read from, ConfigError
    where training would not fit into memory.
    """
    parameters = num_parameters(config)
    # Weights of both models in float32, and in small ones gradients and Adam's moments of all.
    needed = 4 * parameters * (4 if parameters <= FULL_PARAMETERS else 2)
    free = free_memory_bytes()
    if free is not None and needed > free:
        raise ConfigError(
            f"--recover: training takes {format_bytes(needed)} of memory, {format_bytes(free)} are free; leave it out, "
            "or run on a larger machine"
        )
    documents = read_documents(path)
    require_unseen(texts.sealed_documents, Fingerprint.of(documents), "sealed text that the verdict is read from")
    return encode(documents, tokenizer, vocab_size=config.vocab_size)


@dataclass
class _Entry:
    name: str
    kind: Literal["dense", "sparse"]
    format: str
    path: Path
    bytes_per_token: int
    perplexity: float
    ppl_ratio: Measured | None
    kl: Measured | None


class _Bench:
    """Measures one model after another against the dense one."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, texts: Texts, device: str, progress: Progress
    ) -> None:
        self.checkpoint, self.config, self.texts, self.device = checkpoint, config, texts, device
        self.progress = progress
        self.original = original_scorer(checkpoint, config, device)
        self.sealed = _first(texts.sealed, SEALED_TOKENS)
        self.entries: list[_Entry] = []
        self.dense_bytes = bytes_per_token(config, stored_formats(checkpoint, config))

    def add(self, name: str, kind: Literal["dense", "sparse"], path: Path) -> _Entry:
        """Measure the model in a directory."""
        with (
            open_checkpoint(path) as made,
            self.progress.task(f"Measuring {name}", "tokens") as advance,
        ):
            decoder = reload(made, self.device)
            scores = compare(
                self.original,
                DecoderScorer(decoder),
                self.sealed,
                window_tokens=self.texts.window_tokens,
                progress=advance,
            )
            stored = stored_formats(made, load_config(made))
            size = bytes_per_token(decoder.config, stored)
        found = quality(scores, confidence=CONFIDENCE)
        if not self.entries:
            own = math.exp(float(scores.nll_original.mean()))
            word = _format_of(stored_formats(self.checkpoint, self.config).values())
            self.entries.append(_Entry("dense", "dense", word, self.checkpoint.path, self.dense_bytes, own, None, None))
        entry = _Entry(
            name,
            kind,
            _format_of(stored.values()),
            path,
            size,
            math.exp(float(scores.nll_smaller.mean())),
            found.ppl_ratio,
            found.kl_mean,
        )
        self.entries.append(entry)
        return entry

    def moved(self, before: Path, after: Path) -> None:
        """A directory that was measured has another name now."""
        for entry in self.entries:
            if entry.path == before:
                entry.path = after

    def finished(self, folder: Path, made: ModelConfig) -> tuple[Row, ...]:
        """Measure what the same bytes buy otherwise, and all speeds."""
        sparse = self.entries[-1]
        plans = uniform_candidates(self.config, stored_formats(self.checkpoint, self.config), portable=False)
        four = next((c for c in plans if c.format == FOUR_BITS), plans[len(plans) // 2])
        wanted = {four.format: four}
        with open_checkpoint(folder / "model") as checkpoint:
            own = {c.format: c for c in uniform_candidates(made, stored_formats(checkpoint, made), portable=False)}
            rounded = None
            if four.format in own:
                self._round(checkpoint, made.with_kv_format("fp32"), own[four.format], folder / "sparse-rounded")
                rounded = self.add(f"{sparse.name}, {four.format}", "sparse", folder / "sparse-rounded")
        for entry in (sparse, rounded):
            if entry is not None and (rival := _largest_within(plans, entry.bytes_per_token)) is not None:
                wanted[rival.format] = rival
        energies = None
        for candidate in wanted.values():
            path = folder / f"dense-{candidate.format}"
            energies = self._round(self.checkpoint, self.config, candidate, path, energies)
            self.add(f"dense, {candidate.format}", "dense", path)
        speeds = self._speeds()
        return tuple(
            Row(
                name=entry.name,
                kind=entry.kind,
                format=entry.format,
                bytes_per_token=entry.bytes_per_token,
                of_dense=entry.bytes_per_token / self.dense_bytes,
                perplexity=entry.perplexity,
                ppl_ratio=entry.ppl_ratio,
                kl=entry.kl,
                decode_tok_s=speed,
            )
            for entry, speed in zip(self.entries, speeds, strict=True)
        )

    def _round(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        candidate: Candidate,
        path: Path,
        energies: Energies | None = None,
    ) -> Energies:
        """Write a model in one format, as `optimize` would; returns the energies of its inputs."""
        if energies is None:
            with self.progress.task("Calibrating", "layers") as advance:
                energies = calibrate(
                    config,
                    CheckpointSource(checkpoint),
                    _first(self.texts.calibration, CALIBRATION_TOKENS),
                    window_tokens=self.texts.window_tokens,
                    device=self.device,
                    progress=advance,
                )
        with self.progress.task(f"Writing {candidate.format}", "matrices") as advance:
            apply_plan(checkpoint, config, candidate.plan, path, energies=energies, progress=advance)
        return energies

    def _speeds(self) -> list[Measured | None]:
        """Decoded tokens a second of every model, taken in turns; None where they don't fit into memory together."""
        size = 0
        for entry in self.entries:
            with open_checkpoint(entry.path) as checkpoint:
                size += checkpoint.weight_bytes
        free = free_memory_bytes()
        if free is not None and size > free // 2:
            log.warning("speeds are not measured: the models to compare do not fit into memory side by side")
            return [None] * len(self.entries)
        device = served_device(self.device)
        models = [load(entry.path, device=device, keep=False) for entry in self.entries]
        times: list[list[tuple[float, float]]] = [[] for _ in models]
        with witnessed(), self.progress.task("Measuring speed", "runs") as advance:
            for done in range(RUNS + 1):
                for model, taken in zip(models, times, strict=True):
                    taken.append(run_once(model, seed=done))
                advance(done, RUNS)
        for model in models:
            model.close()
        return [speed_of(taken[1:]).decode_tok_s for taken in times]


def _first(documents: Sequence[Array], most: int) -> list[Array]:
    """As many documents as hold so many tokens."""
    found, count = [], 0
    for document in documents:
        found.append(document)
        count += len(document)
        if count >= most:
            break
    return found


def _format_of(formats: Iterable[Format]) -> str:
    """The one format of a model, or all of them."""
    return "+".join(sorted({fmt.name for fmt in formats}))


def _largest_within(plans: Sequence[Candidate], size: int) -> Candidate | None:
    """Of plans, cheapest first, the dearest that reads no more bytes a token."""
    fitting = [c for c in plans if c.bytes_per_token <= size]
    return fitting[-1] if fitting else None


def verdict_of(rows: Sequence[Row]) -> tuple[Literal["dense", "sparse", "mixed"], str]:
    """Each sparse model beside the best dense one that reads no more bytes, in words.

    Of two sparse rows in one format the later, recovered, one counts. One is better where its KL is lower by more than
    both intervals; what no dense format reads as little as has no rival, and stands for sparse.
    """
    last = {row.format: row for row in rows if row.kind == "sparse"}
    said, winners = [], set()
    for row in last.values():
        rivals = [r for r in rows if r.kind == "dense" and r.kl and r.bytes_per_token <= row.bytes_per_token]
        assert row.kl is not None
        own = f"{row.name} ({row.format}) reads {row.of_dense:.2f} of the dense model's bytes a token at KL " + _shown(
            row.kl
        )
        if not rivals:
            winners.add("sparse")
            said.append(f"{own}; no dense model of one format that was tried reads as little")
            continue
        rival = min(rivals, key=lambda r: r.kl.value if r.kl else math.inf)
        assert rival.kl is not None
        other = f"{rival.name} reads {rival.of_dense:.2f} at KL {_shown(rival.kl)}"
        if rival.kl.high < row.kl.low:
            winners.add("dense")
            said.append(f"dense is better: {own}, {other}{_speed_words(row, rival)}")
        elif row.kl.high < rival.kl.low:
            winners.add("sparse")
            said.append(f"sparse is better: {own}, {other}{_speed_words(row, rival)}")
        else:
            winners.add("neither")
            said.append(f"no difference was found: {own}, {other}{_speed_words(row, rival)}")
    better: Literal["dense", "sparse", "mixed"] = "mixed"
    if winners == {"dense"}:
        better = "dense"
    elif winners == {"sparse"}:
        better = "sparse"
    return better, ". ".join(s[0].upper() + s[1:] for s in said) + "."


def _shown(kl: Measured) -> str:
    return f"{kl.value:.3g} [{kl.low:.3g}, {kl.high:.3g}]"


def _speed_words(row: Row, rival: Row) -> str:
    if row.decode_tok_s is None or rival.decode_tok_s is None:
        return ""
    return f", at {rival.decode_tok_s.value / row.decode_tok_s.value:.1f} times its tokens a second here"
