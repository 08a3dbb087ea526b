"""AutoQuantize: scores in the space of outputs, by gradients or directly.

Source: NVIDIA TensorRT Model Optimizer, `modelopt.torch.quantization.auto_quantize`. Its method "gradient" sums
(dL/dY)^2 (Y_b - Y)^2 over the outputs Y of each linear layer, a diagonal Fisher approximation of what their error does
to the loss; "kl_div" is the divergence of the model's predictions, with that layer alone quantized, from those of full
precision. The program minimises the sum of scores under the budget, here for both; Model Optimizer allocates by a
threshold for the second. A block has the sum of its layers' gradient scores, and a divergence of its own.
"""

from coopq.plan.scores import Gains
from coopq.game.sensitivity import Probe


def gains_by_gradient(probe: Probe) -> Gains:
    """How much the weighted error of outputs falls when a player is raised."""
    low, high = probe.output_errors().sum(axis=2)
    gains: Gains = low - high
    return gains


def gains_by_divergence(probe: Probe) -> Gains:
    """How much the divergence from full precision falls when a player is raised."""
    low, high = probe.divergences()
    gains: Gains = low - high
    return gains
