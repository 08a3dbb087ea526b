"""LIM, layer input modification: how much a block changes what goes through it.

Source: Dumitru et al., Layer-Wise Quantization, 2024 (arXiv 2406.17415): the negative cosine similarity of a layer's
input and output, averaged over calibration samples; higher keeps more bits. Similarities are taken of the flattened
states of each sequence. Their layers are blocks: players that are linear layers inherit the score of their block.
"""

import numpy as np
from torch.nn import functional

from coopq.plan.scores import Gains, gains_of_ranking
from coopq.game.sensitivity import Probe


def scores(probe: Probe) -> Gains:
    """Negative cosine similarity of what goes into each player's block and what comes out, averaged over sequences.

    Shape (n_players,).
    """
    of_blocks: list[float] = []
    for inputs, outputs in probe.states():
        similarity = functional.cosine_similarity(inputs.flatten(1).double(), outputs.flatten(1).double(), dim=1)
        of_blocks.append(-float(similarity.mean()))
    return np.array(of_blocks)[probe.blocks]


def gains(probe: Probe) -> Gains:
    """Blocks that change their input most are raised first."""
    return gains_of_ranking(scores(probe), probe.shares)
