"""What a search learns of a model, kept in the user's cache for the next limit: statistics, scores of every option.

It depends on the model and on the text it is shown, but not on the limit or the workload, so that another limit takes
seconds. Files are written whole or not at all; what is broken is made again, and that alone.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve import __version__
from halve.api.progress import Progress
from halve.api.texts import Texts
from halve.api.workspace import write_atomic
from halve.checkpoint import Checkpoint
from halve.compress import Energies, Hessians, Statistics, calibrate
from halve.core.cache import cache_folder
from halve.core.errors import ConfigError
from halve.core.plan import ActivationFormat, KVFormat, RoundingMethod
from halve.core.record import from_dict, from_json, parse_json, to_dict, to_json
from halve.evaluate import windows
from halve.evaluate.scorer import DecoderScorer
from halve.formats import Format
from halve.kernels.ops import Array
from halve.kernels.reference import TorchOps
from halve.kernels.rough import rough_ops
from halve.models import CheckpointSource, ModelConfig
from halve.models.names import num_parameters
from halve.search.fisher import fisher
from halve.search.sensitivity import Part, Score, Screen, Sensitivity, analyse, options_of, parts_of
from halve.search.settings import Setting, SettingLosses, measure_losses, settings_of
from halve.search.swaps import Swaps
from halve.search.tiers import tiered
from halve.search.uniform import MethodChoice

log = logging.getLogger("halve")

VERSION = 2  # of what is kept: raised when more is learned, or differently
FISHER_TOKENS = 4096  # of calibration text that run backward; half of them in large models
SWAP_TOKENS = 2048  # of selection text that swaps are measured on
SETTING_TOKENS, SETTING_WINDOW = 2048, 512  # of it that other roundings are weighed on: a cache's need a context
WINDOW = 128  # of both: many documents say more than long ones
LARGE = 200_000_000  # parameters: from here on nothing is swapped, and gptq is only taken when it is asked for
SCREEN_ROWS = 256  # of a large model's matrices that options are screened by
# Means of squares settle soon: a large model's are of a part of the text, in short windows of many documents.
LARGE_CALIBRATION_TOKENS, LARGE_WINDOW = 16_384, 512
KEEP_HESSIANS_BYTES = 1 << 29  # beyond it they lie with the run and go with it
KEEP_STUDIES = 8
SWAP_SHARE = 0.4  # of the time given


def is_large(config: ModelConfig) -> bool:
    """Whether a model is studied by a part of the text, and screened only."""
    return num_parameters(config) >= LARGE


def screen_tokens(config: ModelConfig) -> int:
    """Tokens that a model is screened on."""
    return FISHER_TOKENS // (2 if is_large(config) else 1)


@dataclass(frozen=True, kw_only=True)
class Studied:
    """statistics: for methods. sensitivity, settings: what can be chosen, and what it loses. whole: a layer's experts
    are all stored alike.
    """

    statistics: Statistics
    sensitivity: Sensitivity
    settings: tuple[Setting, ...]  # the usual one first
    whole: bool

    def parts(self, config: ModelConfig) -> tuple[list[Part], Sensitivity]:
        """What is chosen for at once, and the sensitivity that names it. config: of the model, or of one with other
        experts.
        """
        parts, energies = parts_of(config), self.statistics.energies
        if self.whole or energies is None:
            return parts, self.sensitivity
        return tiered(parts, self.sensitivity, energies.routed, screen_tokens(config))


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is studied."""

    checkpoint: Checkpoint
    config: ModelConfig  # of the original, with its cache in fp32
    source: Mapping[str, Format]
    method: MethodChoice
    portable: bool
    activations: tuple[ActivationFormat, ...]  # that plans may take, the usual first
    kv_caches: tuple[KVFormat, ...]
    device: str
    texts: Texts
    model_sha256: str

    def folder(self) -> Path | None:
        """Where its answers are kept; None where nothing is."""
        key = {
            "model": self.model_sha256,
            "calibration": self.texts.calibration_sha256,
            "selection": self.texts.selection_sha256,
            "window": self.texts.window_tokens,
            "method": self.method,
            "portable": self.portable,
            "device": self.device,
            "halve": __version__,
            "version": VERSION,
        }
        root = cache_folder("search")
        return (
            None if root is None else root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        )

    def method_for(self, fmt: Format) -> RoundingMethod:
        """How weights are rounded to a format: gptq below 8 bits, where the model is not large, unless told."""
        if self.method != "auto":
            return self.method
        return "gptq" if fmt.bits < 8 and not self.large else "clip"

    @property
    def large(self) -> bool:
        """Whether swaps and gptq would take more than the rest of the search."""
        return is_large(self.config)

    @property
    def needs_hessians(self) -> bool:
        """Whether any option is rounded by gptq."""
        return self.method == "gptq" or (self.method == "auto" and not self.large)


