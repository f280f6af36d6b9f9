"""`quantization_config` of config.json in the words of compressed-tensors: written for our bundles, read from anyone's.

A layout says how each matrix of a checkpoint is stored. What compressed-tensors can say and this engine can't run
rightly is refused by key, since ignoring a key here changes what the weights mean.
Source: compressed-tensors 0.20.0, quantization/quant_config.py, quant_scheme.py, quant_args.py, utils/match.py.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from halve.checkpoint.files import shown
from halve.core.errors import CheckpointError, PlanError
from halve.formats import FORMATS, Format, format_named

VERSION = "0.20.0"  # of compressed-tensors; since June 2026 words of 3, 5, 6 and 7 bits are dense

Storage = Literal["pack-quantized", "int-quantized", "float-quantized"]

EMBEDDING = "embed_tokens"
# What vLLM loads as one matrix: its name, and the names in the file.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
IN_LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<block>.+)\.(?P<leaf>[^.]+)")

CONFIG_KEYS = {
    *(
        "quant_method",
        "version",
        "format",
        "quantization_status",
        "global_compression_ratio",
        "config_groups",
        "ignore",
    ),
    *("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"),
    *("run_compressed", "dequantize", "use_optimized_inference"),  # how transformers loads it, nothing about the file
}
SCHEME_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
ARGS_KEYS = {
    *(
        "num_bits",
        "type",
        "symmetric",
        "strategy",
        "group_size",
        "block_structure",
        "dynamic",
        "actorder",
        "scale_dtype",
    ),
    *("observer", "observer_kwargs", "zp_dtype"),  # how codes were found, and what symmetric weights have none of
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A format and the tensors that carry it."""

    format: Format
    storage: Storage


def storage_of(fmt: Format, portable: bool) -> Storage:
    """How we store a compressed format. Native per-row int8 keeps its bytes as kernels read them, packed by nobody."""
    if fmt.kind == "float":
        return "float-quantized"
    return "int-quantized" if fmt.name == "int8" and not portable else "pack-quantized"


def quantization_config(formats: Mapping[str, str], *, portable: bool) -> dict[str, Any] | None:
    """The config of a model whose matrices are stored in `formats`; None when none is compressed.

    formats: module (`model.layers.0.self_attn.q_proj`, `lm_head`) -> format name, plain formats included: they are
    listed under `ignore`. Raises FormatError on an unknown format, and PlanError when a portable model would store
    matrices that others fuse in different formats, or compress its embedding table.
    """
    if portable:
        _check_portable(formats)
    groups: dict[str, list[str]] = {}
    for module, name in formats.items():
        if format_named(name).scaled:
            groups.setdefault(name, []).append(module)
    if not groups:
        return None
    ordered = sorted(groups, key=list(FORMATS).index)
    storages = {storage_of(FORMATS[name], portable) for name in ordered}
    plain = [module for module, name in formats.items() if not FORMATS[name].scaled]
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": storages.pop() if len(storages) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [module for module in plain if not _is_embedding(module)],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {
            f"group_{i}": _group(FORMATS[name], groups[name], portable) for i, name in enumerate(ordered)
        },
    }


