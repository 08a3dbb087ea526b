"""Greedy search on the true loss: from one end of the game to the other, the best players first."""

import numpy as np

from coopq.search.space import Measured, Setting
from coopq.search.solver.quadratic_program import neighbours
from coopq.search.surrogate import Lowered
from coopq.core.types import Assignment, Assignments, Losses

_STEPS = 32
"""Steps of a paced search, about; a model's blocks go one a step, and its linear layers several."""


class Greedy:
    """Lowers, or raises, a few players a step, those that cost least, or gain most, by the byte.

    One path serves all budgets, and steps stop at each: with players of unequal size, what it finds for a budget
    depends on the larger ones. With `swaps`, the best assignment of each budget is then improved: every player is
    flipped alone there, and the exchanges that those flips promise most of are measured, as long as one of them helps.

    Args:
        setting: Widths, sizes, budgets.
        direction: "down" from the high width, or "up" from the low one.
        per_step: Players that change in a step.
        candidates: Players measured in a step after the first, those that were best when last measured; None takes all.
        swaps: Exchanges measured at a time at each budget, after the path.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        direction: str = "down",
        per_step: int = 1,
        candidates: int | None = None,
        swaps: int = 0,
    ) -> None:
        self._setting = setting
        self._down = direction == "down"
        self._per_step = per_step
        self._n_candidates = setting.n_steps if candidates is None else candidates
        self._swaps = swaps
        self._at = np.full(setting.n_steps, not self._down)
        self._rate = np.full(setting.n_steps, -np.inf)  # what was never measured is a candidate
        self._candidates: list[int] = []
        self._arrived = False
        self._centres: dict[int, bytes] = {}
        self.measured = Measured(setting)

    @classmethod
    def paced(cls, setting: Setting, direction: str = "down") -> "Greedy":
        """One whose cost grows little faster than the players: of many, the best third is measured in a step."""
        per_step = max(1, setting.n_steps // _STEPS)
        candidates = None if per_step == 1 else setting.n_steps // 3
        return cls(setting, direction=direction, per_step=per_step, candidates=candidates)

    def propose(self) -> Assignments:
        """Where the path stands, and each of its next steps by one player; then flips and exchanges at the budgets."""
        if not self._arrived:
            past = self._down and self._raised_bytes() <= min(self._setting.capacities)
            self._candidates = [] if past else self._next()
            points = np.repeat(self._at[None], len(self._candidates) + 1, axis=0)
            points[np.arange(len(self._candidates)) + 1, self._candidates] = self._down
            if self._candidates or self._at not in self.measured:
                return self._setting.assignments(points)
            self._arrived = True
        found = [q for capacity in self._setting.capacities for q in self._exchanges(capacity)]
        return self._setting.assignments(np.array(found, dtype=bool).reshape(-1, self._setting.n_steps))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the step."""
        self.measured.add(assignments, losses)
        if self._arrived:
            return
        candidates = np.array(self._candidates, dtype=np.intp)
        # Per byte, so that players of unequal size compare.
        self._rate[candidates] = (losses[1:] - losses[0]) / self._setting.costs[candidates]
        for player in candidates[np.argsort(self._rate[candidates], kind="stable")][: self._per_step]:
            before = self._raised_bytes()
            if self._down:
                self._at[player] = True
            elif self._fits(player):
                self._at[player] = False
            if any(min(before, self._raised_bytes()) <= c < max(before, self._raised_bytes()) for c in self._budgets()):
                break

    def choose(self, capacity: int) -> Assignment:
        """The best assignment measured."""
        return self._setting.assignments(self.measured.best(capacity)[0])

    def _budgets(self) -> list[int]:
        """Sizes that a step does not pass: going up, the last one that still fits is measured."""
        if self._down:
            return list(self._setting.capacities)
        smallest = int(self._setting.costs.min())
        return [capacity - smallest for capacity in self._setting.capacities]

    def _next(self) -> list[int]:
        """Players that may change next: the best of the last step, if not all."""
        back, down = self._setting.program(0).movable(self._at)
        free = np.array([s for s in np.flatnonzero(down if self._down else back) if self._down or self._fits(s)], int)
        most = max(self._n_candidates, self._per_step) if len(self.measured) else len(free)
        best = free[np.argsort(self._rate[free], kind="stable")][:most]
        return [int(player) for player in np.sort(best)]

    def _exchanges(self, capacity: int) -> list[Lowered]:
        """Flips at the best assignment of a budget if it is new, then its most promising exchanges."""
        if not self._swaps:
            return []
        best = self.measured.best(capacity)[0]
        free = np.flatnonzero(np.logical_or(*self._setting.program(0).movable(best)))
        flips = best ^ np.eye(len(best), dtype=bool)[free]
        unknown = [q for q in flips if q not in self.measured]
        if unknown:
            return unknown
        if self._centres.get(capacity) == best.tobytes():  # its exchanges were measured, and none was better
            return []
        self._centres[capacity] = best.tobytes()
        origin = self.measured.loss(best)
        change = np.zeros(len(best))
        change[free] = np.array([self.measured.loss(q) for q in flips]) - origin
        near = neighbours(self._setting.program(capacity), best)
        promise = ((near ^ best) * change).sum(axis=1)
        fresh = [q for q in near[np.argsort(promise, kind="stable")] if q not in self.measured]
        return fresh[: self._swaps]

    def _raised_bytes(self) -> int:
        return int(self._setting.costs[~self._at].sum())

    def _fits(self, player: int) -> bool:
        return self._raised_bytes() + int(self._setting.costs[player]) <= max(self._setting.capacities)
