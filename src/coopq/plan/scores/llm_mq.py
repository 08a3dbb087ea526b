"""LLM-MQ: first-order sensitivity of the loss to rounding, and an integer program over widths.

The sensitivity of a weight W at b bits is |<dL/dW, W - Q_b(W)>|; the program minimises the sum over layers. With two
widths, raising a player is worth the difference of its sensitivities, and the program is a knapsack.

Source: Li et al., LLM-MQ: Mixed-precision Quantization for Efficient LLM Deployment, 2023. Their layers are linear
layers. Where players are blocks, the absolute value can be taken of each linear layer or of their sum: both are here.
Where players are linear layers, both are the same.
"""

import numpy as np

from coopq.plan.scores import Gains
from coopq.game.sensitivity import Probe


def gains_by_layer(probe: Probe) -> Gains:
    """The sensitivity of a player is the sum of its linear layers' sensitivities."""
    changes = probe.first_order_changes()
    low, high = (np.array([np.abs(of).sum() for of in changes[bits]]) for bits in (probe.low, probe.high))
    return low - high


def gains_by_block(probe: Probe) -> Gains:
    """The sensitivity of a player is the absolute value of its linear layers' summed changes."""
    changes = probe.first_order_changes()
    low, high = (np.array([abs(sum(of)) for of in changes[bits]]) for bits in (probe.low, probe.high))
    return low - high
