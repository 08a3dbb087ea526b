"""AutoQuantize: scores of the error that quantization makes in outputs.

Source: NVIDIA TensorRT Model Optimizer, `modelopt.torch.quantization.auto_quantize`. The method "gradient" sums
(dL/dY)^2 (Y_b - Y)^2 over the outputs Y of each linear layer: a diagonal Fisher approximation of the effect on the
loss. The method "kl_div" is the KL divergence of the model's predictions from full precision if one layer alone is
quantized. The program minimizes the sum of scores under the budget, here for both methods; Model Optimizer allocates by
a threshold for "kl_div". A block has the sum of its layers' gradient scores, and a divergence of its own. Embeddings,
heads and experts in one tensor have gradient scores here too; see `coopq.plan.scores.output_errors`.
"""

from collections.abc import Sequence

import numpy as np

from coopq.game.sensitivity import Sensitivity
from coopq.plan.scores import Gains
from coopq.plan.scores.output_errors import output_errors


def gains_by_gradient(sensitivities: Sequence[Sensitivity]) -> Gains:
    """Decrease of the weighted output error by not taking each step, shape (n_players, n_pairs of widths).

    Args:
        sensitivities: One for each pair of neighbouring widths, the highest first; all are computed in one pass.
    """
    widths = [sensitivities[0].high, *(sensitivity.low for sensitivity in sensitivities)]
    gains: Gains = np.diff(output_errors(sensitivities[0], widths), axis=0).T
    return gains


def gains_by_divergence(sensitivity: Sensitivity) -> Gains:
    """Decrease of the KL divergence from full precision from the low to the high width."""
    low, high = sensitivity.divergences()
    gains: Gains = low - high
    return gains
