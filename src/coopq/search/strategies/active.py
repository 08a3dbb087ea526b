"""Active search: a surrogate proposes assignments, the true loss decides, and each loss improves the surrogate.

docs/decisions/0009-active-search.md says why, and docs/decisions/0038-informed-search.md what the prior is for.
"""

from dataclasses import replace

import numpy as np

from coopq.core.types import Assignment, Assignments, Losses
from coopq.search.informed import InformedSurrogate, fit_informed, lowered_origin
from coopq.search.measured import Known, Measured
from coopq.search.prior import Floats, Prior, knapsacks
from coopq.search.protocol import Search
from coopq.search.solver.exact import knapsack
from coopq.search.solver.local_search import (
    descend,
    distinct_points,
    exchanges,
    local_optima,
    neighbours,
    range_sums,
)
from coopq.search.solver.quadratic_program import QuadraticProgram, Steps
from coopq.search.space import SearchSpace

_PER_ROUND = 2
"""Points that are proposed for each budget in a round: few, so that the surrogate learns often. Chosen by hand."""
_OPENING, _AROUND = 5, 2
"""Points at other sizes, and points beside each first plan, that the first fit sees. Chosen by hand."""
_GROUPS, _GROUPS_AFTER = 24, 60
"""Most groups of steps that are taken back once, each by itself, and after how many points. Chosen by hand."""
_POOL = 1000
"""Neighbours of a point, of lowest total of corrected gains, that the surrogate looks at. Chosen by hand."""
_CLIMBS = 12
"""Most exchanges from the best point towards the surrogate's own optimum in a round. Chosen by hand."""
_INCUMBENTS = 3
"""Best measured points of a budget whose neighbours are candidates. Chosen by hand."""
TOLERANCE = 0.01
"""Share of the loss lost that a user would not miss."""
_WORTH = 0.03
"""A candidate is worth a measurement if its expected gain is at least this share of the tolerance."""
_ROUNDS = 3
"""Rounds in a row without such a candidate after which a budget is settled."""
_STALE_ROUNDS, _STALE = 8, 0.3
"""A budget is also settled when so many rounds have gained less than this share of the tolerance: expectations can be
too high. Chosen on traces of benchmarks/informed.py."""
_POINTS_PER_PLAYER_OF_FEW, _POINTS_PER_STEP, _POINTS_PER_PLAYER, _FEW_STEPS = 13, 6, 8, 64
"""Limits on the points measured, see `most_points`; searches with a prior seldom meet them (decision 9)."""
_LIKELY = 0.05
"""Without a prior a budget is settled when no candidate is lower than its best loss with a higher probability."""
_RANDOM_STARTS = 20
"""Random descents on each surrogate without a prior. Chosen by hand."""


def most_points(space: SearchSpace) -> int:
    """Points after which a search proposes no more: the opening counts, known points do not.

    Few steps: 13 for each player, or 6 for each step if that is more. Many steps: 6 for each step, at most 8 for each
    player.
    """
    n_steps, n_players = space.n_steps, space.n_players
    if n_steps <= _FEW_STEPS:
        return max(n_players * _POINTS_PER_PLAYER_OF_FEW, n_steps * _POINTS_PER_STEP)
    return min(n_steps * _POINTS_PER_STEP, n_players * _POINTS_PER_PLAYER)


