"""Empirical Fisher: the loss to second order from per-sequence gradients, all pairs of players at once.

With u_is = <g_s, Q(W_i) - W_i> for sequence s, the loss changes by mean_s sum_i u_is + T/2 mean_s (sum_i u_is)^2. The
second term is the quadratic form of the empirical Fisher matrix, which stands for the Hessian: the gradient of a
sequence is that of the mean over its T scored tokens, and were tokens independent, T of its squares would be theirs.

Source: its diagonal is what Fisher-weighted quantization uses, as Kim et al., SqueezeLLM, 2023 (arXiv 2306.07629); all
pairs as in Singh and Alistarh, WoodFisher, 2020, between players instead of weights.
"""

import numpy as np
import numpy.typing as npt

from coopq.probe import Probe


def terms(probe: Probe) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Linear and pair terms of lowering players, shapes (n_players,) and (n_players, n_players), nats per token."""
    low, high = probe.sequence_changes()
    lowering, base = low - high, high.sum(axis=0)
    n_sequences = low.shape[1]
    linear = lowering.mean(axis=1) + probe.scored_tokens * lowering @ base / n_sequences
    return linear, probe.scored_tokens / 2 * lowering @ lowering.T / n_sequences
