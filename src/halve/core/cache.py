"""Where files are kept that can be made again: $HALVE_CACHE, else $XDG_CACHE_HOME/halve, else ~/.cache/halve.

HALVE_CACHE=off keeps nothing. Importing this reads no environment; asking does.
"""

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """The folder of one kind of files; None where nothing is kept. It need not exist."""
    named = os.environ.get("HALVE_CACHE", "")
    if named.lower() == "off":
        return None
    if named:
        return Path(named) / name
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the standard has relative ones ignored
        return Path(base) / "halve" / name
    try:
        return Path.home() / ".cache" / "halve" / name
    except RuntimeError:  # a user without a home
        return None
