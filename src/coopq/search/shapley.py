"""Shapley-based Progressive Quantization Estimation: permutation walks that lower one player after the other."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coopq.core.errors import EstimationError
from coopq.core.types import Assignments, Losses, Width


@dataclass(frozen=True)
class ShapleyEstimate:
    """What M permutation walks say about the players.

    Attributes:
        shapley: phi, the mean marginal contribution of each player, shape (n_players,), nats per token.
        stderr: Standard error of phi over the walks, shape (n_players,), nats per token.
        covariance: C, the covariance of the marginal contributions over the walks with divisor M - 1, shape
            (n_players, n_players), nats squared.
        loss_high: Loss with every player at the high width, nats per token.
        permutations: M, the number of walks.
    """

    shapley: npt.NDArray[np.float64]
    stderr: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    loss_high: float
    permutations: int


def permutation_walk(order: npt.NDArray[np.intp], low: Width, high: Width) -> Assignments:
    """The assignments of one walk from all players at `high` to all players at `low`.

    Args:
        order: The players in the order in which the walk lowers them, shape (n_players,).
        low: Width of a player after its turn.
        high: Width of a player before its turn.
    Returns:
        The start and the assignment after each step of the walk, shape (n_players + 1, n_players).
    """
    walk = np.full((len(order) + 1, len(order)), high, dtype=np.float32)
    for turn, player in enumerate(order, start=1):
        walk[turn:, player] = low
    return walk


def marginals(order: npt.NDArray[np.intp], walk_losses: Losses) -> npt.NDArray[np.float64]:
    """The loss increase that lowering each player causes in one walk.

    Args:
        order: The players in the order in which the walk lowers them, shape (n_players,).
        walk_losses: Loss before the walk and after each step of the walk, shape (n_players + 1,), nats per token.
    Returns:
        Marginal contribution of each player, in the players' own order, shape (n_players,), nats per token.
    Source: Castro et al. 2009; walked from high to low precision as in CoopQ (2026).
    """
    contributions = np.empty(len(order))
    contributions[order] = np.diff(walk_losses)
    return contributions


class SPQE:
    """The paper's estimator: M seeded permutation walks, measured at every step.

    Walk m depends only on the seed and m, so a run with more permutations repeats no walk of a run with fewer.

    Args:
        n_players: Number of players, L.
        low: Width that the walks lower players to.
        high: Width that players start from.
        permutations: Number of walks, M; at least 2, because a covariance needs two.
        seed: Seed of the permutations.

    Attributes:
        orders: The players of each walk in the order in which the walk lowers them, M arrays of shape (n_players,).
        points: The assignments of all walks, shape (M (n_players + 1), n_players).

    Source: CoopQ (2026), stage 1.
    """

    def __init__(self, n_players: int, *, low: Width, high: Width, permutations: int, seed: int) -> None:
        if permutations < 2:
            raise EstimationError(f"permutations = {permutations} is too few; a covariance needs at least 2")
        self.orders = [self.order(n_players, seed, m) for m in range(permutations)]
        self.points: Assignments = np.concatenate([permutation_walk(order, low, high) for order in self.orders])
        self._losses: Losses | None = None

    @staticmethod
    def order(n_players: int, seed: int, m: int) -> npt.NDArray[np.intp]:
        """The players in the order in which walk m lowers them, shape (n_players,)."""
        return np.random.default_rng([seed, m]).permutation(n_players)

    def propose(self) -> Assignments:
        """All walks at once, so that walks share their common prefixes."""
        return self.points if self._losses is None else self.points[:0]

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses of the walks."""
        assert np.array_equal(assignments, self.points)
        self._losses = losses

    def estimate(self) -> ShapleyEstimate:
        """Mean, standard error and covariance of the marginal contributions over the walks."""
        assert self._losses is not None, "learn() comes first"
        walk_losses = self._losses.reshape(len(self.orders), -1)
        samples = np.stack([marginals(order, row) for order, row in zip(self.orders, walk_losses, strict=True)])
        return ShapleyEstimate(
            shapley=samples.mean(axis=0),
            stderr=samples.std(axis=0, ddof=1) / np.sqrt(len(samples)),
            covariance=np.cov(samples, rowvar=False, ddof=1)
            .astype(np.float64)
            .reshape(samples.shape[1], samples.shape[1]),
            loss_high=float(walk_losses[0, 0]),
            permutations=len(samples),
        )
