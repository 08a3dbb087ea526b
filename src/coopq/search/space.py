"""What an estimator is, the one loop that runs all of them, and what they share."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from coopq.search.solver.quadratic_program import QuadraticProgram
from coopq.search.surrogate import Surrogate, fit_surrogates
from coopq.core.types import Assignment, Assignments, Game, Losses, Width


@dataclass(frozen=True)
class ShapleyEstimate:
    """What permutation walks say about the players.

    Attributes:
        shapley: Mean marginal contribution of each player, shape (n_players,), nats per token.
        stderr: Its standard error over the walks, shape (n_players,).
        covariance: Covariance of the marginals over the walks (divisor M - 1), shape (n_players, n_players).
        loss_high: Loss with every player at the high width.
        loss_low: Loss with every player at the low width.
        permutations: Number of walks, M.
    """

    shapley: npt.NDArray[np.float64]
    stderr: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    loss_high: float
    loss_low: float
    permutations: int


Known: TypeAlias = tuple[Assignments, Losses]
"""Points measured before a search began, and their losses."""


@dataclass(frozen=True)
class Setting:
    """What a search is for.

    Attributes:
        widths: The widths to choose from, ascending.
        costs: Bytes that each step between neighbouring widths of a player costs, shape (n_steps,): the steps of a
            player lie together, from its highest width down. With two widths, a step is a player.
        capacities: For each budget, the bytes that all steps not taken down may cost together.
        seed: Seed of all that is random.
        levels: Those of the widths that each player has, ascending, two at least; None where all have all.
    """

    widths: tuple[Width, ...]
    costs: npt.NDArray[np.int64]
    capacities: tuple[int, ...]
    seed: int = 0
    levels: tuple[tuple[Width, ...], ...] | None = None

    @property
    def n_steps(self) -> int:
        """Number of steps of all players."""
        return len(self.costs)

    @property
    def n_players(self) -> int:
        """Number of players."""
        return len(self.levels_of_players)

    @cached_property
    def levels_of_players(self) -> tuple[tuple[Width, ...], ...]:
        """The widths of each player, ascending."""
        return self.levels or (self.widths,) * (self.n_steps // (len(self.widths) - 1))

    @cached_property
    def owners(self) -> npt.NDArray[np.intp]:
        """Player of each step, shape (n_steps,)."""
        return np.repeat(np.arange(self.n_players), [len(levels) - 1 for levels in self.levels_of_players])

    def assignments(self, lowered: npt.NDArray[np.bool_]) -> Assignments:
        """Bit-widths of coalitions: shape (..., n_steps) to (..., n_players)."""
        highest = np.array([levels[-1] for levels in self.levels_of_players], dtype=np.float32)
        # Whole and half bits have exact sums.
        return highest - np.add.reduceat(lowered * (self._above - self._below), self._first, axis=-1)

    def lowered(self, assignments: Assignments) -> npt.NDArray[np.bool_]:
        """Coalitions of assignments: shape (..., n_players) to (..., n_steps)."""
        lowered: npt.NDArray[np.bool_] = assignments[..., self.owners] < self._above
        return lowered

    def alone(self) -> npt.NDArray[np.bool_]:
        """Each player lowered alone, to each width; a coalition a step, shape (n_steps, n_steps)."""
        return np.tri(self.n_steps, dtype=bool) & np.equal.outer(self.owners, self.owners)

    def raised_alone(self) -> npt.NDArray[np.bool_]:
        """Each player raised alone, to each width; a coalition a step, shape (n_steps, n_steps)."""
        return ~(np.tri(self.n_steps, dtype=bool).T & np.equal.outer(self.owners, self.owners))

    def by_player(self, values: npt.NDArray[np.float64], axis: int = 0) -> npt.NDArray[np.float64]:
        """Sums over the steps of each player: an axis of n_steps becomes one of n_players."""
        return np.add.reduceat(values, self._first, axis=axis)

    def program(self, capacity: int) -> QuadraticProgram:
        """The constraint of a budget without an objective."""
        n = self.n_steps
        return QuadraticProgram(np.zeros(n), np.zeros((n, n)), self.costs, capacity, self.owners)

    @cached_property
    def _above(self) -> npt.NDArray[np.float32]:
        """The width that each step leads down from."""
        return np.array([width for levels in self.levels_of_players for width in levels[:0:-1]], dtype=np.float32)

    @cached_property
    def _below(self) -> npt.NDArray[np.float32]:
        """The width that each step leads down to."""
        return np.array([width for levels in self.levels_of_players for width in levels[-2::-1]], dtype=np.float32)

    @cached_property
    def _first(self) -> npt.NDArray[np.intp]:
        """The first step of each player, shape (n_players,)."""
        return np.flatnonzero(np.diff(self.owners, prepend=-1))


class Measured:
    """Points of a game between some widths and their losses.

    Attributes:
        lowered: Distinct coalitions, shape (n_points, n_steps).
        losses: Shape (n_points,), nats per token.
        raised_bytes: What the steps not taken of each point cost, shape (n_points,).
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._rows: dict[bytes, int] = {}
        self.lowered = np.zeros((0, setting.n_steps), dtype=bool)
        self.losses: Losses = np.zeros(0)
        self.raised_bytes: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def __contains__(self, lowered: npt.NDArray[np.bool_]) -> bool:
        return lowered.tobytes() in self._rows

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, assignments: Assignments, losses: Losses) -> None:
        """Take points; those of other widths and those known are left out."""
        if len(assignments) == 0:
            return
        setting = self._setting
        of_game = (setting.assignments(setting.lowered(assignments)) == assignments).all(axis=1)
        coalitions, losses = setting.lowered(assignments[of_game]), losses[of_game]
        new = []
        for row, coalition in enumerate(coalitions):
            key = coalition.tobytes()
            if key not in self._rows:
                self._rows[key] = len(self._rows)
                new.append(row)
        lowered = coalitions[new]
        self.lowered = np.concatenate([self.lowered, lowered])
        self.losses = np.concatenate([self.losses, losses[new]])
        self.raised_bytes = np.concatenate([self.raised_bytes, ~lowered @ setting.costs])

    def loss(self, lowered: npt.NDArray[np.bool_]) -> float:
        """Loss of a coalition that was measured."""
        return float(self.losses[self._rows[lowered.tobytes()]])

    def known(self) -> Known:
        """Everything, for another search to start from."""
        return self._setting.assignments(self.lowered), self.losses

    def sizes(self) -> npt.NDArray[np.float64]:
        """Size of each point: 0 with all players lowered, 1 with none, shape (n_points,)."""
        return self.raised_bytes / self._setting.costs.sum()

    def best(self, capacity: int, n: int = 1) -> npt.NDArray[np.bool_]:
        """The points of lowest loss that keep a budget, best first, shape (up to n, n_steps)."""
        fitting = np.flatnonzero(self.raised_bytes <= capacity)
        return self.lowered[fitting[np.argsort(self.losses[fitting], kind="stable")[:n]]]

    def surrogates(self, capacity: int, *, pairs: bool = True) -> list[Surrogate]:
        """Surrogates for a budget, one for each transform of the loss, fitted to everything measured."""
        size = min(1.0, capacity / self._setting.costs.sum())
        return fit_surrogates(self.lowered, self.losses, sizes=self.sizes(), size=size, pairs=pairs)

    def lowest(self, capacity: int) -> float:
        """The lowest loss that keeps a budget; infinity where none is known."""
        return float(self.losses[self.raised_bytes <= capacity].min(initial=np.inf))


class Estimator(Protocol):
    """Proposes points of the game and learns from their losses; it never calls the game itself.

    A proposal is a function of the seed and of the losses learnt so far, nothing else: an interrupted
    run replays its losses from the journal and goes on.
    """

    def propose(self) -> Assignments:
        """The next points to measure, shape (n, n_players); n = 0 when nothing more is wanted."""
        ...

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses of the points proposed last."""
        ...


class Search(Estimator, Protocol):
    """An estimator that answers with an assignment for each budget of its setting.

    Attributes:
        measured: What it has learnt.
    """

    measured: Measured

    def choose(self, capacity: int) -> Assignment:
        """The assignment of a budget, shape (n_players,)."""
        ...


AnyEstimator = TypeVar("AnyEstimator", bound=Estimator)


def run_estimator(estimator: AnyEstimator, game: Game) -> AnyEstimator:
    """Measure what `estimator` proposes until it wants no more."""
    while len(points := estimator.propose()):
        estimator.learn(points, game(points))
    return estimator
