"""The text that ships with Halve: English, Japanese, code and chat; SOURCES.md says where it comes from."""

from pathlib import Path

KINDS = ("english", "japanese", "code", "chat")


def mixed_text_paths() -> tuple[Path, ...]:
    """One JSON Lines file for each kind, in the order of KINDS; documents are `{"text"}` or `{"messages"}`."""
    folder = Path(__file__).resolve().parent
    return tuple(folder / f"{kind}.jsonl" for kind in KINDS)