def _group(fmt: Format, modules: Collection[str], portable: bool) -> dict[str, Any]:
    return {
        "format": storage_of(fmt, portable),
        "targets": _targets(modules),
        "weights": {
            "num_bits": fmt.bits,
            "type": fmt.kind,
            "symmetric": True,
            "strategy": "group" if fmt.group_size else "channel",
            "group_size": fmt.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _check_portable(formats: Mapping[str, str]) -> None:
    for module, name in formats.items():
        if _is_embedding(module) and format_named(name).scaled:
            raise PlanError(f"{module}: other engines read embeddings in 16 bits, not {name}; set portable to false")
        prefix, _, leaf = module.rpartition(".")
        for fused, members in FUSED.items():
            found = {formats[other] for m in members if (other := f"{prefix}.{m}") in formats}
            if leaf in members and len(found) > 1:
                raise PlanError(
                    f"{prefix}: other engines run {', '.join(members)} as one {fused}, here in {sorted(found)}; "
                    "store them in one format or set portable to false"
                )


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] == EMBEDDING


def _targets(modules: Collection[str]) -> list[str]:
    """Targets of exactly these modules: a pattern for each whole fused set over its layers, names for the rest.

    A pattern also matches the fused name, so that engines which only see `qkv_proj` find their format.
    """
    remaining = dict.fromkeys(modules)
    layers: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        match = IN_LAYER.fullmatch(module)
        fused = next((f for f, members in FUSED.items() if match and match["leaf"] == members[0]), None)
        if match is None or fused is None:
            continue
        members = [module.removesuffix(match["leaf"]) + m for m in FUSED[fused]]
        if all(member in remaining for member in members):
            layers.setdefault((match["block"], fused), []).append(match["layer"])
            for member in members:
                del remaining[member]
    patterns = [
        rf"re:(.*\.)?layers\.({'|'.join(sorted(numbers, key=int))})\.{re.escape(block)}\.({_leaves(fused)})$"
        for (block, fused), numbers in layers.items()
    ]
    return patterns + list(remaining)


def _leaves(fused: str) -> str:
    return "|".join((*FUSED[fused], fused))


@dataclass(frozen=True, slots=True)
class Layout:
    """How each matrix of a checkpoint is stored. targets: in the order of precedence; ignore: stored plainly."""

    targets: tuple[tuple[str, Stored], ...] = ()
    ignore: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, quantization_config: Mapping[str, Any] | None) -> "Layout":
        """Read a model's `quantization_config`; None is a model without compression.

        Raises CheckpointError that names the key which this engine can't run rightly.
        """
        if quantization_config is None:
            return cls()
        raw = _object(quantization_config, "quantization_config")
        _check_config(raw)
        targets: dict[str, Stored] = {}
        for name, group in _object(raw.get("config_groups"), "config_groups").items():
            where = f"config_groups.{name}"
            stored = _read_group(_object(group, where), raw.get("format"), where)
            for target in _names(group.get("targets"), f"{where}.targets"):
                if targets.setdefault(target, stored) != stored:
                    raise _refused(f"{where}.targets", target, "two groups of different formats have this target")
        ignore = _names(raw["ignore"], "ignore") if raw.get("ignore") is not None else []
        return cls(tuple(sorted(targets.items(), key=lambda item: _precedence(item[0]))), tuple(ignore))

    def format_of(self, module: str) -> Format | None:
        """The compressed format of a matrix, None when it is stored plainly."""
        stored = self.stored(module)
        return stored.format if stored else None

    def stored(self, module: str) -> Stored | None:
        """Format and carrying tensors of a matrix, None when it is stored plainly."""
        if any(_matches(module, target) for target in self.ignore):
            return None
        return next((stored for target, stored in self.targets if _matches(module, target)), None)


def _precedence(target: str) -> tuple[int, str]:
    """compressed-tensors looks at exact names first, then patterns in order, then classes."""
    return (1 if target.startswith("re:") else 2 if target in ("Linear", "Embedding") else 0), target


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, "Embedding" if _is_embedding(module) else "Linear")


def _check_config(raw: Mapping[str, Any]) -> None:
    method = raw.get("quant_method")
    if method != "compressed-tensors":
        raise _refused(
            "quant_method", method, "only compressed-tensors is read; use the original model and compress that"
        )
    _known(raw, CONFIG_KEYS, "quantization_config")
    if raw.get("quantization_status") != "compressed":
        raise _refused(
            "quantization_status", raw.get("quantization_status"), "must be compressed; save the model compressed"
        )
    reasons = {
        "kv_cache_scheme": "a cache quantized with stored scales is not supported",
        "sparsity_config": "sparse weights are not supported",
        "transform_config": "transforms at run time are not supported",
        "moe_sparsity_config": "sparse experts are not supported",
    }
    for key, reason in reasons.items():
        if raw.get(key):
            raise _refused(key, raw[key], reason)


