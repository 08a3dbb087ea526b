"""One-shot scores: what each player does alone to the true loss, at one end of the game."""

import numpy as np

from coopq.allocate import allocate
from coopq.estimators.base import Measured, Setting
from coopq.program import QuadraticProgram
from coopq.types import Assignment, Assignments, Losses


class OneShot:
    """Measures every player alone, and believes that what they do adds up.

    Args:
        setting: Widths, sizes, budgets.
        end: "high": each is lowered alone, all others at the high width; "low": each is raised alone.
    """

    def __init__(self, setting: Setting, end: str) -> None:
        self._setting = setting
        alone, nobody = np.eye(setting.n_players, dtype=bool), np.zeros((1, setting.n_players), dtype=bool)
        self._points = np.concatenate([nobody, alone]) ^ (end == "low")
        self.measured = Measured(setting)

    def propose(self) -> Assignments:
        """The end, then each player alone."""
        return self._setting.assignments(self._points[: 0 if len(self.measured) else None])

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The exact knapsack over what players do alone."""
        n = self._setting.n_players
        end, *alone = (self.measured.loss(q) for q in self._points)
        change = np.array(alone) - end  # by lowering, or by raising
        linear = -change if self._points[0].all() else change
        program = QuadraticProgram(linear, np.zeros((n, n)), self._setting.costs, capacity)
        return self._setting.assignments(allocate(program).q)
