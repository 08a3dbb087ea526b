"""Greedy search on the true loss: one end of the game to the other, the best players first."""

import numpy as np

from coopq.estimators.base import Measured, Setting
from coopq.types import Assignment, Assignments, Losses


class Greedy:
    """Lowers, or raises, a few players a step, those that cost least, or gain most, by the byte.

    Args:
        setting: Widths, sizes, budgets. All budgets lie on one path.
        direction: "down" from the high width, or "up" from the low one.
        per_step: Players that change in a step.
        candidates: Players measured in a step, those that were best in the step before; None measures all.
    """

    def __init__(
        self, setting: Setting, *, direction: str = "down", per_step: int = 1, candidates: int | None = None
    ) -> None:
        self._setting = setting
        self._down = direction == "down"
        self._per_step = per_step
        self._n_candidates = setting.n_players if candidates is None else candidates
        self._at = np.full(setting.n_players, not self._down)
        self._rate = np.zeros(setting.n_players)
        self._candidates: list[int] = []
        self.measured = Measured(setting)

    def propose(self) -> Assignments:
        """Where the path stands, and each of its next steps by one player."""
        past = self._down and self._raised_bytes() <= min(self._setting.capacities)
        self._candidates = [] if past else self._next()
        points = np.repeat(self._at[None], len(self._candidates) + 1, axis=0)
        points[np.arange(len(self._candidates)) + 1, self._candidates] = self._down
        done = not self._candidates and self._at in self.measured
        return self._setting.assignments(points[:0] if done else points)

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the step."""
        self.measured.add(assignments, losses)
        candidates = np.array(self._candidates, dtype=np.intp)
        # Per byte, so that players of unequal size compare.
        self._rate[candidates] = (losses[1:] - losses[0]) / self._setting.costs[candidates]
        for player in candidates[np.argsort(self._rate[candidates], kind="stable")][: self._per_step]:
            if self._down or self._fits(player):
                self._at[player] = self._down

    def choose(self, capacity: int) -> Assignment:
        """The best assignment measured on the way."""
        return self._setting.assignments(self.measured.best(capacity)[0])

    def _next(self) -> list[int]:
        """Players that may change next: the best of the last step, if not all."""
        free = np.array([p for p in np.flatnonzero(self._at != self._down) if self._down or self._fits(p)], dtype=int)
        best = free[np.argsort(self._rate[free], kind="stable")][: max(self._n_candidates, self._per_step)]
        return [int(player) for player in np.sort(best)]

    def _raised_bytes(self) -> int:
        return int(self._setting.costs[~self._at].sum())

    def _fits(self, player: int) -> bool:
        return self._raised_bytes() + int(self._setting.costs[player]) <= max(self._setting.capacities)
