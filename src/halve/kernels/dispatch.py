"""Kernels as rows of a table. A row says why it refuses; the first that does not refuse runs.

Choosing happens once, when a weight is loaded, and is logged with the reason of every row that refused. Nothing is
found out by trying.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from halve.core.errors import KernelError
from halve.formats import Format
from halve.hardware import Device

log = logging.getLogger("halve.kernels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What a kernel is asked to run. Shapes are None when only the format is in question (`halve doctor`)."""

    op: str  # "linear", "embed", "attention", "rms_norm", ...
    format: Format | None = None
    activations: str = "fp32"
    out_features: int | None = None
    in_features: int | None = None
    num_tokens: int | None = None  # of one product, where a row cares


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One way to run one operation.

    refusal(device, spec): why not here, or None. prepare(weight): the weight as `run` wants it, made once.
    run: the operation itself; its arguments depend on the operation.
    """

    name: str
    op: str
    refusal: Callable[[Device, Spec], str | None]
    run: Callable[..., Any]
    prepare: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The kernel that runs, and every row before it with its reason."""

    kernel: Kernel
    refused: tuple[tuple[str, str], ...] = field(default=())


def choose(table: Sequence[Kernel], device: Device, spec: Spec) -> Choice:
    """Take the first row of `spec.op` that does not refuse. Raises KernelError with all reasons when every row does."""
    refused: list[tuple[str, str]] = []
    for kernel in table:
        if kernel.op != spec.op:
            continue
        reason = kernel.refusal(device, spec)
        if reason is None:
            log.debug("%s %s: %s (refused: %s)", spec.op, spec.format and spec.format.name, kernel.name, refused)
            return Choice(kernel=kernel, refused=tuple(refused))
        refused.append((kernel.name, reason))
    what = f"{spec.op}{f' of {spec.format.name}' if spec.format else ''}"
    raise KernelError(f"no kernel runs {what} on {device.name} ({device.model}): {refused or 'no row for it'}")
