"""The cheapest choice of one option a group whose losses add up to at most a limit, with a proof of how near it is.

    minimise sum_g cost[g, c_g]   such that   sum_g loss[g, c_g] <= limit        (a multiple-choice knapsack)

Three steps. (1) For a price m of loss, each group alone takes the option of least cost + m * loss; the sum less
m * limit is a lower bound of every plan that keeps the limit (Lagrange duality), and bisection over m finds the best
such bound, on the convex hull of each group's options. (2) What costs more than the gap between that bound and a plan
already found can't be in a better one (reduced costs), which leaves a short list. (3) The short list is solved exactly
by HiGHS (`scipy.optimize.milp`; "Parallelizing the dual revised simplex method", 2018). Sources: Everett 1963
(generalised Lagrange multipliers); Sinha and Zoltners 1979 (the multiple-choice knapsack).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from halve.core.errors import QualityError
from halve.search.stdout import stdout_to_log

Array = np.ndarray[Any, np.dtype[Any]]

TIME_LIMIT_S = 4.0
NUM_BISECTIONS = 100
FRONT_RANGE = 1e-5
SLACK = 1e-9  # of the limit: what sums in another order may differ by


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """One option of each group. bound: no choice within the limit costs less; gap: (cost - bound) / cost."""

    chosen: tuple[int, ...]
    cost: float
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """Share of the cost that a better choice could save at most; 0 for the cheapest."""
        return max(0.0, self.cost - self.bound) / self.cost if self.cost > 0 else 0.0


def solve(costs: Sequence[Array], losses: Sequence[Array], limit: float, *, time_s: float = TIME_LIMIT_S) -> Solution:
    """The cheapest choice within a limit of loss.

    costs, losses: float [options] of each group, finite. time_s: of the exact step, after which the best found stands
    with its gap. Raises QualityError, saying the least loss there is, when no choice keeps the limit.
    """
    groups = [_Group(np.asarray(c, np.float64), np.asarray(x, np.float64)) for c, x in zip(costs, losses, strict=True)]
    least = sum(float(group.losses.min()) for group in groups)
    if least > limit + SLACK * abs(limit):
        raise QualityError(f"no plan loses {limit:.3g} nats or less by this model; the least is {least:.3g}")
    bound, chosen = _lagrangian(groups, limit)
    chosen = _greedy(groups, chosen, limit)
    cost = _sum(groups, chosen, "costs")
    if cost - bound > 1e-12 * abs(cost):
        chosen, bound = _exact(groups, chosen, bound, limit, time_s)
    cost = _sum(groups, chosen, "costs")
    return Solution(
        chosen=tuple(int(group.index[c]) for group, c in zip(groups, chosen, strict=True)),
        cost=cost,
        loss=_sum(groups, chosen, "losses"),
        bound=min(bound, cost),
    )


def front(costs: Sequence[Array], losses: Sequence[Array], *, num_points: int = 40) -> list[Solution]:
    """Solutions from the cheapest of all to that of least loss, each cheaper than any other with as little loss.

    num_points: limits tried between the two, evenly on a logarithmic scale, down to FRONT_RANGE of the cheapest one's
    loss; equal solutions are one.
    """
    low = sum(float(np.min(x)) for x in losses)
    cheapest = sum(float(x[np.lexsort((x, c))[0]]) for c, x in zip(costs, losses, strict=True))
    floor = max(low, FRONT_RANGE * cheapest)
    between = np.geomspace(floor, max(cheapest, floor), num_points) if cheapest > 0 else np.zeros(0)
    limits = [low, *(limit for limit in between.tolist() if low < limit < cheapest), max(low, cheapest)]
    found = {one.chosen: one for one in (solve(costs, losses, limit) for limit in limits)}
    kept: list[Solution] = []
    for one in sorted(found.values(), key=lambda s: (s.cost, s.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept


class _Group:
    """A group's options that no other beats in both, by rising cost. index: their places as given."""

    def __init__(self, costs: Array, losses: Array) -> None:
        order = np.lexsort((losses, costs))
        kept: list[int] = []
        for i in order:
            if not kept or losses[i] < losses[kept[-1]]:
                kept.append(int(i))
        self.index = np.array(kept)
        self.costs, self.losses = costs[kept], losses[kept]


def _sum(groups: Sequence[_Group], chosen: Sequence[int], what: str) -> float:
    return float(sum(getattr(group, what)[c] for group, c in zip(groups, chosen, strict=True)))


def _at_price(groups: Sequence[_Group], price: float) -> list[int]:
    """Each group's best option where loss has a price; of equals the one of less loss."""
    return [len(g.costs) - 1 - int(np.argmin((g.costs + price * g.losses)[::-1])) for g in groups]


