"""The folder where what was measured or compiled for a device is kept, and how a file comes to be there.

It is $HALVE_CACHE, else $XDG_CACHE_HOME/halve, else ~/.cache/halve, under `cuda`; HALVE_CACHE=off keeps nothing.
"""

import os
import tempfile
from pathlib import Path


def folder() -> Path | None:
    """Where it is; None where nothing is kept. It need not exist."""
    named = os.environ.get("HALVE_CACHE", "")
    if named.lower() == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if named:
        home = Path(named)
    elif os.path.isabs(base):
        home = Path(base) / "halve"
    else:
        try:
            home = Path.home() / ".cache" / "halve"
        except RuntimeError:  # a user without a home
            return None
    return home / "cuda"


def write(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there: others see it whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".new", delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
