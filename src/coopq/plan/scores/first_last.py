"""First and last: blocks at the ends of the model keep more bits.

Source: a rule of thumb without data. llama.cpp's mixed files, for one, give more bits to the first and the last eighth
of the blocks (`use_more_bits` in src/llama-quant.cpp). Here blocks are ranked by their distance from the middle, of two
equally far the first one first; players that are linear layers inherit the rank of their block.
"""

import numpy as np

from coopq.plan.scores import Gains, gains_of_ranking
from coopq.game.sensitivity import Probe


def gains(probe: Probe) -> Gains:
    """Blocks farthest from the middle are raised first."""
    blocks = np.array(probe.blocks, dtype=np.float64)
    return gains_of_ranking(np.abs(blocks - blocks[-1] / 2) - blocks / (4 * len(blocks)), probe.shares)
