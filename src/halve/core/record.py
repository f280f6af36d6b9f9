"""Frozen records to JSON and back, strict about everything.

A record is a frozen dataclass. `from_dict` refuses unknown keys, missing keys and wrong types, and names the path
of what it refused (`plan.weights.rules[2].format`), because these files are written by hand as well as by us.
"""

import dataclasses
import json
import math
import reprlib
import sys
import types
import typing
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from halve.core.errors import ConfigError

T = TypeVar("T")


def to_dict(record: Any) -> Any:
    """Turn a record into plain JSON values: tuples become lists, records become objects."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_dict(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {str(key): to_dict(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [to_dict(value) for value in record]
    if record is None or isinstance(record, str | int | float | bool):
        return record
    raise TypeError(f"{type(record).__name__} has no JSON form")


def to_json(record: Any) -> str:
    """Turn a record into indented JSON text; NaN and infinity are refused with ValueError."""
    return json.dumps(to_dict(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_dict(cls: type[T], raw: Any, where: str | None = None) -> T:
    """Build a record of type `cls` from plain JSON values.

    Raises ConfigError that names the path on unknown keys, missing keys and wrong types; what the record itself
    refuses in `__post_init__` passes through.
    """
    return typing.cast(T, _read(cls, raw, where or cls.__name__.lower()))


def from_json(cls: type[T], text: str, where: str | None = None) -> T:
    """Build a record of type `cls` from JSON text. Raises ConfigError as `from_dict` does."""
    where = where or cls.__name__.lower()
    return from_dict(cls, parse_json(text, where), where)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text.

    Raises ConfigError naming `where` on syntax errors, duplicate keys, NaN, and numbers or nesting beyond what Python
    holds: these files come from the internet too.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ConfigError(f"{where}: duplicate keys {sorted(key for key, n in counts.items() if n > 1)}")
        return result

    def refuse_constant(name: str) -> float:
        raise ConfigError(f"{where}: {name} is not a JSON number")

    def finite(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):  # 1e999 would turn into infinity without a sign
            raise ConfigError(f"{where}: {shown(digits)} is larger than a float from JSON can hold")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:  # ValueError: a syntax error, or an integer of over 4,300 digits
        raise ConfigError(f"{where}: not JSON: {error}") from error


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80
_brief.maxlist = _brief.maxdict = _brief.maxtuple = 8


def shown(value: Any) -> str:
    """A value for a message, cut in length and depth."""
    return _brief.repr(value)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _read(kind: Any, raw: Any, where: str) -> Any:
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_record(kind, raw, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if not any(type(raw) is type(arg) and raw == arg for arg in args):  # True and 1.0 equal 1
            raise ConfigError(f"{where}: {shown(raw)} is not one of {list(args)}")
        return raw
    if origin in (Union, types.UnionType):
        return _read_union(args, raw, where)
    if origin in (tuple, list):
        if not isinstance(raw, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {shown(raw)}")
        return tuple(_read(args[0], value, f"{where}[{i}]") for i, value in enumerate(raw))
    if origin in (dict, Mapping):
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: expected an object, got {shown(raw)}")
        return {str(key): _read(args[1], value, f"{where}.{key}") for key, value in raw.items()}
    return _read_scalar(kind, raw, where)


def _read_record(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected an object, got {shown(raw)}")
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if unknown := sorted(raw.keys() - known.keys()):
        raise ConfigError(f"{where}: unknown keys {unknown}; known keys are {sorted(known)}")
    required = {
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - raw.keys()):
        raise ConfigError(f"{where}: missing keys {missing}")
    hints = _hints(cls)
    return cls(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in raw.items()})


def _read_union(args: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    for choice in choices[:-1]:
        try:
            return _read(choice, raw, where)
        except ConfigError:
            continue
    return _read(choices[-1], raw, where)


def _read_scalar(kind: Any, raw: Any, where: str) -> Any:
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if kind is float and number:
        if not -sys.float_info.max <= raw <= sys.float_info.max:
            raise ConfigError(f"{where}: expected a finite number, got {shown(raw)}")
        return float(raw)
    if not isinstance(raw, kind) or (isinstance(raw, bool) and kind is not bool):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {shown(raw)}")
    return raw
