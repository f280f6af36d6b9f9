"""The models that ship with Halve, small enough to travel and real enough to measure; each folder has its card."""

from pathlib import Path

EMBEDDED = "tiny-en"
SPARSE = "tiny-en-moe"


def embedded_model_path(name: str = EMBEDDED) -> Path:
    """Folder of an embedded checkpoint, a plain Hugging Face one in bf16.

    `EMBEDDED` is a dense Llama of 8.9 MB, `SPARSE` a Mixtral of 18.4 MB that was made of it.
    """
    return Path(__file__).resolve().parent / name
