"""Sections of a file that people write by hand, read strictly: a mapping of known keys to numbers, shares and names.

Every refusal names the key by its path, the value, the rule, and where there is one the nearest known name. Numbers
become `Decimal` from the digits that were written, so that 0.1 is a tenth.
"""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import Any

from halve.core.errors import ConfigError
from halve.core.record import shown

MOST = Decimal(10) ** 12  # beyond it a number in a file of prices is a slip of the pen


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'seats'?` where a known name is near, else nothing."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def read_decimal(value: Any, where: str, example: str = "12.50") -> Decimal:
    """A number of YAML, JSON or a command line. Raises ConfigError for what is none, or not finite."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
            raise InvalidOperation
        number = Decimal(str(value).strip().replace("_", "").removeprefix("$"))
    except InvalidOperation:
        raise ConfigError(f"{where}: {shown(value)} is not a number, such as {example}") from None
    if not number.is_finite():
        raise ConfigError(f"{where}: {shown(value)} is not a finite number, such as {example}")
    return number


def read_number(value: Any, where: str, *, low: Decimal | int = 0, high: Decimal | int = MOST) -> Decimal:
    """A number from low to high. Raises ConfigError."""
    number = read_decimal(value, where)
    if not low <= number <= high:
        raise ConfigError(f"{where}: {shown(value)} must be from {Decimal(low):f} to {Decimal(high):f}")
    return number


def read_share(value: Any, where: str, *, low: Decimal | int = 0, high: Decimal | int = 1) -> Decimal:
    """A share as `30%` or 0.3. A bare number above 1 is refused: 30 could be 30 % or thirtyfold. Raises ConfigError."""
    percent = re.fullmatch(r"\s*([^%]+?)\s*%\s*", value) if isinstance(value, str) else None
    number = read_decimal(percent[1], where, "30%") / 100 if percent else read_decimal(value, where, "30%")
    if percent is None and abs(number) > 1:
        raise ConfigError(f"{where}: {shown(value)} could be a percentage or a factor; write {number:f}% or a fraction")
    if not low <= number <= high:
        raise ConfigError(f"{where}: {shown(value)} must be from {Decimal(low) * 100:f}% to {Decimal(high) * 100:f}%")
    return number


class Section:
    """One mapping of a file. where: its path, for messages. Raises ConfigError for keys that are not known."""

    def __init__(self, raw: Any, where: str, known: Iterable[str], required: Iterable[str] = ()) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: expected a section with keys, got {shown(raw)}")
        self._raw, self.where, names = raw, where, sorted(known)
        for key in raw:
            if key not in names:
                hint = nearest(str(key), names) or ";"
                raise ConfigError(f"{self._path(str(key))}: unknown key{hint} known keys are {', '.join(names)}")
        if missing := sorted(set(required) - {key for key in raw if raw[key] is not None}):
            raise ConfigError(f"{where}: missing {', '.join(missing)}; give {'it' if len(missing) == 1 else 'them'}")

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def has(self, key: str) -> bool:
        """Whether the key is there and not empty."""
        return self._raw.get(key) is not None

    def get(self, key: str) -> Any:
        """What stands there, as YAML gave it; None where nothing does."""
        return self._raw.get(key)

    def number(
        self, key: str, default: Decimal | int | None = None, *, low: Decimal | int = 0, high: Decimal | int = MOST
    ) -> Decimal:
        """A number from low to high."""
        if not self.has(key) and default is not None:
            return Decimal(default)
        return read_number(self.get(key), self._path(key), low=low, high=high)

    def share(
        self, key: str, default: Decimal | int | None = None, *, low: Decimal | int = 0, high: Decimal | int = 1
    ) -> Decimal:
        """A share, `30%` or 0.3."""
        if not self.has(key) and default is not None:
            return Decimal(default)
        return read_share(self.get(key), self._path(key), low=low, high=high)

    def whole(self, key: str, default: int, *, low: int = 0, high: int = 10_000) -> int:
        """A whole number from low to high."""
        number = self.number(key, default, low=low, high=high)
        if number != int(number):
            raise ConfigError(f"{self._path(key)}: {shown(self.get(key))} must be a whole number")
        return int(number)

    def text(self, key: str, default: str = "") -> str:
        """A text of 1 to 200 characters."""
        value = self._raw.get(key, default)
        if not isinstance(value, str) or len(value) > 200:
            raise ConfigError(f"{self._path(key)}: {shown(value)} must be a text of at most 200 characters")
        return value

    def path(self, key: str) -> str:
        """Where a key stands, for messages."""
        return self._path(key)
