"""Halve: run open Llama-family models for a fraction of what they cost, and prove it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halve.api import demo as demo
    from halve.api import doctor as doctor
    from halve.api import inspect as inspect
    from halve.api import load as load
    from halve.api import optimize as optimize
    from halve.api import verify as verify

__version__ = "0.1.0"
__all__ = ["__version__", "demo", "doctor", "inspect", "load", "optimize", "verify"]


def __getattr__(name: str) -> Any:
    # The verbs load on first use, so that `import halve` reads no disk and loads neither numpy nor torch.
    if name in __all__:
        return getattr(import_module("halve.api"), name)
    raise AttributeError(f"module 'halve' has no attribute {name!r}")
