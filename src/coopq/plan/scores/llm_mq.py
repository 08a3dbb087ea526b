"""LLM-MQ: first-order sensitivity of the loss to rounding, and an integer program over widths.

The sensitivity of a weight matrix W at b bits is |<dL/dW, W - Q_b(W)>|, and the program minimizes the sum over layers.
With two widths the gain of a player is the difference of its two sensitivities, and the program is a knapsack.

Source: Li et al., LLM-MQ: Mixed-precision Quantization for Efficient LLM Deployment, 2023. The paper's layers are
linear layers. If players are blocks, the absolute value can be that of each linear layer or that of their sum: both are
here. If players are linear layers, both are the same.
"""

import numpy as np

from coopq.game.sensitivity import Sensitivity
from coopq.plan.scores import Gains


def gains_by_layer(sensitivity: Sensitivity) -> Gains:
    """A player's sensitivity is the sum of its linear layers' sensitivities."""
    changes = sensitivity.first_order_changes()
    low, high = (
        np.array([np.abs(by_layer).sum() for by_layer in changes[bits]]) for bits in (sensitivity.low, sensitivity.high)
    )
    return low - high


def gains_by_block(sensitivity: Sensitivity) -> Gains:
    """A player's sensitivity is the absolute value of the sum of its linear layers' changes."""
    changes = sensitivity.first_order_changes()
    low, high = (
        np.array([abs(sum(by_layer)) for by_layer in changes[bits]]) for bits in (sensitivity.low, sensitivity.high)
    )
    return low - high
