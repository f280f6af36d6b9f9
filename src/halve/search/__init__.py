"""The cheapest plan within a quality limit."""

from halve.search.front import Candidate, Judged, Move, candidates, cheapest_passing, in_words, likely_start
from halve.search.uniform import bytes_per_token, method_for, plan_for
from halve.search.whole import uniform_candidates

__all__ = [
    "Candidate",
    "Judged",
    "Move",
    "bytes_per_token",
    "candidates",
    "cheapest_passing",
    "in_words",
    "likely_start",
    "method_for",
    "plan_for",
    "uniform_candidates",
]
