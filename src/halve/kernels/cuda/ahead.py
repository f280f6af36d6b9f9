"""Kernels that begin before the kernel before them has ended: programmatic dependent launch, from sm_90 on.

Every kernel of a step says by `follow`, before it writes anything or reads what others of the step wrote, that the
next one may begin, and waits until the one before has ended and what it wrote is there. So one that waited has waited
for all before it, launches cost no time between two kernels, and a product (`gemv.cu`) fetches weights, which nobody
writes, while small kernels before it still run. A kernel launched without it, torch's for example, begins and ends as
ever.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

PROGRAMMATIC = (9, 0)  # the capability from which a kernel may begin before the one before it ends


def launched(device: torch.device) -> dict[str, bool]:
    """How a kernel that calls `follow` is compiled and launched on a device."""
    return {"AHEAD": True, "launch_pdl": True} if programmatic(device) else {"AHEAD": False}


@cache
def programmatic(device: torch.device) -> bool:
    """Whether a device's kernels may begin before the one before ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= PROGRAMMATIC


@triton.jit
def follow(AHEAD: tl.constexpr):
    """Let the next kernel begin; from here on what the one before wrote is there."""
    if AHEAD:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
