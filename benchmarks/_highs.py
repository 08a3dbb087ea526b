"""The program of a budget solved by HiGHS, in the form in which `coopq.search.solver.exact` hands programs to SCIP."""

from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from coopq.search.solver.exact import Allocation, near_optimum
from coopq.search.solver.quadratic_program import QuadraticProgram

_OPTIMAL = 0
"""Status of `scipy.optimize.milp` for a proven optimum."""

Terms = list[tuple[int, int]]
"""Columns and coefficients of a row."""


def allocate_by_highs(program: QuadraticProgram, time_limit: float) -> Allocation:
    """What `coopq.search.solver.exact.allocate` does by SCIP; scipy hands HiGHS no solution to start from.

    Args:
        program: The program to minimise.
        time_limit: Seconds after which HiGHS returns the best solution found so far.
    """
    n = len(program.a)
    scale = max(float(np.abs(program.a).max()), float(np.abs(program.K).max()))
    weights = {(i, j): program.K[i, j] + program.K[j, i] for i, j in combinations(range(n), 2)}
    weights = {pair: weight for pair, weight in weights.items() if weight != 0}
    objective = np.concatenate([program.a + np.diag(program.K), list(weights.values())]) / scale
    result = milp(
        objective,
        integrality=np.arange(len(objective)) < n,
        bounds=Bounds(0, 1),
        constraints=_constraints(program, weights),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    if result.status == _OPTIMAL:
        q = result.x[:n] > 0.5
        assert program.is_feasible(q), "HiGHS's tolerance lets q over the budget"
        value = program.objective(q)
        return Allocation(q=q, objective=value, bound=value, gap=0.0, status="optimal")
    solution = near_optimum(program)
    bound = solution.bound if result.mip_dual_bound is None else max(solution.bound, result.mip_dual_bound * scale)
    q, value = solution.q, solution.objective
    if result.x is not None and program.is_feasible(found := result.x[:n] > 0.5) and program.objective(found) < value:
        q, value = found, program.objective(found)
    bound = min(bound, value)
    return Allocation(q=q, objective=value, bound=bound, gap=(value - bound) / max(abs(value), 1e-12), status="limit")


def _constraints(program: QuadraticProgram, weights: dict[tuple[int, int], float]) -> LinearConstraint:
    """Products of two steps, the order of steps, and the capacity.

    Args:
        program: The program.
        weights: K_ij + K_ji of pairs with a product; their columns follow the steps' in this order.
    """
    n = len(program.a)
    rows: list[tuple[Terms, float, float]] = []
    for product, ((i, j), weight) in enumerate(weights.items(), start=n):
        if weight > 0:  # minimisation presses the product down: only the lower side can bind
            rows.append(([(product, 1), (i, -1), (j, -1)], -1, np.inf))
        else:
            rows += [([(product, 1), (step, -1)], -np.inf, 0) for step in (i, j)]
    rows += [([(i, 1), (i - 1, -1)], -np.inf, 0) for i in np.flatnonzero(program.needs_previous).tolist()]
    step_bytes = program.step_bytes.tolist()
    rows.append((list(enumerate(step_bytes)), sum(step_bytes) - program.capacity, np.inf))
    entries = [(number, column, value) for number, (terms, _, _) in enumerate(rows) for column, value in terms]
    numbers, columns, values = zip(*entries, strict=True)
    matrix = coo_array((values, (numbers, columns)), shape=(len(rows), n + len(weights)))
    return LinearConstraint(matrix.tocsr(), [low for _, low, _ in rows], [high for _, _, high in rows])