def _dual(groups: Sequence[_Group], chosen: Sequence[int], price: float, limit: float) -> float:
    return _sum(groups, chosen, "costs") + price * (_sum(groups, chosen, "losses") - limit)


def _lagrangian(groups: Sequence[_Group], limit: float) -> tuple[float, list[int]]:
    """The best bound and a choice within the limit, by bisection over the price."""
    chosen = _at_price(groups, 0.0)
    if _sum(groups, chosen, "losses") <= limit + SLACK * abs(limit):
        return _sum(groups, chosen, "costs"), chosen
    best = -inf
    low, high = 0.0, 1.0
    feasible = [len(g.costs) - 1 for g in groups]  # the least loss there is
    for _ in range(NUM_BISECTIONS):
        chosen = _at_price(groups, high)
        best = max(best, _dual(groups, chosen, high, limit))
        if _sum(groups, chosen, "losses") <= limit:
            feasible = chosen
            break
        low, high = high, high * 8
    for _ in range(NUM_BISECTIONS):
        price = (low + high) / 2
        chosen = _at_price(groups, price)
        best = max(best, _dual(groups, chosen, price, limit))
        if _sum(groups, chosen, "losses") <= limit:
            high, feasible = price, chosen
        else:
            low = price
        if high - low <= 1e-12 * high:
            break
    return best, feasible


def _greedy(groups: Sequence[_Group], chosen: Sequence[int], limit: float) -> list[int]:
    """Spend what is left of the limit: the step down that saves most, as long as one fits."""
    chosen = list(chosen)
    left = limit + SLACK * abs(limit) - _sum(groups, chosen, "losses")
    while True:
        best: tuple[float, int, int, float] | None = None
        for g, (group, c) in enumerate(zip(groups, chosen, strict=True)):
            for other in range(c):
                more = float(group.losses[other] - group.losses[c])
                saved = float(group.costs[c] - group.costs[other])
                if more <= left and (best is None or saved > best[0]):
                    best = saved, g, other, more
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
        left -= best[3]


def _exact(
    groups: Sequence[_Group], chosen: Sequence[int], bound: float, limit: float, time_s: float
) -> tuple[list[int], float]:
    """The best choice and the best bound, by branch and bound over what could be in it."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    cost = _sum(groups, chosen, "costs")
    lists = _short_lists(groups, chosen, limit, cost)
    sizes = [len(one) for one in lists]
    starts = np.cumsum([0, *sizes])
    costs = np.concatenate([g.costs[one] for g, one in zip(groups, lists, strict=True)])
    losses = np.concatenate([g.losses[one] for g, one in zip(groups, lists, strict=True)])
    columns = np.arange(starts[-1])
    one_each = coo_array((np.ones(len(columns)), (np.repeat(np.arange(len(groups)), sizes), columns)))
    scale = max(abs(limit), float(np.abs(losses).max()), 1e-300)
    unit = max(abs(cost), 1e-300)
    with stdout_to_log():
        result = milp(
            costs / unit,
            integrality=np.ones(len(columns), np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(losses[None] / scale, -np.inf, limit / scale),
            ],
            options={"time_limit": time_s, "mip_rel_gap": 0.0},
        )
    bound = max(bound, _proven(result, unit))
    if result.x is None:
        return list(chosen), bound
    found = [int(one[np.argmax(result.x[a:b])]) for one, a, b in zip(lists, starts, starts[1:], strict=False)]
    within = _sum(groups, found, "losses") <= limit + SLACK * abs(limit)
    if within and _sum(groups, found, "costs") < cost:
        return found, bound
    return list(chosen), bound


def _proven(result: Any, unit: float) -> float:
    """What HiGHS proves that no choice is below, less its tolerance."""
    value = getattr(result, "mip_dual_bound", None)
    return -inf if value is None or not np.isfinite(value) else float(value) * unit - 1e-9 * unit


def _short_lists(groups: Sequence[_Group], chosen: Sequence[int], limit: float, cost: float) -> list[Array]:
    """Of each group, the options that a choice cheaper than `cost` may hold, by the reduced costs of the best price."""
    price = _best_price(groups, limit)
    least = [float((g.costs + price * g.losses).min()) for g in groups]
    total = sum(least) - price * limit
    lists = []
    for group, c, one in zip(groups, chosen, least, strict=True):
        reduced = group.costs + price * group.losses - one
        may = total + reduced <= cost + 1e-9 * abs(cost)
        may[c] = True
        lists.append(np.flatnonzero(may))
    return lists


def _best_price(groups: Sequence[_Group], limit: float) -> float:
    low, high = 0.0, 1.0
    while _sum(groups, _at_price(groups, high), "losses") > limit and high < 1e30:
        low, high = high, high * 8
    for _ in range(NUM_BISECTIONS):
        price = (low + high) / 2
        if _sum(groups, _at_price(groups, price), "losses") > limit:
            low = price
        else:
            high = price
    return high
