"""Regression: one surrogate, fitted to random points that fill the budgets."""

import numpy as np

from coopq.core.types import Assignment, Assignments, Losses
from coopq.search.measured import Known, Measured
from coopq.search.protocol import Search
from coopq.search.solver.local_search import local_optima, random_fill
from coopq.search.space import SearchSpace
from coopq.search.surrogate import best_surrogate

_POINTS_PER_STEP = 8
"""Random points for each step unless told otherwise. Chosen by hand."""
_STARTS = 100
"""Random descents on the surrogate. Chosen by hand."""


class Regression(Search):
    """Measures random points that fill the budgets, and chooses the optimum of a surrogate fitted to the points.

    Args:
        space: Players, widths, budgets, seed.
        known: Points measured before, with their losses; the surrogate is fitted to known points too.
        n_points: Number of random points, shared evenly by the budgets; None takes eight for each step.
        order: 1 for single terms, 2 for single and pair terms.

    Source: least squares over coalition values; for the relation to Shapley values see Charnes et al., Extremal
    Principle Solutions of Games in Characteristic Function Form, 1988.
    """

    def __init__(
        self, space: SearchSpace, known: Known | None = None, *, n_points: int | None = None, order: int = 2
    ) -> None:
        self._space = space
        self._order = order
        n_points = _POINTS_PER_STEP * space.n_steps if n_points is None else n_points
        self._points = np.array(
            [
                random_fill(space.constraint(capacity), np.random.default_rng([space.seed, budget, row]))
                for budget, capacity in enumerate(space.capacities)
                for row in range(max(1, n_points // len(space.capacities)))
            ]
        )
        self._learnt = False
        self.measured = Measured(space)
        if known is not None:
            self.measured.add(*known)

    def propose(self) -> Assignments:
        """All random points at once."""
        return self._space.assignments(self._points[:0] if self._learnt else self._points)

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)
        self._learnt = True

    def choose(self, capacity: int) -> Assignment:
        """The best local optimum of the surrogate, shape (n_players,)."""
        rng = np.random.default_rng([self._space.seed, 0])
        surrogate = best_surrogate(self.measured.surrogates(capacity, pairs=self._order == 2))
        program = surrogate.program(self._space.constraint(capacity))
        starts = self.measured.best(capacity, 3)
        return self._space.assignments(local_optima(program, starts, _STARTS, rng)[0])
