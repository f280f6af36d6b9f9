"""Compile attention, elementwise kernels and sampling for sm_90, without a device; print one JSON line each.

python compile_attention.py decode|prefill|write|elementwise|sampling [FORMAT of the cache or activations ...] [--sweep]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halve.kernels.cuda import attention, elementwise, sampling
from halve.kernels.cuda import attention_kernels as kernels
from halve.kernels.cuda import sampling_kernels as choosing
from halve.kernels.cuda.attention import Tiling

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BYTES = {"bf16": "*bf16", "fp8": "*fp8e4nv", "int8": "*i8"}
VOCAB = 128256
TYPES = {
    "q": "*bf16", "block_tables": "*i32", "seq_lens": "*i32", "cu_seqlens": "*i32", "out": "*bf16", "parts": "*fp32",
    "sums": "*fp32", "scale": "fp32", "num_sequences": "i32", "sinks": "*fp32", "key_scales": "*bf16",
    "value_scales": "*bf16", "qkv": "*bf16", "q_out": "*bf16", "positions": "*i32", "slots": "*i32", "table": "*fp32",
    "x": "*bf16", "gain": "*fp32", "residual": "*fp32", "scales": "*fp32", "eps": "fp32", "gate_up": "*bf16",
    "rows": "i32", "logits": "*fp32", "values": "*fp32", "ids": "*i32", "tiles": "i32", "floats": "*fp64",
    "whole": "*i64", "chosen": "*i32", "status": "*i32", "bias": "*fp32", "counts": "*i32", "seen": "*i8",
    "allowed": "*i32", "penalties": "*fp64", "words": "i32", "wanted": "*i64", "logprobs": "*fp32", "most": "i32",
    "maxima": "*fp32", "group_maxima": "*fp32", "candidates": "*i32", "limits": "*i32", "lowest": "*fp64",
    "weights": "*fp64", "equals": "*i32", "apart": "i32", "counters": "*i32",
}  # fmt: skip
SWEEP_DECODE = [
    Tiling(16, 32, 4, 4), Tiling(16, 64, 4, 2), Tiling(16, 64, 4, 4), Tiling(16, 64, 8, 3), Tiling(16, 128, 4, 2),
    Tiling(16, 128, 8, 3),
]  # fmt: skip
SWEEP_PREFILL = [
    Tiling(128, 64, 8, 3), Tiling(128, 128, 8, 2), Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(128, 64, 4, 2),
    Tiling(128, 32, 4, 3),
]  # fmt: skip


def compiled(name, function, constants, num_warps, num_stages=3, *, fusion=True, **types):
    """Compile and tell registers, spills and shared memory. Pointers and strides divide by 16, as torch allots them."""
    kinds = {**TYPES, **types}
    ahead = {"AHEAD": True} if "AHEAD" in function.arg_names else {}
    constants = {**constants, **ahead}
    signature, divisible = {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = kinds.get(argument, "i32" if argument.endswith("stride") else None)
        if signature[argument].startswith("*") or argument.endswith("stride"):
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fusion, "launch_pdl": bool(ahead)}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        use = run("cuobjdump", "-res-usage", file.name)
        code = run("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", use).groups()
    record = {
        "kernel": name,
        "registers": int(registers),
        "spilled": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
    }
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def over_cache(kv_format, head_dim, *, sinks=False):
    constants = {"G": 8, "D": head_dim, "P": 16, "KV": kv_format}
    types = {"keys": BYTES[kv_format], "values": BYTES[kv_format]}
    if kv_format != "int8":
        constants.update(key_scales=None, value_scales=None)
    if not sinks:
        constants["sinks"] = None
    return constants, types


def decode(kv_format, head_dim, tiling, *, window=0, splits=33, sinks=False, group=4):
    constants, types = over_cache(kv_format, head_dim, sinks=sinks)
    constants.update(
        DIM=triton.next_power_of_2(head_dim), GROUP=group,
        HEADS=attention._columns(group, SimpleNamespace(kv_format=kv_format)), WINDOW=window, N=tiling.tokens,
        SPLITS=splits, PARTS=triton.next_power_of_2(splits), LEAST=attention.TILES_A_SPLIT, SINKS=sinks,
    )  # fmt: skip
    name = f"decode {kv_format} {head_dim} {tuple(tiling)} window {window} splits {splits} sinks {sinks} group {group}"
    compiled(name, kernels.decode_kernel, constants, tiling.num_warps, tiling.num_stages, **types)


def prefill(kv_format, head_dim, tiling, *, window=0, sinks=False, group=4):
    constants, types = over_cache(kv_format, head_dim, sinks=sinks)
    constants.update(
        DIM=triton.next_power_of_2(head_dim), GROUP=group, QUERIES=tiling.rows // group, ROWS=tiling.rows,
        WINDOW=window, N=tiling.tokens, SINKS=sinks, ASM=True,
    )  # fmt: skip
    name = f"prefill {kv_format} {head_dim} {tuple(tiling)} window {window} sinks {sinks} group {group}"
    compiled(name, kernels.prefill_kernel, constants, tiling.num_warps, tiling.num_stages, **types)


def decodes(kv_format, sweep):
    cache = SimpleNamespace(kv_format=kv_format)
    for head_dim in (128, 64):
        tiling = attention.decode_tiling(cache, head_dim)
        for other in (tiling, *(SWEEP_DECODE if sweep else [])):
            decode(kv_format, head_dim, other)
    decode(kv_format, 64, attention.decode_tiling(cache, 64), window=128, sinks=True, group=8)
    decode(kv_format, 80, attention.decode_tiling(cache, 80), splits=1, sinks=True, group=1)


def prefills(kv_format, sweep):
    cache = SimpleNamespace(kv_format=kv_format)
    for head_dim in (128, 64):
        tiling = attention.prefill_tiling(cache, head_dim)
        for other in (tiling, *(SWEEP_PREFILL if sweep else [])):
            prefill(kv_format, head_dim, other)
    prefill(kv_format, 64, attention.prefill_tiling(cache, 64), window=128, sinks=True, group=8)
    prefill(kv_format, 80, attention.prefill_tiling(cache, 80), group=3)


def write(kv_format, sweep):
    for head_dim in (64, 80, 128):
        constants, types = over_cache(kv_format, head_dim)
        del constants["sinks"]
        half = triton.next_power_of_2(head_dim // 2)
        constants.update(H=32, HALF=half, HEADS=8, ROPE=True)
        compiled(f"write {kv_format} {head_dim}", kernels.write_kernel, constants, 1, fusion=False, **types)


def rounding(activations, sweep):
    types = {"out": BYTES[activations]}
    absent = {"scales": None} if activations == "bf16" else {}
    for function, width in (("norm", 4096), ("silu", 14336), ("silu", 8192), ("quantize", 8192)):
        tile = elementwise.SHARED_ROW if (function, activations) == ("silu", "bf16") else width
        launch = elementwise._launch(tile, activations, torch.device("cpu"))
        constants = {"K": width, "WIDTH": launch["WIDTH"], "TO": activations, **absent}
        kernel = getattr(elementwise, f"_{function}_kernel")
        name = f"{function} {activations} {width}"
        compiled(name, kernel, constants, launch["num_warps"], fusion=False, **types)


def choices():
    compiled("take", elementwise._take_kernel, {"K": 4096, "WIDTH": 4096}, 4, rows="*i32")
    compiled("argmax", elementwise._argmax_tile_kernel, {"V": VOCAB, "WIDTH": elementwise.VOCABULARY_TILE}, 4)
    compiled("argmax join", elementwise._argmax_join_kernel, {"WIDTH": 32}, 1, out="*i32")
    tile = {"V": VOCAB, "WIDTH": sampling.TILE}
    compiled("adjust", choosing.adjust_kernel, tile, sampling.WARPS, fusion=False, out="*fp32")
    compiled("logprob", choosing.logprob_kernel, tile, sampling.WARPS, out="*fp32")
    shape = {"V": VOCAB, **sampling._shape(VOCAB)}
    pointers = {"out": "*fp32", "sums": "*fp64", "ids": "*i32"}
    for name in ("survey", "cut", "weigh", "draw", "keep"):
        function = getattr(choosing, f"{name}_kernel")
        constants = {"GROUP": sampling.GROUP, "GROUPS": 4096, "CHUNK": sampling.CHUNK, **shape}
        constants = {k: v for k, v in constants.items() if k in function.arg_names}
        compiled(name, function, constants, sampling.WARPS, **pointers)


if __name__ == "__main__":
    chosen, *formats = [a for a in sys.argv[1:] if a != "--sweep"]
    sets = {"decode": decodes, "prefill": prefills, "write": write, "elementwise": rounding}
    if chosen == "sampling":
        choices()
    else:
        for name in formats or BYTES:
            sets[chosen](name, "--sweep" in sys.argv)
