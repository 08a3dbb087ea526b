"""ZD, z-score distribution: the share of a player's weights far above their mean; needs no data.

Source: Dumitru et al., Layer-Wise Quantization, 2024 (arXiv 2406.17415): z = (w - mean) / standard deviation over all
weights of the layer, and the share of weights with z > 1; a smaller share keeps more bits.
"""

import numpy as np
import torch

from coopq.game.sensitivity import Sensitivity
from coopq.model.matrices import in_float64
from coopq.plan.scores import Gains, gains_of_ranking


def scores(sensitivity: Sensitivity, *, two_sided: bool) -> Gains:
    """Share of each player's weights with z > 1, or with |z| > 1, shape (n_players,)."""
    values = np.empty(len(sensitivity.players))
    for player in range(len(sensitivity.players)):
        weights = torch.cat([weight.flatten() for weight in sensitivity.weights(player).values()]).float()
        z = (weights - weights.mean()) / weights.std()
        values[player] = float(in_float64((z.abs() if two_sided else z) > 1).mean())
    return values


def gains_one_sided(sensitivity: Sensitivity) -> Gains:
    """Players with the smallest share of z > 1 get the high width first."""
    return gains_of_ranking(-scores(sensitivity, two_sided=False), sensitivity.shares)


def gains_two_sided(sensitivity: Sensitivity) -> Gains:
    """Players with the smallest share of |z| > 1 get the high width first."""
    return gains_of_ranking(-scores(sensitivity, two_sided=True), sensitivity.shares)
