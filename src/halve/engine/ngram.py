"""Guesses without a model: what followed the last tokens when they came before. Sources: prompt lookup (Saxena 2023;
arXiv:2304.04487, "Inference with reference"), the chains of positions of LZ77 coders (RFC 1951, section 4).

Text that is edited, quoted or summarized comes again, often word for word. Every pair of tokens is indexed with where
it ended last, and each position with the one before it of the same pair. A lookup follows that chain, measures how far
back the context agrees, and takes the longest, of equal ones the latest. A token costs one entry, a lookup some
microseconds, both in Python (`benchmarks/speculation.py` measures them).
"""

from array import array

MIN_MATCH = 2  # tokens of context that must agree
MAX_MATCH = 16  # beyond it, longer says nothing more
MAX_CHAIN = 16  # positions that are looked at


class NgramIndex:
    """Of one sequence, whose tokens only grow."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # pair of tokens -> where it ended last
        self._before = array("i", [-1])  # position -> where the same pair ended before, -1 for nowhere

    def guess(self, tokens: "array[int]", most: int) -> tuple[int, "array[int]"]:
        """How many tokens of context agree, and at most `most` tokens that followed there; 0 and none without a match.

        A match whose continuation runs into the end goes on repeating itself: text that repeats with a period.
        """
        end = len(tokens) - 1
        self._index(tokens, end)
        if end < MIN_MATCH - 1 or most < 1:
            return 0, array("i")
        length, at = self._longest(tokens, end, self._last.get(tokens[end - 1] << 32 | tokens[end], -1))
        if not length:
            return 0, array("i")
        draft = tokens[at + 1 : at + 1 + most]
        period = end - at
        while len(draft) < most:
            draft += draft[len(draft) - period : len(draft) - period + most - len(draft)]
        return length, draft

    def _index(self, tokens: "array[int]", end: int) -> None:
        """Take in the pairs that end before `end`."""
        before, last = self._before, self._last
        for i in range(len(before), end):
            pair = tokens[i - 1] << 32 | tokens[i]
            before.append(last.get(pair, -1))
            last[pair] = i

    def _longest(self, tokens: "array[int]", end: int, at: int) -> tuple[int, int]:
        """Length and end of the longest match among those of a chain."""
        best = best_at = 0
        for _ in range(MAX_CHAIN):
            if at < 0:
                break
            length, most = MIN_MATCH, min(MAX_MATCH, at + 1)
            while length < most and tokens[at - length] == tokens[end - length]:
                length += 1
            if length > best:
                best, best_at = length, at
                if length == MAX_MATCH:
                    break
            at = self._before[at]
        return best, best_at
