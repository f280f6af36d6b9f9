"""`halve upcycle`: a dense model as a sparse one, to be trained on."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from halve.api.progress import SILENT, Progress
from halve.api.workspace import refuse_existing
from halve.checkpoint import open_checkpoint, resolve
from halve.compress import Upcycling, upcycle_refusal
from halve.compress import upcycle as copy_experts
from halve.core.errors import ConfigError, OutputError
from halve.models import load_config
from halve.models.names import num_active_parameters, num_parameters


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
    seed: int = 0,
    progress: Progress = SILENT,
) -> Upcycled:
    """Write a Mixtral whose experts are copies of a dense model's feed-forwards; equal to it until it is trained on.

    width_divisor: an expert is the 1 / width_divisor of a feed-forward, whole copies are chosen. reinit: the share of
    each expert's neurons that is drawn anew; the model is then no longer equal.
    The directory appears whole or not at all. Raises ConfigError, CheckpointError, OutputError.
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
        try:
            with progress.task("experts", "tensors") as advance:
                made = copy_experts(checkpoint, config, partial, into, progress=advance)
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
