"""The points that a search chooses from: players, their widths, and the steps between widths.

A player with W widths has W - 1 binary steps, one from each width down to the next lower width, ordered from the
highest width down. A player takes a step down only after all its steps above. A player with two widths has one step: if
all players have two widths, a step is a player. A player with one width has none, and stays there. A point is q, one
bit for each step (`Steps`); the same point as one width for each player is an assignment.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from coopq.core.types import Assignments, Width
from coopq.search.solver.quadratic_program import QuadraticProgram, Steps

Number = TypeVar("Number", np.float32, np.float64)


@dataclass(frozen=True)
class SearchSpace:
    """What a search chooses from, and the budgets that it searches for.

    Attributes:
        player_widths: Widths of each player, ascending, at least one; some player has two.
        step_bytes: Bytes that each step down saves, shape (n_steps,). The steps of a player lie together, from its
            highest width down.
        capacities: For each budget, the most bytes above all players at their lowest width.
        seed: Seed of all randomness.
    """

    player_widths: tuple[tuple[Width, ...], ...]
    step_bytes: npt.NDArray[np.int64]
    capacities: tuple[int, ...] = ()
    seed: int = 0

    @classmethod
    def uniform(
        cls,
        widths: tuple[Width, ...],
        step_bytes: npt.NDArray[np.int64],
        capacities: tuple[int, ...] = (),
        seed: int = 0,
    ) -> "SearchSpace":
        """The space of players that all have the same widths, as many as `step_bytes` has steps for."""
        n_players = len(step_bytes) // (len(widths) - 1)
        return cls((widths,) * n_players, step_bytes, capacities, seed)

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """All widths that some player has, ascending."""
        return tuple(sorted({width for widths in self.player_widths for width in widths}))

    @property
    def n_steps(self) -> int:
        """Number of steps of all players."""
        return len(self.step_bytes)

    @property
    def n_players(self) -> int:
        """Number of players."""
        return len(self.player_widths)

    @cached_property
    def player_of_step(self) -> npt.NDArray[np.intp]:
        """Player of each step, shape (n_steps,)."""
        return np.repeat(np.arange(self.n_players), [len(widths) - 1 for widths in self.player_widths])

    def assignments(self, q: Steps) -> Assignments:
        """Widths of points: shape (..., n_steps) to (..., n_players)."""
        highest = np.array([widths[-1] for widths in self.player_widths], dtype=np.float32)
        # Widths are whole or half bits, whose sums are exact.
        return highest - self._sums(q * (self._above - self._below))

    def steps_down(self, assignments: Assignments) -> Steps:
        """Points of assignments: shape (..., n_players) to (..., n_steps)."""
        q: Steps = assignments[..., self.player_of_step] < self._above
        return q

    def holds(self, assignments: Assignments) -> npt.NDArray[np.bool_]:
        """Whether each assignment is one of the space: shape (n, n_players) to (n,)."""
        found: npt.NDArray[np.bool_] = (self.assignments(self.steps_down(assignments)) == assignments).all(axis=1)
        return found

    def one_player_down(self) -> Steps:
        """The points with one player lowered and all others at their highest width, shape (n_steps, n_steps).

        Row i lowers the player of step i by step i and all its steps above.
        """
        return np.tri(self.n_steps, dtype=bool) & self._same_player

    def one_player_lowest(self) -> Steps:
        """The points with one player at its lowest width and all others at their highest.

        Shape (n_players, n_steps).
        """
        return np.equal.outer(np.arange(self.n_players), self.player_of_step)

    def one_player_up(self) -> Steps:
        """The points with one player raised and all others at their lowest width, shape (n_steps, n_steps).

        Row i takes back step i and all steps below of the same player.
        """
        return ~(np.tri(self.n_steps, dtype=bool).T & self._same_player)

    def sum_by_player(self, values: npt.NDArray[np.float64], axis: int = 0) -> npt.NDArray[np.float64]:
        """Sums over the steps of each player: an axis of length n_steps becomes one of length n_players."""
        return np.moveaxis(self._sums(np.moveaxis(values, axis, -1)), -1, axis)

    def constraint(self, capacity: int) -> QuadraticProgram:
        """The program of a budget with a = 0 and K = 0."""
        n = self.n_steps
        return QuadraticProgram(np.zeros(n), np.zeros((n, n)), self.step_bytes, capacity, self.player_of_step)

    @cached_property
    def _above(self) -> npt.NDArray[np.float32]:
        """The width above each step, shape (n_steps,)."""
        return np.array([width for widths in self.player_widths for width in widths[:0:-1]], dtype=np.float32)

    @cached_property
    def _below(self) -> npt.NDArray[np.float32]:
        """The width below each step, shape (n_steps,)."""
        return np.array([width for widths in self.player_widths for width in widths[-2::-1]], dtype=np.float32)

    def _sums(self, values: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """Sums over the steps of each player, shape (..., n_steps) to (..., n_players)."""
        with_steps, first_steps = np.unique(self.player_of_step, return_index=True)
        sums = np.zeros((*values.shape[:-1], self.n_players), dtype=values.dtype)
        sums[..., with_steps] = np.add.reduceat(values, first_steps, axis=-1)
        return sums

    @property
    def _same_player(self) -> npt.NDArray[np.bool_]:
        """Whether two steps are of one player, shape (n_steps, n_steps)."""
        return np.equal.outer(self.player_of_step, self.player_of_step)
