"""LIM, layer input modification: how much a block changes the states that go through it.

Source: Dumitru et al., Layer-Wise Quantization, 2024 (arXiv 2406.17415): the negative cosine similarity of a layer's
input and output, averaged over calibration samples; a higher score keeps more bits. Here the similarity is that of
each sequence's flattened states. The paper's layers are blocks; players that are linear layers have the score of their
block.
"""

import numpy as np
from torch.nn import functional

from coopq.game.sensitivity import Sensitivity
from coopq.model.matrices import in_float64
from coopq.plan.scores import Gains, gains_of_ranking


def scores(sensitivity: Sensitivity) -> Gains:
    """Negative cosine similarity of the input and the output of each player's block, shape (n_players,)."""
    found: list[float] = []
    for inputs, outputs in sensitivity.states():
        before, after = in_float64(inputs.flatten(1)), in_float64(outputs.flatten(1))
        similarity = functional.cosine_similarity(before, after, dim=1)
        found.append(-float(similarity.mean()))
    return np.array(found)[sensitivity.blocks]


def gains(sensitivity: Sensitivity) -> Gains:
    """Blocks that change their input most get the high width first."""
    return gains_of_ranking(scores(sensitivity), sensitivity.shares)
