"""One choice per layer under a sum of bytes, at the least total cost: the multiple-choice knapsack problem, exactly.

Bits or ranks per layer are chosen by it from measured costs, which are taken to add up. It is an integer program (one
0/1 variable per layer and choice) for HiGHS's branch and bound, which scipy brings. It measures nothing: costs come
from `tasks.algorithms.quantisation.sensitivity` and others.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from scipy import optimize, sparse

from tasks.algorithms.errors import InputError

COST_SCALE = 1e7
"""What the bound on the sum of costs becomes for the solver."""

Choice = TypeVar("Choice", bound=Hashable)


def allocate(
    costs: Mapping[str, Mapping[Choice, float]], sizes: Mapping[str, Mapping[Choice, int]], budget: int
) -> dict[str, Choice]:
    """Choose per name so that the sum of costs is least and the sizes sum to at most the budget.

    Args:
        costs: name -> choice -> cost; any unit, finite.
        sizes: the same names and choices -> bytes.
        budget: bytes.

    Returns:
        name -> choice, in the order of `costs`.

    Raises:
        InputError: even the smallest choices don't fit.
    """
    smallest = sum(min(options.values()) for options in sizes.values())
    if smallest > budget:
        raise InputError(
            f"the smallest choices take {smallest} bytes, the budget is {budget} bytes: "
            f"raise it to at least {smallest}, or allow smaller choices"
        )
    options = {name: _undominated(costs[name], sizes[name]) for name in costs}
    if not options:
        return {}
    chosen = _solve(
        [[costs[name][choice] for choice in choices] for name, choices in options.items()],
        [[sizes[name][choice] for choice in choices] for name, choices in options.items()],
        budget,
    )
    return {name: choices[index] for (name, choices), index in zip(options.items(), chosen, strict=True)}


def _undominated(costs: Mapping[Choice, float], sizes: Mapping[Choice, int]) -> list[Choice]:
    """Sort the choices by rising size and falling cost, without those that another beats or equals in both."""
    if set(costs) != set(sizes):
        raise ValueError(f"costs are given for {sorted(map(str, costs))}, sizes for {sorted(map(str, sizes))}")
    kept: list[Choice] = []
    for choice in sorted(costs, key=lambda choice: (sizes[choice], costs[choice])):
        if not np.isfinite(costs[choice]):
            raise ValueError(f"the cost of {choice} is {costs[choice]}")
        if not kept or costs[choice] < costs[kept[-1]]:
            kept.append(choice)
    return kept


def _solve(costs: list[list[float]], sizes: list[list[int]], budget: int) -> list[int]:
    """Find the index of the choice in each row; each row starts with its smallest choice.

    HiGHS stops at an absolute gap of 1e-6 and scipy has no option for it, while costs can span many orders of
    magnitude. So they are scaled far above the gap by a bound on their sum, and again where the answer is far below it.
    """
    excess = [np.subtract(row, min(row)) for row in costs]  # what no choice can avoid decides nothing
    bound = float(sum(row.max() for row in excess))
    if bound == 0:
        return [0] * len(costs)
    while True:
        # A cost above the bound is in no best answer, whatever it is.
        scaled = [np.minimum(row, 2 * bound) * (COST_SCALE / bound) for row in excess]
        chosen = _branch_and_bound(scaled, sizes, budget)
        found = float(sum(row[index] for row, index in zip(excess, chosen, strict=True)))
        if found == 0 or found > bound / 1000:
            return chosen
        bound = found


def _branch_and_bound(costs: list[np.ndarray], sizes: list[list[int]], budget: int) -> list[int]:
    """Find the index of the choice in each row by HiGHS: minimise c x, x of 0 and 1 with one 1 per row."""
    counts = [len(row) for row in costs]
    # Sizes stay integers, but lose what no choice can avoid and their common divisor.
    extra = np.concatenate([np.subtract(row, row[0]) for row in sizes])
    room = budget - sum(row[0] for row in sizes)
    divisor = max(1, int(np.gcd.reduce(extra)))
    extra, room = extra // divisor, room // divisor
    rows = np.repeat(np.arange(len(counts)), counts)  # [variables], the row of each
    one_each = sparse.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    answer = optimize.milp(
        np.concatenate(costs),
        integrality=np.ones(len(rows)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            # Sizes are integers: half a unit above the room admits nothing more, and leaves out no answer by rounding.
            optimize.LinearConstraint(extra[np.newaxis].astype(float), -np.inf, room + 0.5),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if answer.x is None:
        raise RuntimeError(f"HiGHS: {answer.message}")
    # The solver's variables are 1 within its tolerance only.
    chosen = [int(part.argmax()) for part in np.split(answer.x, np.cumsum(counts)[:-1])]
    taken = sum(row[index] for row, index in zip(sizes, chosen, strict=True))
    if taken > budget:
        raise RuntimeError(f"HiGHS answered with {taken} bytes for a budget of {budget}")
    return chosen
