"""Active search: a surrogate proposes, the true loss decides, and each answer teaches the surrogate."""

import numpy as np

from coopq.estimators.base import Known, Measured, Setting
from coopq.program import local_optima, neighbours
from coopq.surrogate import Lowered
from coopq.types import Assignment, Assignments, Losses

_PER_SURROGATE = 2
"""Points that each surrogate proposes for each budget in a round. Few, so that it soon learns from them; several,
so that the prefix tree has something to share."""
_PATIENCE = 5
"""Rounds without a better assignment after which a budget is settled."""
_INCUMBENTS = 3
_RANDOM_STARTS = 20


class ActiveSearch:
    """Searches all budgets of a setting at once on the true loss.

    It starts from what is known, from what cheap scores choose, and from what each player does alone, at either end of
    the game. In a round, for each
    budget, a surrogate of each transform of the loss is fitted to everything measured so far and proposes the best of
    its own optima and of the neighbours of the best assignments measured. A budget is settled when several rounds found
    nothing better for it.

    Args:
        setting: Widths, sizes, budgets, seed.
        known: Points measured before the search began, with their losses.
        starts: Assignments to measure first, shape (n, n_players): the search ends with nothing worse.

    Source: sequential design on a surrogate as in Jones et al., Efficient Global Optimization, 1998, without its
    bonus for uncertainty.
    """

    def __init__(self, setting: Setting, known: Known | None = None, starts: Assignments | None = None) -> None:
        self._setting = setting
        self._starts = np.zeros((0, setting.n_players), dtype=np.int8) if starts is None else starts
        self.measured = Measured(setting)
        if known is not None:
            self.measured.add(*known)
        self._round = 0
        self._stale = [0 for _ in setting.capacities]

    def propose(self) -> Assignments:
        """First the starts and what each player does alone, then what surrogates propose for budgets not settled."""
        setting, self._round = self._setting, self._round + 1
        if self._round == 1:
            alone = np.eye(setting.n_players, dtype=bool)
            nobody = np.zeros((1, setting.n_players), dtype=bool)
            ends = setting.assignments(np.concatenate([nobody, alone, ~nobody, ~alone]))
            return np.concatenate([ends, self._starts])
        chosen: list[Lowered] = []
        for budget, capacity in enumerate(setting.capacities):
            if self._stale[budget] < _PATIENCE:
                new = self._candidates(budget, capacity, chosen)
                chosen += new
                if not new:  # every candidate is measured
                    self._stale[budget] = _PATIENCE
        return setting.assignments(np.array(chosen, dtype=bool).reshape(-1, setting.n_players))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take losses, and count the rounds that brought nothing better."""
        before = [self.measured.lowest(capacity) for capacity in self._setting.capacities]
        self.measured.add(assignments, losses)
        if self._round > 1:
            for budget, capacity in enumerate(self._setting.capacities):
                better = self.measured.lowest(capacity) < before[budget]
                self._stale[budget] = 0 if better else self._stale[budget] + 1

    def choose(self, capacity: int) -> Assignment:
        """The assignment of lowest true loss."""
        return self._setting.assignments(self.measured.best(capacity)[0])

    def _candidates(self, budget: int, capacity: int, taken: list[Lowered]) -> list[Lowered]:
        """What the surrogates of a budget propose, without what is measured or taken."""
        rng = np.random.default_rng([self._setting.seed, self._round, budget])
        incumbents = self.measured.best(capacity, _INCUMBENTS)
        near = [neighbours(self._setting.program(capacity), q) for q in incumbents[:2]]
        seen = {q.tobytes() for q in taken}
        proposed: list[Lowered] = []
        for surrogate in self.measured.surrogates(capacity):
            program = surrogate.program(self._setting.costs, capacity)
            optima = local_optima(program, incumbents, _RANDOM_STARTS, rng)
            pool = np.unique(np.concatenate([optima, neighbours(program, optima[0]), *near]), axis=0)
            order = np.argsort(surrogate.value(pool), kind="stable")
            fresh = (q for q in pool[order] if q not in self.measured and q.tobytes() not in seen)
            for q, _ in zip(fresh, range(_PER_SURROGATE), strict=False):
                seen.add(q.tobytes())
                proposed.append(q)
        return proposed
