"""How close are products to what the machine can do, for each format and number of rows?

A product of M rows with a matrix of B bytes and W weights takes at least max(B / read bandwidth, M W / arithmetic rate)
seconds. Few rows wait for memory, many for arithmetic: the ceilings (kernels/ceilings.py) are measured just before each
figure, and a figure is told as a fraction of the one that binds: of `read` up to 4 rows, else of `int8`, the rate of
exact products of bytes (`fp32` for float activations). On AVX2 products of 4 bits have a higher ceiling, `int4`, given
beside it. Weights are taken in turn from more memory than any cache holds; rounding the activations is part of it.

    python benchmarks/kernels.py [--formats int4-g32,int8] [--shape 8192x2048] [--activations int8] [--rounds 5]

Prints a table, and one JSON line last.
"""

import argparse
import ctypes
import json
import time
from pathlib import Path
from statistics import median

import numpy as np

from halve.formats import FORMATS, Format, Weight
from halve.formats.base import BF16
from halve.kernels import ceilings
from halve.kernels.arena import Arena
from halve.kernels.native import NativeOps
from halve.kernels.native_rows import Linear, call
from halve.kernels.products import ROUNDINGS, PrepareRecord, product_record, rows_of

FEW = 4  # rows up to which memory binds


def rotated_bytes() -> int:
    """More than any cache holds: three times the largest, 240 MB at least."""
    found = [240_000_000]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(3 * int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(found)


def random_weight(fmt: Format, shape: tuple[int, int], rng: np.random.Generator) -> Weight:
    """A matrix of random bits; speed does not depend on them."""
    stored = fmt.codes_shape(shape)
    if fmt.kind == "float":
        codes = (rng.standard_normal(stored, np.float32) * 0.02).astype(fmt.dtype)
    else:
        codes = np.frombuffer(rng.bytes(int(np.prod(stored)) * fmt.dtype.itemsize), fmt.dtype).reshape(stored)
    scale = (rng.random(fmt.scale_shape(shape), np.float32) * 0.01).astype(BF16) if fmt.scaled else None
    return Weight(format=fmt, shape=shape, codes=codes, scale=scale)


class Turn:
    """Products of M rows with each of many copies of a matrix."""

    def __init__(self, ops: NativeOps, linears: list[Linear], rows: int) -> None:
        layout, n = linears[0].layout, linears[0].matrix.out_features
        self.ops, self.rows, self.macs = ops, rows, rows * n * layout.width
        self.x = np.random.default_rng(0).standard_normal((rows, layout.width), np.float32)
        self.y = np.empty((rows, n), np.float32)
        inputs, self.kept = layout.allocate(rows)
        self.prepare = PrepareRecord(
            x=self.x.ctypes.data,
            out=inputs,
            x_stride=layout.width,
            width=layout.width,
            rounding=ROUNDINGS[layout.rounding],
        )
        self.products = [
            product_record(inputs, [w.matrix], [None], [rows_of(self.y)], rounding=layout.rounding, rows=rows)
            for w in linears
        ]
        self.size_bytes = linears[0].matrix.data.nbytes

    def seconds(self, least_s: float) -> float:
        """Of one product, over at least that long."""
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < least_s or done < 2:
            record = self.products[done % len(self.products)]
            call("prepare", self.ops.isa, ctypes.addressof(self.prepare), self.rows, self.ops.num_threads)
            call("product", self.ops.isa, ctypes.addressof(record), self.ops.num_threads)
            done += 1
        return (time.perf_counter() - started) / done


def main() -> None:
    """Measure, print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="int4-g32,int4-g64,int4-g128,int8,int6-g32,int3-g64,int2-g32")
    parser.add_argument("--shape", default="8192x2048", help="outputs x inputs")
    parser.add_argument("--activations", default="int8", choices=tuple(ROUNDINGS))
    parser.add_argument("--rows", default="1,2,4,8,32,128,512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one sample")
    options = parser.parse_args()
    shape = tuple(int(n) for n in options.shape.split("x"))
    ops, rng, results = NativeOps(activations=options.activations), np.random.default_rng(0), []
    threads, device = ops.num_threads, ops.device
    memory = ceilings.Arena()
    rate = ceilings.loop_for("int8" if options.activations == "int8" else "fp32", device)
    print(f"{'format':10} {'rows':>4} {'GB/s':>6} {'GMAC/s':>7} of the ceiling, median [low, high]")
    for name in options.formats.split(","):
        packed = ops.pack(random_weight(FORMATS[name], (shape[0], shape[1]), rng))
        arena = Arena()
        linears = []
        for _ in range(max(2, rotated_bytes() // packed.blob.nbytes)):
            blob = arena.take(packed.blob.nbytes)
            blob[:] = packed.blob
            linears.append(
                ops.linear(type(packed)(format=packed.format, shape=packed.shape, record=packed.record, blob=blob))
            )
        for rows in map(int, options.rows.split(",")):
            turn, fractions, times = Turn(ops, linears, rows), [], []
            for _ in range(options.rounds):
                bound = memory.read_gb_s(threads) if rows <= FEW else ceilings.gmac_s(rate, threads)
                times.append(turn.seconds(options.seconds))
                amount = turn.size_bytes if rows <= FEW else turn.macs
                fractions.append(amount / times[-1] / 1e9 / bound)
            result = {
                "format": name,
                "rows": rows,
                "gb_s": turn.size_bytes / median(times) / 1e9,
                "gmac_s": turn.macs / median(times) / 1e9,
                "bound": "read" if rows <= FEW else rate.what,
                "of_ceiling": {"value": median(fractions), "low": min(fractions), "high": max(fractions)},
            }
            results.append(result)
            spread = f"{median(fractions):.2f} [{min(fractions):.2f}, {max(fractions):.2f}] of {result['bound']}"
            print(f"{name:10} {rows:4} {result['gb_s']:6.1f} {result['gmac_s']:7.1f} {spread}", flush=True)
    record = {
        "question": "kernels",
        "shape": options.shape,
        "activations": options.activations,
        "kernel": ops.isa.name,
        "threads": threads,
        "runs": options.rounds,
        "hardware": device.model,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/kernels.py --formats {options.formats} --shape {options.shape}",
        "results": results,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
