"""Shapley-based Progressive Quantization Estimation: walks that lower one player after the other."""

import numpy as np
import numpy.typing as npt

from coopq.core.errors import EstimationError
from coopq.search.space import ShapleyEstimate
from coopq.core.types import Assignments, Losses, Width


def permutation_walk(order: npt.NDArray[np.intp], low: Width, high: Width) -> Assignments:
    """Assignments of one walk from all-`high` to all-`low`.

    Args:
        order: The players in the order in which they are lowered, shape (n_players,).
        low: Bit-width after a player's turn.
        high: Bit-width before it.
    Returns:
        The start and the state after each step, shape (n_players + 1, n_players).
    """
    walk = np.full((len(order) + 1, len(order)), high, dtype=np.float32)
    for step, player in enumerate(order, start=1):
        walk[step:, player] = low
    return walk


def marginals(order: npt.NDArray[np.intp], walk_losses: Losses) -> npt.NDArray[np.float64]:
    """Loss increase caused by lowering each player in one walk.

    Args:
        order: The players in the order in which they were lowered, shape (n_players,).
        walk_losses: Loss before the walk and after each step, shape (n_players + 1,), nats per token.
    Returns:
        Marginal contribution of each player, in the players' own order, shape (n_players,).
    Source: Castro et al. 2009; walked from high to low precision as in CoopQ (2026).
    """
    contributions = np.empty(len(order))
    contributions[order] = np.diff(walk_losses)
    return contributions


class SPQE:
    """The paper's estimator: M seeded permutation walks, each measured at every step.

    Walk m depends on (seed, m) alone, so more permutations extend a run and repeat nothing.

    Args:
        n_players: Number of players, L.
        low: Bit-width that players are lowered to.
        high: Bit-width that players start from.
        permutations: Number of walks, M; at least 2, for a covariance.
        seed: Seed of the permutations.
        antithetic: Let every second walk go through the players in the reverse order of the one before. A pair is
            exact for games of single and pair terms, and says half as much about pairs.

    Source: CoopQ (2026), stage 1; antithetic walks: Mitchell et al., Sampling Permutations for Shapley Value
    Estimation, 2022.
    """

    def __init__(
        self, n_players: int, *, low: Width, high: Width, permutations: int, seed: int, antithetic: bool = False
    ) -> None:
        if permutations < 2:
            raise EstimationError(f"permutations = {permutations}, but a covariance needs at least 2")
        self.orders = [
            np.random.default_rng([seed, m // 2]).permutation(n_players)[:: -1 if m % 2 else 1]
            if antithetic
            else np.random.default_rng([seed, m]).permutation(n_players)
            for m in range(permutations)
        ]
        walks = [permutation_walk(order, low, high) for order in self.orders]
        self.points: Assignments = np.concatenate(walks)
        self._losses: Losses | None = None

    def propose(self) -> Assignments:
        """All walks at once, so that common prefixes are shared between them."""
        return self.points if self._losses is None else self.points[:0]

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses of the walks."""
        assert np.array_equal(assignments, self.points)
        self._losses = losses

    def estimate(self) -> ShapleyEstimate:
        """Mean, standard error and covariance of the marginals over the walks."""
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
            loss_low=float(walk_losses[0, -1]),
            permutations=len(samples),
        )
