"""Memory that the products of one device share, made when the first matrix is packed, before any graph is captured.

Because it is shared, products of one device must run in one stream, or one after another.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

PARTIAL_ELEMENTS = 1 << 23  # float32 sums of split products, 32 MiB
COUNTERS = 1 << 16  # tiles of a split product
SLAB_ELEMENTS = 1 << 24  # bf16 weights widened at once, 32 MiB: about half of an H200's L2 cache


@dataclass(frozen=True, eq=False)
class Workspace:
    """partial: sums of split products. counters: programs that came to a tile, zero between products. slab: weights."""

    partial: Tensor
    counters: Tensor
    slab: Tensor


def workspace(device: torch.device) -> Workspace:
    """The workspace of a device."""
    return _workspace(torch.device(device.type, device.index or 0) if device.type == "cuda" else device)


@cache
def _workspace(device: torch.device) -> Workspace:
    return Workspace(
        partial=torch.empty(PARTIAL_ELEMENTS, dtype=torch.float32, device=device),
        counters=torch.zeros(COUNTERS, dtype=torch.int32, device=device),
        slab=torch.empty(SLAB_ELEMENTS, dtype=torch.bfloat16, device=device),
    )


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; 2 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; an H200's 227 KiB where there is no device."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
