"""Solutions of the quadratic program: proven by dynamic programming or branch and bound, or good with a bound."""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from pyscipopt import Model, quicksum

from coopq.core.errors import EstimationError
from coopq.search.solver.local_search import local_optima
from coopq.search.solver.lower_bound import lower_bound
from coopq.search.solver.quadratic_program import QuadraticProgram, Steps

_STARTS = 30
"""Random descents, whose best end the solver starts from (docs/decisions/0010-hard-programs.md). Chosen by hand."""
_MOST_CELLS = 200_000_000
"""Most bytes that the knapsack's tables may take. Chosen by hand."""
_STATUS = {"optimal": "optimal", "timelimit": "time limit"}
"""Names of SCIP's statuses in an `Allocation`."""


@dataclass(frozen=True)
class Allocation:
    """A solution of the quadratic program, and what is proven about the solution.

    Attributes:
        q: The solution, shape (n_steps,).
        objective: The value of the program at q, in the unit of the program.
        bound: No feasible q has a lower value.
        gap: (objective - bound) / |objective|; 0 when q is proven optimal.
        status: "optimal", "time limit", or "local optimum" for the best of several descents.
    """

    q: Steps
    objective: float
    bound: float
    gap: float
    status: str


def allocate(program: QuadraticProgram, time_limit: float | None = None) -> Allocation:
    """Solve the program exactly, for any K, definite or not.

    A program without interactions is a knapsack, solved by dynamic programming over bytes. Rankings give many steps the
    same loss per byte, and such knapsacks take branch and bound longest. All other programs go to SCIP, with the
    products of two steps linearised.

    Args:
        program: The program to minimise.
        time_limit: Seconds after which SCIP returns the best solution found so far; None waits for the proof.
    Raises:
        EstimationError: If the time limit ends before any solution is found.
    """
    q = knapsack(program)
    if q is not None:
        return _allocation(program, q, -math.inf, "optimal")
    q, bound, status = _branch_and_bound(program, time_limit)
    return _allocation(program, q, bound, status)


def near_optimum(program: QuadraticProgram) -> Allocation:
    """The best of several descents with a lower bound: seconds for hundreds of steps, for any K."""
    return _allocation(program, _descended(program), -math.inf, "local optimum")


def _allocation(program: QuadraticProgram, q: Steps, bound: float, status: str) -> Allocation:
    """The solution q with the better of a known bound and `lower_bound`."""
    objective = program.objective(q)
    bound = objective if status == "optimal" else min(objective, max(bound, lower_bound(program)))
    gap = 0.0 if bound == objective else (objective - bound) / max(abs(objective), 1e-12)
    return Allocation(q=q, objective=objective, bound=bound, gap=gap, status=status)


def _descended(program: QuadraticProgram) -> Steps:
    """The best end of `_STARTS` random descents, shape (n_steps,)."""
    no_starts = np.zeros((0, len(program.a)), dtype=bool)
    return local_optima(program, no_starts, _STARTS, np.random.default_rng(0))[0]


