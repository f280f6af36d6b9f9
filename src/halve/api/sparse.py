"""`halve upcycle`: a dense model as a sparse one, to be trained on."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from halve.api.progress import SILENT, Progress
from halve.api.texts import window_of
from halve.api.workspace import refuse_existing
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.compress import CALIBRATION_TOKENS, Upcycling, cluster_routers, upcycle_refusal
from halve.compress import upcycle as copy_experts
from halve.core.errors import ConfigError, OutputError
from halve.data import encode, read_documents
from halve.kernels.ops import Array
from halve.models import CheckpointSource, ModelConfig, load_config
from halve.models.names import num_active_parameters, num_parameters
from halve.text import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycled:
    """What was written. equal: whether it computes what the dense model computes."""

    path: str
    experts: int
    active: int
    width_divisor: int
    reinit: float
    equal: bool
    parameters: int
    active_parameters: int
    dense_parameters: int
    version: int = 1


def upcycle(
    model: str | Path,
    out: Path,
    *,
    experts: int,
    active: int,
    width_divisor: int = 1,
    reinit: float = 0.0,
    cluster: str | Path | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Upcycled:
    """Write a Mixtral whose experts are copies of a dense model's feed-forwards; equal to it until it is trained on.

    width_divisor: an expert is the 1 / width_divisor of a feed-forward, whole copies are chosen. reinit: the share of
    each expert's neurons that is drawn anew; the model is then no longer equal. cluster: text, by whose clusters
    routers tell copies apart; without it they are random. The directory appears whole or not at all.
    Raises ConfigError, CheckpointError, DataError, OutputError.
    """
    out = Path(out)
    into = Upcycling(num_experts=experts, active=active, width_divisor=width_divisor, reinit=reinit, seed=seed)
    if out.exists():
        raise OutputError(f"{out}: is there already; name another directory, or remove it")
    with open_checkpoint(resolve(str(model))) as checkpoint:
        config = load_config(checkpoint)
        if reason := upcycle_refusal(checkpoint, config, into):
            raise ConfigError(reason)
        refuse_existing(out, force=False)
        partial = out.with_name(f".{out.name}.partial")
        if partial.exists():
            raise OutputError(f"{partial}: another run's work; remove it if none is running")
        rows = None
        if cluster is not None:
            documents = _spread(Path(cluster), checkpoint, config)
            source = CheckpointSource(checkpoint)
            rows = cluster_routers(config, source, documents, into.copies, window_tokens=window_of(config), seed=seed)
        try:
            with progress.task("experts", "tensors") as advance:
                made = copy_experts(checkpoint, config, partial, into, rows=rows, progress=advance)
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Upcycled(
            path=str(out),
            experts=experts,
            active=active,
            width_divisor=width_divisor,
            reinit=reinit,
            equal=reinit == 0,
            parameters=num_parameters(made),
            active_parameters=num_active_parameters(made),
            dense_parameters=num_parameters(config),
        )


def _spread(path: Path, checkpoint: Checkpoint, config: ModelConfig) -> list[Array]:
    """Windows from all over a text, as many as the clusters are made of, so that one long document is not all of it."""
    tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
    documents = encode(read_documents(path), tokenizer, vocab_size=config.vocab_size)
    size = window_of(config)
    windows = [ids[at : at + size] for ids in documents for at in range(0, len(ids), size)]
    most = -(-CALIBRATION_TOKENS // size)
    return windows if len(windows) <= most else [windows[i * len(windows) // most] for i in range(most)]
