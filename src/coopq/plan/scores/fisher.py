"""Empirical Fisher: the loss to second order from per-sequence gradients, all pairs of players at once.

With u_is = <g_s, Q(W_i) - W_i> for sequence s, the loss changes by mean_s sum_i u_is + T/2 mean_s (sum_i u_is)^2. The
second term is the quadratic form of the empirical Fisher matrix, which stands for the Hessian: the gradient of a
sequence is that of the mean over its T scored tokens, and were tokens independent, T of its squares would be theirs.

Source: its diagonal is what Fisher-weighted quantization uses, as Kim et al., SqueezeLLM, 2023 (arXiv 2306.07629); all
pairs as in Singh and Alistarh, WoodFisher, 2020, between players instead of weights.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from coopq.game.sensitivity import Probe


def terms(probes: Sequence[Probe]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Linear and pair terms of steps down, shapes (n_steps,) and (n_steps, n_steps), nats per token.

    Args:
        probes: One for each pair of neighbouring widths, the highest first.
    """
    changes = [probe.sequence_changes() for probe in probes]
    base = changes[0][1].sum(axis=0)
    lowering = np.stack([low - high for low, high in changes], axis=1).reshape(-1, len(base))
    linear = lowering.mean(axis=1) + probes[0].scored_tokens * lowering @ base / len(base)
    return linear, probes[0].scored_tokens / 2 * lowering @ lowering.T / len(base)
