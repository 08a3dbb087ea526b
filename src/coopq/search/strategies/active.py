"""Active search: surrogates propose assignments, the true loss decides, and each loss improves the surrogates.

docs/decisions/0009-active-search.md says why, and what was tried instead.
"""

from collections.abc import Callable

import numpy as np

from coopq.core.types import Assignment, Assignments, Losses
from coopq.search.measured import Known, Measured
from coopq.search.protocol import Search
from coopq.search.solver.local_search import local_optima, neighbours
from coopq.search.solver.quadratic_program import Steps
from coopq.search.space import SearchSpace
from coopq.search.strategies.greedy import Greedy

_POINTS_PER_SURROGATE = 2
"""Points that each surrogate proposes for each budget in a round: few, so that the surrogates learn often, and more
than one, so that points share prefixes. Chosen by hand."""
_PLAYERS_PER_POINT = 32
"""With more than twice as many players, a surrogate proposes one point for this number of players (decision 9)."""
_LIKELY = 0.05
"""A budget is settled when no candidate is lower than its best loss with a higher probability (decision 9)."""
_POINTS_PER_PLAYER_OF_FEW, _POINTS_PER_STEP, _POINTS_PER_PLAYER = 13, 6, 8
"""Limits on the points measured, see `most_points` (decision 9; benchmarks/enough.py, docs/results/enough-*.md). For
blocks the limit is less than a tenth of the paper's hundred walks."""
_FEW_STEPS = 64
"""With more steps than this, a search starts with a descent (decision 9). Chosen by hand: what a player does alone at
either end says too little about the points between if there are many steps."""
_DESCENT_MOVES, _DESCENT_CANDIDATES = 8, 4
"""A descent takes this number of moves from end to end, and measures one in so many steps before a move (decision 9;
benchmarks/openings.py, docs/results/openings.md)."""
_POOL = 2000
"""Candidates of lowest predicted loss that get an expected improvement. With 210 players there are 25,000 candidates,
and predictions for all took most of the time between two rounds (decision 9). Chosen by hand."""
_INCUMBENTS = 3
"""Best measured points of a budget whose neighbours are candidates. Chosen by hand."""
_RANDOM_STARTS = 20
"""Random descents on each surrogate. Chosen by hand."""


def descent(space: SearchSpace) -> Greedy | None:
    """The greedy descent that the search of many steps starts with; None for few steps."""
    n = space.n_steps
    if n <= _FEW_STEPS:
        return None
    return Greedy(space, per_move=n // _DESCENT_MOVES, candidates=n // _DESCENT_CANDIDATES)


def most_points(space: SearchSpace) -> int:
    """Most points that a search measures, its start and its descent not counted.

    Few steps: 13 for each player, or 6 for each step if that is more. Many steps: 6 for each step, at most 8 for each
    player.
    """
    n_steps, n_players = space.n_steps, space.n_players
    if n_steps <= _FEW_STEPS:
        return max(n_players * _POINTS_PER_PLAYER_OF_FEW, n_steps * _POINTS_PER_STEP)
    return min(n_steps * _POINTS_PER_STEP, n_players * _POINTS_PER_PLAYER)


class ActiveSearch(Search):
    """Searches all budgets of a space at once on the true loss.

    The search starts from known points, from the assignments in `starts`, and from each player alone at either end of
    the game. With many steps a greedy descent replaces the players alone.

    Then the search goes in rounds. For each budget, one surrogate of each transform of the loss is fitted to all points
    measured so far. Candidates are the surrogate's own optima and the neighbours of these optima and of the best
    measured points. The candidates of highest expected improvement on the best measured loss are measured next. A
    budget is settled when no candidate is better with a probability worth a measurement, by the errors of the
    surrogates on left-out points.

    Args:
        space: Players, widths, budgets, seed.
        known: Points measured before the search, with their losses.
        starts: Assignments to measure first, shape (n, n_players): the search ends with nothing worse.
        opening: The descent to start with, if any.
        limit: Most points to measure, starts and descent not counted.

    Source: expected improvement, Jones et al., Efficient Global Optimization, 1998.
    """

    def __init__(
        self,
        space: SearchSpace,
        known: Known | None = None,
        starts: Assignments | None = None,
        opening: Callable[[SearchSpace], Greedy | None] = descent,
        limit: Callable[[SearchSpace], int] = most_points,
    ) -> None:
        self._space = space
        self._starts = np.zeros((0, space.n_players), dtype=np.float32) if starts is None else starts
        self.measured = Measured(space)
        if known is not None:
            self.measured.add(*known)
        self._descent = opening(space)
        self._limit, self._most = limit(space), 0
        self._round = 0

    def propose(self) -> Assignments:
        """The start first, then the candidates that may improve on the best measured losses."""
        if self._descent is not None and len(move := self._descent.propose()):
            return move
        self._round += 1
        if self._round == 1:
            self._most = len(self.measured) + self._limit
            if len(start := self._start()):
                return start
        chosen: list[Steps] = []
        if len(self.measured) < self._most:
            for budget, capacity in enumerate(self._space.capacities):
                chosen += self._candidates(budget, capacity, chosen)
        return self._space.assignments(np.array(chosen, dtype=bool).reshape(-1, self._space.n_steps))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)
        if self._descent is not None:
            self._descent.learn(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The measured assignment of lowest loss, shape (n_players,)."""
        return self._space.assignments(self.measured.best(capacity)[0])

    def _start(self) -> Assignments:
        """The starts and, without a descent, each player alone at either end, shape (n, n_players)."""
        if self._descent is not None:
            return self._starts
        none_down = np.zeros((1, self._space.n_steps), dtype=bool)
        ends = self._space.assignments(
            np.concatenate([none_down, self._space.one_player_down(), ~none_down, self._space.one_player_up()])
        )
        return np.concatenate([ends, self._starts])

    def _candidates(self, budget: int, capacity: int, taken: list[Steps]) -> list[Steps]:
        """The points that the surrogates of a budget propose, except measured points and points in `taken`."""
        rng = np.random.default_rng([self._space.seed, self._round, budget])
        incumbents, lowest = self.measured.best(capacity, _INCUMBENTS), self.measured.lowest(capacity)
        around_incumbents = [neighbours(self._space.constraint(capacity), q) for q in incumbents]
        seen = {q.tobytes() for q in taken}
        most = max(_POINTS_PER_SURROGATE, self._space.n_players // _PLAYERS_PER_POINT)
        proposed: list[Steps] = []
        for surrogate in self.measured.surrogates(capacity):
            program = surrogate.program(self._space.constraint(capacity))
            optima = local_optima(program, incumbents, _RANDOM_STARTS, rng)
            around_optima = [neighbours(program, q) for q in optima[:2]]
            pool = np.concatenate([optima, *around_optima, *around_incumbents])
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
