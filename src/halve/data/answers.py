"""Answers that run on: past where the next turn begins, or round in a circle."""

import re

# What begins somebody else's turn, and so is no part of an answer.
MARKERS = (
    "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>",
    "\nUser:", "\nHuman:", "\nAssistant:", "\nQ:", "\nQuestion:", "\n### Instruction", "\n### User", "\n### Human",
    "\nユーザー:", "\n質問:",
)  # fmt: skip
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))


def first_marker(answer: str) -> tuple[int, str] | None:
    """Where an answer goes on with somebody else's turn, and the stop sequence that would end it there."""
    found = _MARKER.search(answer, 1)
    return (found.start(), found[0]) if found else None


def loop_start(answer: str, least: int = 3, longest: int = 400) -> int | None:
    """Where the second round of a loop begins that the answer ends in; None where it ends in none.

    A loop is a piece of up to `longest` characters, `least` times or more in a row, 40 characters in all or more; the
    last round may be cut short.
    """
    size = len(answer)
    for period in range(1, min(longest, size // least) + 1):
        start = size - period
        while start > 0 and answer[start - 1] == answer[start - 1 + period]:
            start -= 1
        repeated = size - start
        if repeated >= least * period and repeated >= 40:
            return start + period
    return None
