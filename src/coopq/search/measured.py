"""The points that a search has measured, and the surrogates fitted to the measured losses."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from coopq.core.types import Assignments, Losses
from coopq.search.solver.quadratic_program import Steps
from coopq.search.space import SearchSpace
from coopq.search.surrogate import Surrogate, fit_surrogates

Known: TypeAlias = tuple[Assignments, Losses]
"""Assignments measured before a search starts, and their losses."""


class Measured:
    """Distinct points of a space with their losses.

    Attributes:
        q: Shape (n_points, n_steps).
        losses: Shape (n_points,), nats per token.
        bytes_above_min: Bytes of each point above all players at their lowest width, shape (n_points,).
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._rows: dict[bytes, int] = {}
        self.q: Steps = np.zeros((0, space.n_steps), dtype=bool)
        self.losses: Losses = np.zeros(0)
        self.bytes_above_min: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def __contains__(self, q: Steps) -> bool:
        return q.tobytes() in self._rows

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, assignments: Assignments, losses: Losses) -> None:
        """Add assignments and their losses, except points that are known and assignments outside the space."""
        if len(assignments) == 0:
            return
        space = self._space
        is_inside = space.holds(assignments)
        points, losses = space.steps_down(assignments[is_inside]), losses[is_inside]
        new = []
        for row, q in enumerate(points):
            key = q.tobytes()
            if key not in self._rows:
                self._rows[key] = len(self._rows)
                new.append(row)
        points = points[new]
        self.q = np.concatenate([self.q, points])
        self.losses = np.concatenate([self.losses, losses[new]])
        self.bytes_above_min = np.concatenate([self.bytes_above_min, ~points @ space.step_bytes])

    def loss(self, q: Steps) -> float:
        """The loss of one measured point, nats per token; q of shape (n_steps,)."""
        return float(self.losses[self._rows[q.tobytes()]])

    def known(self) -> Known:
        """All points, for another search to start from."""
        return self._space.assignments(self.q), self.losses

    def fill(self) -> npt.NDArray[np.float64]:
        """`bytes_above_min` as a share: 0 with all players lowest, 1 with all players highest, shape (n_points,)."""
        return self.bytes_above_min / self._space.step_bytes.sum()

    def best(self, capacity: int, n: int = 1) -> Steps:
        """The n points of lowest loss that keep a capacity, best first, shape (up to n, n_steps)."""
        feasible = np.flatnonzero(self.bytes_above_min <= capacity)
        return self.q[feasible[np.argsort(self.losses[feasible], kind="stable")[:n]]]

    def lowest(self, capacity: int) -> float:
        """The lowest loss that keeps a capacity, nats per token; infinity if no measured point keeps the capacity."""
        return float(self.losses[self.bytes_above_min <= capacity].min(initial=np.inf))

    def surrogates(self, capacity: int, *, pairs: bool = True) -> list[Surrogate]:
        """Surrogates for a capacity fitted to all points, one for each transform of the loss."""
        fill = min(1.0, capacity / self._space.step_bytes.sum())
        return fit_surrogates(self.q, self.losses, fills=self.fill(), fill=fill, pairs=pairs)
