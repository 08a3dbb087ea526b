"""What an estimator is, and the one loop that runs all of them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from coopq.types import Assignments, Game, Losses


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

    def estimate(self) -> ShapleyEstimate:
        """What was learnt."""
        ...


def run_estimator(estimator: Estimator, game: Game) -> ShapleyEstimate:
    """Measure what `estimator` proposes until it wants no more."""
    while len(points := estimator.propose()):
        estimator.learn(points, game(points))
    return estimator.estimate()
