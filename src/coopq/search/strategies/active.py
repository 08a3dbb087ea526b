"""Active search: a surrogate proposes, the true loss decides, and each answer teaches the surrogate."""

from collections.abc import Callable

import numpy as np

from coopq.search.space import Known, Measured, Setting
from coopq.search.strategies.greedy import Greedy
from coopq.search.solver.quadratic_program import local_optima, neighbours
from coopq.search.surrogate import Lowered
from coopq.core.types import Assignment, Assignments, Losses

_PER_SURROGATE = 2
"""Points that each surrogate proposes for each budget in a round. Few, so that it soon learns from them; several,
so that the prefix tree has something to share."""
_PLAYERS_A_POINT = 32
"""Above twice this many players, a round has a point more for every so many: fits take longer, and more are needed."""
_LIKELY = 0.05
"""A budget is settled when nothing proposed is better than its best with more than this probability."""
_MOST_OF_FEW, _MOST_A_STEP, _MOST_A_PLAYER = 13, 6, 8
"""Points measured at most: of few players 13 for each, with several widths six for each step between them where that is
more; of many, after a descent, six for each step, and no more than eight for each player. For blocks that is less than
a tenth of the paper's hundred walks, and several widths do not need as many times the points (benchmarks/enough.py)."""
_MANY_PLAYERS = 64
"""Of more players than this, what each does alone says too little of the rest: the search descends to the budgets."""
_DESCENT_STEPS, _DESCENT_CANDIDATES = 8, 4
"""The descent lowers an eighth of the players a step, and measures a quarter of them: it is there to learn from, and
finer ones took more than they taught (docs/decisions/0009-active-search.md)."""
_POOL = 2000
"""Of more assignments that a surrogate knows to be near, it looks closer at those which it says are best."""
_INCUMBENTS = 3
_RANDOM_STARTS = 20


def descent(setting: Setting) -> Greedy | None:
    """How the search of many players begins; None for few."""
    n = setting.n_steps
    if n <= _MANY_PLAYERS:
        return None
    return Greedy(setting, per_step=n // _DESCENT_STEPS, candidates=n // _DESCENT_CANDIDATES)


def most_points(setting: Setting) -> int:
    """Points that a search measures at most, beside its starts and its descent; with two widths a step is a player."""
    n_steps, n_players = setting.n_steps, setting.n_players
    if n_steps <= _MANY_PLAYERS:
        return max(n_players * _MOST_OF_FEW, n_steps * _MOST_A_STEP)
    return min(n_steps * _MOST_A_STEP, n_players * _MOST_A_PLAYER)


class ActiveSearch:
    """Searches all budgets of a setting at once on the true loss.

    It starts from what is known, from what cheap scores choose, and from what each player does alone, at either end of
    the game; where there are many players, from a greedy descent instead of the latter, and ends with nothing worse. In
    a round, for each budget, a surrogate of each transform of the loss is fitted to everything measured so far. Of its
    own optima, and of all exchanges of two players at those and at the best assignments measured, those are measured
    next that are expected to improve most on the best. A budget is settled when the surrogates, by how wrong they have
    been, find for none of these a probability to be better that is worth the try.

    Args:
        setting: Widths, sizes, budgets, seed.
        known: Points measured before the search began, with their losses.
        starts: Assignments to measure first, shape (n, n_players): the search ends with nothing worse.
        descend: How it begins.
        most: How many points it measures at most, beside starts and descent.

    Source: expected improvement, Jones et al., Efficient Global Optimization, 1998.
    """

    def __init__(
        self,
        setting: Setting,
        known: Known | None = None,
        starts: Assignments | None = None,
        descend: Callable[[Setting], Greedy | None] = descent,
        most: Callable[[Setting], int] = most_points,
    ) -> None:
        self._setting = setting
        self._starts = np.zeros((0, setting.n_players), dtype=np.float32) if starts is None else starts
        self.measured = Measured(setting)
        if known is not None:
            self.measured.add(*known)
        self._descent = descend(setting)
        self._points, self._most = most(setting), 0
        self._round = 0

    def propose(self) -> Assignments:
        """First how the search opens, then what may improve on the best of the budgets."""
        if self._descent is not None and len(step := self._descent.propose()):
            return step
        self._round += 1
        if self._round == 1:
            self._most = len(self.measured) + self._points
            if len(opening := self._opening()):
                return opening
        chosen: list[Lowered] = []
        if len(self.measured) < self._most:
            for budget, capacity in enumerate(self._setting.capacities):
                chosen += self._candidates(budget, capacity, chosen)
        return self._setting.assignments(np.array(chosen, dtype=bool).reshape(-1, self._setting.n_steps))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take losses."""
        self.measured.add(assignments, losses)
        if self._descent is not None:
            self._descent.learn(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The assignment of lowest true loss."""
        return self._setting.assignments(self.measured.best(capacity)[0])

    def _opening(self) -> Assignments:
        """The starts and, without a descent, what each player does alone."""
        if self._descent is not None:
            return self._starts
        nobody = np.zeros((1, self._setting.n_steps), dtype=bool)
        ends = self._setting.assignments(
            np.concatenate([nobody, self._setting.alone(), ~nobody, self._setting.raised_alone()])
        )
        return np.concatenate([ends, self._starts])

    def _candidates(self, budget: int, capacity: int, taken: list[Lowered]) -> list[Lowered]:
        """What the surrogates of a budget propose, without what is measured or taken."""
        rng = np.random.default_rng([self._setting.seed, self._round, budget])
        incumbents, lowest = self.measured.best(capacity, _INCUMBENTS), self.measured.lowest(capacity)
        near = [neighbours(self._setting.program(capacity), q) for q in incumbents]
        seen = {q.tobytes() for q in taken}
        most = max(_PER_SURROGATE, self._setting.n_players // _PLAYERS_A_POINT)
        proposed: list[Lowered] = []
        for surrogate in self.measured.surrogates(capacity):
            program = surrogate.program(self._setting.program(capacity))
            optima = local_optima(program, incumbents, _RANDOM_STARTS, rng)
            exchanged = [neighbours(program, q) for q in optima[:2]]
            pool = np.concatenate([optima, *exchanged, *near])
            pool = pool[np.unique(np.packbits(pool, axis=1), axis=0, return_index=True)[1]]
            pool = pool[[q not in self.measured and q.tobytes() not in seen for q in pool]]
            if len(pool):
                pool = pool[np.argsort(surrogate.value(pool), kind="stable")[:_POOL]]
                improvement, probability = surrogate.improvement(pool, lowest)
                best = np.argsort(-improvement, kind="stable")[:most]
                fresh = pool[best[probability[best] >= _LIKELY]]
                seen.update(q.tobytes() for q in fresh)
                proposed += list(fresh)
        return proposed
