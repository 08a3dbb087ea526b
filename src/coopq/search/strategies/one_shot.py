"""One-shot scores: the true loss of each player alone, at one end of the game."""

from dataclasses import replace

import numpy as np

from coopq.core.types import Assignment, Assignments, Losses
from coopq.search.measured import Measured
from coopq.search.protocol import Search
from coopq.search.solver.exact import allocate
from coopq.search.space import SearchSpace


class OneShot(Search):
    """Measures every player alone, and chooses as if the loss changes of players add up.

    Args:
        space: Players, widths, budgets.
        end: "high" lowers each player alone, with all others at their highest width; "low" raises each player alone,
            with all others at their lowest width. With more than two widths, to each width in turn.
    """

    def __init__(self, space: SearchSpace, end: str) -> None:
        self._space = space
        self._is_low = end == "low"
        alone = space.one_player_up() if self._is_low else space.one_player_down()
        self._points = np.concatenate([np.full((1, space.n_steps), self._is_low), alone])
        self.measured = Measured(space)

    def propose(self) -> Assignments:
        """The end of the game, then each player alone."""
        return self._space.assignments(self._points[: 0 if len(self.measured) else None])

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The exact knapsack over what each step adds to the loss, shape (n_players,)."""
        end, *alone = (self.measured.loss(q) for q in self._points)
        program, losses = self._space.constraint(capacity), np.array(alone)
        # The loss below each step minus the loss above, of one player with all others at the end of the game.
        if self._is_low:
            is_last = ~np.append(program.needs_previous[1:], False)
            added = np.where(is_last, end, np.append(losses[1:], end)) - losses
        else:
            added = losses - np.where(program.needs_previous, np.append(end, losses[:-1]), end)
        return self._space.assignments(allocate(replace(program, a=added)).q)
