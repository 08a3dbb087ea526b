"""Solving the program of a budget: exactly, by branch and bound, or near and with a bound where it is too large."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np
import numpy.typing as npt
from pyscipopt import Model, quicksum

from coopq.core.errors import EstimationError
from coopq.search.solver.quadratic_program import QuadraticProgram, local_optima
from coopq.search.solver.lower_bound import lower_bound

_STARTS = 30
"""Descents from random assignments, whose best the solver starts from."""
_MOST_CELLS = 200_000_000
"""Bytes that the dynamic program may take: for each unit of the budget one a player, and some floats."""
_STATUS = {"optimal": "optimal", "timelimit": "time limit"}


@dataclass(frozen=True)
class Allocation:
    """A solution of the program and what is proven about it.

    Attributes:
        q: True where a step down is taken, shape (n_steps,).
        objective: Value of the program at q, nats per token.
        bound: No assignment has a lower value than this.
        gap: (objective - bound) / |objective|; 0 when proven optimal.
        status: "optimal", "time limit", or "local optimum" where only descents and a relaxation were tried.
    """

    q: npt.NDArray[np.bool_]
    objective: float
    bound: float
    gap: float
    status: str


def allocate(program: QuadraticProgram, time_limit: float | None = None) -> Allocation:
    """Solve the program exactly, for any K, definite or not: by SCIP, its products linearised.

    Without interactions the program is a knapsack, and is solved by dynamic programming over bytes: players of equal
    worth by the byte, which rankings make, are what branch and bound takes longest for.

    Args:
        program: What to minimise.
        time_limit: Seconds after which the best solution found so far is taken; None waits for the proof.
    """
    knapsack = _knapsack(program)
    if knapsack is not None:
        return _allocation(program, knapsack, -math.inf, "optimal")
    return next(_allocations(program, time_limit))


def best_allocations(program: QuadraticProgram, k: int, time_limit: float | None = None) -> list[Allocation]:
    """The k best assignments, best first; fewer where there are no more.

    Args:
        program: What to minimise.
        k: How many.
        time_limit: Seconds for each; None waits for the proof.
    """
    return list(islice(_allocations(program, time_limit), k))


def near_optimum(program: QuadraticProgram) -> Allocation:
    """The best of many descents, with the bound of a relaxation: seconds for hundreds of players, whatever K is."""
    q = _descended(program)
    return _allocation(program, q, -math.inf, "local optimum")


def _allocations(program: QuadraticProgram, time_limit: float | None) -> Iterator[Allocation]:
    """Solutions in order, each excluded from the next search."""
    solver = _Solver(program, time_limit)
    start: npt.NDArray[np.bool_] | None = _descended(program)
    while (found := solver.solve(start)) is not None:
        q, bound, status = found
        yield _allocation(program, q, bound, status)
        solver.exclude(q)
        start = None


def _allocation(program: QuadraticProgram, q: npt.NDArray[np.bool_], bound: float, status: str) -> Allocation:
    """A solution with the best bound there is."""
    objective = program.objective(q)
    bound = objective if status == "optimal" else min(objective, max(bound, lower_bound(program)))
    gap = 0.0 if bound == objective else (objective - bound) / max(abs(objective), 1e-12)
    return Allocation(q=q, objective=objective, bound=bound, gap=gap, status=status)


def _descended(program: QuadraticProgram) -> npt.NDArray[np.bool_]:
    nowhere = np.zeros((0, len(program.linear)), dtype=bool)
    return local_optima(program, nowhere, _STARTS, np.random.default_rng(0))[0]


def _knapsack(program: QuadraticProgram) -> npt.NDArray[np.bool_] | None:
    """The optimum without interactions; None if there are some, or bytes have no common unit to count in.

    Source: Bellman, Dynamic Programming, 1957.
    """
    unit = math.gcd(*program.costs.tolist()) or 1
    weights, n = program.costs // unit, len(program.linear)
    capacity = min(program.capacity // unit, int(weights.sum()))
    pairs = program.quadratic - np.diag(np.diag(program.quadratic))
    if pairs.any() or (n + 24) * (capacity + 1) > _MOST_CELLS:
        return None
    values = program.linear + np.diag(program.quadratic)
    of_players = np.split(np.arange(n), np.flatnonzero(~program.follows)[1:])
    # For each player, what raising it by 1, 2, ... steps is worth and weighs; the last step down is the first one up.
    worth = [values[steps[::-1]].cumsum() for steps in of_players]
    weight = [weights[steps[::-1]].cumsum() for steps in of_players]
    best, raises = np.zeros(capacity + 1), np.zeros((len(of_players), capacity + 1), dtype=np.int8)
    for player in range(len(of_players)):
        before = best.copy()
        for raised in np.flatnonzero((worth[player] > 0) & (weight[player] <= capacity)):
            fits = weight[player][raised]
            with_it = before[: capacity + 1 - fits] + worth[player][raised]
            better = with_it > best[fits:]
            raises[player, fits:][better] = raised + 1
            best[fits:][better] = with_it[better]
    q, left = np.ones(n, dtype=bool), capacity
    for player in reversed(range(len(of_players))):
        raised = raises[player, left]
        if raised:
            q[of_players[player][-raised:]] = False
            left -= int(weight[player][raised - 1])
    return q


class _Solver:
    """The program as SCIP has it."""

    def __init__(self, program: QuadraticProgram, time_limit: float | None) -> None:
        self._program = program
        n = len(program.linear)
        # Solver tolerances are absolute and marginals can be 1e-3 nats: solve in units of the largest coefficient.
        self._scale = max(float(np.abs(program.linear).max()), float(np.abs(program.quadratic).max())) or 1.0
        a, K = program.linear / self._scale, program.quadratic / self._scale
        self._model = model = Model("coopq")
        model.hideOutput()
        if time_limit is not None:
            model.setParam("limits/time", time_limit)
        self._q = q = [model.addVar(vtype="B", name=f"q{i}") for i in range(n)]
        self._products: dict[tuple[int, int], Any] = {}
        terms = [(a[i] + K[i, i]) * q[i] for i in range(n)]
        for i, j in combinations(range(n), 2):
            weight = K[i, j] + K[j, i]
            if weight == 0:
                continue
            self._products[i, j] = product = model.addVar(lb=0, ub=1, name=f"y{i}_{j}")
            if weight > 0:  # minimisation presses the product down: only its lower side can bind
                model.addCons(product >= q[i] + q[j] - 1)
            else:
                model.addCons(product <= q[i])
                model.addCons(product <= q[j])
            terms.append(weight * product)
        for i in range(n):
            if program.follows[i]:
                model.addCons(q[i] <= q[i - 1])
        unit = math.gcd(*program.costs.tolist()) or 1
        raised = quicksum(int(c) // unit * (1 - x) for c, x in zip(program.costs, q, strict=True))
        model.addCons(raised <= program.capacity // unit)
        model.setObjective(quicksum(terms), "minimize")

    def solve(self, start: npt.NDArray[np.bool_] | None) -> tuple[npt.NDArray[np.bool_], float, str] | None:
        """The best assignment not excluded, a bound and the status in our words; None when there is no other.

        Raises:
            EstimationError: If the time limit leaves no solution at all.
        """
        if start is not None:
            self._suggest(start)
        while True:
            self._model.optimize()
            status = self._model.getStatus()
            if status == "userinterrupt":  # SCIP answers an interrupt by stopping
                raise KeyboardInterrupt
            if status == "infeasible":
                return None
            if status not in _STATUS or self._model.getNSols() == 0:
                raise EstimationError(
                    f"the solver stopped ({status}) before it found any assignment; raise the time limit"
                )
            solution = np.array([self._model.getVal(x) > 0.5 for x in self._q])
            if self._program.feasible(solution):
                return solution, self._model.getDualbound() * self._scale, _STATUS[status]
            # Bytes over the budget, but within the solver's relative tolerance. The raised players do not fit together,
            # which is a valid inequality that excludes this solution and nothing feasible.
            self._model.freeTransform()
            raised = np.flatnonzero(~solution)
            self._model.addCons(quicksum(1 - self._q[i] for i in raised) <= len(raised) - 1)

    def exclude(self, q: npt.NDArray[np.bool_]) -> None:
        """Forbid one assignment."""
        self._model.freeTransform()
        self._model.addCons(quicksum((1 - x) if low else x for x, low in zip(self._q, q, strict=True)) >= 1)

    def _suggest(self, start: npt.NDArray[np.bool_]) -> None:
        """Let the search begin with a known solution."""
        solution = self._model.createSol()
        for i, x in enumerate(self._q):
            self._model.setSolVal(solution, x, float(start[i]))
        for (i, j), product in self._products.items():
            self._model.setSolVal(solution, product, float(start[i] and start[j]))
        self._model.addSol(solution)