def knapsack(program: QuadraticProgram) -> Steps | None:
    """The optimum of a program without interactions, shape (n_steps,).

    Returns:
        None if the program has interactions, or if the bytes have no common unit large enough to count in.
    Source: Bellman, Dynamic Programming, 1957.
    """
    unit = math.gcd(*program.step_bytes.tolist()) or 1
    weights, n = program.step_bytes // unit, len(program.a)
    capacity = min(program.capacity // unit, int(weights.sum()))
    pairs = program.K - np.diag(np.diag(program.K))
    if pairs.any() or (n + 24) * (capacity + 1) > _MOST_CELLS:
        return None
    values = program.a + np.diag(program.K)
    steps_of_player = np.split(np.arange(n), np.flatnonzero(~program.needs_previous)[1:])
    # Gain and weight of taking back the last 1, 2, ... steps of each player.
    gain = [values[steps[::-1]].cumsum() for steps in steps_of_player]
    weight = [weights[steps[::-1]].cumsum() for steps in steps_of_player]
    best, taken_back = np.zeros(capacity + 1), np.zeros((len(steps_of_player), capacity + 1), dtype=np.int8)
    for player in range(len(steps_of_player)):
        before = best.copy()
        for k in np.flatnonzero((gain[player] > 0) & (weight[player] <= capacity)):
            fits = weight[player][k]
            gained = before[: capacity + 1 - fits] + gain[player][k]
            is_better = gained > best[fits:]
            taken_back[player, fits:][is_better] = k + 1
            best[fits:][is_better] = gained[is_better]
    q, left = np.ones(n, dtype=bool), capacity
    for player in reversed(range(len(steps_of_player))):
        k = taken_back[player, left]
        if k:
            q[steps_of_player[player][-k:]] = False
            left -= int(weight[player][k - 1])
    return q


def _branch_and_bound(program: QuadraticProgram, time_limit: float | None) -> tuple[Steps, float, str]:
    """The best q that SCIP finds, shape (n_steps,), the lower bound that SCIP proves, and the status.

    Raises:
        EstimationError: If SCIP stops without any solution.
    """
    # SCIP's tolerances are absolute and marginals can be 1e-3 nats: solve in units of the largest coefficient.
    scale = max(float(np.abs(program.a).max()), float(np.abs(program.K).max())) or 1.0
    model, variables = _scip_model(program, scale)
    if time_limit is not None:
        model.setParam("limits/time", time_limit)
    while True:
        model.optimize()
        status = model.getStatus()
        if status == "userinterrupt":  # SCIP answers an interrupt by stopping
            raise KeyboardInterrupt
        if status not in _STATUS or model.getNSols() == 0:
            raise EstimationError(f"the solver stopped ({status}) before it found any assignment; raise the time limit")
        q = np.array([model.getVal(x) > 0.5 for x in variables])
        if program.is_feasible(q):
            return q, model.getDualbound() * scale, _STATUS[status]
        # q is over the budget by less than SCIP's relative tolerance. The steps not taken do not fit together: a valid
        # inequality, which excludes q and nothing feasible.
        model.freeTransform()
        kept = np.flatnonzero(~q)
        model.addCons(quicksum(1 - variables[i] for i in kept) <= len(kept) - 1)


def _scip_model(program: QuadraticProgram, scale: float) -> tuple[Any, list[Any]]:
    """The program over `scale` as SCIP's model, which starts from a descended q, and the variable of each step."""
    n = len(program.a)
    a, K = program.a / scale, program.K / scale
    model = Model("coopq")
    model.hideOutput()
    q = [model.addVar(vtype="B", name=f"q{i}") for i in range(n)]
    products: dict[tuple[int, int], Any] = {}
    terms = [(a[i] + K[i, i]) * q[i] for i in range(n)]
    for i, j in combinations(range(n), 2):
        weight = K[i, j] + K[j, i]
        if weight == 0:
            continue
        products[i, j] = product = model.addVar(lb=0, ub=1, name=f"y{i}_{j}")
        if weight > 0:  # minimisation presses the product down: only the lower side can bind
            model.addCons(product >= q[i] + q[j] - 1)
        else:
            model.addCons(product <= q[i])
            model.addCons(product <= q[j])
        terms.append(weight * product)
    for i in np.flatnonzero(program.needs_previous):
        model.addCons(q[i] <= q[i - 1])
    unit = math.gcd(*program.step_bytes.tolist()) or 1
    kept_bytes = quicksum(int(c) // unit * (1 - x) for c, x in zip(program.step_bytes, q, strict=True))
    model.addCons(kept_bytes <= program.capacity // unit)
    model.setObjective(quicksum(terms), "minimize")
    _suggest(model, q, products, _descended(program))
    return model, q


def _suggest(model: Any, variables: list[Any], products: dict[tuple[int, int], Any], q: Steps) -> None:
    """Let SCIP start from a known solution."""
    solution = model.createSol()
    for x, value in zip(variables, q, strict=True):
        model.setSolVal(solution, x, float(value))
    for (i, j), product in products.items():
        model.setSolVal(solution, product, float(q[i] and q[j]))
    model.addSol(solution)
