"""Compile kernels of products for sm_90, without a device, and print one JSON line each: registers, spills, memory.

python compile_products.py few|many|grouped|persistent|other [FORMAT ...]
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halve.formats import FORMATS
from halve.kernels.cuda import configs, gemm, launching, persistent, widen
from halve.kernels.cuda.packing import CELL_BITS, COLUMNS, PLANES, CudaMatrix

TYPES = {torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int16: "*i16", torch.float8_e4m3fn: "*fp8e4nv"}
STORED = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CLASSES = {"few": (1, 16, 32, 64), "many": (128, 4096), "grouped": (4, 16, 64, 256)}
ALIGNED = {
    "codes_ptr",
    "scale_ptr",
    "x_ptr",
    "out_ptr",
    "partial_ptr",
    "N",
    "K",
    "code_row",
    "x_row",
    "out_row",
    "add_row",
    "expert_codes",
    "expert_scales",
}


def matrix_of(name, activations, shape):
    fmt = FORMATS[name]
    in_cells = activations == "bf16" and fmt.scaled
    stored = torch.int16 if in_cells else STORED["bf16" if not fmt.scaled else activations]
    bits = fmt.bits
    chunk = COLUMNS * CELL_BITS // PLANES[bits][-1] if in_cells else 1
    width = -(-shape[-1] // chunk) * chunk * bits // CELL_BITS if in_cells else shape[-1]
    codes = torch.empty((*shape[:-1], width), dtype=stored, device="meta")
    scale = torch.empty(1, dtype=torch.bfloat16 if activations == "bf16" else torch.float32, device="meta")
    group = fmt.group_size or 0
    return CudaMatrix(fmt, shape, activations, codes, scale if fmt.scaled else None, group_size=group)


def compiled(function, signature, constants, aligned, options):
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={n: signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n in names and n not in constants},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "spilled": int(stack), "shared": kernel.metadata.shared}


def product(matrix, config, *, splits, grouped=False, residual=False, out="*bf16"):
    constants = launching.constants(matrix, config, splits, grouped=grouped, add=residual)
    constants |= {"PTX": True, "AHEAD": True}
    options = {"num_warps": constants.pop("num_warps"), "num_stages": constants.pop("num_stages"), "launch_pdl": True}
    signature = {
        "codes_ptr": TYPES[matrix.codes.dtype],
        "x_ptr": TYPES[STORED[matrix.activations]],
        "out_ptr": out,
        "token_scale_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "counter_ptr": "*i32",
        "offsets_ptr": "*i32",
        "add_ptr": "*bf16",
        "scale_ptr": TYPES.get(matrix.scale.dtype, "*fp32") if matrix.scale is not None else "*bf16",
        "bias_ptr": "*fp32",
        **dict.fromkeys(
            (
                "T",
                "N",
                "K",
                "code_row",
                "x_row",
                "add_row",
                "out_row",
                "tiles_t",
                "splits",
                "expert_codes",
                "expert_scales",
            ),
            "i32",
        ),
    }
    return compiled(gemm.product, signature, constants, ALIGNED, options)


def other():
    for bits in (2, 3, 4, 5, 6, 8):
        pointers = {"codes_ptr": "*i16", "scale_ptr": "*bf16", "out_ptr": "*bf16"}
        numbers = dict.fromkeys(("N", "K", "first", "rows", "code_row"), "i32")
        fixed = {"KIND": "int_cells", "BITS": bits, "GROUP": 64, "BN": 32, "PTX": True}
        yield (
            f"widen {bits}",
            lambda s={**pointers, **numbers}, c=fixed: compiled(
                widen.widen, s, c, ("codes_ptr", "scale_ptr", "out_ptr", "N", "K", "code_row"), {"num_warps": 4}
            ),
        )
    pointers = {"sums_ptr": "*i32", "out_ptr": "*bf16", "add_ptr": "*bf16"}
    pointers |= dict.fromkeys(("token_scale_ptr", "scale_ptr", "bias_ptr"), "*fp32")
    numbers = dict.fromkeys(("N", "add_row", "out_row"), "i32")
    yield (
        "rescale",
        lambda: compiled(
            widen.rescale,
            {**pointers, **numbers},
            {"HAS_BIAS": True, "HAS_ADD": True, "BLOCK": 1024},
            ("sums_ptr", "scale_ptr", "out_ptr", "N"),
            {"num_warps": 4},
        ),
    )


def persistent_jobs(names):
    for name in names:
        activations = STORED_AS.get(name, "bf16")
        matrix = matrix_of(name, activations, (4096, 4096))
        element = TYPES[matrix.codes.dtype].removeprefix("*")
        for config in configs.persistent_candidates(matrix):
            for residual in (False, True):
                pointers = dict.fromkeys(("scale_ptr", "bias_ptr", "token_scale_ptr"), "*fp32")
                pointers |= dict.fromkeys(("add_ptr", "out_ptr"), "*bf16")
                descriptors = {
                    "x_descriptor": f"tensordesc<{element}[{config.bt}, {config.cols}]>",
                    "codes_descriptor": f"tensordesc<{element}[{config.bn}, {config.cols}]>",
                }
                numbers = dict.fromkeys(("T", "N", "K", "add_row", "out_row"), "i32")
                constants = {
                    "HAS_SCALE": matrix.scale is not None,
                    "HAS_BIAS": residual,
                    "HAS_ADD": residual,
                    "ACT": activations,
                    "BT": config.bt,
                    "BN": config.bn,
                    "COLS": config.cols,
                    "SWIZZLE": config.swizzle,
                    "FLATTEN": config.flatten,
                }
                yield (
                    f"persistent {name} x {activations} {config}{' + bias + residual' if residual else ''}",
                    lambda s={**descriptors, **pointers, **numbers}, c=constants, k=config: compiled(
                        persistent.persistent,
                        s,
                        c,
                        ("scale_ptr", "out_ptr", "add_ptr", "bias_ptr", "N", "K", "add_row", "out_row"),
                        {"num_warps": k.warps, "num_stages": k.stages},
                    ),
                )


def jobs(what, names):
    if what == "persistent":
        yield from persistent_jobs(names)
        return
    if what == "other":
        yield from other()
        return
    grouped = what == "grouped"
    pairs = [(n, "bf16") for n in names] + [(n, STORED_AS[n]) for n in names if n in STORED_AS]
    for name, activations in pairs:
        matrix = matrix_of(name, activations, (64, 2048, 4096) if grouped else (4096, 4096))
        for tokens in CLASSES[what]:
            for config in configs.candidates(matrix, tokens, grouped=grouped)[: 1 if grouped else None]:
                label = f"{name} x {activations} T={tokens} {config}"
                yield label, lambda m=matrix, c=config: product(m, c, splits=c.programs_a_sm > 0, grouped=grouped)


STORED_AS = {n: "int8" for n in FORMATS if n.startswith("int8")} | {"fp8": "fp8"}


def main():
    what, names = sys.argv[1], sys.argv[2:] or [n for n in FORMATS if FORMATS[n].scaled or n == "bf16"]

    def run(job):
        try:
            return json.dumps({"kernel": job[0], **job[1]()})
        except Exception as error:
            return json.dumps({"kernel": job[0], "error": str(error)[-400:]})

    with ThreadPoolExecutor(2) as threads:
        for line in threads.map(run, jobs(what, names)):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
