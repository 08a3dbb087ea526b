"""Greedy search on the true loss: from one end of the game to the other, the best steps first."""

import numpy as np

from coopq.core.types import Assignment, Assignments, Losses
from coopq.search.measured import Measured
from coopq.search.protocol import Search
from coopq.search.space import SearchSpace

_PACED_MOVES = 32
"""Moves of a paced search from end to end, about: players that are blocks go one a move, linear layers several. Chosen
by hand."""
_PACED_CANDIDATES = 3
"""A paced search with several steps a move measures one in so many steps before each move. Chosen by hand."""


class Greedy(Search):
    """Takes a few steps down, or back, in each move: the steps of lowest loss change per byte.

    One path serves all budgets, and moves stop at each budget. With players of unequal size, what a budget gets depends
    on the larger budgets before.

    Args:
        space: Players, widths, budgets.
        direction: "down" from the highest widths, or "up" from the lowest widths.
        per_move: Steps that change in a move.
        candidates: Steps measured before each move after the first, the best when last measured; None measures all.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        direction: str = "down",
        per_move: int = 1,
        candidates: int | None = None,
    ) -> None:
        self._space = space
        self._down = direction == "down"
        self._per_move = per_move
        self._n_candidates = space.n_steps if candidates is None else candidates
        self._q = np.full(space.n_steps, not self._down)
        self._change_per_byte = np.full(space.n_steps, -np.inf)  # a step that was never measured is a candidate
        self._candidates: list[int] = []
        self._arrived = False
        self.measured = Measured(space)

    @classmethod
    def paced(cls, space: SearchSpace, direction: str = "down") -> "Greedy":
        """A search whose cost grows little faster than the steps: of many steps, the best third is measured a move."""
        per_move = max(1, space.n_steps // _PACED_MOVES)
        candidates = None if per_move == 1 else space.n_steps // _PACED_CANDIDATES
        return cls(space, direction=direction, per_move=per_move, candidates=candidates)

    def propose(self) -> Assignments:
        """Where the path stands, and each candidate step from there."""
        if not self._arrived:
            is_past = self._down and self._bytes_above_min() <= min(self._space.capacities)
            self._candidates = [] if is_past else self._next()
            points = np.repeat(self._q[None], len(self._candidates) + 1, axis=0)
            points[np.arange(len(self._candidates)) + 1, self._candidates] = self._down
            if self._candidates or self._q not in self.measured:
                return self._space.assignments(points)
            self._arrived = True
        return self._space.assignments(np.empty((0, self._space.n_steps), dtype=bool))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses and, on the path, make the move."""
        self.measured.add(assignments, losses)
        if self._arrived:
            return
        candidates = np.array(self._candidates, dtype=np.intp)
        # Per byte, so that players of unequal size compare.
        self._change_per_byte[candidates] = (losses[1:] - losses[0]) / self._space.step_bytes[candidates]
        for step in candidates[np.argsort(self._change_per_byte[candidates], kind="stable")][: self._per_move]:
            before = self._bytes_above_min()
            if self._down:
                self._q[step] = True
            elif self._fits(step):
                self._q[step] = False
            smaller, larger = sorted((before, self._bytes_above_min()))
            if any(smaller <= stop < larger for stop in self._stops()):
                break

    def choose(self, capacity: int) -> Assignment:
        """The measured assignment of lowest loss, shape (n_players,)."""
        return self._space.assignments(self.measured.best(capacity)[0])

    def _stops(self) -> list[int]:
        """Bytes that no move passes: on the way up, the last point that still fits each budget is measured."""
        if self._down:
            return list(self._space.capacities)
        smallest = int(self._space.step_bytes.min())
        return [capacity - smallest for capacity in self._space.capacities]

    def _next(self) -> list[int]:
        """The steps to measure before the next move: the best when last measured, if not all."""
        back, down = self._space.constraint(0).movable(self._q)
        allowed = down if self._down else back
        free = np.array([step for step in np.flatnonzero(allowed) if self._down or self._fits(step)], int)
        most = max(self._n_candidates, self._per_move) if len(self.measured) else len(free)
        best = free[np.argsort(self._change_per_byte[free], kind="stable")][:most]
        return [int(step) for step in np.sort(best)]

    def _bytes_above_min(self) -> int:
        """Bytes of the current point above all players at their lowest width."""
        return int(self._space.step_bytes[~self._q].sum())

    def _fits(self, step: int) -> bool:
        """Whether the largest budget has room for taking a step back."""
        return self._bytes_above_min() + int(self._space.step_bytes[step]) <= max(self._space.capacities)
