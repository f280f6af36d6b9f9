"""Quantities as people write and read them. GB = 10^9 bytes, GiB = 2^30 bytes."""

import re

from halve.core.errors import ConfigError

_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZES |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_percent(text: str | float, name: str) -> float:
    """Read `1%`, `0.5 %` or `0.01` as a fraction (0.01, 0.005, 0.01).

    A bare number of 1 or more is refused with ConfigError, since "1" could mean 1 % or 100 %.
    """
    raw = str(text).strip()
    try:
        value = float(raw[:-1]) / 100 if raw.endswith("%") else float(raw)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a percentage; write it as 1% or 0.01") from None
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name}: {text!r} must be zero or more and finite; write it as 1% or 0.01")
    if not raw.endswith("%") and value >= 1:
        raise ConfigError(f"{name}: {text!r} is ambiguous; write {raw}% or a fraction below 1")
    return value


def parse_bytes(text: str | int, name: str) -> int:
    """Read `2GB`, `1.5 GiB`, `500mb` or a whole number of bytes. Raises ConfigError for anything else, and for none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    unit = match and _SIZES.get(match[2])
    if match is None or unit is None or (unit == 1 and "." in match[1]):
        raise ConfigError(f"{name}: {str(text)!r:.40} is no size; write it as 2GB, 512MiB or a whole number of bytes")
    size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if size < 1:
        raise ConfigError(f"{name}: {text!r} must be 1 byte or more; write it as 2GB, 512MiB or a number of bytes")
    return size


def format_bytes(size_bytes: float) -> str:
    """Say a size with three significant digits in decimal units: `8.92 MB`."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_duration(seconds: float) -> str:
    """Say a duration: `42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
