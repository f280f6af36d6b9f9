"""Halve: run open Llama-family models for a fraction of what they cost, and prove it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halve.api.bench import bench as bench
    from halve.api.compare import compare as compare
    from halve.api.demo import demo as demo
    from halve.api.describe import doctor as doctor
    from halve.api.describe import inspect as inspect
    from halve.api.model import load as load
    from halve.api.optimize import optimize as optimize
    from halve.api.verify import verify as verify

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "compare", "demo", "doctor", "inspect", "load", "optimize", "verify"]

# Verbs load on first use: `import halve` reads no disk, and running a model never loads torch.
_HOMES = {
    "bench": "halve.api.bench",
    "compare": "halve.api.compare",
    "demo": "halve.api.demo",
    "doctor": "halve.api.describe",
    "inspect": "halve.api.describe",
    "load": "halve.api.model",
    "optimize": "halve.api.optimize",
    "verify": "halve.api.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'halve' has no attribute {name!r}")