class ActiveSearch(Search):
    """Searches all budgets of a space at once on the true loss.

    The search starts from what the prior alone chooses for the budgets and for sizes around them. Then it goes in
    rounds. For each budget a surrogate is fitted to all points, and the unmeasured points of highest expected
    improvement on the best measured loss are measured next: among the surrogate's own optimum, its neighbours and those
    of the best points. A budget is settled after three rounds in which no point is worth a measurement, or eight
    without a gain. After 60 points, or when all budgets are settled, groups of steps are once taken back from the best
    point of the smallest budget, and the rounds go on. With 60 points known that keep the smallest budget, from
    searches of smaller budgets, there are no points at other sizes and no groups (benchmarks/later_sizes.py).

    A game of which nothing is known has no prior. Then each player is measured alone at either end first, and the
    surrogates are quadratics of the loss, its root and its logarithm (`coopq.search.surrogate`).

    Args:
        space: Players, widths, budgets, seed.
        known: Points measured before the search, with their losses.
        prior: What each step costs about; None if nothing is known.
        limit: Points after which the search proposes no more, besides known points; None for `most_points`.

    Source: expected improvement, Jones et al., Efficient Global Optimization, 1998.
    """

    def __init__(
        self,
        space: SearchSpace,
        known: Known | None = None,
        prior: Prior | None = None,
        limit: int | None = None,
    ) -> None:
        self._space, self._prior = space, prior
        self.measured = Measured(space)
        if known is not None:
            self.measured.add(*known)
        self._limit = most_points(space) if limit is None else limit
        self._most = self._n_known = 0
        self._round = 0
        self._opening: list[Steps] = []
        self._has_groups = False
        self._unsettle()

    def propose(self) -> Assignments:
        """The opening first, then the points that are expected to improve on the best measured losses."""
        self._round += 1
        if self._round == 1:
            self._n_known = len(self.measured)
            self._most = self._n_known + self._limit
            self._opening = [self._alone()] if self._prior is None else self._first_plans(self._prior)
            within = np.count_nonzero(self.measured.bytes_above_min <= min(self._space.capacities))
            if self._prior is not None and within >= _GROUPS_AFTER:
                self._opening, self._has_groups = self._opening[:1], True
        while self._opening:
            if len(fresh := self._unmeasured(self._opening.pop(0))):
                return fresh
        chosen: list[Steps] = []
        if len(self.measured) < self._most:
            for budget, capacity in enumerate(self._space.capacities):
                if self._prior is None:
                    chosen += self._likely(budget, capacity, chosen)
                elif self._quiet[capacity] < _ROUNDS:
                    chosen += self._candidates(self._prior, capacity, chosen)
            is_time = not chosen or len(self.measured) - self._n_known >= _GROUPS_AFTER
            if is_time and self._prior is not None and not self._has_groups:
                self._has_groups = True
                self._unsettle()
                smallest = min(self._space.capacities)
                best = self.measured.best(smallest)[0]
                fresh = self._unmeasured(_groups_back(self._space.constraint(smallest), self._prior, best))
                return fresh if len(fresh) else self.propose()
        return self._space.assignments(np.array(chosen, dtype=bool).reshape(-1, self._space.n_steps))

    def _unsettle(self) -> None:
        """No budget is settled."""
        self._quiet = dict.fromkeys(self._space.capacities, 0)
        self._stale = dict.fromkeys(self._space.capacities, (0, np.inf))

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The measured assignment of lowest loss, shape (n_players,)."""
        return self._space.assignments(self.measured.best(capacity)[0])

    def _alone(self) -> Steps:
        """Both ends of the game, and each player alone at either end."""
        none_down = np.zeros((1, self._space.n_steps), dtype=bool)
        return np.concatenate([none_down, self._space.one_player_down(), ~none_down, self._space.one_player_up()])

    def _first_plans(self, prior: Prior) -> list[Steps]:
        """What the prior chooses for the budgets; then what it chooses for other sizes, and some neighbours."""
        space, rng = self._space, np.random.default_rng(self._space.seed)
        plans: list[Steps] = []
        others: list[Steps] = []
        for capacity in knapsacks(space.capacities, int(space.step_bytes.sum()), _OPENING):
            program = space.constraint(capacity)
            best = _filled(program, prior.gains)
            (plans if capacity in space.capacities else others).append(best[None])
            if capacity in space.capacities and len(beside := neighbours(program, best)):
                others.append(beside[rng.choice(len(beside), min(_AROUND, len(beside)), replace=False)])
        return [np.concatenate(found) for found in (plans, others) if found]

    def _unmeasured(self, points: Steps) -> Assignments:
        """Distinct points without a loss, as assignments."""
        distinct = distinct_points(points)
        fresh = [q for q in distinct if q not in self.measured]
        return self._space.assignments(np.array(fresh, dtype=bool).reshape(-1, self._space.n_steps))

    def _candidates(self, prior: Prior, capacity: int, taken: list[Steps]) -> list[Steps]:
        """The points of a budget that are worth a measurement, except measured points and points in `taken`."""
        program, lowest = self._space.constraint(capacity), self.measured.lowest(capacity)
        rounds, before = self._stale[capacity]
        origin = lowered_origin(prior.origin, self.measured.losses)
        has_gained = lowest - origin < (1 - _STALE * TOLERANCE) * (before - origin)
        self._stale[capacity] = (0, lowest) if has_gained else (rounds + 1, before)
        if rounds + 1 > _STALE_ROUNDS and not has_gained:
            self._quiet[capacity] = _ROUNDS
            return []
        surrogate, optimum = likely_optimum(self._space, capacity, prior, self.measured)
        gains, incumbents = surrogate.corrected_gains(), self.measured.best(capacity, _INCUMBENTS)
        pools = [optimum[None], *(exchanges(program, q, gains, _POOL) for q in (optimum, *incumbents))]
        pool = distinct_points(np.concatenate(pools))
        seen = {q.tobytes() for q in taken}
        pool = pool[[q not in self.measured and q.tobytes() not in seen for q in pool]]
        if not len(pool):
            self._quiet[capacity] = _ROUNDS
            return []
        improvement = surrogate.improvement(pool, lowest)
        best = np.argsort(-improvement, kind="stable")[:_PER_ROUND]
        is_worth = improvement[best[0]] >= _WORTH * TOLERANCE
        self._quiet[capacity] = 0 if is_worth else self._quiet[capacity] + 1
        return list(pool[best])

    def _likely(self, budget: int, capacity: int, taken: list[Steps]) -> list[Steps]:
        """The points that quadratics propose for a budget, except measured points and points in `taken`."""
        rng = np.random.default_rng([self._space.seed, self._round, budget])
        incumbents, lowest = self.measured.best(capacity, _INCUMBENTS), self.measured.lowest(capacity)
        around_incumbents = [neighbours(self._space.constraint(capacity), q) for q in incumbents]
        seen = {q.tobytes() for q in taken}
        proposed: list[Steps] = []
        for surrogate in self.measured.surrogates(capacity):
            program = surrogate.program(self._space.constraint(capacity))
            optima = local_optima(program, incumbents, _RANDOM_STARTS, rng)
            pool = np.concatenate([optima, *(neighbours(program, q) for q in optima[:2]), *around_incumbents])
            pool = distinct_points(pool)
            pool = pool[[q not in self.measured and q.tobytes() not in seen for q in pool]]
            if len(pool):
                pool = pool[np.argsort(surrogate.value(pool), kind="stable")[:_POOL]]
                improvement, probability = surrogate.improvement(pool, lowest)
                best = np.argsort(-improvement, kind="stable")[:_PER_ROUND]
                fresh = pool[best[probability[best] >= _LIKELY]]
                seen.update(q.tobytes() for q in fresh)
                proposed += list(fresh)
        return proposed


def likely_optimum(
    space: SearchSpace, capacity: int, prior: Prior, measured: Measured
) -> tuple[InformedSurrogate, Steps]:
    """A surrogate fitted to all points near a budget, and the point that it takes for the best, shape (n_steps,).

    Args:
        space: Players and steps.
        capacity: Bytes that steps not taken may cost together.
        prior: What each step costs about.
        measured: The points; one of them keeps the budget.
    """
    program = space.constraint(capacity)
    surrogate = fit_informed(prior, measured.q, measured.losses, measured.lowest(capacity))
    gains = surrogate.corrected_gains()
    starts = np.concatenate([_filled(program, gains)[None], measured.best(capacity, _INCUMBENTS)])
    return surrogate, _climb(program, surrogate, gains, starts)


def _filled(program: QuadraticProgram, gains: Floats) -> Steps:
    """The point of lowest total of gains, shape (n_steps,); near the lowest if the bytes have no common unit."""
    linear = replace(program, a=gains, K=np.zeros_like(program.K))
    found = knapsack(linear)
    return _greedily_filled(linear) if found is None else found


def _greedily_filled(program: QuadraticProgram) -> Steps:
    """The point that a greedy fill and a descent find: again and again the width that gains most by the byte."""
    q, left = np.ones(len(program.a), dtype=bool), program.capacity
    while True:
        begin, end = program.widths_beside(q)
        gain, size = (range_sums(values, begin, end) for values in (program.a, program.step_bytes))
        fits = np.flatnonzero(q & (size <= left))
        if not len(fits):
            return descend(program, q)
        step = fits[np.argmax(gain[fits] / size[fits])]
        q[begin[step] : end[step]] = False
        left -= int(size[step])


def _groups_back(program: QuadraticProgram, prior: Prior, q: Steps) -> Steps:
    """A point with the last steps of some players taken back, for each group of players, shape (n_groups, n_steps).

    A group has steps of one kind in adjacent blocks. A score can be wrong by a factor in all steps of a kind, or in
    some blocks; in the neighbourhood of one plan a search would not notice. Of too many kinds those of the highest
    scores are taken.
    """
    back = np.flatnonzero(program.movable(q)[0])
    keys = np.stack([prior.kinds[back], prior.blocks[back]], axis=1)
    span = 1
    while len(groups := np.unique(keys // [1, span], axis=0)) > _GROUPS and span <= prior.blocks.max():
        span += 1
    members = [back[(keys // [1, span] == group).all(axis=1)] for group in groups]
    members = sorted(members, key=lambda steps: -prior.gains[steps].sum())[:_GROUPS]
    found = np.repeat(q[None], len(members), axis=0)
    for row, steps in zip(found, members, strict=True):
        row[steps] = False
    return found


def _climb(program: QuadraticProgram, surrogate: InformedSurrogate, gains: Floats, starts: Steps) -> Steps:
    """The point that exchanges lead to from the best start, as the surrogate sees it, shape (n_steps,)."""
    means = surrogate.mean_log_loss(starts)
    current, lowest = starts[means.argmin()], float(means.min())
    for _ in range(_CLIMBS):
        beside = exchanges(program, current, gains, _POOL)
        if not len(beside):
            break
        means = surrogate.mean_log_loss(beside)
        if float(means.min()) >= lowest - 1e-9:
            break
        current, lowest = beside[means.argmin()], float(means.min())
    return current
