"""One-shot scores: what each player does alone to the true loss, at one end of the game."""

from dataclasses import replace

import numpy as np

from coopq.search.solver.exact import allocate
from coopq.search.space import Measured, Setting
from coopq.core.types import Assignment, Assignments, Losses


class OneShot:
    """Measures every player alone, and believes that what they do adds up.

    Args:
        setting: Widths, sizes, budgets.
        end: "high": each is lowered alone, all others at the high width; "low": each is raised alone. With more than
            two widths, to each of them.
    """

    def __init__(self, setting: Setting, end: str) -> None:
        self._setting = setting
        self._is_low = end == "low"
        alone = setting.raised_alone() if self._is_low else setting.alone()
        self._points = np.concatenate([np.full((1, setting.n_steps), self._is_low), alone])
        self.measured = Measured(setting)

    def propose(self) -> Assignments:
        """The end, then each player alone."""
        return self._setting.assignments(self._points[: 0 if len(self.measured) else None])

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The exact knapsack over what players do alone."""
        end, *alone = (self.measured.loss(q) for q in self._points)
        program, losses = self._setting.program(capacity), np.array(alone)
        # From width to width of a player, all of it down: what a step costs.
        if self._is_low:
            worth = np.where(np.append(program.follows[1:], False), np.append(losses[1:], end), end) - losses
        else:
            worth = losses - np.where(program.follows, np.append(end, losses[:-1]), end)
        return self._setting.assignments(allocate(replace(program, linear=worth)).q)
