"""Ops that other packages bring: entry points of the group `halve.backends`, a device's name -> a factory of `Ops`.

In the package's pyproject.toml:

    [project.entry-points."halve.backends"]
    xpu = "halve_xpu:make_ops"

`device="xpu"` (or "xpu:1") then calls `make_ops("xpu", activations="int8")`, which returns `halve.kernels.ops.Ops`, or
raises KernelError saying why it can't run here. activations: the plan's (`halve.core.plan.Activations`). Nothing of a
package is imported before its device is asked for. The names auto, cpu and cuda are Halve's own.
"""

import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import cast

from halve.core.errors import KernelError
from halve.kernels.ops import Ops

log = logging.getLogger("halve.kernels")

GROUP = "halve.backends"
OWN = ("auto", "cpu", "cuda")
Factory = Callable[..., Ops]


def backend(device: str) -> Factory | None:
    """The factory that an installed package offers for a device, None where there is none.

    Raises KernelError when two packages offer it, or the one that does can't be imported.
    """
    name = device.partition(":")[0]
    if name in OWN:
        return None
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        return None
    if len({(point.value, point.dist and point.dist.name) for point in found}) > 1:
        packages = sorted(str(point.dist.name if point.dist else point.value) for point in found)
        raise KernelError(f"device {name!r}: {' and '.join(packages)} both offer it; uninstall one of them")
    try:
        factory = found[0].load()
    except Exception as error:  # whatever a foreign module does when it is imported
        raise KernelError(f"device {name!r}: {found[0].value} can't be imported: {error}") from error
    log.info("device %s is run by %s", name, found[0].value)
    return cast(Factory, factory)
