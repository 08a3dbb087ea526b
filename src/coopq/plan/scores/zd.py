"""ZD, z-score distribution: the share of a player's weights far above their mean; needs no data.

Source: Dumitru et al., Layer-Wise Quantization, 2024 (arXiv 2406.17415): z = (w - mean) / standard deviation over all
weights of the layer; the share with z > 1; smaller keeps more bits.
"""

import numpy as np
import torch

from coopq.plan.scores import Gains, gains_of_ranking
from coopq.game.sensitivity import Probe


def scores(probe: Probe, *, two_sided: bool) -> Gains:
    """Share of each player's weights with z > 1, or with |z| > 1, shape (n_players,)."""
    values = np.empty(len(probe.players))
    for player in range(len(probe.players)):
        weights = torch.cat([weight.flatten() for weight in probe.weights(player).values()]).float()
        z = (weights - weights.mean()) / weights.std()
        values[player] = float(((z.abs() if two_sided else z) > 1).double().mean())
    return values


def gains_one_sided(probe: Probe) -> Gains:
    """Players with the smallest share above are raised first."""
    return gains_of_ranking(-scores(probe, two_sided=False), probe.shares)


def gains_two_sided(probe: Probe) -> Gains:
    """Players with the smallest share on both sides are raised first."""
    return gains_of_ranking(-scores(probe, two_sided=True), probe.shares)
