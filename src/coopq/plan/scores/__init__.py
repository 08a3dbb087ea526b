"""One-layer scores that CoopQ is compared with, one file a baseline; `coopq.plan.methods` lists them.

A score turns a `coopq.game.sensitivity.Sensitivity` into gains, and the gains become an assignment under a byte budget.
"""

import numpy as np
import numpy.typing as npt

Gains = npt.NDArray[np.float64]
"""Loss saved by a higher width, as a score sees it. Each function says the shape. A knapsack adds gains."""


def gains_of_ranking(scores: Gains, shares: Gains) -> Gains:
    """Gains from scores that only rank players: how far each is above the lowest, by its share of a block's weights.

    With players of equal size the knapsack gives the high width to the players with the highest scores, as the scores'
    authors do. A small player is not preferred for being small, because its gain is scaled by its share of the weights.
    The lowest player has a small gain too, so that the knapsack fills the budget.

    Args:
        scores: Score of each player, shape (n_players,); a higher score keeps more bits.
        shares: Share of its block's weights that each player has, shape (n_players,).
    """
    above = scores - scores.min()
    spread = float(above.max()) or 1.0
    return (above + 1e-6 * spread) * shares
