"""Pairwise sensitivities at the high end: what players cost alone, and what pairs cost beyond that."""

import numpy as np

from coopq.search.space import Measured, Setting
from coopq.search.solver.quadratic_program import QuadraticProgram, local_optima
from coopq.core.types import Assignment, Assignments, Losses


class CrossLayer:
    """Measures every player and every pair lowered from the high width, and believes the quadratic they define.

    Args:
        setting: Widths, sizes, budgets, seed.

    Source: CLADO, Deng et al., Mixed-Precision Quantization with Cross-Layer Dependencies, 2023 (arXiv 2307.05657).
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.measured = Measured(setting)

    def propose(self) -> Assignments:
        """Nobody, each player and each pair lowered."""
        n = self._setting.n_players
        first, second = np.triu_indices(n)
        points = np.zeros((1 + len(first), n), dtype=bool)
        points[np.arange(len(first)) + 1, first] = True
        points[np.arange(len(first)) + 1, second] = True
        return self._setting.assignments(points[:0] if len(self.measured) else points)

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The best local optimum of the quadratic."""
        rng = np.random.default_rng([self._setting.seed, 0])
        return self._setting.assignments(local_optima(self.program(capacity), np.zeros((0, 0), bool), 100, rng)[0])

    def program(self, capacity: int) -> QuadraticProgram:
        """The quadratic through everything measured, under a budget."""
        n = self._setting.n_players
        loss = np.empty((n, n))
        origin = float(self.measured.losses[~self.measured.lowered.any(axis=1)][0])
        for q, value in zip(self.measured.lowered, self.measured.losses, strict=True):
            where = np.flatnonzero(q)
            if len(where) in (1, 2):
                loss[where[0], where[-1]] = loss[where[-1], where[0]] = value - origin
        linear = np.diag(loss).copy()
        pairs = (loss - np.add.outer(linear, linear)) / 2
        np.fill_diagonal(pairs, 0.0)
        return QuadraticProgram(linear, pairs, self._setting.costs, capacity)