def study(
    question: Question, original: DecoderScorer, workspace: Path, progress: Progress, *, time_s: float | None = None
) -> Studied:
    """Calibrate, screen every option and measure the anchors, as far as it is not known already.

    workspace: the run's own directory, for what is not kept. time_s: that the whole search may take.
    """
    folder = question.folder() or workspace / "study"
    folder.mkdir(parents=True, exist_ok=True)
    _forget_old(folder)
    statistics = statistics_of(
        question.checkpoint,
        question.config,
        question.texts,
        question.device,
        folder,
        workspace,
        progress,
        hessians=question.needs_hessians,
    )
    parts = parts_of(question.config)
    options = {
        p.name: options_of(
            p, question.source, question.method_for, portable=question.portable, allowed=lambda fmt: True
        )
        for p in parts
    }
    scores_path = folder / "scores.json"
    known = _read_scores(scores_path, {name: {str(o) for o in found} for name, found in options.items()})
    if known.keys() >= options.keys():
        log.info("the sensitivities of this model are known: %s", scores_path)
    sensitivity = _analyse(question, original, statistics, parts, options, known, scores_path, progress, time_s)
    losses = _losses(question, original, folder / "settings.json", progress)
    settings = settings_of(losses, question.activations, question.kv_caches, question.config.num_layers)
    return Studied(statistics=statistics, sensitivity=sensitivity, settings=tuple(settings), whole=question.portable)


def _losses(question: Question, original: DecoderScorer, path: Path, progress: Progress) -> SettingLosses:
    """What roundings beside the weights lose, from disk as far as it is known there."""
    known = SettingLosses(activations={}, caches={})
    try:
        if path.exists():
            known = from_json(SettingLosses, path.read_text(encoding="utf-8"), str(path))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        log.warning("%s can't be read and is made again: %s", path, error)
    if known.missing(question.activations, question.kv_caches):
        size = min(SETTING_WINDOW, question.texts.window_tokens)
        most = SETTING_TOKENS // (2 if question.large else 1)
        text = first_tokens(question.texts.selection[::-1], most, size)
        source = CheckpointSource(question.checkpoint)
        with progress.task("Weighing other roundings", "formats") as advance:
            swaps = Swaps(original.decoder, source, text, device=question.device)
            found = measure_losses(
                swaps,
                question.config,
                question.activations,
                question.kv_caches,
                by_layer=not question.large,
                progress=advance,
            )
        known = SettingLosses(
            activations={**known.activations, **found.activations}, caches={**known.caches, **found.caches}
        )
        write_atomic(path, to_json(known))
    return known


