"""The folder where what was measured or compiled for a device is kept, and how a file comes to be there.

It is $HALVE_CACHE, else $XDG_CACHE_HOME/halve, else ~/.cache/halve, under `cuda`; HALVE_CACHE=off keeps nothing.
"""

import tempfile
from pathlib import Path

from halve.core.cache import cache_folder


def folder() -> Path | None:
    """Where it is; None where nothing is kept. It need not exist."""
    return cache_folder("cuda")


def write(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there: others see it whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".new", delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
