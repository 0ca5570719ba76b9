"""Things with a worth and prices, and budgets -> the best ones that keep every budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

# Costs are sums of floating-point numbers: a choice that meets its budget exactly must not fail by the last bit.
ROUNDING = 1e-9
INFEASIBLE = 2  # a status of SciPy's solver


def best_affordable(
    scores: Sequence[float],
    costs: Sequence[Sequence[float]],
    money: Sequence[float],
    *,
    at_least: int = 1,
    at_most: int,
) -> list[int]:
    """Indices of the best total score whose costs keep every budget, in ascending order; empty if nothing does.

    Exact where the things cost the same; else a knapsack, solved to one millionth of the budgets.

    Args:
        scores: What each thing is worth, above 0.
        costs: For each budget what each thing costs of it.
        money: The budgets.
        at_least: Smallest number of things.
        at_most: Largest number of things.
    """
    if len(scores) < at_least or not scores:
        return []
    if any(left <= 0 or left < sum(sorted(row)[:at_least]) for row, left in zip(costs, money, strict=True)):
        return []
    if all(max(row) - min(row) <= ROUNDING * max(row) for row in costs):
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        counts = [int(left / max(row)) for row, left in zip(costs, money, strict=True) if max(row) > 0]
        count = min([at_most, *counts])
        return sorted(order[:count]) if count >= at_least else []
    # All rows and the objective are scaled to 1, because the solver's tolerances are absolute.
    scaled = [np.asarray(row) / left for row, left in zip(costs, money, strict=True)]
    rows = np.array([*scaled, np.full(len(scores), 1 / at_most)])
    result = milp(
        -np.asarray(scores) / max(scores),
        constraints=LinearConstraint(rows, lb=[*[-np.inf] * len(scaled), at_least / at_most], ub=1.0),
        bounds=Bounds(0, 1),
        integrality=np.ones(len(scores)),
        options={"mip_rel_gap": 0.0},
    )
    if result.status == INFEASIBLE:
        return []
    assert result.success, f"the knapsack has a solution, yet the solver says: {result.message}"
    return [int(index) for index in np.flatnonzero(result.x > 0.5)]
