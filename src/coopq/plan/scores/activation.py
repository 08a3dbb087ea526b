"""Activation score: the Frobenius norm of what a block puts out, larger keeps more bits.

Source: a baseline of CoopQ (2026), which does not say more; the norm is taken of each sequence's states after the block
and averaged over the calibration sequences. Players that are linear layers inherit the score of their block.
"""

import numpy as np

from coopq.plan.scores import Gains, gains_of_ranking
from coopq.game.sensitivity import Probe


def scores(probe: Probe) -> Gains:
    """Frobenius norm of the output of each player's block, averaged over sequences, shape (n_players,)."""
    of_blocks = [float(outputs.flatten(1).double().norm(dim=1).mean()) for _, outputs in probe.states()]
    return np.array(of_blocks)[probe.blocks]


def gains(probe: Probe) -> Gains:
    """Blocks with the largest outputs are raised first."""
    return gains_of_ranking(scores(probe), probe.shares)
