"""How good is it, with an interval: the smaller model against the original on text that the search never saw."""

from halve.evaluate.fidelity import (
    MINIMUM,
    LogitSource,
    Minimum,
    PairedScores,
    compare,
    quality,
    require_enough,
    windows,
)
from halve.evaluate.verdict import answer, differences, documents_needed, fails, passes

__all__ = [
    "MINIMUM",
    "LogitSource",
    "Minimum",
    "PairedScores",
    "answer",
    "compare",
    "differences",
    "documents_needed",
    "fails",
    "passes",
    "quality",
    "require_enough",
    "windows",
]
