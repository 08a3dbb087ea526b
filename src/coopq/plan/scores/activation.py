"""Activation score: the Frobenius norm of a block's output; a larger norm keeps more bits.

Source: a baseline of CoopQ (2026), which gives no more detail. Here the norm is that of each sequence's states after
the block, averaged over the calibration sequences. Players that are linear layers have the score of their block.
"""

import numpy as np

from coopq.game.sensitivity import Sensitivity
from coopq.model.matrices import in_float64
from coopq.plan.scores import Gains, gains_of_ranking


def scores(sensitivity: Sensitivity) -> Gains:
    """Frobenius norm of the output of each player's block, averaged over sequences, shape (n_players,)."""
    norms = [float(in_float64(outputs.flatten(1)).norm(dim=1).mean()) for _, outputs in sensitivity.states()]
    return np.array(norms)[sensitivity.blocks]


def gains(sensitivity: Sensitivity) -> Gains:
    """Blocks with the largest outputs get the high width first."""
    return gains_of_ranking(scores(sensitivity), sensitivity.shares)
