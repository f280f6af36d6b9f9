"""What a card can do at most: how fast it copies memory, and multiplies large matrices, by torch's own kernels.

Kernels of ours are told as fractions of these: a decode step takes at least its bytes / copy, a prompt at least its
multiply-adds / the rate of its format.

    copy   read and written bytes together of a copy that no cache holds, GB/s (GB = 10^9 bytes)
    bf16   products of square bf16 matrices, TFLOP/s (10^12; a multiply-add is two)
    fp8    the same in e4m3 with a scale a row, summed as fast as the card can
    int8   the same in int8, TOP/s
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from halve.core.certificate import Measured

COPY_BYTES = 2 << 30
SIDE = 8192  # rows and columns of a matrix
SAMPLES = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaCeilings:
    """What `measure` found: median, slowest and fastest sample. refused: why a rate that is null was not measured."""

    copy_gb_s: Measured
    bf16_tflop_s: Measured | None
    fp8_tflop_s: Measured | None
    int8_top_s: Measured | None
    refused: Mapping[str, str]


def measure(
    device: str = "cuda",
    *,
    copy_bytes: int = COPY_BYTES,
    side: int = SIDE,
    samples: int = SAMPLES,
    progress: Callable[[int, int], None] | None = None,
) -> CudaCeilings:
    """Measure the ceilings of a card, in a second or two. progress: rates done, rates in all."""
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _rate(device, lambda: target.copy_(source), 2 * copy_bytes / 1e9, samples)
    products: dict[str, Callable[[], Tensor]] = {}
    refused: dict[str, str] = {}
    for name, make in (("bf16", _bf16), ("fp8", _fp8), ("int8", _int8)):
        try:
            products[name] = make(device, side)
            products[name]()
        except (RuntimeError, AttributeError, NotImplementedError) as error:  # torch says so only when it is asked
            refused[name] = str(error).splitlines()[0]
            products.pop(name, None)
    rates: dict[str, Measured] = {}
    for done, (name, run) in enumerate(products.items(), start=1):
        rates[name] = _rate(device, run, 2 * side**3 / 1e12, samples)
        if progress:
            progress(done, len(products))
    return CudaCeilings(
        copy_gb_s=copy,
        bf16_tflop_s=rates.get("bf16"),
        fp8_tflop_s=rates.get("fp8"),
        int8_top_s=rates.get("int8"),
        refused=refused,
    )


def _bf16(device: str, side: int) -> Callable[[], Tensor]:
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in "ab")
    return lambda: a @ b.T


def _fp8(device: str, side: int) -> Callable[[], Tensor]:
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in "ab")
    rows, columns = torch.ones(side, 1, device=device), torch.ones(1, side, device=device)
    return lambda: torch._scaled_mm(
        a, b.T, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _int8(device: str, side: int) -> Callable[[], Tensor]:
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in "ab")
    return lambda: torch._int_mm(a, b.T)


def _rate(device: str, run: Callable[[], object], work: float, samples: int) -> Measured:
    """Work a second: the device's clock where it has one."""
    run()
    found = sorted(work / _seconds(device, run) for _ in range(samples))
    return Measured(value=median(found), low=found[0], high=found[-1], n=samples)


def _seconds(device: str, run: Callable[[], object]) -> float:
    if torch.device(device).type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
