"""Which row and cut are fastest for a product on this device: measured once, kept on disk, found again by key.

A key is format, activations, shape and a class of tokens (a power of two). `tune` measures; `chosen` only looks up and
falls back to the fixed default, so that no request ever waits for a measurement and nothing is measured inside a
graph's capture. The file is one for each device, Triton and torch, in `disk.folder()`. A file that can't be read, or
holds what this version does not know, is measured anew; a new one replaces it whole.
"""

import json
import logging
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from halve.core.errors import KernelError
from halve.kernels.cuda import configs, disk, gemv, product_rows
from halve.kernels.cuda.configs import Config
from halve.kernels.cuda.launching import INTERPRETED, Activations, warm, warm_persistent
from halve.kernels.cuda.packing import CudaMatrix
from halve.kernels.cuda.product_rows import TABLE, cuda_device, runnable
from halve.kernels.dispatch import Kernel

log = logging.getLogger("halve.kernels")

FILE_VERSION = 3  # raised when the kernels change so that old measurements mislead
ROTATED_BYTES = 200 << 20  # of weights that are read in turn, so that no cache holds them
# Classes of tokens from which a row is the default.
LIBRARIES_FROM = {"torch_mm": 128, "torch_scaled_mm": 256, "triton_persistent": 512, "widen_torch_mm": 256}
FEW = 64  # tokens, up to which a product takes microseconds: launches of a graph must be many to be timed
WARM = {"triton": warm, "triton_persistent": warm_persistent, "cuda_gemv": gemv.warm}  # what compiles a row's cuts
TOKENS = (1, 4, 8, 16, 64, 256, 1024, 4096)  # classes that `tune` measures unless told


@dataclass(frozen=True, slots=True)
class Choice:
    """A row, its cut (None where it has none to choose), and the microseconds it took (None: not measured)."""

    kernel: Kernel
    config: Config | None
    microseconds: float | None = None


_known: dict[tuple[object, ...], Choice] = {}


def chosen(matrix: CudaMatrix, num_tokens: int, out_dtype: torch.dtype) -> Choice:
    """The best known choice for a product. Raises KernelError where no row runs."""
    device, tokens = matrix.codes.device, configs.token_class(num_tokens)
    wide = out_dtype == torch.float32
    signature = (device, matrix.format.name, matrix.activations, matrix.shape, matrix.group_size, tokens, wide)
    found = _known.get(signature)
    if found is None:
        found = _known[signature] = _look_up(matrix, num_tokens, out_dtype)
    return found


def _look_up(matrix: CudaMatrix, num_tokens: int, out_dtype: torch.dtype) -> Choice:
    device = cuda_device(matrix.codes.device)
    rows = {row.name: row for row in runnable(matrix, num_tokens, device, out_dtype)}
    if not rows:
        reasons = {row.name: row.refusal(device, product_rows.spec_of(matrix, num_tokens)) for row in TABLE}
        raise KernelError(f"no kernel multiplies {matrix.format.name} on {device.name} ({device.model}): {reasons}")
    stored = _load(cache_file(matrix.codes.device)).get(key(matrix, configs.token_class(num_tokens)))
    if stored is not None and stored.kernel.name in rows:
        log.info("%s: %s %s", key(matrix, num_tokens), stored.kernel.name, stored.config)
        return stored
    return _default(matrix, num_tokens, rows)


def _default(matrix: CudaMatrix, num_tokens: int, rows: dict[str, Kernel]) -> Choice:
    """Without measurements: torch's rows or `triton_persistent` where tensor cores are the limit, else the first."""
    for name, least in LIBRARIES_FROM.items():
        if name in rows and configs.token_class(num_tokens) >= least:
            return Choice(rows[name], product_rows.cuts(rows[name], matrix, num_tokens)[0])
    row = next(iter(rows.values()))
    return Choice(row, product_rows.cuts(row, matrix, num_tokens)[0])


def key(matrix: CudaMatrix, tokens: int) -> str:
    """What a measurement is kept under."""
    shape = "x".join(str(n) for n in matrix.shape)
    return f"{matrix.format.name} {matrix.activations} {shape} group {matrix.group_size} tokens {tokens}"


def tune(matrix: CudaMatrix, tokens: Iterable[int] = TOKENS, *, again: bool = False) -> dict[int, Choice]:
    """Measure rows and cuts of one matrix for classes of tokens; keep and return the fastest of each.

    Classes measured before are taken over unless `again`. Raises KernelError inside a graph's capture.
    """
    device = matrix.codes.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError("tuning measures and can't run inside a graph's capture; tune before it")
    path, results, fresh = cache_file(device), {}, {}
    stored = {} if again else _load(path)
    for count in sorted({configs.token_class(n) for n in tokens}):
        known = stored.get(key(matrix, count))
        if known is None:
            known = fresh[key(matrix, count)] = _fastest(matrix, count)
            log.info("%s: %s %s, %.1f us", key(matrix, count), known.kernel.name, known.config, known.microseconds)
        results[count] = known
    if fresh:
        _save(path, {**_load(path), **fresh})
        _load.cache_clear()
    _known.clear()
    return results