def _read_group(group: Mapping[str, Any], top_format: Any, where: str) -> Stored:
    _known(group, SCHEME_KEYS, where)
    for key in ("input_activations", "output_activations"):
        if (args := group.get(key)) is not None:
            dynamic = isinstance(args, Mapping) and args.get("dynamic")
            what = "dynamic (W8A8)" if dynamic else "static"
            raise _refused(
                f"{where}.{key}", args, f"{what} quantization of activations is not supported, only of weights"
            )
    args = _object(group.get("weights"), f"{where}.weights")
    fmt = _read_format(args, f"{where}.weights")
    named = group.get("format") or top_format
    readable: tuple[Storage, ...] = ("float-quantized",) if fmt.kind == "float" else ("pack-quantized", "int-quantized")
    storage = readable[-1] if named == "naive-quantized" else named  # the older word for both
    if storage not in readable or (storage == "int-quantized" and fmt.bits != 8):
        raise _refused(f"{where}.format", named, f"{fmt.name} is read from {' or '.join(readable)}")
    return Stored(fmt, cast("Storage", storage))


def _read_format(args: Mapping[str, Any], where: str) -> Format:
    _known(args, ARGS_KEYS, where)
    if args.get("symmetric", True) is not True:
        raise _refused(f"{where}.symmetric", args["symmetric"], "asymmetric weights (zero points) are not supported")
    if args.get("dynamic", False) is not False:
        raise _refused(f"{where}.dynamic", args["dynamic"], "weights must be quantized statically")
    if args.get("actorder") not in (None, False, "weight", "static"):
        raise _refused(f"{where}.actorder", args["actorder"], "columns reordered at run time (g_idx) are not supported")
    if args.get("block_structure") is not None:
        raise _refused(f"{where}.block_structure", args["block_structure"], "scales of blocks are not supported")
    if args.get("scale_dtype") not in (None, "torch.bfloat16", "torch.float16", "torch.float32"):
        raise _refused(
            f"{where}.scale_dtype", args["scale_dtype"], "scales must be bf16, fp16 or fp32 (no nvfp4, no mxfp4)"
        )
    bits, kind, group_size = args.get("num_bits", 8), args.get("type", "int"), args.get("group_size")
    strategy = args.get("strategy") or _inferred_strategy(group_size)
    if strategy not in ("channel", "group"):
        raise _refused(
            f"{where}.strategy", strategy, "only one scale a row (channel) or a group of inputs is supported"
        )
    if strategy == "channel" and group_size not in (None, -1):
        raise _refused(f"{where}.group_size", group_size, "one scale a row (channel) has no groups")
    group = group_size if strategy == "group" else None
    for fmt in FORMATS.values():
        if fmt.scaled and (fmt.bits, fmt.kind, fmt.group_size) == (bits, kind, group):
            return fmt
    known = ", ".join(fmt.name for fmt in FORMATS.values() if fmt.scaled)
    raise _refused(where, {"num_bits": bits, "type": kind, "group_size": group_size}, f"supported are {known}")


def _inferred_strategy(group_size: Any) -> str:
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"


def _object(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise _refused(where, raw, "expected an object")
    return raw


def _known(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    if unknown := sorted(raw.keys() - set(known)):
        raise _refused(where, unknown, f"unknown keys, from a newer compressed-tensors than {VERSION}?")


def _names(raw: Any, where: str) -> list[str]:
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        raise _refused(where, raw, "expected a list of names")
    for name in raw:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except (re.error, RecursionError, OverflowError) as error:
                raise _refused(where, name, f"not a pattern ({error})") from error
    return cast("list[str]", raw)


def _refused(key: str, value: Any, rule: str) -> CheckpointError:
    return CheckpointError(f"config.json: quantization_config: {key}: {shown(value)}: {rule}")
