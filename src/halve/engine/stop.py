"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopText:
    """Passes text on up to the first stop string; holds back what may still become one.

    The first is the one that is complete first, reading character by character (the longest, if two end together),
    so where tokens begin and end changes nothing. include: the stop string itself passes too.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece; return the text that is certain, and whether a stop string ended it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if found:
            end, minus_length = min(found)
            self._held = ""
            return text[: end if self._include else end + minus_length], True
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
