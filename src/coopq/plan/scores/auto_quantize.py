"""AutoQuantize: scores of the error that quantization makes in outputs.

Source: NVIDIA TensorRT Model Optimizer, `modelopt.torch.quantization.auto_quantize`. The method "gradient" sums
(dL/dY)^2 (Y_b - Y)^2 over the outputs Y of each linear layer: a diagonal Fisher approximation of the effect on the
loss. The method "kl_div" is the KL divergence of the model's predictions from full precision if one layer alone is
quantized. The program minimizes the sum of scores under the budget, here for both methods; Model Optimizer allocates by
a threshold for "kl_div". A block has the sum of its layers' gradient scores, and a divergence of its own.
"""

from coopq.game.sensitivity import Sensitivity
from coopq.plan.scores import Gains


def gains_by_gradient(sensitivity: Sensitivity) -> Gains:
    """Decrease of the weighted output error from the low to the high width."""
    low, high = sensitivity.output_errors().sum(axis=2)
    gains: Gains = low - high
    return gains


def gains_by_divergence(sensitivity: Sensitivity) -> Gains:
    """Decrease of the KL divergence from full precision from the low to the high width."""
    low, high = sensitivity.divergences()
    gains: Gains = low - high
    return gains
