"""The front that a search found, as a bundle keeps it (`halve/front.json`): every plan, and what was not done."""

from dataclasses import dataclass
from typing import Literal

from halve.api.job import label
from halve.api.pipeline import Outcome
from halve.core.certificate import Measured
from halve.search import Move, in_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A plan of the front. number: for --pick. cost_ratio: of the search's own unit, over the dearest plan's here.

    predicted_kl: nats per token by the sensitivities. kl, ppl_ratio: measured, or null.
    """

    number: int
    name: str
    bytes_per_token: int
    cost_ratio: float
    predicted_kl: float
    kl: Measured | None
    ppl_ratio: Measured | None
    chosen: bool
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """What a search found, cheapest first, and what the chosen plan left undone. basis: of cost."""

    basis: Literal["seconds", "bytes"]
    workload: str
    points: tuple[Point, ...]
    rejected_moves: tuple[Move, ...]
    version: int = 1


def front_of(outcome: Outcome) -> Front:
    """The front with what was measured of it."""
    plans = outcome.plans
    assert plans is not None
    judged = {label(j): j for j in outcome.judged}
    most = max(c.cost or 0.0 for c in outcome.ranked) or 1.0
    points = []
    for i, candidate in enumerate(outcome.ranked):
        found, chosen = judged.get(label(candidate)), candidate is outcome.candidate
        points.append(
            Point(
                number=i + 1,
                name=label(candidate),
                bytes_per_token=candidate.bytes_per_token,
                cost_ratio=(candidate.cost or 0.0) / most,
                predicted_kl=candidate.predicted_kl or 0.0,
                kl=outcome.quality.kl_mean if chosen else found.kl_mean if found else None,
                ppl_ratio=outcome.quality.ppl_ratio if chosen else found.ppl_ratio if found else None,
                chosen=chosen,
                layers=tuple(in_words(candidate.choices)),
            )
        )
    return Front(
        basis=plans.basis,
        workload=plans.purpose.workload.name,
        points=tuple(points),
        rejected_moves=tuple(outcome.moves()),
    )
