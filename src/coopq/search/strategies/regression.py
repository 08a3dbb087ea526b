"""Regression: a surrogate of single and pair terms, fitted to coalitions of the sizes that the budgets ask for."""

import numpy as np

from coopq.search.space import Known, Measured, Setting
from coopq.search.solver.quadratic_program import local_optima, random_fill
from coopq.search.surrogate import best_surrogate
from coopq.core.types import Assignment, Assignments, Losses

_STARTS = 100


class Regression:
    """Measures random coalitions that fill the budgets, fits, and believes the fit.

    Args:
        setting: Widths, sizes, budgets, seed.
        known: Points measured before, with their losses; they are fitted too.
        n_points: Random coalitions, shared evenly by the budgets.
        order: 1 for single terms, 2 for pairs too.

    Source: least squares over coalition values; for its relation to Shapley values see Charnes et al., Extremal
    Principle Solutions of Games in Characteristic Function Form, 1988.
    """

    def __init__(self, setting: Setting, known: Known | None = None, *, n_points: int, order: int = 2) -> None:
        self._setting = setting
        self._order = order
        self._points = np.array(
            [
                random_fill(setting.program(capacity), np.random.default_rng([setting.seed, budget, row]))
                for budget, capacity in enumerate(setting.capacities)
                for row in range(max(1, n_points // len(setting.capacities)))
            ]
        )
        self._learnt = False
        self.measured = Measured(setting)
        if known is not None:
            self.measured.add(*known)

    def propose(self) -> Assignments:
        """The whole design at once."""
        return self._setting.assignments(self._points[:0] if self._learnt else self._points)

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)
        self._learnt = True

    def choose(self, capacity: int) -> Assignment:
        """The best local optimum of the surrogate."""
        rng = np.random.default_rng([self._setting.seed, 0])
        surrogate = best_surrogate(self.measured.surrogates(capacity, pairs=self._order == 2))
        program = surrogate.program(self._setting.program(capacity))
        starts = self.measured.best(capacity, 3)
        return self._setting.assignments(local_optima(program, starts, _STARTS, rng)[0])