def _analyse(
    question: Question,
    original: DecoderScorer,
    statistics: Statistics,
    parts: Sequence[Part],
    options: Mapping[str, Sequence[Any]],
    known: dict[str, list[Score]],
    scores_path: Path,
    progress: Progress,
    time_s: float | None,
) -> Sensitivity:
    source = CheckpointSource(question.checkpoint)
    large = question.large
    swapped = [] if large else first_tokens(question.texts.selection[::-1], SWAP_TOKENS)
    screen: Screen | None = None
    if not known.keys() >= options.keys():
        ops = rough_ops(question.device) if large else TorchOps(question.device)
        text = first_tokens(question.texts.calibration, screen_tokens(question.config))
        with progress.task("Weighing outputs", "layers") as advance:
            weighed = fisher(question.config, source, ops, text, progress=advance)
        if large:
            log.info("a large model: options are screened, and only whole plans are measured")
        swaps = None if large else Swaps(original.decoder, source, swapped, device=question.device)
        most_rows = SCREEN_ROWS if large else None
        screen = Screen(question.config, source, statistics, weighed, swaps, most_rows)
    kept = dict(known)

    def keep(name: str, scores: list[Score]) -> None:
        kept[name] = scores
        write_atomic(scores_path, json.dumps({name: to_dict(scores) for name, scores in kept.items()}))

    with progress.task("Scoring every option", "groups") as advance:
        return analyse(
            screen,
            parts,
            options,
            num_tokens=sum(map(len, swapped)),
            time_s=float("inf") if time_s is None else SWAP_SHARE * time_s,
            known=known,
            keep=keep,
            progress=advance,
        )


def statistics_of(
    checkpoint: Checkpoint,
    config: ModelConfig,
    texts: Texts,
    device: str,
    folder: Path,
    workspace: Path,
    progress: Progress,
    *,
    hessians: bool,
) -> Statistics:
    """Energies, and second moments where asked, from disk or by calibration; the energies are written last."""
    path = folder / "energies.npz"
    size = Hessians.size_bytes(config)
    found = Hessians(folder=(folder if size <= KEEP_HESSIANS_BYTES else workspace) / "hessians") if hessians else None
    done = None if found is None else found.folder / "done"
    if path.exists() and (done is None or done.exists()):
        try:
            return Statistics(energies=Energies.load(path), hessians=found)
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s can't be read and is made again: %s", path, error)
    if found is not None:
        shutil.rmtree(found.folder, ignore_errors=True)
        found.folder.mkdir(parents=True)
    documents, window_tokens = texts.calibration, texts.window_tokens
    if is_large(config) and found is None:
        window_tokens = min(LARGE_WINDOW, window_tokens)
        documents = first_tokens(documents, LARGE_CALIBRATION_TOKENS, window_tokens)
        log.info("a large model: its inputs are measured on %d tokens of the text", sum(map(len, documents)))
    with progress.task("Calibrating", "layers") as advance:
        energies = calibrate(
            config,
            CheckpointSource(checkpoint),
            documents,
            window_tokens=window_tokens,
            device=device,
            hessians=found,
            progress=advance,
        )
    temporary = path.with_suffix(".new.npz")
    energies.save(temporary)
    temporary.replace(path)
    if done is not None:
        done.touch()
    return Statistics(energies=energies, hessians=found)


def first_tokens(documents: Sequence[Array], most: int, size: int = WINDOW) -> list[Array]:
    """Windows of documents, so many tokens in all: the first of each document, then the second, so that all speak."""
    cut = [windows(document, size) for document in documents]
    turns = (parts[turn] for turn in range(max(map(len, cut), default=0)) for parts in cut if turn < len(parts))
    found: list[Array] = []
    left = most
    for window in turns:
        if left < 2:
            break
        found.append(window[:left])
        left -= len(found[-1])
    return found


def _read_scores(path: Path, expected: Mapping[str, set[str]]) -> dict[str, list[Score]]:
    """Scores of the parts whose options are the same; none from a broken file, which is said."""
    if not path.exists():
        return {}
    try:
        raw = parse_json(path.read_text(encoding="utf-8"), str(path))
        found = {name: [from_dict(Score, one) for one in scores] for name, scores in raw.items()}
    except (ConfigError, OSError, UnicodeDecodeError, AttributeError, TypeError) as error:
        log.warning("%s can't be read and is made again: %s", path, error)
        return {}
    return {n: scores for n, scores in found.items() if {str(s.choice) for s in scores} == expected.get(n)}


def _forget_old(folder: Path) -> None:
    """Keep the newest studies of the cache."""
    root = cache_folder("search")
    if root is None or folder.parent != root:
        return
    folder.touch()
    others = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in others[KEEP_STUDIES:]:
        shutil.rmtree(old, ignore_errors=True)
