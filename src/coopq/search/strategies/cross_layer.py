"""Pairwise sensitivities at the high end: the true loss of each player and each pair of players lowered."""

from dataclasses import replace

import numpy as np

from coopq.core.types import Assignment, Assignments, Losses
from coopq.search.measured import Measured
from coopq.search.protocol import Search
from coopq.search.solver.local_search import local_optima
from coopq.search.solver.quadratic_program import QuadraticProgram
from coopq.search.space import SearchSpace

_STARTS = 100
"""Random descents on the quadratic. Chosen by hand."""


class CrossLayer(Search):
    """Measures every player and every pair lowered from the high width, and chooses the optimum of their quadratic.

    Args:
        space: Players with two widths each, budgets, seed.

    Source: CLADO, Deng et al., Mixed-Precision Quantization with Cross-Layer Dependencies, 2023 (arXiv 2307.05657).
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.measured = Measured(space)

    def propose(self) -> Assignments:
        """No player lowered, then each player and each pair lowered."""
        n = self._space.n_players
        first, second = np.triu_indices(n)
        points = np.zeros((1 + len(first), n), dtype=bool)
        points[np.arange(len(first)) + 1, first] = True
        points[np.arange(len(first)) + 1, second] = True
        return self._space.assignments(points[:0] if len(self.measured) else points)

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The best local optimum of the quadratic, shape (n_players,)."""
        rng, no_starts = np.random.default_rng([self._space.seed, 0]), np.zeros((0, self._space.n_steps), dtype=bool)
        return self._space.assignments(local_optima(self.program(capacity), no_starts, _STARTS, rng)[0])

    def program(self, capacity: int) -> QuadraticProgram:
        """The quadratic through all measured points, under a capacity."""
        n = self._space.n_players
        loss = np.empty((n, n))
        origin = float(self.measured.losses[~self.measured.q.any(axis=1)][0])
        for q, value in zip(self.measured.q, self.measured.losses, strict=True):
            lowered = np.flatnonzero(q)
            if len(lowered) in (1, 2):
                loss[lowered[0], lowered[-1]] = loss[lowered[-1], lowered[0]] = value - origin
        a = np.diag(loss).copy()
        K = (loss - np.add.outer(a, a)) / 2
        np.fill_diagonal(K, 0.0)
        return replace(self._space.constraint(capacity), a=a, K=K)
