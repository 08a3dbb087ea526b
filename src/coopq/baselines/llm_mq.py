"""LLM-MQ: first-order sensitivity of the loss to rounding, and an integer program over widths.

The sensitivity of a weight W at b bits is |<dL/dW, W - Q_b(W)>|; the program minimises the sum over layers. With two
widths, raising a player is worth the difference of its sensitivities, and the program is a knapsack.

Source: Li et al., LLM-MQ: Mixed-precision Quantization for Efficient LLM Deployment, 2023. Their layers are linear
layers. Where players are blocks, the absolute value can be taken of each linear layer or of their sum: both are here.
Where players are linear layers, both are the same.
"""

import numpy as np

from coopq.baselines import Gains
from coopq.probe import Probe
from coopq.types import Width


def first_order_changes(probe: Probe) -> dict[Width, list[list[float]]]:
    """<dL/dW, W - Q_b(W)> by width, player and linear layer, nats per token."""
    changes: dict[Width, list[list[float]]] = {bits: [[] for _ in probe.players] for bits in (probe.low, probe.high)}
    for player, gradients in probe.gradients():
        weights = probe.weights(player)
        for bits, of_players in changes.items():
            quantized = probe.quantized(player, bits)
            of_players[player] = [
                float((gradient.double() * (weights[name] - quantized[name]).to(gradient.device).double()).sum())
                for name, gradient in gradients.items()
            ]
    return changes


def gains_by_layer(probe: Probe) -> Gains:
    """The sensitivity of a player is the sum of its linear layers' sensitivities."""
    changes = first_order_changes(probe)
    low, high = (np.array([np.abs(of).sum() for of in changes[bits]]) for bits in (probe.low, probe.high))
    return low - high


def gains_by_block(probe: Probe) -> Gains:
    """The sensitivity of a player is the absolute value of its linear layers' summed changes."""
    changes = first_order_changes(probe)
    low, high = (np.array([abs(sum(of)) for of in changes[bits]]) for bits in (probe.low, probe.high))
    return low - high
