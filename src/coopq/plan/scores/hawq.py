"""HAWQ-V2: the average trace of a layer's Hessian times its squared quantization error.

Source: Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, 2020 (arXiv 1911.03852):
Omega_i(b) = Tr(H_i) / n_i ||Q_b(W_i) - W_i||^2, and the program minimises its sum over layers. Traces are Hutchinson
estimates, as there, of eight draws, by central differences of gradients instead of a second backward. Their layers are
linear layers, so that a block has the sum of its own.
"""

import numpy as np

from coopq.plan.scores import Gains
from coopq.game.sensitivity import Probe

_N_SAMPLES = 8
_SEED = 0


def gains(probe: Probe) -> Gains:
    """How much Omega falls when a player is raised."""
    traces = probe.traces(_N_SAMPLES, _SEED)
    omega = np.zeros((2, len(probe.players)))
    for player in range(len(probe.players)):
        weights = probe.weights(player)
        for row, bits in enumerate((probe.low, probe.high)):
            for name, quantized in probe.quantized(player, bits).items():
                error = float((quantized - weights[name]).double().square().sum())
                omega[row, player] += traces[name] / weights[name].numel() * error
    return omega[0] - omega[1]
