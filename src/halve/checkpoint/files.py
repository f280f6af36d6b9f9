"""Reading small files strictly: JSON without duplicate keys, errors that name the file and the way out."""

from pathlib import Path
from typing import Any

from halve.core.errors import CheckpointError, ConfigError
from halve.core.record import parse_json

AGAIN = "the file is damaged or incomplete; download or write it again"


def shown(value: Any) -> str:
    """A value for a message, cut where a hostile file would flood the screen."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def exists(path: Path) -> bool:
    """Whether there is anything at `path`. Raises CheckpointError where the system will not tell."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path}: cannot be read: {error}; check the path and permissions") from error
    return True


def read_bytes(path: Path) -> bytes:
    """A small file's content. Raises CheckpointError with the system's reason."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the path and permissions") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError as `parse_object` does."""
    return parse_object(read_bytes(path), str(path))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes.

    Raises CheckpointError naming `where` on other encodings, syntax errors, duplicate keys, numbers out of range and
    anything that is not an object.
    """
    try:
        value = parse_json(raw.decode(), where)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}; {AGAIN}") from error
    except ConfigError as error:
        raise CheckpointError(f"{error}; {AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {shown(value)}; {AGAIN}")
    return value
