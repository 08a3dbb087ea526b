"""HAWQ-V2: the average trace of a layer's Hessian times the layer's squared quantization error.

Source: Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, 2020 (arXiv 1911.03852):
Omega_i(b) = Tr(H_i) / n_i ||Q_b(W_i) - W_i||^2, and the program minimizes the sum over layers. Traces are Hutchinson
estimates, as in the paper, from eight draws, but by central differences of gradients instead of a second backward. The
paper's layers are linear layers; a block has the sum of its linear layers.
"""

import numpy as np

from coopq.game.sensitivity import Sensitivity
from coopq.model.matrices import in_float64
from coopq.plan.scores import Gains

_N_SAMPLES = 8
_SEED = 0


def gains(sensitivity: Sensitivity) -> Gains:
    """Decrease of Omega from the low to the high width."""
    traces = sensitivity.traces(_N_SAMPLES, _SEED)
    omega = np.zeros((2, len(sensitivity.players)))
    for player in range(len(sensitivity.players)):
        weights = sensitivity.weights(player)
        for row, bits in enumerate((sensitivity.low, sensitivity.high)):
            for name, quantized in sensitivity.quantized(player, bits).items():
                error = float(in_float64(quantized - weights[name]).square().sum())
                omega[row, player] += traces[name] / weights[name].numel() * error
    return omega[0] - omega[1]
