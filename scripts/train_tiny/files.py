"""Folders and files that the verbs write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halve.core.errors import OutputError


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises OutputError where the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