def choices(matrix: CudaMatrix, num_tokens: int) -> list[Choice]:
    """Every row and cut that is worth a measurement."""
    device = cuda_device(matrix.codes.device)
    rows = runnable(matrix, num_tokens, device, torch.bfloat16)
    return [Choice(row, cut) for row in rows for cut in product_rows.cuts(row, matrix, num_tokens)]


def _fastest(matrix: CudaMatrix, num_tokens: int) -> Choice:
    device = matrix.codes.device
    copies = copies_of(matrix)
    x = example(matrix, num_tokens)
    out = torch.empty((num_tokens, matrix.out_features), dtype=torch.bfloat16, device=device)
    tried = choices(matrix, num_tokens)
    prepare(tried, matrix, x, out)
    measured, launches = [], 32 if num_tokens <= FEW else 8
    for choice in tried:

        def run(m: CudaMatrix, choice: Choice = choice) -> None:
            choice.kernel.run(m, x, out, None, choice.config)

        try:
            measured.append(replace(choice, microseconds=measure(run, copies, launches=launches)))
        except triton.runtime.errors.OutOfResources as error:
            log.debug("%s %s: %s", choice.kernel.name, choice.config, error)
    if not measured:
        raise KernelError(f"no cut of {key(matrix, num_tokens)} fits this device")
    return min(measured, key=lambda c: c.microseconds or 0.0)


def copies_of(matrix: CudaMatrix) -> list[CudaMatrix]:
    """A matrix at places enough that no cache holds them; under the interpreter the one."""
    copies = [matrix]
    if not INTERPRETED:
        while sum(m.size_bytes for m in copies) < ROTATED_BYTES and len(copies) < 16:
            scale = None if matrix.scale is None else matrix.scale.clone()
            copies.append(replace(matrix, codes=matrix.codes.clone(), scale=scale))
    return copies


def prepare(tried: Iterable[Choice], matrix: CudaMatrix, x: Activations, out: Tensor) -> None:
    """Compile cuts at once, ahead of their runs: compiling is most of what measuring takes."""
    if not INTERPRETED:
        with ThreadPoolExecutor(8) as threads:
            for choice in tried:
                if choice.config is not None:
                    threads.submit(_compiles, choice, matrix, x, out)


def _compiles(choice: Choice, matrix: CudaMatrix, x: Activations, out: Tensor) -> None:
    """Compile one cut ahead; whatever goes wrong shows when it is run."""
    assert choice.config is not None
    with suppress(Exception):
        WARM[choice.kernel.name](matrix, x, out, choice.config)


def example(matrix: CudaMatrix, num_tokens: int) -> Activations:
    """Tokens of the right type to measure with."""
    device = matrix.codes.device
    values = torch.randn((num_tokens, matrix.in_features), device=device)
    if matrix.activations == "bf16":
        return Activations(values.to(torch.bfloat16))
    scale = torch.ones(num_tokens, device=device)
    if matrix.activations == "int8":
        return Activations((values * 40).round().clamp(-127, 127).to(torch.int8), scale)
    return Activations(values.to(torch.float8_e4m3fn), scale)


def measure(
    run: Callable[[CudaMatrix], None], copies: Sequence[CudaMatrix], *, repeats: int = 5, launches: int = 8
) -> float:
    """Microseconds of one run, the median of replays of a graph that runs over the copies in turn.

    launches: of the graph, at least; it has a whole number of turns.
    Under the interpreter there is nothing to measure: it runs once and takes 0.
    """
    run(copies[0])
    if INTERPRETED:
        return 0.0
    torch.cuda.synchronize()
    launches = -(-launches // len(copies)) * len(copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(copies[i % len(copies)])
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / launches)
    return statistics.median(times)


def cache_file(device: torch.device) -> Path | None:
    """Where the choices of a device are kept; None where nothing is."""
    home = disk.folder()
    if home is None:
        return None
    model = re.sub(r"[^A-Za-z0-9.]+", "-", cuda_device(device).model)
    return home / f"{model}-triton{triton.__version__}-torch{torch.__version__}.json"


@cache
def _load(path: Path | None) -> dict[str, Choice]:
    """What a file holds, empty where there is none or it can't be read as one of ours."""
    if path is None or not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != FILE_VERSION:
            raise ValueError(f"version {raw['version']}, expected {FILE_VERSION}")
        rows = {row.name: row for row in TABLE}
        return {
            name: Choice(
                rows[entry["row"]],
                None if entry["config"] is None else Config(**entry["config"]),
                float(entry["microseconds"]),
            )
            for name, entry in raw["choices"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: not a file of measured products (%r); they are measured anew", path, error)
        return {}


def _save(path: Path | None, table: dict[str, Choice]) -> None:
    """Write the file beside its place and move it there."""
    if path is None:
        return
    content = {
        "version": FILE_VERSION,
        "choices": {
            name: {
                "row": choice.kernel.name,
                "config": None if choice.config is None else asdict(choice.config),
                "microseconds": choice.microseconds,
            }
            for name, choice in table.items()
        },
    }
    try:
        disk.write(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        log.warning("measured products can't be kept in %s: %s", path, error.strerror)
