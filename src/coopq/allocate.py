"""The CoopQ program: the assignment that minimises the surrogate under a byte budget, solved exactly."""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from pyscipopt import Model, quicksum

from coopq.errors import EstimationError
from coopq.program import QuadraticProgram

_STATUS = {"optimal": "optimal", "timelimit": "time limit"}


@dataclass(frozen=True)
class Allocation:
    """A solution of the program and what is proven about it.

    Attributes:
        q: True where a player stays at the low width, shape (n_players,).
        objective: Value of the program at q, nats per token.
        bound: No assignment has a lower value than this.
        gap: (objective - bound) / |objective|; 0 when proven optimal.
        status: "optimal" or "time limit".
    """

    q: npt.NDArray[np.bool_]
    objective: float
    bound: float
    gap: float
    status: str


def allocate(program: QuadraticProgram, time_limit: float | None = None) -> Allocation:
    """Solve the program with SCIP, its products linearised.

    Args:
        program: What to minimise.
        time_limit: Seconds after which the best solution found so far is taken; None waits for the proof.
    Raises:
        EstimationError: If the time limit leaves no solution at all.
    """
    n = len(program.linear)
    # Solver tolerances are absolute and marginals can be 1e-3 nats: solve in units of the largest coefficient.
    scale = max(float(np.abs(program.linear).max()), float(np.abs(program.quadratic).max())) or 1.0
    a, K = program.linear / scale, program.quadratic / scale

    model = Model("coopq")
    model.hideOutput()
    if time_limit is not None:
        model.setParam("limits/time", time_limit)
    q = [model.addVar(vtype="B", name=f"q{i}") for i in range(n)]
    terms = [(a[i] + K[i, i]) * q[i] for i in range(n)]
    for i, j in combinations(range(n), 2):
        weight = K[i, j] + K[j, i]
        if weight == 0:
            continue
        product = model.addVar(lb=0, ub=1, name=f"y{i}_{j}")
        if weight > 0:  # minimisation presses the product down: only its lower side can bind
            model.addCons(product >= q[i] + q[j] - 1)
        else:
            model.addCons(product <= q[i])
            model.addCons(product <= q[j])
        terms.append(weight * product)
    unit = math.gcd(*program.costs.tolist()) or 1
    model.addCons(
        quicksum(int(c) // unit * (1 - x) for c, x in zip(program.costs, q, strict=True)) <= program.capacity // unit
    )
    model.setObjective(quicksum(terms), "minimize")
    model.optimize()
    solution, status = _solution(model, q)
    while not program.feasible(solution):
        # Bytes over the budget, but within the solver's relative tolerance. The raised players do not fit together,
        # which is a valid inequality that excludes this solution and nothing feasible.
        model.freeTransform()
        raised = np.flatnonzero(~solution)
        model.addCons(quicksum(1 - q[i] for i in raised) <= len(raised) - 1)
        model.optimize()
        solution, status = _solution(model, q)
    objective = program.objective(solution)
    bound = min(model.getDualbound() * scale, objective)
    if status == "optimal":
        bound = objective
    gap = 0.0 if bound == objective else (objective - bound) / max(abs(objective), 1e-12)
    return Allocation(q=solution, objective=objective, bound=bound, gap=gap, status=status)


def _solution(model: Model, q: list[Any]) -> tuple[npt.NDArray[np.bool_], str]:
    """The solver's best assignment and its status in our words."""
    status = model.getStatus()
    if status == "userinterrupt":  # SCIP answers an interrupt by stopping
        raise KeyboardInterrupt
    if status not in _STATUS or model.getNSols() == 0:
        raise EstimationError(f"the solver stopped ({status}) before it found any assignment; raise the time limit")
    return np.array([model.getVal(x) > 0.5 for x in q]), _STATUS[status]
