"""First and last: blocks at the ends of the model keep more bits.

Source: a rule of thumb without data. llama.cpp's mixed files, for example, give more bits to the first and the last
eighth of the blocks (`use_more_bits` in src/llama-quant.cpp). Here blocks are ranked by their distance from the middle;
of two blocks at equal distance the first ranks higher. Players that are linear layers have the rank of their block.
"""

import numpy as np

from coopq.game.sensitivity import Sensitivity
from coopq.plan.scores import Gains, gains_of_ranking


def gains(sensitivity: Sensitivity) -> Gains:
    """Blocks farthest from the middle get the high width first."""
    blocks = np.array(sensitivity.blocks, dtype=np.float64)
    distance = np.abs(blocks - blocks[-1] / 2)
    return gains_of_ranking(distance - blocks / (4 * len(blocks)), sensitivity.shares)
