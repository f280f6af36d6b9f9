"""`halve upcycle`: a dense model as a sparse one, to be trained on."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from halve.api.progress import SILENT, Progress
from halve.api.workspace import refuse_existing
from halve.checkpoint import open_checkpoint, resolve
from halve.compress import upcycle as copy_experts
from halve.compress import upcycle_refusal
from halve.core.errors import ConfigError, OutputError
from halve.models import load_config
from halve.models.names import num_active_parameters, num_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycled:
    """What was written."""

    path: str
    experts: int
    active: int
    parameters: int
    active_parameters: int
    dense_parameters: int
    version: int = 1


def upcycle(
    model: str | Path, out: Path, *, experts: int, active: int, seed: int = 0, progress: Progress = SILENT
) -> Upcycled:
    """Write a Mixtral whose experts are copies of a dense model's feed-forwards; equal to it until it is trained on.

    The directory appears whole or not at all. Raises ConfigError, CheckpointError, OutputError.
    """
    out = Path(out)
    if out.exists():
        raise OutputError(f"{out}: is there already; name another directory, or remove it")
    with open_checkpoint(resolve(str(model))) as checkpoint:
        config = load_config(checkpoint)
        if reason := upcycle_refusal(checkpoint, config, experts, active):
            raise ConfigError(reason)
        refuse_existing(out, force=False)
        partial = out.with_name(f".{out.name}.partial")
        if partial.exists():
            raise OutputError(f"{partial}: another run's work; remove it if none is running")
        try:
            with progress.task("experts", "tensors") as advance:
                made = copy_experts(
                    checkpoint, config, partial, experts=experts, active=active, seed=seed, progress=advance
                )
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Upcycled(
            path=str(out),
            experts=experts,
            active=active,
            parameters=num_parameters(made),
            active_parameters=num_active_parameters(made),
            dense_parameters=num_parameters(config),
        )
