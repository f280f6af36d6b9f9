"""The cheapest plan within a quality limit."""

from halve.search.uniform import (
    Candidate,
    Judged,
    bytes_per_token,
    candidates,
    cheapest_passing,
    method_for,
    plain_bytes_per_token,
    plan_for,
)

__all__ = [
    "Candidate",
    "Judged",
    "bytes_per_token",
    "candidates",
    "cheapest_passing",
    "method_for",
    "plain_bytes_per_token",
    "plan_for",
]
