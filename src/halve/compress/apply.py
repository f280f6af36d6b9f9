"""Carry a plan out: read a tensor, round it, write it, forget it. Memory holds one matrix at a time."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halve.checkpoint import (
    Checkpoint,
    TensorWriter,
    quantization_config,
    weight_specs,
    weight_tensors,
)
from halve.compress.calibrate import Energies, Hessians
from halve.compress.resolve import Assignment, resolve
from halve.compress.rounding import relative_error, round_weight
from halve.core.errors import CheckpointError, OutputError, PlanError
from halve.core.plan import Plan
from halve.formats import Format, Weight
from halve.kernels.ops import Array
from halve.models.config import ModelConfig
from halve.models.load import stored_formats
from halve.models.names import EMBEDDING, vectors

PLAN_FILE = "halve/plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """What became of one module. relative_error: of its output, see `rounding.relative_error`; 0 if left alone."""

    name: str
    group: str
    parameters: int
    format_before: str
    bytes_before: int
    format_after: str
    bytes_after: int
    method: str | None
    relative_error: float
    version: int = 1


def apply_plan(
    checkpoint: Checkpoint,
    config: ModelConfig,
    plan: Plan,
    directory: Path,
    *,
    energies: Energies | None = None,
    hessians: Hessians | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModuleReport, ...]:
    """Write the compressed model of `plan` into `directory`, a plain Hugging Face model directory.

    Weights, config.json with its quantization_config, halve/plan.json; every carried file byte for byte. energies are
    needed where the plan says clip, hessians too where it says gptq. progress: modules done, modules in all. A plan's
    errors come before any file, and a weight's leave none behind; OutputError when the disk is full.
    """
    assignments = resolve(plan, config)
    _check_energies(assignments, energies, hessians)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    stored = stored_formats(checkpoint, config)
    for a in assignments:
        stored[a.module.name] = a.format or stored[a.module.name]
        specs |= weight_specs(a.module.name, stored[a.module.name], a.module.shape, portable=plan.portable)
    for name, _ in vectors(config):
        info = checkpoint.reader.info(name)
        specs[name] = (info.dtype, info.shape)
    config_json = _config_json(checkpoint.config, stored, plan)
    reports = []
    make_directory(directory / "halve")
    with TensorWriter(directory, specs) as writer:
        for i, a in enumerate(assignments):
            weight, report = _convert(checkpoint, a, stored[a.module.name], energies, hessians)
            reports.append(report)
            for name, array in weight_tensors(a.module.name, weight, portable=plan.portable).items():
                writer.write(name, array)
            checkpoint.reader.forget()
            if progress:
                progress(i + 1, len(assignments))
        for name, shape in vectors(config):
            checkpoint.read_vector(name, shape)  # refuses NaN and wrong shapes
            writer.write(name, checkpoint.reader.read(name))
    write_text(directory / PLAN_FILE, plan.to_json())
    write_text(directory / "config.json", config_json)
    carry_files(checkpoint, directory)
    return tuple(reports)


def _convert(
    checkpoint: Checkpoint, a: Assignment, fmt: Format, energies: Energies | None, hessians: Hessians | None
) -> tuple[Weight, ModuleReport]:
    original = checkpoint.read_weight(a.module.name, a.module.shape)
    weight, error = original, 0.0
    # Second moments of every expert's inputs would be larger than the model; experts are rounded by their energies.
    method = "clip" if a.method == "gptq" and a.module.expert is not None else a.method
    if fmt != original.format:
        values, energy = original.dequantize(), energy_of(a, energies)
        weight = round_weight(values, fmt, method, energy, hessian_of(a, hessians) if method == "gptq" else None)
        error = relative_error(values, weight, energy)
    return weight, ModuleReport(
        name=a.module.name,
        group=a.group,
        parameters=a.module.shape[0] * a.module.shape[1],
        format_before=original.format.name,
        bytes_before=original.size_bytes,
        format_after=fmt.name,
        bytes_after=weight.size_bytes,
        method=method if fmt != original.format else None,
        relative_error=error,
    )


def _check_energies(assignments: Sequence[Assignment], energies: Energies | None, hessians: Hessians | None) -> None:
    """Every product has the energy of its inputs where there are any, and what its method needs."""
    for a in assignments:
        if a.method == "gptq" and hessians is None:
            raise PlanError(f"{a.module.name}: method gptq needs second moments of its inputs; calibrate with them")
        if energies is None:
            if a.method in ("clip", "gptq"):
                raise PlanError(
                    f"{a.module.name}: method {a.method} needs energies of its inputs; calibrate first, or use rtn"
                )
            continue
        energy = energies.by_group.get(a.inputs)
        if a.group != "embedding" and (energy is None or energy.shape != (a.module.shape[1],)):
            raise PlanError(
                f"{a.module.name}: the energies do not hold {a.module.shape[1]} inputs of {a.inputs!r}; "
                "they are of another model, calibrate this one"
            )


def hessian_of(a: Assignment, hessians: Hessians | None) -> Array | None:
    """Second moments of a module's inputs, weighted between its uses as `energy_of` does; None without calibration."""
    if hessians is None:
        return None
    if a.group == "embedding":
        return np.eye(a.module.shape[1], dtype=np.float32)
    moments = hessians.of(a.group)
    if a.module.name != EMBEDDING:
        return moments
    both: Array = (moments + np.eye(len(moments), dtype=np.float32) * np.diagonal(moments).mean()) / 2
    return both


def energy_of(a: Assignment, energies: Energies | None) -> Array | None:
    """Input energies of a module; None without calibration.

    An embedding table is looked up, not multiplied: every column of an untied one counts the same, and a tied one,
    which is also the head, takes half of its weighting from each use.
    """
    if energies is None:
        return None
    if a.group == "embedding":
        return np.ones(a.module.shape[1])
    energy = energies.by_group[a.inputs]
    return (energy + energy.mean()) / 2 if a.module.name == EMBEDDING else energy


def _config_json(raw: Mapping[str, Any], stored: Mapping[str, Format], plan: Plan) -> str:
    config = dict(raw)
    quantization = quantization_config({name: fmt.name for name, fmt in stored.items()}, portable=plan.portable)
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def make_directory(path: Path) -> None:
    """Make a folder and those above it. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: can't make this directory: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises OutputError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error


def carry_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy what travels with a model, byte for byte. Raises OutputError; CheckpointError for what changed meanwhile."""
    for path in checkpoint.carried_files():
        _carry(path, directory / path.relative_to(checkpoint.path))


def _carry(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(f"{source.name}: can't be copied to {target.parent}: {error.strerror}") from error
    if source.stat().st_size != target.stat().st_size:
        raise CheckpointError(f"{source}: changed while it was copied; run again when nothing writes to it")
