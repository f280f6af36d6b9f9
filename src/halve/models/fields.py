"""Values of config.json read strictly: numbers, flags, and rotary positions."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from halve.core.errors import ConfigError
from halve.models.spec import Rope

ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
}
ROPE_MAY: Mapping[str, frozenset[str]] = {
    "yarn": frozenset({"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}),
}


def rope_object(raw: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key of config.json that says how positions are scaled, and what it holds; empty where nothing is said."""
    name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    if name == "rope_parameters" and raw.get("rope_scaling") not in (None, raw[name]):
        raise ConfigError(
            "config.json: rope_parameters and rope_scaling differ; remove the one that is not the model's"
        )
    scaling = raw.get(name)
    if scaling is None:
        scaling = {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: {name} is {scaling!r}; expected an object")
    return name, scaling


def read_rope(raw: Mapping[str, Any]) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    name, scaling = rope_object(raw)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("type", kind) != kind:
        raise ConfigError(f"config.json: {name} has rope_type {kind!r} and type {scaling['type']!r}; keep one of them")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ConfigError(f"config.json: {name} type {kind!r} can't be run; known types are {', '.join(ROPE_KEYS)}")
    known = ROPE_KEYS[kind] | ROPE_MAY.get(kind, frozenset()) | {"rope_type", "type", "rope_theta"}
    if unknown := sorted(scaling.keys() - known):
        raise ConfigError(
            f"config.json: {name} has unknown keys {unknown} for type {kind!r}; known are {sorted(known)}"
        )
    if missing := sorted(ROPE_KEYS[kind] - scaling.keys()):
        raise ConfigError(f"config.json: {name} of type {kind!r} misses {missing}")
    theta = number(scaling if scaling.get("rope_theta") is not None else raw, "rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta=theta)
    factor = number(scaling, "factor", None)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        return _yarn(scaling, theta, factor)
    low, high = number(scaling, "low_freq_factor", None), number(scaling, "high_freq_factor", None)
    if high <= low:
        raise ConfigError(f"config.json: {name}.high_freq_factor {high} must be above low_freq_factor {low}")
    original = count(scaling, "original_max_position_embeddings")
    return Rope(
        theta=theta, kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=original
    )


def _yarn(scaling: Mapping[str, Any], theta: float, factor: float) -> Rope:
    """attention_factor as stated, else by mscale and mscale_all_dim where both are given, else by factor alone."""
    if scaling.get("attention_factor") is not None:
        attention_factor = number(scaling, "attention_factor", None)
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        of_some, of_all = number(scaling, "mscale", None), number(scaling, "mscale_all_dim", None)
        attention_factor = yarn_mscale(factor, of_some) / yarn_mscale(factor, of_all)
    else:
        attention_factor = yarn_mscale(factor, 1.0)
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=count(scaling, "original_max_position_embeddings"),
        beta_fast=number(scaling, "beta_fast", 32.0),
        beta_slow=number(scaling, "beta_slow", 1.0),
        truncate=flag(scaling, "truncate", default=True),
        attention_factor=attention_factor,
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """By how much attention over a context that was made `factor` times longer is sharpened; arXiv:2309.00071, 3.4."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def routed(raw: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """num_experts, under one of `names`, and top_k. Raises ConfigError, also for more chosen than there are."""
    found = [name for name in names if raw.get(name) is not None]
    if not found:
        raise ConfigError(f"config.json: {' or '.join(names)} is missing")
    experts, top_k = count(raw, found[0]), count(raw, "num_experts_per_tok")
    if top_k > experts:
        raise ConfigError(
            f"config.json: num_experts_per_tok {top_k} is above {found[0]} {experts}; a token can't go to more experts "
            "than there are"
        )
    return {"num_experts": experts, "top_k": top_k}


def count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above zero; None for no default. Raises ConfigError."""
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ConfigError(f"config.json: {key} is {value!r}; expected a whole number above zero")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None) -> float:
    """A finite number above zero; None for no default. Raises ConfigError."""
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"config.json: {key} is {value!r}; expected a finite number above zero")
    return float(value)


def flag(raw: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """True or false. Raises ConfigError."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}; expected true or false")
    return default if value is None else value
