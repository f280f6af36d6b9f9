"""The model that ships with Halve, small enough to travel and real enough to measure: see tiny-en/README.md."""

from pathlib import Path

EMBEDDED = "tiny-en"


def embedded_model_path() -> Path:
    """Folder of the embedded checkpoint: a plain Hugging Face one, 8.9 MB of bf16 weights."""
    return Path(__file__).resolve().parent / EMBEDDED
