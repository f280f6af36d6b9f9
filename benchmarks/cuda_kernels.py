"""How near products on a CUDA device come to what the device can do.

Few tokens: every weight is read once, so the ceiling is memory bandwidth, taken as a large copy's (read and write
counted). The figure is bytes of codes and scales over time, as a fraction of it; the goal is 0.75. Weights are read in
turn from enough copies that the L2 cache does not hold them, in a captured graph, so that launches cost what they cost
in the engine. Many tokens: the ceiling is the tensor cores', taken as the best rate of torch's own fp8, int8 and bf16
products in this run; the goal is 0.70 of the fp8 rate for 8-bit activations at 4096 tokens.

Every figure comes with its error against float64, relative to the sum of the terms' sizes. Whatever time was left out
to end in time is named. The last line is one JSON object.

    PYTHONPATH=src python3 benchmarks/cuda_kernels.py [--seconds 110]
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import triton

from halve.formats import FORMATS
from halve.kernels.cuda import configs, tuning
from halve.kernels.cuda.packing import CudaMatrix, to_cells
from halve.kernels.cuda.product_rows import cuda_device
from halve.kernels.cuda.products import Activations, grouped_project
from halve.kernels.cuda.workspace import workspace

DEVICE = torch.device("cuda", 0)
FEW = [(4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192)]  # outputs, inputs
MANY = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672)]
FEW_GOAL, MANY_GOAL = 0.75, 0.70


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def seconds_of(run: Callable[[], object], repeats: int = 7, together: int = 4) -> float:
    """The median seconds of one run, by events around some together, so that launching one hides behind another."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(together):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / together)
    return sorted(times)[repeats // 2]


def make(name: str, shape: tuple[int, ...], activations: str = "bf16") -> tuple[CudaMatrix, Callable[[int, int], Any]]:
    """A random matrix made on the device, and its rows first .. last in float64."""
    fmt = FORMATS[name]
    workspace(DEVICE)
    if not fmt.scaled:
        codes = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    elif fmt.kind == "float":
        codes = torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn)
    else:
        half = 1 << (fmt.bits - 1)
        codes = torch.randint(-half, half, shape, device=DEVICE, dtype=torch.int8)
    groups = 1 if fmt.group_size is None else shape[-1] // fmt.group_size
    kind = torch.bfloat16 if activations == "bf16" else torch.float32
    scale = (torch.rand((*shape[:-2], groups, shape[-2]), device=DEVICE) + 0.5).to(kind) if fmt.scaled else None
    stored = codes
    if fmt.scaled and activations == "bf16":
        stored = to_cells(codes.view(torch.int8), fmt.bits)
    matrix = CudaMatrix(
        format=fmt, shape=shape, activations=activations, codes=stored, scale=scale, group_size=fmt.group_size or 0
    )

    def rows(first: int, last: int) -> torch.Tensor:
        wide = codes[..., first:last, :].double()
        if scale is None:
            return wide
        spread = scale[..., first:last].double().transpose(-1, -2)
        return wide * spread.repeat_interleave(shape[-1] // groups, dim=-1)

    return matrix, rows


def error_of(matrix: CudaMatrix, rows: Callable[[int, int], torch.Tensor], choice: tuning.Choice, tokens: int) -> float:
    """The largest error of a corner of the product against float64, relative to the sum of the terms' sizes."""
    x = tuning.example(matrix, tokens)
    out = torch.empty((tokens, matrix.out_features), dtype=torch.bfloat16, device=DEVICE)
    choice.kernel.run(matrix, x, out, None, choice.config)
    worst = 0.0
    for first in (0, matrix.out_features - 256):
        dense = x.values[-32:].double() * (1 if x.scale is None else x.scale[-32:, None].double())
        weights = rows(first, first + 256)
        difference = (out[-32:, first : first + 256].double() - dense @ weights.T).abs()
        worst = max(worst, float((difference / (dense.abs() @ weights.T.abs())).max()))
    return worst


def ceilings() -> dict[str, float]:
    """What the device does at most, here and now."""
    found = {}
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    found["copy_gb_s"] = 2 * a.numel() / seconds_of(functools.partial(b.copy_, a)) / 1e9
    del a, b
    n = 8192
    x, y = (torch.randn((n, n), device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    work = 2 * n**3 / 1e12
    found["bf16_tflops"] = work / seconds_of(lambda: x @ y.T)
    x8, y8 = (t.to(torch.float8_e4m3fn) for t in (x, y))
    ones = torch.ones((n, 1), device=DEVICE)
    one = torch.ones((), device=DEVICE)
    scaled: dict[str, Callable[[], object]] = {
        "fp8_rows_tflops": lambda: torch._scaled_mm(
            x8, y8.T, scale_a=ones, scale_b=ones.T, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "fp8_tflops": lambda: torch._scaled_mm(
            x8, y8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }
    xi, yi = (t.mul(30).clamp(-127, 127).to(torch.int8) for t in (x, y))
    scaled["int8_tflops"] = lambda: torch._int_mm(xi, yi.T)
    for name, run in scaled.items():
        try:
            found[name] = work / seconds_of(run)
        except RuntimeError as error:
            say(f"{name}: {error}")
    return found


def guarded(run: Callable[..., dict[str, Any]], *words: Any) -> dict[str, Any]:
    """A figure, or why there is none."""
    try:
        return run(*words)
    except Exception:
        say(traceback.format_exc())
        return {"what": [str(w) for w in words[1:]], "error": traceback.format_exc()[-1500:]}


def few_run(found: dict[str, float], name: str, shape: tuple[int, int], count: int) -> dict[str, Any]:
    """One product of few tokens, as fast as it was found to run."""
    matrix, rows = make(name, shape)
    choice = tuning.tune(matrix, [count])[count]
    assert choice.microseconds is not None
    rate = matrix.size_bytes / choice.microseconds / 1e3
    fraction = rate / found["copy_gb_s"]
    say(f"{name} {shape} T={count}: {choice.microseconds:.2f} us, {fraction:.2f} of copy, {choice.config}")
    return {
        "format": name,
        "activations": "bf16",
        "shape": shape,
        "tokens": count,
        "us": round(choice.microseconds, 2),
        "gb_s": round(rate),
        "ceiling_fraction": round(fraction, 3),
        "goal": FEW_GOAL,
        "error": error_of(matrix, rows, choice, count),
        "row": choice.kernel.name,
        "config": str(choice.config),
    }


def few(found: dict[str, float], left: Callable[[], float]) -> list[dict[str, Any]]:
    """Products of few tokens: bytes a second against a copy."""
    plan = [("int4-g128", (1, 8)), ("int4-g32", (1, 8)), ("bf16", (1,)), ("int8", (1,)), ("fp8", (1,))]
    plan += [("int4-g128", (4, 16, 64)), ("int4-g64", (1,)), ("int3-g64", (1,)), ("int2-g32", (1,)), ("int6-g64", (1,))]
    runs: list[dict[str, Any]] = []
    for name, tokens in plan:
        for shape in FEW if name in ("int4-g32", "int4-g128") and 1 in tokens else FEW[:1]:
            for count in tokens:
                if left() < 4:
                    runs.append({"format": name, "shape": shape, "tokens": count, "skipped": "no time left"})
                    continue
                runs.append(guarded(few_run, found, name, shape, count))
                print(json.dumps(runs), flush=True)
    return runs


def gemv_run(found: dict[str, float], name: str, shape: tuple[int, int], count: int) -> dict[str, Any]:
    """One product of few tokens by every cut of `cuda_gemv`, and by `triton` as it is cut without measurements."""
    matrix, rows = make(name, shape)
    x = tuning.example(matrix, count)
    out = torch.empty((count, shape[0]), dtype=torch.bfloat16, device=DEVICE)
    ours = [c for c in tuning.choices(matrix, count) if c.kernel.name in ("cuda_gemv", "triton")]
    tried = [c for c in ours if c.kernel.name == "cuda_gemv" or c.config == configs.default(matrix, count)]
    tuning.prepare(tried, matrix, x, out)
    copies, cuts = tuning.copies_of(matrix), []
    for choice in tried:
        run = functools.partial(run_choice, choice=choice, x=x, out=out)
        took = tuning.measure(run, copies, repeats=7, launches=48)
        cut = {
            "row": choice.kernel.name,
            "us": round(took, 2),
            "ceiling_fraction": round(matrix.size_bytes / took / 1e3 / found["copy_gb_s"], 3),
            "error": error_of(matrix, rows, choice, count),
            "config": str(choice.config),
        }
        cuts.append(cut)
        say(f"{name} {shape} T={count}: {cut}")
    return {"format": name, "shape": shape, "tokens": count, "default": cuts[0], "cuts": cuts}


def gemv(found: dict[str, float], left: Callable[[], float]) -> list[dict[str, Any]]:
    """Cuts of `cuda_gemv`, the default first, against a copy."""
    small, large, head = FEW[0], FEW[2], (128256, 4096)
    plan: list[tuple[str, tuple[int, int], int]] = [("int4-g128", shape, 1) for shape in FEW]
    plan += [("int4-g128", small, 8), ("int4-g128", large, 8), ("int4-g32", small, 1), ("int4-g32", large, 1)]
    plan += [
        ("int8", small, 1),
        ("fp8", small, 8),
        ("bf16", small, 1),
        ("bf16", head, 1),
        ("int4-g128", (4096, 4096), 1),
    ]
    plan += [("int4-g128", small, 2), ("int4-g128", small, 4), ("int4-g32", small, 8), ("int2-g32", small, 1)]
    runs: list[dict[str, Any]] = []
    for name, shape, count in plan:
        if left() < 3:
            runs.append({"format": name, "shape": shape, "tokens": count, "skipped": "no time left"})
            continue
        runs.append(guarded(gemv_run, found, name, shape, count))
        print(json.dumps(runs), flush=True)
    return runs


def run_choice(matrix: CudaMatrix, choice: tuning.Choice, x: Activations, out: torch.Tensor) -> None:
    """One product by one row."""
    choice.kernel.run(matrix, x, out, None, choice.config)


def many_run(ceiling: float, name: str, shape: tuple[int, int], kind: str) -> dict[str, Any]:
    """One product of 4096 tokens, by every row as fast as it runs here."""
    matrix, rows = make(name, shape, kind)
    x = tuning.example(matrix, 4096)
    out = torch.empty((4096, shape[0]), dtype=torch.bfloat16, device=DEVICE)
    fastest: dict[str, tuple[float, tuning.Choice]] = {}
    failed: dict[str, str] = {}
    for choice in tuning.choices(matrix, 4096):
        row = choice.kernel.name
        try:
            run = functools.partial(run_choice, choice=choice, x=x, out=out)
            seconds = tuning.measure(run, [matrix], repeats=3) / 1e6
        except (RuntimeError, ValueError, triton.runtime.errors.OutOfResources) as error:
            failed[f"{row} {choice.config}"] = str(error)[-500:]
            continue
        if row not in fastest or seconds < fastest[row][0]:
            fastest[row] = (seconds, choice)
    work = 2 * 4096 * shape[0] * shape[1] / 1e12
    by_row = {
        row: {
            "us": round(seconds * 1e6, 1),
            "tflops": round(work / seconds, 1),
            "ceiling_fraction": round(work / seconds / ceiling, 3),
            "error": error_of(matrix, rows, choice, 4096),
            "config": str(choice.config),
        }
        for row, (seconds, choice) in fastest.items()
    }
    say(f"{name} x {kind} {shape}: " + ", ".join(f"{r} {d['ceiling_fraction']}" for r, d in by_row.items()))
    return {
        "format": name,
        "activations": kind,
        "shape": shape,
        "tokens": 4096,
        "goal": MANY_GOAL,
        "ceiling_fraction": max((work / s / ceiling for s, _ in fastest.values()), default=None),
        "rows": by_row,
        "failed": failed,
    }


def many(found: dict[str, float], left: Callable[[], float]) -> list[dict[str, Any]]:
    """Products of 4096 tokens: every row's best rate against torch's fp8 (8-bit activations) or bf16 rate."""
    runs: list[dict[str, Any]] = []
    best_fp8 = max((v for k, v in found.items() if k.startswith("fp8")), default=float("nan"))
    plan = [("fp8", "fp8", MANY), ("int8", "int8", MANY), ("int4-g128", "bf16", MANY[1:2]), ("bf16", "bf16", MANY[1:2])]
    for name, kind, shapes in plan:
        for shape in shapes:
            if left() < 6:
                runs.append({"format": name, "activations": kind, "shape": shape, "skipped": "no time left"})
                continue
            runs.append(guarded(many_run, best_fp8 if kind != "bf16" else found["bf16_tflops"], name, shape, kind))
            print(json.dumps(runs), flush=True)
    return runs


def run_grouped(matrix: CudaMatrix, x: Activations, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """One grouped product."""
    grouped_project(matrix, x, offsets, out)


def experts_run(found: dict[str, float], name: str, tokens: int) -> dict[str, Any]:
    """One grouped product of 64 experts; of few tokens, each goes to an expert of its own."""
    matrix, rows = make(name, (64, 2048, 2048))
    used = min(tokens, 64)
    counts = torch.full((64,), tokens // used)
    counts[used:] = 0
    offsets = torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32).to(DEVICE)
    x = tuning.example(matrix, tokens)
    out = torch.empty((tokens, 2048), dtype=torch.bfloat16, device=DEVICE)
    took = tuning.measure(functools.partial(run_grouped, x=x, offsets=offsets, out=out), [matrix])
    mine = slice(int(offsets[used - 1]), int(offsets[used]))  # of the last expert that has any
    dense, weights = x.values[mine].double(), rows(0, 256)[used - 1]
    error = (out[mine, :256].double() - dense @ weights.T).abs() / (dense.abs() @ weights.T.abs())
    rate = matrix.size_bytes * used / 64 / took / 1e3
    say(f"grouped {name} T={tokens}: {took:.1f} us")
    return {
        "format": name,
        "experts": 64,
        "experts_used": used,
        "tokens": tokens,
        "us": round(took, 2),
        "ceiling_fraction": round(rate / found["copy_gb_s"], 3),
        "note": "weights may stay in the L2 cache" if used < 64 else "",
        "error": float(error.max()),
        "config": str(configs.default(matrix, -(-tokens // 64), grouped=True)),
    }


def experts(found: dict[str, float], left: Callable[[], float]) -> list[dict[str, Any]]:
    """Grouped products, 64 experts of which 8 tokens choose 2 each, and 512 tokens all: bytes read against a copy."""
    runs: list[dict[str, Any]] = []
    for name in ("int4-g128", "bf16"):
        for tokens in (16, 1024):
            if left() < 2:
                runs.append({"format": name, "experts": 64, "tokens": tokens, "skipped": "no time left"})
                continue
            runs.append(guarded(experts_run, found, name, tokens))
            print(json.dumps(runs), flush=True)
    return runs


PARTS = {"few": few, "gemv": gemv, "many": many, "experts": experts}
SHARE = {"few": 0.5, "gemv": 0.3, "many": 0.75, "experts": 1.0}  # of the seconds that are left


def in_its_own_process(part: str, found: dict[str, float], seconds: float, cache: str) -> Any:
    """One part's figures; what kills its process, or the device's context, costs only them."""
    words = ["--part", part, "--seconds", f"{seconds:.0f}", "--ceilings", json.dumps(found)]
    environment = {**os.environ, "HALVE_CACHE": cache}
    try:
        result = subprocess.run(
            [sys.executable, __file__, *words],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=environment,
            timeout=seconds + 15,
        )
        printed, ended = result.stdout, f"exit code {result.returncode}"
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ended = f"still running {seconds + 15:.0f} s after its start"
    lines = [line for line in printed.splitlines() if line.startswith(("[", "{"))]
    return {"ended": ended, "runs": json.loads(lines[-1]) if lines else []}


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=110, help="leave out what would take longer than this")
    parser.add_argument("--part", choices=PARTS, help="measure this alone, in this process")
    parser.add_argument("--ceilings", type=json.loads, help="those of this run, as JSON")
    arguments = parser.parse_args()
    started = time.monotonic()

    def left() -> float:
        return float(arguments.seconds) - (time.monotonic() - started)

    if not torch.cuda.is_available():
        print(json.dumps({"question": "cuda_kernels", "error": "no CUDA device"}))
        return 1
    if arguments.part:
        try:
            print(json.dumps(PARTS[arguments.part](arguments.ceilings or ceilings(), left)))
        except Exception:
            say(traceback.format_exc())
            print(json.dumps({"error": traceback.format_exc()[-2000:]}))
        return 0
    result: dict[str, Any] = {
        "question": "cuda_kernels",
        "hardware": cuda_device(DEVICE).model,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(["python3", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result["commit"] = commit.stdout.strip() or None
    found = result["ceilings"] = ceilings()
    torch.cuda.empty_cache()
    say(json.dumps(found))
    with tempfile.TemporaryDirectory() as cache:  # measured now, not found
        for part in PARTS:
            result[part] = in_its_own_process(part, found, left() * SHARE[part], cache)
    result["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
